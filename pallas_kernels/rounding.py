"""Roundings of FP32 values to FP8 and BF16 that XLA does not leave out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def to_fp8(
    x: Float[Array, "..."], dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn
) -> Float[Array, "..."]:
    """FP32 values to the nearest FP8 numbers, ties to even; saturating, and NaN stays NaN.

    The rounding is arithmetic, and the cast after it exact: of two casts, to fewer bits and back,
    XLA on GPUs leaves out both, as it may be more precise than it is asked to be.
    """
    info = jnp.finfo(dtype)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=info.nmant)
    # Below the normal numbers the step stays the same, a power of two.
    step = float(info.smallest_subnormal)
    subnormal = jnp.round(x * (1 / step)) * step
    rounded = jnp.where(jnp.abs(x) < float(info.smallest_normal), subnormal, normal)
    return jnp.clip(rounded, -float(info.max), float(info.max)).astype(dtype)


def to_bf16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """FP32 values to the nearest BF16 numbers, whatever is left out, as to_fp8 does."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)
