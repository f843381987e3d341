"""Limits of error and random data of the kernel tests."""

import jax.numpy as jnp
import numpy as np

# Largest relative error (Frobenius) against float64 arithmetic on the same operands: rounding of
# the output, and FP32 sums.
LIMITS = {jnp.dtype(jnp.float32): 2e-6, jnp.dtype(jnp.bfloat16): 3e-3}


def normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def float64(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
