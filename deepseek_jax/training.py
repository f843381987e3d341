"""The train step: a pure function of state and batch (V3 report, sections 2.2 and 4.2)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import Run
from deepseek_jax.fp8 import is_quantized, quantize_weights, with_targets
from deepseek_jax.layers import RoutingBias
from deepseek_jax.linear import DTYPES
from deepseek_jax.loss import cross_entropy
from deepseek_jax.model import Model, ready, with_load
from deepseek_jax.mtp import ahead, valid_positions
from deepseek_jax.optimizer import adamw
from sharding.placement import (
    Scheme,
    at_rest,
    on_several_devices,
    store_shardings,
    stored,
    under_mesh,
)

Tree = Any  # nested dicts of arrays, keyed by module and parameter name


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on, as arrays; no module class takes part in a checkpoint."""

    params: Tree  # FP32 masters
    biases: Tree  # routing biases, FP32
    first: Tree  # AdamW moments, in the dtype that the precision names
    second: Tree
    ema: Tree | None  # moving average of params
    step: jax.Array  # int32: steps done, skipped ones included
    tokens: jax.Array  # uint32 [2]: tokens seen, low and high word
    skipped: jax.Array  # int32: steps without an update because something was not finite
    skipped_in_row: jax.Array  # int32


def new_model(run: Run, *, seed: int) -> Model:
    return Model(run.config, precision=run.precision, rngs=nnx.Rngs(seed))


def split(model: Model) -> tuple[Tree, Tree]:
    """A model's parameters and routing biases as nested dicts of arrays."""
    params, biases = nnx.state(model, nnx.Param), nnx.state(model, RoutingBias)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(biases)


def join(run: Run, params: Tree, biases: Tree) -> Model:
    """The model of a run around given parameters and biases."""
    graphdef, *_ = nnx.split(nnx.eval_shape(lambda: new_model(run, seed=0)), nnx.Param, RoutingBias)
    return nnx.merge(graphdef, nnx.State(params), nnx.State(biases))


