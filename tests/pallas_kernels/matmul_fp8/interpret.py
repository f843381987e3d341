"""Interprets one tiny case of an FP8 product on CPU: values against the reference.

Without race detection: it wants a fence between the ordinary load of a stage's scales and the copy
that refills the stage, which the loads' arrival at the barrier orders on the card.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# The interpreter's callbacks block: with few cores they starve the thread pool.
os.environ["NPROC"] = "32"

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_scaled, tile_scaled
from pallas_kernels.grouped_matmul.groups import group_of_block, group_starts, padded_sizes
from pallas_kernels.grouped_matmul_fp8 import hopper as grouped
from pallas_kernels.grouped_matmul_fp8 import reference as grouped_reference
from pallas_kernels.matmul_fp8 import hopper, reference
from pallas_kernels.quantize_fp8.reference import blocks, tiles

SIZES = np.array([130, 0, 200], np.int32)


def main(case: str):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    options = dict(cores=4, interpret=plgpu.InterpretGPUParams())
    sizes = (group_starts(SIZES, 128), padded_sizes(SIZES, 128))
    group_m = group_of_block(SIZES, num_blocks=5, alignment=128)
    if case in ("dense", "in_flight"):
        # Six slices of 64 rows, the last one short, in four tiles of 2, 2, 1, 1.
        shape = block_scaled.Tiles(2, 128, 2, row_tiles=4, band=1, memory_registers=40)
        rows, k = 328, 256
        if case == "in_flight":
            # Eleven products of 128: two rounds of four and three more.
            shape = block_scaled.Tiles(
                1, 32, 3, 32, 1, pair=False, memory_registers=40, in_flight=2, round=4
            )
            rows, k = 40, 1408
        a, (b_codes, b_scale) = tiles(normal(rows, k), False), blocks(normal(1, 272, k), False)
        operands, options["out_dtype"] = (*a, b_codes[0], b_scale[0]), jnp.bfloat16
        found = hopper.matmul(*operands, tiles=shape, **options)
        right = reference.matmul(*operands, jnp.bfloat16)
    if case == "dense_sum":
        shape = block_scaled.Tiles(1, 32, 3, 32, 1, pair=False, memory_registers=40, in_flight=2)
        pairs = [(tiles(normal(40, 384), False), blocks(normal(1, 272, 384), False))
                 for _ in range(2)]
        first, second = [(*a, b_codes[0], b_scale[0]) for a, (b_codes, b_scale) in pairs]
        options["out_dtype"] = jnp.bfloat16
        found = hopper.matmul(*first, (second,), tiles=shape, **options)
        right = sum(reference.matmul(*one, jnp.float32) for one in (first, second))
    if case == "by_rows_sum":
        shape = block_scaled.Tiles(3, 64, 2, band=2)
        first, second = [
            (*tiles(normal(640, 256), False), *blocks(normal(3, 144, 256), False)) for _ in range(2)
        ]
        options["out_dtype"] = jnp.bfloat16
        found = grouped.by_rows(*first, *sizes, (second,), tiles=shape, **options)[:512]
        right = sum(grouped_reference.by_rows(*one, group_m, jnp.float32)
                    for one in (first, second))[:512]
    if case == "by_rows":
        shape = block_scaled.Tiles(3, 64, 2, band=2)
        operands = *tiles(normal(640, 128), False), *blocks(normal(3, 144, 128), False)
        options["out_dtype"] = jnp.bfloat16
        found = grouped.by_rows(*operands, *sizes, tiles=shape, **options)[:512]
        right = grouped_reference.by_rows(*operands, group_m, jnp.bfloat16)[:512]
    if case.startswith("by_contraction"):
        # The scales of 64 of the 160 columns are loaded late.
        fetch = "added" in case
        shape = tile_scaled.Tiles(2, 160, 2, 32, 5, band=1, memory_registers=104, fetch_sums=fetch)
        if "slices" in case:
            # Of the second tile's rows a warpgroup has 16, the other none; nobody a second slice.
            shape = tile_scaled.Tiles(2, 96, 2, 48, 1, band=1, slices=2)
        operands = *tiles(normal(272, 640), False), *tiles(normal(176, 640), False)
        start_GNK = normal(3, 272, 176) if fetch else jnp.zeros((3, 272, 176))
        start = start_GNK if fetch else None
        right = grouped_reference.by_contraction(*operands, group_m, start_GNK)
        found = grouped.by_contraction(*operands, *sizes, start, tiles=shape, **options)
    found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
    error = np.linalg.norm(found - right) / np.linalg.norm(right)
    print(f"{case}: jax {jax.__version__}, relative error {error:.1e}")
    assert error < (1e-6 if case.startswith("by_contraction") else 3e-3)


main(sys.argv[1])
