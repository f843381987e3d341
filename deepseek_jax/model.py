"""DeepSeek-V3: embedding, dense and MoE blocks, final norm, head, multi-token prediction."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from deepseek_jax import mtp as mtp_modules
from deepseek_jax.block import Block, checkpointed, run_stack, stack
from deepseek_jax.config import ModelConfig, Precision
from deepseek_jax.fp8 import is_quantized, quantize_weights
from deepseek_jax.layers import embed, normal, ones, rms_norm
from deepseek_jax.linear import DTYPES, einsum
from deepseek_jax.moe import Load, MoE, placed
from deepseek_jax.rope import positions, rotations
from deepseek_jax.stored import may_be_stored, store
from sharding import shard
from sharding.expert_copies import check_placement
from sharding.placement import current_mesh, current_scheme
from sharding.rules import is_router, letters_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aux:
    """What a forward pass returns beside logits. Counts cover the MoE layers in order, MTP last."""

    expert_counts_LE: Int[Array, "L E"]
    sequence_loss: Float[Array, ""]  # summed over MoE layers, without its weight alpha
    lost: Int[Array, ""]  # choices for which dispatch had no room; the pass is then void
    hidden_LBTD: Float[Array, "L B T D"] | None = None  # L + 1, the last after the final norm
    mtp_logits: tuple[Float[Array, "B t V"], ...] | None = None  # depth k: t = T - k positions
    latent_LBTY: Float[Array, "L B T Y"] | None = None  # what MLA caches of the tokens


class Model(nnx.Module):
    """The whole model; `model(tokens_BT)` is the head on `model.hidden(tokens_BT)`.

    Layers are stacked: every parameter of `dense`, `moe` and `mtp` has a leading dimension.
    """

    def __init__(
        self, config: ModelConfig, *, precision: str | Precision = "fp32", rngs: nnx.Rngs
    ):
        self.config = config
        self.precision = Precision.of(precision)
        self.embed_VD = normal(rngs, (config.vocab_size, config.model_dim), config)
        self.dense = stack(config, config.num_dense_layers, dense=True, rngs=rngs)
        self.moe = stack(config, config.num_moe_layers, dense=False, rngs=rngs)
        self.final_norm_D = ones(config.model_dim)
        self.head_VD = normal(rngs, (config.vocab_size, config.model_dim), config)
        self.mtp = mtp_modules.modules(config, rngs=rngs)
        for block in (self.dense, self.moe, self.mtp and self.mtp.block):
            if block is not None:
                block.residual = self.precision.residual
                if isinstance(block.ffn, MoE):
                    block.ffn.combine = self.precision.combine
        if self.precision.weights != "fp32":
            cast_weights(self, self.precision.weights)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        hidden: bool = False,
        mtp: bool = False,
    ) -> tuple[Float[Array, "B T V"], Aux]:
        """FP32 logits and auxiliary values.

        Args:
          segments_BT: attention stays among equal ids.
          hidden: also return every layer's hidden state.
          mtp: also return the logits of the MTP modules, and count their experts.
        """
        check_tokens(tokens_BT, self.config)
        self = ready(self)
        x_BTD, aux = self.hidden(tokens_BT, segments_BT=segments_BT, every_layer=hidden)
        mtp_logits = None
        if mtp:
            depths, load = self.predict_ahead(x_BTD, tokens_BT, segments_BT=segments_BT)
            T = tokens_BT.shape[1]
            mtp_logits = tuple(
                self.head(h_BTD[:, : max(T - k, 0)]) for k, h_BTD in enumerate(depths, start=1)
            )
            aux = with_load(aux, load)
        return self.head(x_BTD), replace(aux, mtp_logits=mtp_logits)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        every_layer: bool = False,
        latents: bool = False,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Hidden states after the final norm, in the precision of activations."""
        check_tokens(tokens_BT, self.config)
        self, config = ready(self), self.config
        x_BTD = embed(tokens_BT, self.embed_VD[...], self.dtype)
        turns = rotations(positions(tokens_BT.shape[1]), config)
        layers_LBTD, caches, loads = [x_BTD[None]], [], []

        def keep(output):
            return (
                output.x_BTD if every_layer else None,
                output.latent_BTY if latents else None,
                output.load,
            )

        for name, blocks in ("dense", self.dense), ("moe", self.moe):
            if blocks is None:
                continue
            with jax.named_scope(name):
                x_BTD, (xs_LBTD, cache_LBTY, load) = run_stack(
                    blocks, x_BTD, turns, keep=keep, remat=remat, segments_BT=segments_BT
                )
            layers_LBTD.append(xs_LBTD)
            caches.append(cache_LBTY)
            loads.append(load)
        x_BTD = rms_norm(x_BTD, self.final_norm_D[...], config.norm_eps)
        none = jnp.zeros((0, config.num_experts), jnp.int32), jnp.zeros(()), jnp.int32(0)
        aux = with_load(Aux(*none), loads[-1])
        if every_layer:
            layers_LBTD = jnp.concatenate(layers_LBTD)
            aux = replace(aux, hidden_LBTD=jnp.concatenate((layers_LBTD[:-1], x_BTD[None])))
        if latents:
            aux = replace(aux, latent_LBTY=jnp.concatenate(caches))
        return x_BTD, aux

    def predict_ahead(
        self,
        hidden_BTD: Float[Array, "B T D"],
        tokens_BS: Int[Array, "B S"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        remat: str = "none",
    ) -> tuple[list[Float[Array, "B T D"]], Load | None]:
        """Hidden states of every MTP depth, and their load stacked over depths.

        `tokens_BS` may be longer than T (in training by the last target). Depth k is meaningful
        at positions i < T - k; later ones see padding and do not count in the load.
        """
        self, T = ready(self), hidden_BTD.shape[1]
        turns = rotations(positions(T), self.config)
        outputs, loads = [], []

        def one_depth(module, hidden_BTD, embedded_BTD, valid_BT):
            return module(
                hidden_BTD, embedded_BTD, turns, segments_BT=segments_BT, valid_BT=valid_BT
            )

        for k in range(1, self.config.num_mtp + 1):
            module = jax.tree.map(lambda leaf, k=k: leaf[k - 1], self.mtp)
            embedded_BTD = embed(
                mtp_modules.ahead(tokens_BS, k, T), self.embed_VD[...], self.dtype
            )
            valid_BT = mtp_modules.valid_positions(tokens_BS[:, :T], k)
            hidden_BTD, load = checkpointed(one_depth, remat)(
                module, hidden_BTD, embedded_BTD, valid_BT
            )
            outputs.append(hidden_BTD)
            loads.append(load)
        return outputs, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loads) if loads else None

    def head(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """FP32 logits."""
        head_VD = self.head_VD[...].astype(hidden_BTD.dtype)
        return shard(einsum("BTD,VD->BTV", hidden_BTD, head_VD, jnp.float32), "BTV")

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """The dtype of activations."""
        return DTYPES[self.precision.activations]


def check_tokens(tokens_BT: jax.Array, config: ModelConfig) -> None:
    """Refuses tokens that a model of these sizes cannot read. Under jit their values are unknown.

    Raises:
      ValueError: they are not integers [B, T], more than the model's positions, or outside its
        vocabulary.
    """
    if not isinstance(tokens_BT, jax.Array | np.ndarray):
        raise ValueError(f"tokens must be an array, not a {type(tokens_BT).__name__}")
    shape, dtype = tokens_BT.shape, tokens_BT.dtype
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens of shape {shape} and dtype {dtype} must be integers [B, T]")
    if shape[1] > config.max_length:
        raise ValueError(
            f"{shape[1]} tokens exceed max_length={config.max_length}: cut the text, or make a "
            "configuration with more positions"
        )
    known = not isinstance(tokens_BT, jax.core.Tracer)
    if not known or isinstance(tokens_BT, jax.Array) and not tokens_BT.is_fully_addressable:
        return
    ids_BT = np.asarray(tokens_BT)
    outside = ids_BT[(ids_BT < 0) | (ids_BT >= config.vocab_size)]
    if outside.size:
        raise ValueError(f"token {outside[0]} is outside 0..{config.vocab_size - 1}")


def ready(model: Model) -> Model:
    """The model with its weights as products read them, made once for all that follow.

    In FP8 they are quantised; with a placement, those of experts are brought to their places. Their
    gradients flow to the weights as they were.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    weights = nnx.to_pure_dict(params)
    done = any(map(is_quantized, jax.tree.leaves(weights, is_leaf=is_quantized)))
    if model.precision.matmul == "fp8" and not done:
        weights = quantize_weights(weights, model.precision.implementation)
        model = nnx.merge(graphdef, nnx.State(weights), rest)
    table, stacks = current_scheme().placement, with_experts(model)
    if table is None or not stacks or stacks[0].ffn.place_EJ is not None:
        return model
    return with_placement(model, np.asarray(table, np.int32))


def with_experts(model: Model) -> list[Block]:
    """The stacks of blocks that have experts, in the order of expert counts."""
    blocks = (model.moe, model.mtp and model.mtp.block)
    return [block for block in blocks if block is not None and isinstance(block.ffn, MoE)]


def with_placement(model: Model, expert_LP: np.ndarray) -> Model:
    """A copy of the model whose experts lie where the table of all layers says."""
    config, mesh = model.config, current_mesh()
    sizes = [config.num_moe_layers, config.num_mtp]
    check_placement(
        expert_LP,
        layers=sum(sizes),
        experts=config.num_experts,
        devices=1 if mesh is None else mesh.shape["expert"],
    )
    model = nnx.merge(*nnx.split(model))
    tables = np.split(expert_LP, sizes[:1])
    for block, table in zip(with_experts(model), tables, strict=False):
        placed(block.ffn, table)
    return model


def cast_weights(model: Model, format: str) -> None:
    """Converts parameters, but neither routing biases nor routers, which stay FP32.

    In FP8 only the matrices that released checkpoints have in FP8, the others in BF16.
    """
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = path[-1]
        if format == "fp8" and may_be_stored(name):
            param.set_value(store(param[...], letters_of(name), model.dtype))
        elif not is_router(name):
            param.set_value(param[...].astype(DTYPES["bf16" if format == "fp8" else format]))


def with_load(aux: Aux, load: Load | None) -> Aux:
    """`aux` with the load of further layers, stacked on L, added at the end."""
    if load is None:
        return aux
    return replace(
        aux,
        expert_counts_LE=jnp.concatenate((aux.expert_counts_LE, load.counts_E)),
        sequence_loss=aux.sequence_loss + jnp.sum(load.sequence_loss),
        lost=aux.lost + jnp.sum(load.lost),
    )
