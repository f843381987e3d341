"""Text from a model: prefill in the expanded form, then decoding on MLA's latent cache."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.block import run_stack
from deepseek_jax.config import ModelConfig
from deepseek_jax.layers import embed, rms_norm
from deepseek_jax.linear import DTYPES
from deepseek_jax.model import Model
from deepseek_jax.rope import rotations


def empty_cache(
    config: ModelConfig, batch: int, length: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Float[Array, "L B S Y"]:
    """The latent cache of all layers: C + R elements per token and layer."""
    return jnp.zeros((config.num_layers, batch, length, config.cache_dim), dtype)


def prefill(
    model: Model, tokens_BT: Int[Array, "B T"], cache_LBSY: Float[Array, "L B S Y"]
) -> tuple[Float[Array, "B V"], Float[Array, "L B S Y"]]:
    """FP32 logits after the last token, and the cache with all T tokens in it."""
    hidden_BTD, aux = model.hidden(tokens_BT, latents=True)
    latent_LBTY = aux.latent_LBTY.astype(cache_LBSY.dtype)
    cache_LBSY = jax.lax.dynamic_update_slice(cache_LBSY, latent_LBTY, (0, 0, 0, 0))
    return model.head(hidden_BTD[:, -1:])[:, 0], cache_LBSY


def decode(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    cache_LBSY: Float[Array, "L B S Y"],
    start_B: Int[Array, " B"],
) -> tuple[Float[Array, "B T V"], Float[Array, "L B S Y"]]:
    """Logits of T new tokens that stand at start_B + t, and the cache with them in it."""
    config = model.config
    x_BTD = embed(tokens_BT, model.embed_VD[...], model.dtype)
    positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
    turns = rotations(positions_BT, config)
    caches = []
    begin = 0
    for blocks, count in ((model.dense, config.num_dense_layers),
                          (model.moe, config.num_moe_layers)):
        if blocks is None:
            continue
        x_BTD, updated_LBSY = run_stack(
            blocks,
            x_BTD,
            turns,
            keep=lambda output: output.latent_BTY,
            cache_LBSY=cache_LBSY[begin : begin + count],
            start_B=start_B,
        )
        caches.append(updated_LBSY)
        begin += count
    x_BTD = rms_norm(x_BTD, model.final_norm_D[...], config.norm_eps)
    return model.head(x_BTD), jnp.concatenate(caches)


def pick(logits_BV: Float[Array, "B V"], temperature: float, key: jax.Array) -> jax.Array:
    """The next token of each row: the most likely, or a draw from softmax(logits / temperature)."""
    if temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV / temperature, axis=-1).astype(jnp.int32)


def stream(
    model: Model,
    prompt_BT: jax.typing.ArrayLike,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """Yields int32 [B] new tokens one after another; two programs are compiled in all."""
    prompt_BT = jnp.asarray(prompt_BT, jnp.int32)
    check_prompt(model.config, prompt_BT, max_new_tokens, temperature, key)
    B, T = prompt_BT.shape
    key = jax.random.key(0) if key is None else key
    cache = empty_cache(model.config, B, T + max_new_tokens, DTYPES[model.precision.activations])
    token_B, cache = _first(model, prompt_BT, cache, jax.random.fold_in(key, 0), temperature)
    yield np.asarray(token_B)
    for n in range(1, max_new_tokens):
        start_B = jnp.full((B,), T + n - 1, jnp.int32)
        token_B, cache = _next(
            model, token_B, cache, start_B, jax.random.fold_in(key, n), temperature
        )
        yield np.asarray(token_B)


def generate(
    model: Model,
    prompt_BT: jax.typing.ArrayLike,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Int[Array, "B N"]:
    """The continuation of each prompt: int32 [B, max_new_tokens], the new tokens alone.

    Greedy at temperature 0; a temperature above 0 needs a `key`.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, or more tokens than max_length.
    """
    tokens = stream(
        model, prompt_BT, max_new_tokens=max_new_tokens, temperature=temperature, key=key
    )
    return jnp.stack([jnp.asarray(token_B) for token_B in tokens], axis=1)


def check_prompt(config: ModelConfig, prompt_BT, max_new_tokens, temperature, key) -> None:
    if prompt_BT.ndim != 2 or 0 in prompt_BT.shape:
        raise ValueError(f"prompt of shape {prompt_BT.shape} must be [B, T] with B, T >= 1")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    if prompt_BT.shape[1] + max_new_tokens > config.max_length:
        raise ValueError(
            f"prompt of {prompt_BT.shape[1]} tokens + {max_new_tokens=} exceeds "
            f"max_length={config.max_length}"
        )
    low, high = int(prompt_BT.min()), int(prompt_BT.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"prompt token {bad} is outside 0..{config.vocab_size - 1}")
    if temperature < 0.0:
        raise ValueError(f"{temperature=} must not be negative")
    if temperature > 0.0 and key is None:
        raise ValueError(f"{temperature=} draws at random: pass key=jax.random.key(seed)")


@functools.partial(jax.jit, static_argnames="temperature", donate_argnums=2)
def _first(model, prompt_BT, cache_LBSY, key, temperature):
    logits_BV, cache_LBSY = prefill(model, prompt_BT, cache_LBSY)
    return pick(logits_BV, temperature, key), cache_LBSY


@functools.partial(jax.jit, static_argnames="temperature", donate_argnums=2)
def _next(model, token_B, cache_LBSY, start_B, key, temperature):
    logits_BTV, cache_LBSY = decode(model, token_B[:, None], cache_LBSY, start_B)
    return pick(logits_BTV[:, 0], temperature, key), cache_LBSY
