"""E5M6, the format of the input of the linear layer after attention (V3 report, section 3.3.3).

12 bits an element in tiles of 128 with scales that are powers of two: the backward pass of
attention reads these activations too, and re-tiling them adds no error.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_fp8.reference import TILE, amax_of, scale_of
from sharding import local


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class E5M6:
    """An activation of 12 bits an element in tiles with scales that are powers of two.

    x [..., K] holds the rounded values; high [..., 128 k] the sign, the exponent and two bits of
    the mantissa, low [..., 64 k] the other four of two elements.
    """

    x: jax.Array
    high: jax.Array
    low: jax.Array
    scale: jax.Array


def encode_e5m6(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """high, low and scale of values [..., K].

    E5M6 is FP16 with a mantissa of 6 bits instead of 10. The scale is that of a tile of E4M3.
    """
    x32 = x.astype(jnp.float32)
    x32 = jnp.pad(x32, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TILE)])
    tiles = x32.reshape(*x.shape[:-1], -1, TILE)
    scale = scale_of(amax_of(tiles, axis=-1), power_of_two=True)
    half = (tiles / scale[..., None]).astype(jnp.float16)
    bits = jax.lax.bitcast_convert_type(half, jnp.uint16)
    # To nearest, ties to even.
    code = (bits + 7 + ((bits >> 4) & 1)) >> 4
    high = (code >> 4).astype(jnp.uint8).reshape(x32.shape)
    first, second = jnp.split((code & 15).astype(jnp.uint8), 2, axis=-1)
    low = (first | (second << 4)).reshape(*x.shape[:-1], -1)
    return high, low, scale


def decode_e5m6(x: E5M6, shape: tuple[int, ...]) -> jax.Array:
    """BF16 values in the shape that they had, exactly."""
    high = x.high.reshape(*x.scale.shape, TILE).astype(jnp.uint16)
    low = x.low.reshape(*x.scale.shape, TILE // 2).astype(jnp.uint16)
    code = (high << 4) | jnp.concatenate((low & 15, low >> 4), axis=-1)
    half = jax.lax.bitcast_convert_type(code << 4, jnp.float16)
    flat = (half.astype(jnp.float32) * x.scale[..., None]).reshape(x.high.shape)
    width = math.prod(shape) // math.prod(x.high.shape[:-1])
    return flat[..., :width].reshape(shape).astype(jnp.bfloat16)


def to_e5m6(x_BTNU: jax.Array) -> E5M6:
    """An activation rounded to E5M6."""

    def encode(x):
        codes = encode_e5m6(x.reshape(*x.shape[:2], -1))
        return decode_e5m6(E5M6(None, *codes), x.shape), *codes

    return E5M6(*local(encode, f"BTNU->BTNU,{e5m6_letters('BTNU')}")(x_BTNU))


def e5m6_letters(letters: str) -> str:
    """Of high, low and scale; "BTNU" is flattened to "BTN"."""
    flat = letters[:3]
    return f"{flat},{flat},{flat[:-1]}{flat[-1].lower()}"