def init_state(run: Run, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """The state before the first step; with a mesh, made directly in its shards."""
    return make_init(run, mesh)()


def make_init(run: Run, mesh: jax.sharding.Mesh | None = None) -> Callable[[], TrainState]:
    """The jitted program that makes the state before the first step."""
    init = under_mesh(lambda: _init(run), mesh)
    return jax.jit(init, out_shardings=None if mesh is None else state_shardings(run, mesh))


def abstract_state(run: Run) -> TrainState:
    """Shapes and dtypes of the state, without memory."""
    return jax.eval_shape(lambda: _init(run))


def state_shardings(run: Run, mesh: jax.sharding.Mesh) -> TrainState:
    """Where each array of the state lies on the mesh: the store table; scalars everywhere."""
    state = abstract_state(run)
    named = lambda tree: store_shardings(tree, mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return TrainState(
        params=named(state.params),
        biases=named(state.biases),
        first=named(state.first),
        second=named(state.second),
        ema=named(state.ema),
        step=whole,
        tokens=whole,
        skipped=whole,
        skipped_in_row=whole,
    )


def _init(run: Run) -> TrainState:
    params, biases = split(new_model(run, seed=run.seed))
    moment = lambda p: jnp.zeros(p.shape, DTYPES[run.precision.moments])
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        biases=biases,
        first=jax.tree.map(moment, params),
        second=jax.tree.map(moment, params),
        ema=jax.tree.map(jnp.copy, params) if run.ema_decay is not None else None,
        step=zero(),
        tokens=jnp.zeros((2,), jnp.uint32),
        skipped=zero(),
        skipped_in_row=zero(),
    )


def loss_and_aux(
    model: Model,
    tokens_BS: jax.Array,
    segments_BS: jax.Array | None = None,
    *,
    mtp_weight: jax.Array | float,
    sequence_loss_weight: float,
    remat: str = "none",
) -> tuple[jax.Array, dict[str, Any]]:
    """L = L_main + lambda mean_k L_MTP^k + alpha L_sequence of one micro-batch, FP32.

    `tokens_BS` has S = T + 1 tokens. L_MTP^k sums over the T - k positions that have a target and
    divides by T (V3 eq. 24).

    Returns:
      The total, and a dict of loss, mtp_loss, sequence_loss, expert_counts_LE, lost.
    """
    model = ready(model)
    inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    segments_BT = None if segments_BS is None else segments_BS[:, :-1]
    B, T = inputs_BT.shape
    mean = jnp.full((B, T), 1.0 / (B * T), jnp.float32)
    head_VD = model.head_VD[...]

    hidden_BTD, aux = model.hidden(inputs_BT, segments_BT=segments_BT, remat=remat)
    loss = cross_entropy(hidden_BTD, head_VD, targets_BT, mean)
    mtp_loss = jnp.zeros(())
    if model.config.num_mtp:
        depths, load = model.predict_ahead(
            hidden_BTD, tokens_BS, segments_BT=segments_BT, remat=remat
        )
        aux = with_load(aux, load)
        for k, ahead_BTD in enumerate(depths, start=1):
            weight_BT = jnp.where(valid_positions(inputs_BT, k), mean, 0.0)
            target_BT = ahead(tokens_BS, k + 1, T)
            depth_loss = cross_entropy(ahead_BTD, head_VD, target_BT, weight_BT)
            mtp_loss = mtp_loss + depth_loss / model.config.num_mtp
    total = loss + mtp_weight * mtp_loss + sequence_loss_weight * aux.sequence_loss
    return total, {
        "loss": loss,
        "mtp_loss": mtp_loss,
        "sequence_loss": aux.sequence_loss,
        "expert_counts_LE": aux.expert_counts_LE,
        "lost": aux.lost,
    }


def make_train_step(
    run: Run, mesh: jax.sharding.Mesh | None = None, scheme: Scheme | None = None
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step; the state it is given is donated.

    Its batch is {"tokens": int32 [accumulation, B, T + 1], "segments": the same, optional}.
    """
    if run.precision.combine != "bf16" and (mesh is None or mesh.shape["expert"] == 1):
        raise ValueError(
            f"combine={run.precision.combine!r} is a format for results that go to other devices: "
            "it needs an expert axis above 1"
        )
    step = under_mesh(lambda state, batch: train_step(run, state, batch), mesh, scheme)
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = state_shardings(run, mesh)
    # Metrics are whole everywhere, so that every host can read them.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(
        step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, whole)
    )


def train_step(
    run: Run, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from the mean gradient over the micro-batches of `batch`.

    A step whose loss or gradient is not finite changes neither parameters, moments nor biases and
    is counted. One in which dispatch had no room for `lost` choices changes nothing at all and is
    to be done again with more room. Metrics are device scalars, but for expert_counts_LE.
    """
    tokens = tokens_as_float(state.tokens)
    mtp_weight = run.mtp_weight.at(tokens, jnp)
    gradients, sums = accumulate(run, state, batch, mtp_weight)
    norms = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)]
    norm = jnp.sqrt(sum(norms))
    bad = jnp.stack([~jnp.isfinite(n) for n in norms])
    finite = jnp.isfinite(sums["total_loss"]) & jnp.isfinite(norm)

    learning_rate, gamma = run.learning_rate.at(tokens, jnp), run.gamma.at(tokens, jnp)
    params, first, second = adamw(
        state.params,
        gradients,
        state.first,
        state.second,
        count=state.step - state.skipped,
        learning_rate=learning_rate,
        norm=norm,
        settings=run.optimizer,
    )
    updated = replace(
        state,
        params=params,
        first=first,
        second=second,
        biases=update_biases(state.biases, sums["expert_counts_LE"], gamma),
        ema=average(run, state.ema, params),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )
    skipped = replace(
        state, skipped=state.skipped + 1, skipped_in_row=state.skipped_in_row + 1
    )
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, skipped)
    sequences, length = batch["tokens"].shape[0] * batch["tokens"].shape[1], run.seq_len
    chosen = replace(
        chosen, step=state.step + 1, tokens=add_tokens(state.tokens, sequences * length)
    )
    complete = sums["lost"] == 0
    chosen = jax.tree.map(lambda new, old: jnp.where(complete, new, old), chosen, state)
    metrics = {
        **sums,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "gamma": gamma,
        "mtp_weight": mtp_weight,
        "tokens": tokens_as_float(chosen.tokens),
        "skipped": chosen.skipped,
        "skipped_in_row": chosen.skipped_in_row,
        "bad_tensor": jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32),
    }
    return chosen, metrics


