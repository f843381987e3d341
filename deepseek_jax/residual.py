"""What a branch adds to the residual stream, rounded to few bits as results of combine would be.

An imitation on one device of formats for combine (ISCA section 3.2): tiles of 128 channels, FP8
scaled so that the largest magnitude of a tile is that of the format. The gradient passes as it is.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.config import logfmt_bits
from pallas_kernels.logfmt import round_to_logfmt
from pallas_kernels.quantize_fp8.reference import AMAX_FLOOR
from pallas_kernels.rounding import to_fp8

TILE = 128
FP8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x: Float[Array, "... D"], format: str) -> Float[Array, "... D"]:
    """x as it arrives in a format, a value of config.Residual; bf16: as it is."""
    if format == "bf16":
        return x
    if format in FP8:
        return _round_to_fp8(x, FP8[format])
    return round_to_logfmt(x, logfmt_bits(format))


@rounded.defjvp
def _rounded_jvp(format, primals, tangents):
    return rounded(*primals, format), tangents[0]


def _round_to_fp8(x, dtype):
    wide = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TILE)])
    tiles = wide.reshape(*x.shape[:-1], -1, TILE)
    # The floor keeps the scale away from where it would be flushed to 0.
    largest = jnp.maximum(jnp.max(jnp.abs(tiles), axis=-1, keepdims=True), jnp.float32(AMAX_FLOOR))
    # A product: some compilers make one of a division by a constant, others do not.
    scale = largest * jnp.float32(1 / float(jnp.finfo(dtype).max))
    back = to_fp8(tiles / scale, dtype).astype(jnp.float32) * scale
    return back.reshape(wide.shape)[..., : x.shape[-1]].astype(x.dtype)
