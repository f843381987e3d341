"""One step of decoding: prompts in chunks, then new tokens on the latent cache, drafted or not.

Pure functions of a state; its shapes, and so the programs, do not depend on how long texts are.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deepseek_jax.block import run_cached
from deepseek_jax.config import Precision
from deepseek_jax.drafting import Ahead, draft_tokens, next_ahead, read_ahead
from deepseek_jax.latent_cache import LatentCache
from deepseek_jax.layers import embed, rms_norm
from deepseek_jax.model import Model, ready
from deepseek_jax.rope import rotations
from deepseek_jax.sampling import Sampling, draw, verify
from pallas_kernels.mosaic import target
from sharding.rules import is_router, letters_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """The texts being written. All but the last known token of each have been read."""

    tokens_BS: Int[Array, "B S"]
    length_B: Int[Array, " B"]  # known tokens
    limit_B: Int[Array, " B"]  # length at which to stop
    done_B: jax.Array
    cache: LatentCache
    ahead: Ahead | None  # what drafting keeps
    key: jax.Array
    # Passes of the main model over new tokens, the same counted for each text that was not done,
    # drafted tokens that were kept: together, or each would take a kernel to count.
    counts_I: Int[Array, "3"]
    lost: Int[Array, ""]  # choices of experts for which dispatch had no room


def is_as_read(precision: Precision) -> bool:
    """Whether weights are stored as the products of decoding read them."""
    if precision.weights == "fp8" or precision.matmul == "fp32":
        return True
    return precision.weights == "bf16" and target().platform != "cpu"


def as_read(model: Model) -> Model:
    """The model with weights as products read them, made once for all steps.

    FP8 operands are quantised; masters become BF16. A CPU has no use for BF16: there the same
    numbers are widened, and everything else is FP32 too.
    """
    if model.precision.matmul != "bf16":
        return ready(model)
    on_cpu = target().platform == "cpu"
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def read(path, value):
        name = path[-1].key
        if len(letters_of(name)) > 1 and not is_router(name):
            # Not a cast, which compilers may leave out where another follows it.
            value = jax.lax.reduce_precision(value, 8, 7)
            value = value if on_cpu else value.astype(jnp.bfloat16)
        return value.astype(jnp.float32) if on_cpu else value

    weights = jax.tree_util.tree_map_with_path(read, nnx.to_pure_dict(params))
    model = nnx.merge(graphdef, nnx.State(weights), rest)
    changes = dict.fromkeys(("weights", "activations", "matmul"), "fp32") if on_cpu else {}
    model.precision = replace(model.precision, **(changes or {"weights": "bf16"}))
    return model


def decode(
    model: Model, tokens_BT: Int[Array, "B T"], cache: LatentCache, start_B: Int[Array, " B"]
) -> tuple[Float[Array, "B T D"], LatentCache, Int[Array, ""]]:
    """Hidden states after the final norm of T tokens that stand at start_B + t.

    Also returns the cache with them in it, and the choices of experts that found no room.
    """
    model, config = ready(model), model.config
    x_BTD = embed(tokens_BT, model.embed_VD[...], model.dtype)
    turns = rotations(positions_from(start_B, tokens_BT.shape[1]), config)
    lost = jnp.int32(0)
    for blocks, first in ((model.dense, 0), (model.moe, config.num_dense_layers)):
        if blocks is not None:
            x_BTD, cache, more = run_cached(blocks, x_BTD, turns, cache, start_B, first=first)
            lost = lost + more
    return rms_norm(x_BTD, model.final_norm_D[...], config.norm_eps), cache, lost


def positions_from(start_B: jax.Array, length: int) -> Int[Array, "B T"]:
    return start_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]


# Steps on the state.


def prefill(model: Model, state: Decoding, begin: jax.Array) -> Decoding:
    """Reads a chunk of all texts from position `begin` on; what is no prompt is written over."""
    model, width = ready(model), chunk_width(state.tokens_BS.shape[1])
    start_B = jnp.full(state.length_B.shape, begin, jnp.int32)
    tokens_BT = window(state.tokens_BS, start_B, width)
    hidden_BTD, cache, lost = decode(model, tokens_BT, state.cache, start_B)
    ahead = state.ahead
    if ahead is not None:
        ahead, more = read_ahead(model, ahead, hidden_BTD, state.tokens_BS, start_B)
        lost = lost + more
    return replace(state, cache=cache, ahead=ahead, lost=state.lost + lost)


def advance(
    model: Model, state: Decoding, sampling: Sampling, stop_N: jax.Array, steps: jax.Array
) -> Decoding:
    """Up to so many steps, each with one new token for every text, or more where drafts held."""
    model = ready(model)
    step = plain_step if state.ahead is None else drafted_step

    last = state.counts_I[0] + steps

    def more(state):
        return (state.counts_I[0] < last) & ~jnp.all(state.done_B)

    return jax.lax.while_loop(more, lambda state: step(model, state, sampling, stop_N), state)


def plain_step(model: Model, state: Decoding, sampling: Sampling, stop_N: jax.Array) -> Decoding:
    """Reads the last known token of each text and draws the next."""
    start_B = state.length_B - 1
    token_B1 = window(state.tokens_BS, start_B, 1)
    hidden_B1D, cache, lost = decode(model, token_B1, state.cache, start_B)
    logits_BV = model.head(hidden_B1D)[:, 0]
    new_B = draw(logits_BV, sampling, state.key, state.length_B)
    state = replace(state, cache=cache, lost=state.lost + lost)
    return commit(state, new_B[:, None], jnp.zeros_like(new_B), stop_N)


def drafted_step(model: Model, state: Decoding, sampling: Sampling, stop_N: jax.Array) -> Decoding:
    """Drafts tokens with the MTP modules and has the main model verify them in one pass."""
    ahead, draft_logits_BPV, draft_BP, lost = draft_tokens(
        model, state.ahead, state.tokens_BS, state.length_B, sampling, state.key
    )
    state = replace(state, ahead=ahead, lost=state.lost + lost)
    return verified_step(model, state, draft_logits_BPV, draft_BP, sampling, stop_N)


def verified_step(
    model: Model, state: Decoding, draft_logits_BPV, draft_BP, sampling: Sampling, stop_N: jax.Array
) -> Decoding:
    """Reads the last known token of each text and the drafts after it, and keeps what holds."""
    start_B = state.length_B - 1
    last_B1 = window(state.tokens_BS, start_B, 1)
    hidden_BWD, cache, lost = decode(
        model, jnp.concatenate((last_B1, draft_BP), axis=1), state.cache, start_B
    )
    new_BW, accepted_B = verify(
        model.head(hidden_BWD), draft_logits_BPV, draft_BP, sampling, state.key, state.length_B
    )
    ahead = next_ahead(state.ahead, hidden_BWD, start_B)
    state = replace(state, cache=cache, ahead=ahead, lost=state.lost + lost)
    return commit(state, new_BW, accepted_B, stop_N)


def commit(state: Decoding, new_BW: jax.Array, accepted_B: jax.Array, stop_N) -> Decoding:
    """Adds the accepted drafts and the token after them, up to a stop token or the limit."""
    slots_W = jnp.arange(new_BW.shape[1], dtype=jnp.int32)[None, :]
    stops_BW = functools.reduce(jnp.logical_or, [new_BW == stop for stop in stop_N])
    stopped_BW = stops_BW.astype(jnp.int32)
    before_BW = jnp.cumsum(stopped_BW, axis=1) - stopped_BW
    room_B = state.limit_B - state.length_B
    kept_BW = (slots_W <= accepted_B[:, None]) & (before_BW == 0) & (slots_W < room_B[:, None])
    kept_BW = kept_BW & ~state.done_B[:, None]
    count_B = jnp.sum(kept_BW.astype(jnp.int32), axis=1)
    length_B = state.length_B + count_B
    row_steps = jnp.sum((~state.done_B).astype(jnp.int32))
    accepted = jnp.sum(jnp.minimum(accepted_B, count_B))
    done_B = state.done_B | jnp.any(stops_BW & kept_BW, axis=1) | (length_B >= state.limit_B)
    write = jax.vmap(lambda row_S, new_W, at: jax.lax.dynamic_update_slice(row_S, new_W, (at,)))
    return replace(
        state,
        tokens_BS=write(state.tokens_BS, new_BW, state.length_B),
        length_B=length_B,
        done_B=done_B,
        counts_I=state.counts_I + jnp.stack((jnp.int32(1), row_steps, accepted)),
    )


def window(tokens_BS: jax.Array, start_B: jax.Array, width: int) -> Int[Array, "B T"]:
    """Tokens at start_B and the following positions."""
    cut = lambda row_S, start: jax.lax.dynamic_slice(row_S, (start,), (width,))
    return jax.vmap(cut)(tokens_BS, start_B)


def chunk_width(capacity: int) -> int:
    """Tokens of a prompt that are read at once: on a CPU fewer, where each takes its time."""
    parts = 16 if target().platform == "cpu" else 8
    return min(max(capacity // parts, 16), 512)
