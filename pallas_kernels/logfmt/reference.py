"""The meaning of LogFMT in plain jnp, FP32 throughout; the CPU path and the oracle."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from pallas_kernels.logfmt.octaves import TINY, extremes, octaves, steps_of

TILE = 128
# The codes of a tile in 16-bit words: value 8 i + c has bits n i to n i + n of string c.
ROWS, COLUMNS, WORD = 16, 8, 16


def exp2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """2^x to the last bits of large x too."""
    whole = jnp.round(x)
    return jnp.ldexp(jnp.exp2(x - whole), whole.astype(jnp.int32))


def step_of(low, high, n: int):
    """Octaves between neighbouring codes; 0 in tiles of zeros or of one magnitude."""
    return octaves(low, high) * jnp.float32(1 / steps_of(n))


def encode(x_MK: Float[Array, "M K"], n: int) -> tuple[Array, Array, Array]:
    """Words [M, 8 n k], smallest and largest magnitude [M, k] of each tile."""
    x = _tiles(x_MK)
    code, low, high = _codes(x, n)
    negative = jnp.signbit(x).astype(jnp.uint32)
    return pack(code | negative << (n - 1), n), low, high


def round_trip(x: Float[Array, "... K"], n: int) -> Float[Array, "... K"]:
    """FP32 values as decoded from codes: no code is packed, so that a compiler fuses it all."""
    tiles = _tiles(x)
    code, low, high = _codes(tiles, n)
    value = _values(code, jnp.signbit(tiles), low, high, n)
    return value.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def _tiles(x):
    """[..., k, 128] in FP32, the last tile filled up with zeros."""
    x = x.astype(jnp.float32)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TILE)])
    return x.reshape(*x.shape[:-1], -1, TILE)


def _codes(tiles, n: int):
    """Codes without signs, smallest and largest magnitude of each tile."""
    size = jnp.abs(tiles)
    size = jnp.where(size < TINY, 0, size)
    # On CPU a maximum may drop a NaN.
    high = jnp.where(jnp.isfinite(size), size, jnp.float32(jnp.inf)).max(-1)
    low = jnp.where(size > 0, size, jnp.float32(jnp.inf)).min(-1)
    low, high = extremes(low, high)
    return encode_tiles(size, low[..., None], step_of(low, high, n)[..., None], n), low, high


def encode_tiles(size, low, step, n: int):
    """Codes without signs: of the nearest decoded value, a tie going down.

    Between code 0 and code 1 the mean is not of 0 and low, but of low and one step less.
    """
    # A tile of one magnitude has a step of 0, and codes of 1, also where its low was rounded down.
    step = jnp.where(step > 0, step, jnp.ones_like(step))
    steps = (jnp.log2(size) - jnp.log2(jnp.maximum(low, TINY))) / step
    # The number of the code below; one more from 0.9 on, where the mean lies below in any case.
    below = jnp.clip(jnp.round(steps - 0.4), -1, steps_of(n) - 1)
    middle = low * (0.5 + 0.5 * exp2(step)) * exp2(step * below)
    above = (size > middle).astype(jnp.int32)
    return (below.astype(jnp.int32) + 1 + above).astype(jnp.uint32)


def decode(words, low, high, n: int) -> Float[Array, "M K"]:
    """FP32 values, the zeros at the end of the last tile included."""
    code = unpack(words, n)
    value = _values(code & (2 ** (n - 1) - 1), code >> (n - 1) == 1, low, high, n)
    return value.reshape(value.shape[0], -1)


def _values(code, negative, low, high, n: int):
    """What codes and signs of tiles stand for, FP32."""
    size = code.astype(jnp.int32)
    low, high = (x.astype(jnp.float32)[..., None] for x in (low, high))
    value = low * exp2(step_of(low, high, n) * (size - 1).astype(jnp.float32))
    # Exact at both ends, so that the values' own codes are those that they came from.
    value = jnp.where(size == steps_of(n) + 1, high, value)
    value = jnp.where(size == 0, high * 0, value)
    return jnp.where(negative, -value, value)


def pack(code_Mkt, n: int) -> UInt16[Array, "M W"]:
    """Codes [M, k, 128] of n bits as words [M, 8 n k]."""
    rows, tiles, _ = code_Mkt.shape
    code = jnp.swapaxes(code_Mkt.reshape(rows, tiles, ROWS, COLUMNS), 2, 3)
    bits = _bits(code, n).reshape(rows, tiles, COLUMNS, n, WORD)
    words = _number(bits).astype(jnp.uint16)
    return jnp.swapaxes(words, 2, 3).reshape(rows, tiles * n * COLUMNS)


def unpack(words_MW, n: int):
    """Codes [M, k, 128] as uint32."""
    rows = words_MW.shape[0]
    words = words_MW.astype(jnp.uint32).reshape(rows, -1, n, COLUMNS)
    bits = _bits(jnp.swapaxes(words, 2, 3), WORD).reshape(rows, -1, COLUMNS, ROWS, n)
    return jnp.swapaxes(_number(bits), 2, 3).reshape(rows, -1, TILE)


def _bits(x, n: int):
    """The n lowest bits, the lowest first, along a new last dimension."""
    return x[..., None] >> jnp.arange(n, dtype=jnp.uint32).reshape((1,) * x.ndim + (n,)) & 1


def _number(bits):
    """What bits along the last dimension make."""
    places = jnp.arange(bits.shape[-1], dtype=jnp.uint32)
    return jnp.sum(bits << places.reshape((1,) * (bits.ndim - 1) + (-1,)), -1, dtype=jnp.uint32)
