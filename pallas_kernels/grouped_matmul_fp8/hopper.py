"""The experts' FP8 products on Hopper: which tiles, and the table of row tiles; main loops in
block_scaled.py (by rows) and tile_scaled.py (by contraction)."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import block_scaled, tile_scaled
from pallas_kernels.grouped_matmul_fp8 import tuned

# One H200, 32768 rows, TFLOP/s over torch's precise row-wise `_scaled_grouped_mm`
# for (N, K) = (4096, 7168), (7168, 2048), (7168, 4096), (2048, 7168): 8 groups 1.15, 1.29, 1.15,
# 1.18; 32 groups 1.03, 1.20, 1.10, 1.07. A band of 8 is 1 to 7 % slower with 32 groups.
TILES = block_scaled.Tiles(band=16)
# 1.06 to 1.19 of the speed of 3 x 96 on groups of 1536 and 4096 rows; 0.92 to 0.96 on 1024, where
# the output is what takes the time (tuned.py).
GRADIENT_TILES = tile_scaled.Tiles(3, 128, 4, band=8, memory_registers=24)


def tiles_of(rows: int, groups: int, n: int, k: int) -> block_scaled.Tiles:
    """Tiles for so many rows in groups with weights [n, k]."""
    return tuned.TILES.get((rows // groups, n, k), TILES)


def gradient_tiles_of(rows: int, groups: int, n: int, k: int) -> tile_scaled.Tiles:
    """Tiles for weight gradients [n, k] of so many rows in groups."""
    return tuned.GRADIENT_TILES.get((rows // groups, n, k), GRADIENT_TILES)


def row_tiles(starts_G, padded_G, num_rows: int, rows: int) -> tuple[jax.Array, ...]:
    """First row, group and end of each tile of at most `rows` rows, and how many there are.

    A group is cut evenly: a warpgroup alone in a tile would hide nothing.
    """
    slices_G, tiles_G = padded_G // 64, (padded_G + (rows - 1)) // rows
    group_G = jnp.arange(starts_G.shape[0], dtype=jnp.int32)
    # Sums over comparisons, not scans and searches: XLA makes fewer kernels of them.
    earlier_GG = group_G[None] < group_G[:, None]
    before_G = jnp.sum(jnp.where(earlier_GG, tiles_G[None], 0), axis=1, dtype=jnp.int32)
    tile = jnp.arange(num_rows // rows + len(group_G), dtype=jnp.int32)
    begun = (before_G[None] <= tile[:, None]) & (tiles_G > 0)[None]
    group = jnp.max(jnp.where(begun, group_G[None], 0), axis=1)
    local, count = tile - before_G[group], jnp.maximum(tiles_G, 1)[group]
    cut = lambda tile: 64 * block_scaled.starts_of(slices_G[group], count, tile)
    used = jnp.sum(tiles_G, dtype=jnp.int32, keepdims=True)
    return starts_G[group] + cut(local), group, starts_G[group] + cut(local + 1), used


@functools.partial(jax.jit, static_argnames=("tiles", "cores", "out_dtype", "interpret"))
def by_rows(
    a_codes_MK,
    a_scale_kM,
    b_codes_GNK,
    b_scale_Gnk,
    starts_G,
    padded_G,
    more=(),
    *,
    tiles,
    cores,
    out_dtype,
    interpret=None,
):
    """Rows of a group times its weight; rows of no group are not written. `more` as in
    matmul_fp8."""
    return block_scaled.matmul(
        a_codes_MK,
        b_codes_GNK,
        a_scale_kM,
        b_scale_Gnk,
        row_tiles(starts_G, padded_G, a_codes_MK.shape[0], tiles.rows),
        more=[(a, b, a_scale, b_scale) for a, a_scale, b, b_scale in more],
        tiles=tiles,
        cores=cores,
        out_dtype=out_dtype,
        name="grouped_matmul_fp8_by_rows",
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("tiles", "cores", "interpret"))
def by_contraction(
    y_codes_NM,
    y_scale_mN,
    x_codes_KM,
    x_scale_mK,
    starts_G,
    padded_G,
    accumulator_GNK,
    *,
    tiles,
    cores,
    interpret=None,
):
    """Weight gradients of all groups, added to the accumulator if there is one."""
    return tile_scaled.matmul(
        y_codes_NM,
        x_codes_KM,
        y_scale_mN,
        x_scale_mK,
        starts_G,
        padded_G,
        accumulator_GNK,
        tiles=tiles,
        cores=cores,
        name="grouped_matmul_fp8_by_contraction",
        interpret=interpret,
    )
