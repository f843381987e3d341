"""Interprets one tiny case of a grouped kernel on CPU, with poisoned padding and race detection."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# The interpreter's callbacks block: with few cores they starve the thread pool.
os.environ["NPROC"] = "32"

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.grouped_matmul import hopper, reference

# Pairs of row tiles of one group and of two, and a last one alone; unused rows after them. Of a
# weight gradient three row tiles.
SIZES, STARTS = np.array([200, 0, 70, 130], np.int32), (0, 256, 256, 384)
ROWS, N, K = 768, 288, 128
# Masking a group's last rows, both warpgroups write equal values to the operand that they share.
EQUAL_WRITES = "by_contraction"


def main(case: str):
    rng = np.random.default_rng(0)
    real_M = np.zeros(ROWS, bool)
    for start, size in zip(STARTS, SIZES, strict=True):
        real_M[start : start + size] = True
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    poisoned = lambda x, poison: jnp.where(real_M[:, None], x, jnp.bfloat16(poison))
    x_MK, y_MN = poisoned(normal(ROWS, K), np.nan), poisoned(normal(ROWS, N), np.inf)
    tiles = hopper.Tiles(columns=64, stages=2, band=2, store_columns=32)
    interpret = plgpu.InterpretGPUParams(detect_races=case != EQUAL_WRITES)
    options = dict(tiles=tiles, cores=4, interpret=interpret)
    if case == "by_contraction":
        found = hopper.by_contraction(y_MN, x_MK, SIZES, alignment=128, **options)
        right = reference.by_contraction(y_MN, x_MK, SIZES, alignment=128, out_dtype=jnp.float32)
    else:
        last = case == "by_rows"
        w_GNK = normal(4, N, K) if last else normal(4, K, N)
        found = hopper.by_rows(x_MK, w_GNK, SIZES, alignment=128, contract_last=last, **options)
        right = reference.by_rows(x_MK, w_GNK, SIZES, alignment=128, contract_last=last)
        found, right = found[real_M], right[real_M]
    found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
    error = np.linalg.norm(found - right) / np.linalg.norm(right)
    races = case != EQUAL_WRITES and gpu_callbacks.get_races().races_found
    print(f"{case}: jax {jax.__version__}, relative error {error:.1e}, {races=}")
    assert error < 1e-4 and not races


main(sys.argv[1])
