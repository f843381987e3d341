"""Drafting with the MTP modules: they propose tokens, the main model verifies them in one pass.

Module k reads, at position i, the hidden state of module k - 1 (of the main model for k = 1) and
the embedding of token i + k, and predicts token i + k + 1 (V3 report, section 2.2). At the last
position that the main model has read, token i + 1 is known and the modules propose, one after the
other, P tokens after it. A module has read some positions with drafts for tokens; those are read
again, so every step runs each module over 2 P positions: those whose tokens were not all known.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig
from deepseek_jax.latent_cache import LatentCache, empty_cache
from deepseek_jax.layers import embed, rms_norm
from deepseek_jax.model import Model
from deepseek_jax.rope import rotations
from deepseek_jax.sampling import Sampling, draw


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ahead:
    """What the MTP modules have of the texts."""

    cache: LatentCache  # a layer for each depth
    hidden_BWD: Float[Array, "B W D"]  # the main model's, at W = 2 P positions from start_B on
    start_B: Int[Array, " B"]


def first_ahead(
    config: ModelConfig, length_B: jax.Array, capacity: int, format: str, dtype
) -> Ahead:
    """Before the prompts are read: all but the last token of each will be."""
    B, depth = length_B.shape[0], config.num_mtp
    return Ahead(
        cache=empty_cache(config, B, capacity, format, layers=depth),
        hidden_BWD=jnp.zeros((B, 2 * depth, config.model_dim), dtype),
        start_B=jnp.maximum(length_B - 1 - depth, 0),
    )


def run_module(
    model: Model, depth: int, hidden_BTD, tokens_BT, cache: LatentCache, start_B
) -> tuple[Float[Array, "B T D"], LatentCache, Int[Array, ""]]:
    """One module over T positions: its hidden states, the cache and choices without room."""
    module = jax.tree.map(lambda leaf: leaf[depth - 1], model.mtp)
    embedded_BTD = embed(tokens_BT, model.embed_VD[...], model.dtype)
    positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
    x_BTD, output = module.block(
        module.join(hidden_BTD, embedded_BTD),
        rotations(positions_BT, model.config),
        cache=cache.at(depth - 1),
        start_B=start_B,
    )
    x_BTD = rms_norm(x_BTD, module.final_norm_D[...], model.config.norm_eps)
    lost = jnp.int32(0) if output.load is None else output.load.lost
    return x_BTD, replace(output.latent_BTY, layer=None), lost


def read_ahead(
    model: Model, ahead: Ahead, hidden_BTD, tokens_BS, start_B
) -> tuple[Ahead, Int[Array, ""]]:
    """The modules read a chunk of the prompts after the main model, and keep its hidden states."""
    T = hidden_BTD.shape[1]
    cache, lost, x_BTD = ahead.cache, jnp.int32(0), hidden_BTD
    for depth in range(1, model.config.num_mtp + 1):
        tokens_BT = tokens_from(tokens_BS, start_B + depth, T)
        x_BTD, cache, more = run_module(model, depth, x_BTD, tokens_BT, cache, start_B)
        lost = lost + more
    W = ahead.hidden_BWD.shape[1]
    at_BW = ahead.start_B[:, None] + jnp.arange(W, dtype=jnp.int32)[None, :] - start_B[:, None]
    inside_BW = (at_BW >= 0) & (at_BW < T)
    found_BWD = jnp.take_along_axis(hidden_BTD, jnp.clip(at_BW, 0, T - 1)[:, :, None], axis=1)
    hidden_BWD = jnp.where(inside_BW[:, :, None], found_BWD, ahead.hidden_BWD)
    return replace(ahead, cache=cache, hidden_BWD=hidden_BWD), lost


def draft_tokens(
    model: Model, ahead: Ahead, tokens_BS, length_B, sampling: Sampling, key
) -> tuple[Ahead, Float[Array, "B P V"], Int[Array, "B P"], Int[Array, ""]]:
    """Tokens proposed after the last known one, with the logits that they were drawn from."""
    depths, W = model.config.num_mtp, ahead.hidden_BWD.shape[1]
    # The main model has read all but the last known token.
    last_B = jnp.clip(length_B - 2 - ahead.start_B, 0, W - 1)
    x_BWD, cache, lost = ahead.hidden_BWD, ahead.cache, jnp.int32(0)
    logits, drafts = [], []
    for depth in range(1, depths + 1):
        tokens_BW = tokens_from(tokens_BS, ahead.start_B + depth, W)
        x_BWD, cache, more = run_module(model, depth, x_BWD, tokens_BW, cache, ahead.start_B)
        lost = lost + more
        last_B1D = jnp.take_along_axis(x_BWD, last_B[:, None, None], axis=1)
        logits_BV = model.head(last_B1D)[:, 0]
        position_B = length_B + depth - 1
        draft_B = draw(logits_BV, sampling, key, position_B, purpose=3)
        write = lambda row_S, token, at: jax.lax.dynamic_update_slice(row_S, token[None], (at,))
        tokens_BS = jax.vmap(write)(tokens_BS, draft_B, position_B)
        logits.append(logits_BV)
        drafts.append(draft_B)
    ahead = replace(ahead, cache=cache)
    return ahead, jnp.stack(logits, axis=1), jnp.stack(drafts, axis=1), lost


def next_ahead(ahead: Ahead, hidden_BTD: Float[Array, "B T D"], position_B) -> Ahead:
    """Keeps the hidden states of the positions that the modules have to read next.

    Args:
      hidden_BTD: the main model's at the last known token, which stands at `position_B`, and at
        the P drafts after it.
    """
    B, W, D = ahead.hidden_BWD.shape
    depths = hidden_BTD.shape[1] - 1
    start_B = jnp.maximum(position_B - depths + 1, 0)

    def shift(old_WD, new_TD, old, position, start):
        joined = jnp.concatenate((old_WD, jnp.zeros_like(new_TD)))
        zero = jnp.int32(0)
        joined = jax.lax.dynamic_update_slice(joined, new_TD, (position - old, zero))
        return jax.lax.dynamic_slice(joined, (start - old, zero), (W, D))

    hidden_BWD = jax.vmap(shift)(
        ahead.hidden_BWD, hidden_BTD.astype(ahead.hidden_BWD.dtype), ahead.start_B, position_B,
        start_B,
    )  # fmt: skip
    return replace(ahead, hidden_BWD=hidden_BWD, start_B=start_B)


def tokens_from(tokens_BS: jax.Array, start_B: jax.Array, width: int) -> Int[Array, "B T"]:
    """Tokens at start_B and the following positions, 0 past the end."""
    S = tokens_BS.shape[1]
    at_BT = start_B[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
    found_BT = jnp.take_along_axis(tokens_BS, jnp.clip(at_BT, 0, S - 1), axis=1)
    return jnp.where(at_BT < S, found_BT, jnp.zeros_like(found_BT))
