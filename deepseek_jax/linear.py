"""The product that every matrix of the model goes through, and the dtypes of a Precision."""

import functools

import jax
import jax.numpy as jnp

from sharding import local

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def linear(signature: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum(signature, x, weight) in x's dtype: `linear("BTD,FD->BTF", x_BTD, w_FD)`.

    Sums are FP32. The gradient of the weight leaves the product in the dtype of the weight: FP32
    for masters, though the product itself multiplies in x's dtype, so that it is also summed over
    devices in FP32.
    """
    return local(functools.partial(_product, signature), signature)(x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(signature, x, weight):
    return einsum(signature, x, weight.astype(x.dtype), x.dtype)


def _product_fwd(signature, x, weight):
    return _product(signature, x, weight), (x, weight)


def _product_bwd(signature, residuals, g):
    x, weight = residuals
    left, right, out = _letters(signature)
    dx = einsum(f"{out},{right}->{left}", g, weight.astype(x.dtype), x.dtype)
    dw = einsum(f"{out},{left}->{right}", g, x, weight.dtype)
    return dx, dw


_product.defvjp(_product_fwd, _product_bwd)


def _letters(signature: str) -> tuple[str, str, str]:
    operands, out = signature.split("->")
    left, right = operands.split(",")
    return left, right, out


def einsum(signature: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """jnp.einsum with FP32 sums and a result in `dtype`; FP32 operands multiply as FP32."""
    # Without HIGHEST an FP32 product may run in TF32 on a GPU.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(signature, a, b, precision=precision, preferred_element_type=dtype)