def accumulate(
    run: Run, state: TrainState, batch: dict[str, jax.Array], mtp_weight: jax.Array
) -> tuple[Tree, dict[str, jax.Array]]:
    """FP32 gradients and losses averaged over the micro-batches; expert counts are summed.

    In FP8 weights are quantised once, before the micro-batches, and the products that make their
    gradients add them to the sums.
    """
    weights = state.params
    if run.precision.matmul == "fp8":
        weights = quantize_weights(weights, run.precision.implementation)
    tokens, segments = batch["tokens"], batch.get("segments")
    count = tokens.shape[0]
    # Where devices share a weight its gradient is a sum over them, to which nothing may be added
    # on each of them.
    fused = count > 1 and not on_several_devices()

    def micro(targets, tokens_BS, segments_BS):
        model = join(run, with_targets(weights, targets, accumulate=fused), state.biases)
        total, parts = loss_and_aux(
            model,
            tokens_BS,
            segments_BS,
            mtp_weight=mtp_weight,
            sequence_loss_weight=run.sequence_loss_weight,
            remat=run.remat,
        )
        return total, {"total_loss": total, **parts}

    # Two trees of one structure, in which a quantised weight is a leaf.
    each = functools.partial(jax.tree.map, is_leaf=is_quantized)
    # Nothing reads the master of a quantised weight, so it stays where it is stored.
    masters = each(lambda weight, stored, rest: stored if is_quantized(weight) else rest,
                   weights, state.params, at_rest(state.params))
    gradient = jax.grad(micro, has_aux=True)

    def one(targets, tokens_BS, segments_BS):
        gradients, parts = gradient(targets, tokens_BS, segments_BS)
        return stored(gradients), parts

    if count == 1:
        return one(masters, tokens[0], None if segments is None else segments[0])

    def add(sums, inputs):
        so_far, parts = sums
        added = each(lambda weight: fused and is_quantized(weight), weights)
        targets = each(lambda done, sum_, p: sum_ if done else p, added, so_far, masters)
        gradients, more = one(targets, *inputs)
        gradients = each(lambda done, sum_, g: g if done else sum_ + g, added, so_far, gradients)
        return (gradients, jax.tree.map(jnp.add, parts, more)), None

    shapes = jax.eval_shape(one, masters, tokens[0], None if segments is None else segments[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (gradients, parts), _ = jax.lax.scan(add, zeros, (tokens, segments))
    mean = lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x / count
    return jax.tree.map(mean, gradients), jax.tree.map(mean, parts)


def update_biases(biases: Tree, counts_LE: jax.Array, gamma: jax.Array) -> Tree:
    """b += gamma sign(mean load - load) per layer: up where too few came, down where too many.

    Counts cover the whole batch of the step, MoE layers in order, MTP's last.
    """
    counts = counts_LE.astype(jnp.float32)
    change_LE = gamma * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)
    leaves, treedef = jax.tree.flatten(biases)  # moe before mtp, as in counts_LE
    begin, updated = 0, []
    for bias_LE in leaves:
        updated.append(bias_LE + change_LE[begin : begin + bias_LE.shape[0]])
        begin += bias_LE.shape[0]
    return jax.tree.unflatten(treedef, updated)


def average(run: Run, ema: Tree | None, params: Tree) -> Tree | None:
    """decay * ema + (1 - decay) * params."""
    if ema is None:
        return None
    decay = run.ema_decay
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)


def tokens_as_float(words: jax.Array) -> jax.Array:
    """A token count of two uint32 words as FP32 (exact to one part in 2^24)."""
    return words[0].astype(jnp.float32) + words[1].astype(jnp.float32) * 2.0**32


def add_tokens(words: jax.Array, count: int) -> jax.Array:
    """The two-word count plus `count` tokens, exactly: 14.8 T tokens do not fit 32 bits."""
    low = words[0] + jnp.uint32(count % 2**32)
    carry = (low < words[0]).astype(jnp.uint32)
    return jnp.stack((low, words[1] + carry + jnp.uint32(count // 2**32)))


def tokens_seen(state: TrainState) -> int:
    """The exact token count as a Python integer."""
    low, high = (int(word) for word in jax.device_get(state.tokens))
    return low + (high << 32)


def parameter_names(params: Tree) -> list[str]:
    """Dotted names in the order of metrics["bad_tensor"]."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


