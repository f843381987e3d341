"""Operands of kernel benchmarks: normal data from one pool, for JAX and torch, made on the host."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

F8, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
POOL = 1 << 24
# Normal values that fill E4M3 as quantised ones do: five deviations are 448.
DEVIATIONS = 5
# Integers of the same size, for what numpy does not know.
SAME_SIZE = {1: np.uint8, 2: np.int16, 4: np.int32}


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@functools.cache
def _pool(dtype: Any) -> np.ndarray:
    rng = np.random.default_rng()
    if dtype == F32:
        return rng.uniform(0.5, 2, POOL).astype(np.float32)
    normal = rng.standard_normal(POOL, np.float32)
    if dtype == F8:
        normal = np.clip(normal * (448 / DEVIATIONS), -448, 448)
    return normal.astype(dtype)


def random_array(spec: jax.ShapeDtypeStruct) -> np.ndarray:
    """Normal values in FP8 and BF16, uniform scales in FP32; each time another part of a pool."""
    if jnp.issubdtype(spec.dtype, jnp.integer):
        raise ValueError(f"integers {spec.shape} are not random: give the array itself")
    pool = _pool(jnp.dtype(spec.dtype))
    start = int(np.random.default_rng().integers(POOL))
    return np.resize(np.roll(pool, start), spec.shape)


def for_jax(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, jax.devices()[0])


def for_torch(torch: Any, array: np.ndarray) -> Any:
    """The same bits on torch's device."""
    names = {F8: torch.float8_e4m3fn, BF16: torch.bfloat16, F32: torch.float32}
    dtype = next((kind for name, kind in names.items() if array.dtype == name), None)
    plain = torch.from_numpy(array.view(SAME_SIZE[array.dtype.itemsize]))
    return plain.cuda() if dtype is None else plain.cuda().view(dtype)


def weight_specs(n: int, k: int, groups: int = 0) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Codes and scales of a weight in blocks of 128 x 128."""
    lead = (groups,) if groups else ()
    codes = jax.ShapeDtypeStruct((*lead, n, up(k, 128)), F8)
    scales = (*lead, up(n, 128) // 128, up(up(k, 128) // 128, 32))
    return codes, jax.ShapeDtypeStruct(scales, F32)


def tile_specs(rows: int, k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Codes and scales of an operand in tiles of 1 x 128."""
    codes = jax.ShapeDtypeStruct((rows, up(k, 128)), F8)
    return codes, jax.ShapeDtypeStruct((up(k, 128) // 128, up(rows, 4)), F32)
