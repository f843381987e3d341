"""Plain products of which FP32 operands are multiplied as FP32."""

import jax
import jax.numpy as jnp


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """HIGHEST for FP32, which a GPU may multiply in TF32 without it; None for other dtypes."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def einsum(
    signature: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """jnp.einsum with FP32 sums and a result in `dtype`; both operands have one dtype."""
    return jnp.einsum(signature, a, b, precision=precision_of(a), preferred_element_type=dtype)
