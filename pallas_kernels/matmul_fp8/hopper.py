"""The dense FP8 products on Hopper: which tiles for which shape; main loops in block_scaled.py
(forward, input gradient) and tile_scaled.py (weight gradient)."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import block_scaled, tile_scaled

# TFLOP/s over cuBLASLt's block-scaled product at M = 4096, one H200, one run: 2112 x 7168 1.156,
# 24576 x 1536 1.139, 32768 x 512 1.258, 7168 x 16384 1.004, 4096 x 7168 1.010, 7168 x 2048 1.164,
# and 8192 cubed 1.057; geometric mean 1.109.
TILES = {
    (2112, 7168): block_scaled.Tiles(band=16),
    (24576, 1536): block_scaled.Tiles(store_columns=64, store_buffers=1),
    (32768, 512): block_scaled.Tiles(store_columns=64, store_buffers=1),
}


def tiles_of(rows: int, n: int, k: int) -> block_scaled.Tiles:
    """Tiles of the product of so many rows with a weight [n, k]."""
    if rows <= 128:
        # The weight is read once, so it is its bytes that matter: narrow tiles spread it over all
        # SMs, deep rings keep enough of it in flight.
        warpgroups = 1 if rows <= 64 else 2
        columns = 64 if n >= 132 * 64 else 32
        return block_scaled.Tiles(
            warpgroups=warpgroups,
            columns=columns,
            stages=10 if warpgroups == 1 else 8,
            pair=False,
            memory_registers=40,
        )
    return TILES.get((n, k), block_scaled.Tiles())


# 3 x 96 over DeepGEMM's figures, one H200: 2112 x 7168 877 against 754 TFLOP/s, 24576 x 1536 984
# against 846, 32768 x 512 857 against 702, 7168 x 16384 970 against 887. Two warpgroups of 128
# columns reach 754 to 904: the third hides the promotion, which takes two products here.
GRADIENT_TILES = tile_scaled.Tiles(columns=96, warpgroups=3, stages=4, band=16, memory_registers=24)


@functools.partial(jax.jit, static_argnames=("tiles", "cores", "out_dtype", "interpret"))
def matmul(
    a_codes_MK, a_scale_kM, b_codes_NK, b_scale_nk, *, tiles, cores, out_dtype, interpret=None
):
    """Tiles of 1 x 128 times blocks of 128 x 128."""
    return block_scaled.matmul(
        a_codes_MK,
        b_codes_NK,
        a_scale_kM,
        b_scale_nk,
        tiles=tiles,
        cores=cores,
        out_dtype=out_dtype,
        name="matmul_fp8",
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("tiles", "cores", "interpret"))
def weight_gradient(
    y_codes_NM, y_scale_mN, x_codes_KM, x_scale_mK, accumulator_NK, *, tiles, cores, interpret=None
):
    """Tiles of 1 x 128 on both sides, added to the accumulator if there is one."""
    tokens = y_codes_NM.shape[1]
    w_1NK = tile_scaled.matmul(
        y_codes_NM,
        x_codes_KM,
        y_scale_mN,
        x_scale_mK,
        jnp.zeros(1, jnp.int32),
        jnp.full(1, tokens, jnp.int32),
        None if accumulator_NK is None else accumulator_NK[None],
        tiles=tiles,
        cores=cores,
        name="weight_gradient_fp8",
        interpret=interpret,
    )
    return w_1NK[0]
