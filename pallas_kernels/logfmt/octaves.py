"""What of LogFMT must agree to the last bit: the extremes of a tile, and the octaves between them.

A step that differs by one unit in its last place moves the largest of 510 codes by a dozen. So
the extremes are BF16 numbers, whose mantissas have 7 bits, and the series for their logarithm
multiplies them with numbers of 17 bits: products are exact in FP32, fused with sums or not.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# log2(1 + t) is t times this polynomial, constant first, to 1.5e-5; exact at t = 0.
SERIES = (1.4425532, -0.71828181, 0.45827016, -0.27953684, 0.12345032, -0.026457053)
# Magnitudes below the largest over this have no code of their own.
INVERSE_RANGE = 2.0**-32
# Smaller ones are zero: processors flush them.
TINY = 2.0**-126


def steps_of(n: int) -> int:
    """Steps from the smallest code's magnitude, 1, to the largest's, 2^(n-1) - 1."""
    return 2 ** (n - 1) - 2


def extremes(low: Float[Array, "..."], high: Float[Array, "..."]):
    """The pair rounded to BF16 numbers, in FP32; low is at least high / 2^32.

    Both are 0 if high is, and NaN if high is not finite in BF16. `low` may be infinite for zeros.
    """
    round_ = lambda x: _float(_bits(x) + jnp.uint32(0x8000) & jnp.uint32(0xFFFF0000))
    # Rounding may carry a NaN's bits, all ones on a GPU, over into the sign.
    infinite = jnp.full_like(high, jnp.inf)
    low, high = round_(jnp.minimum(low, high)), jnp.where(high < jnp.inf, round_(high), infinite)
    low = jnp.maximum(jnp.maximum(low, high * jnp.float32(INVERSE_RANGE)), jnp.float32(TINY))
    nan, zero = jnp.float32(jnp.nan), jnp.float32(0)
    high = jnp.where(high < TINY, zero, high)
    high = jnp.where(high < jnp.inf, high, nan)
    return jnp.where(high > 0, low, high), high


def octaves(low: Float[Array, "..."], high: Float[Array, "..."]) -> Float[Array, "..."]:
    """log2(high / low) of BF16 numbers in FP32; 0 for a pair of zeros."""
    exponents = (_bits(high) >> jnp.uint32(23)) - (_bits(low) >> jnp.uint32(23))
    exponents = jax.lax.bitcast_convert_type(exponents, jnp.int32).astype(jnp.float32)
    return exponents + (_log2_of_mantissa(high) - _log2_of_mantissa(low))


def _log2_of_mantissa(x):
    t = _float(_bits(x) & jnp.uint32(0x7FFFFF) | jnp.uint32(0x3F800000)) - jnp.float32(1)
    total = jnp.full_like(t, SERIES[-1])
    for term in SERIES[-2::-1]:
        total = _cut(total) * t + jnp.float32(term)
    return _cut(total) * t


def _cut(x):
    """The first 17 bits of the mantissa."""
    return _float(_bits(x) & jnp.uint32(0xFFFFFF80))


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
