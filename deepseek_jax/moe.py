"""DeepSeekMoE: the router with its three balance mechanisms, shared and routed experts.

V3 report eqs. 12-20; V2's softmax routers. No token is ever dropped.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax import experts_in_place, few_rows, fp8
from deepseek_jax.config import ModelConfig, Score
from deepseek_jax.experts import expert_ffn, results_format, to_rows
from deepseek_jax.layers import FeedForward, RoutingBias, normal
from deepseek_jax.linear import Activation
from pallas_kernels.mosaic import target
from sharding import local
from sharding.exchange import expert_device
from sharding.expert_copies import copy_weights, deal, places_of
from sharding.expert_parallel import dispatch_choices, plan_path
from sharding.placement import is_split, on_several_devices


class Load(NamedTuple):
    """What balancing needs to know of a layer."""

    counts_E: jax.Array  # int32: tokens that chose each expert, over the whole batch
    sequence_loss: jax.Array  # FP32 scalar, without its weight alpha
    lost: jax.Array  # int32: choices for which dispatch had no room; the step is then void


class Places(nnx.Variable):
    """Where each expert's copies are: static tables that no gradient reaches."""


class MoE(nnx.Module):
    """Shared experts for every token, K of E routed experts chosen by the router."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.combine = "bf16"  # a value of config.Combine; the model says which
        self.place_EJ = nnx.data(None)  # with a placement, E of the weights counts places
        D, E, F = config.model_dim, config.num_experts, config.expert_ffn_dim
        self.router_ED = normal(rngs, (E, D), config)
        if config.has_routing_bias:
            self.bias_E = RoutingBias(jnp.zeros((E,), jnp.float32))
        self.w_gate_EFD = normal(rngs, (E, F, D), config)
        self.w_up_EFD = normal(rngs, (E, F, D), config)
        self.w_down_EDF = normal(rngs, (E, D, F), config)
        if config.num_shared_experts:
            self.shared = FeedForward(config, config.shared_ffn_dim, rngs=rngs)

    def __call__(
        self,
        x_BTD: Activation,
        valid_BT: Bool[Array, "B T"] | None = None,
        *,
        decoding: bool = False,
    ) -> tuple[Float[Array, "B T D"], Load]:
        """Returns the output and the load. Tokens that are not valid do not count in the load.

        In decoding, the experts of few tokens are read where they lie.
        """
        config = self.config
        score_BTE = scores(x_BTD, self.router_ED[...], config)
        bias_E = self.bias_E[...] if config.has_routing_bias else None
        expert_BTK, weight_BTK = route(score_BTE, bias_E, config)
        weights = (self.w_gate_EFD[...], self.w_up_EFD[...], self.w_down_EDF[...])
        shared = self.shared.weights if config.num_shared_experts else None
        few = decoding and isinstance(x_BTD, few_rows.Scaled)
        at_once = few and self.place_EJ is None and shared is not None
        if at_once and experts_in_place.reads_shared(x_BTD, expert_BTK.size, weights, shared):
            with jax.named_scope("experts"):
                x_1D = jax.tree.map(lambda leaf: leaf[0], x_BTD)
                choices = expert_BTK[0, 0], weight_BTK[0, 0]
                y_BTD = experts_in_place.ffn_with_shared(x_1D, *choices, weights, shared)[None]
            lost = jnp.int32(0)
        else:
            y_BTD, lost = self.routed(x_BTD, expert_BTK, weight_BTK, weights, decoding)
            if shared is not None:
                with jax.named_scope("shared"):
                    y_BTD = y_BTD + self.shared(x_BTD)
        load = Load(
            expert_counts(expert_BTK, config.num_experts, valid_BT),
            sequence_loss(score_BTE, config, valid_BT),
            lost,
        )
        return y_BTD, load

    def routed(
        self, x_BTD: Activation, expert_BTK, weight_BTK, weights, decoding: bool
    ) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
        """What the chosen experts give, and the choices that found no room."""
        experts = functools.partial(
            run_experts,
            num_places=weights[2].shape[0],
            exchanged=is_split(expert_BTK, "BTK", "expert"),
            combine=self.combine,
            decoding=decoding,
        )
        signature, operands = "BTD,BTK,BTK,EFD,EFD,EDF", (x_BTD, expert_BTK, weight_BTK, *weights)
        if self.place_EJ is not None:
            # Every device needs the whole table, so its E is none that a mesh axis splits.
            signature, operands = f"{signature},_J", (*operands, self.place_EJ[...])
        return fp8.on_shards(experts, f"{signature}->BTD,", *operands)


# What a score makes of logits, all of them positive (`sequence_loss`). What else hangs on it is in
# ModelConfig, the routing bias and how many experts speak for a group, and in huggingface_config,
# the model type.
SCORES: dict[Score, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
}


@jax.named_scope("router")
def scores(x_BTD, router_ED, config: ModelConfig) -> Float[Array, "B T E"]:
    """Affinity of each token to each expert, FP32 throughout."""
    product = functools.partial(jnp.einsum, "BTD,ED->BTE", precision=jax.lax.Precision.HIGHEST)
    if isinstance(x_BTD, few_rows.Scaled):
        logits_BTE = few_rows.sums("BTD,ED->BTE", x_BTD, router_ED)
    else:
        logits_BTE = local(product, "BTD,ED->BTE", whole="E")(
            fp8.values(x_BTD).astype(jnp.float32), router_ED.astype(jnp.float32)
        )
    return SCORES[config.score](logits_BTE)


@jax.named_scope("router")
def route(
    score_BTE: Float[Array, "B T E"], bias_E: Float[Array, " E"] | None, config: ModelConfig
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
    """The K experts of each token and their weights.

    The bias decides who is chosen and never enters a weight. Rejected groups are -inf, not 0:
    biased scores can be negative.
    """
    biased_BTE = jax.lax.stop_gradient(score_BTE)
    if bias_E is not None:
        biased_BTE = biased_BTE + jax.lax.stop_gradient(bias_E)[None, None, :]
    if config.groups_per_token < config.num_groups:
        biased_BTE = limit_groups(biased_BTE, config)
    best = few_rows.best if few_rows.are_few(biased_BTE) else best_of
    expert_BTK, weight_BTK = best(biased_BTE, score_BTE, config.experts_per_token)
    if config.normalize_weights:
        total_BT1 = sum(weight_BTK[..., k : k + 1] for k in range(config.experts_per_token))
        weight_BTK = weight_BTK / (total_BT1 + 1e-20)
    return expert_BTK, weight_BTK * config.route_scale


def best_of(biased_BTE, score_BTE, k: int) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
    """The k experts whose biased scores are the largest, and their scores."""
    expert_BTK = checkpoint_name(largest(biased_BTE, k), "route")
    take = functools.partial(jnp.take_along_axis, axis=-1)
    return expert_BTK, local(take, "BTE,BTK->BTK", whole="E")(score_BTE, expert_BTK)


def largest(score_BTE: Float[Array, "B T E"], k: int) -> Int[Array, "B T K"]:
    """The k experts of the largest scores of each token, by its own device.

    Left to itself, XLA gathers the scores of all tokens before it sorts them.
    """
    ids = local(lambda score_BTE: jax.lax.top_k(score_BTE, k)[1], "BTE->BTK", whole="E")
    return ids(jax.lax.stop_gradient(score_BTE))


def limit_groups(biased_BTE: Float[Array, "B T E"], config: ModelConfig) -> jax.Array:
    """-inf outside the best groups (node-limited routing, ISCA section 4.3).

    A group counts by the sum of its two best biased scores in V3, by its best score in V2.
    """
    G = config.num_groups
    grouped = biased_BTE.reshape(*biased_BTE.shape[:-1], G, config.experts_per_group)
    # Without reductions, each of which would be a kernel of its own: experts and groups are few.
    best, second = grouped[..., 0], jnp.full_like(grouped[..., 0], -jnp.inf)
    for e in range(1, config.experts_per_group):
        second = jnp.maximum(second, jnp.minimum(best, grouped[..., e]))
        best = jnp.maximum(best, grouped[..., e])
    group_BTG = best + second if config.best_per_group == 2 else best
    ids_G = jnp.arange(G, dtype=jnp.int32)[None, None, :]
    ahead_BTG = jnp.zeros(group_BTG.shape, jnp.int32)
    for g in range(G):
        other = group_BTG[..., g : g + 1]
        wins = (other > group_BTG) | ((other == group_BTG) & (g < ids_G))
        ahead_BTG = ahead_BTG + wins.astype(jnp.int32)
    kept_BTG = ahead_BTG < config.groups_per_token
    return jnp.where(kept_BTG[..., None], grouped, -jnp.inf).reshape(biased_BTE.shape)


def chosen(expert_BTK: Int[Array, "B T K"], num_experts: int) -> Bool[Array, "B T E"]:
    """True where a token chose an expert (or, likewise, a group)."""
    ids_E = jnp.arange(num_experts, dtype=expert_BTK.dtype)
    return jnp.any(expert_BTK[..., None] == ids_E[None, None, None, :], axis=-2)


@jax.named_scope("balance")
def expert_counts(expert_BTK, num_experts: int, valid_BT) -> Int[Array, " E"]:
    """Tokens per expert over the whole (global) batch."""
    chosen_BTE = chosen(expert_BTK, num_experts)
    if valid_BT is not None:
        chosen_BTE = chosen_BTE & valid_BT[..., None]
    return jnp.sum(chosen_BTE, axis=(0, 1), dtype=jnp.int32)


@jax.named_scope("balance")
def sequence_loss(score_BTE, config: ModelConfig, valid_BT) -> Float[Array, ""]:
    """Mean over sequences of sum_i f_i P_i (V3 eqs. 17-20); 1 when load and scores are even.

    f_i = E / (K T) * tokens with expert i among their K best scores (no bias, no groups);
    P_i = mean over tokens of the share of expert i in the token's scores.
    """
    E, K = config.num_experts, config.experts_per_token
    best_BTK = largest(score_BTE, K)
    valid = jnp.ones(score_BTE.shape[:2]) if valid_BT is None else valid_BT.astype(jnp.float32)
    length_B = jnp.maximum(jnp.sum(valid, axis=1), 1.0)[:, None]
    counts_BE = jnp.sum(jnp.where(chosen(best_BTK, E), valid[..., None], 0.0), axis=1)
    share_BTE = score_BTE / jnp.sum(score_BTE, axis=-1, keepdims=True)
    P_BE = jnp.sum(share_BTE * valid[..., None], axis=1) / length_B
    f_BE = checkpoint_name(counts_BE * (E / K) / length_B, "route")
    return jnp.mean(jnp.sum(f_BE * P_BE, axis=-1))


@jax.named_scope("experts")
def run_experts(
    x_BTD,
    expert_BTK,
    weight_BTK,
    w_gate_EFD,
    w_up_EFD,
    w_down_EDF,
    place_EJ=None,
    *,
    num_places: int,
    exchanged: bool = True,
    combine: str = "bf16",
    decoding: bool = False,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """sum_k weight_k FFN_k(x) of each token of a device; the weights are of its own experts.

    Also returns the number of choices that found no room in the buffers of dispatch.

    Args:
      place_EJ: the places of each expert, if they are not the experts themselves in order.
      exchanged: whether devices with other experts have other tokens.
      combine: the format in which results go back to the devices of their tokens.
      decoding: whether few tokens read their experts where these lie; gradients want them sorted.
    """
    B, T, D = x_BTD.shape
    K, held = expert_BTK.shape[-1], w_gate_EFD.shape[0]
    quantized = fp8.is_quantized(w_down_EDF)
    if decoding and held == num_places and place_EJ is None and not quantized:
        if experts_in_place.suits(B * T, B * T * K, held):
            few = [leaf.reshape(B * T, K) for leaf in (expert_BTK, weight_BTK)]
            x_TD = jax.tree.map(lambda leaf: leaf.reshape(B * T, -1), x_BTD)
            y_TD = experts_in_place.ffn_in_place(x_TD, *few, (w_gate_EFD, w_up_EFD, w_down_EDF))
            return y_TD.reshape(B, T, D), 0 * expert_BTK[0, 0, 0]
    if isinstance(x_BTD, few_rows.Scaled):
        x_BTD = x_BTD.x
    alignment = fp8.TILE if quantized else row_alignment(B * T * K, num_places)
    place_TK = expert_BTK.reshape(B * T, K)
    if place_EJ is not None:
        # Where tokens are copies, all devices must choose alike.
        place_TK = deal(place_TK, place_EJ, first=expert_device() if exchanged else 0)
    path = plan_path(
        place_TK,
        num_places,
        alignment,
        held=held,
        exchanged=exchanged,
        results=results_format(combine),
    )
    path = path._replace(layouts=checkpoint_name(path.layouts, "route"))
    x_TD = jax.tree.map(lambda leaf: leaf.reshape(B * T, leaf.shape[-1]), x_BTD)
    x_MD = to_rows(x_TD, path)
    weight_M = dispatch_choices(weight_BTK.reshape(B * T, K), path)
    weights = (w_gate_EFD, w_up_EFD, w_down_EDF)
    y_TD = expert_ffn(x_MD, weight_M, weights, path, alignment)
    return y_TD.reshape(B, T, D), path.lost


def read_from_stack(moe: MoE, stacked: MoE, layer: Int[Array, ""], num_tokens: int) -> None:
    """Has few tokens read the experts of a layer in the stack of all layers, on a single CPU."""
    if not experts_in_place.are_blocks(num_tokens):
        return
    if moe.place_EJ is not None or on_several_devices():
        return
    for name in ("w_gate_EFD", "w_up_EFD", "w_down_EDF"):
        stack = getattr(stacked, name).get_value()
        # Weights that rest in FP8 are decoded by layer.
        if isinstance(stack, jax.Array):
            getattr(moe, name).set_value(experts_in_place.OfLayer(stack, layer))


def placed(moe: MoE, expert_LP: np.ndarray) -> None:
    """Brings the weights of stacked layers to the places of a placement, copies included."""
    params = (moe.w_gate_EFD, moe.w_up_EFD, moe.w_down_EDF)
    weights = copy_weights([param.get_value() for param in params], expert_LP)
    for param, weight in zip(params, weights, strict=True):
        param.set_value(weight)
    moe.place_EJ = Places(jnp.asarray(places_of(expert_LP, moe.config.num_experts)))


def row_alignment(num_rows: int, num_experts: int) -> int:
    """Rows in a block of one expert: what kernels want, and on CPU little padding to compute."""
    if target().platform != "cpu":
        return 128
    mean = num_rows // (4 * num_experts)
    return min(max(1 << mean.bit_length() >> 1, 1), 128)
