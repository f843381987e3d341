"""The dense FP8 products on Hopper: which tiles for which shape; main loops in block_scaled.py
(forward, input gradient) and tile_scaled.py (weight gradient)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_scaled, pipeline, tile_scaled
from pallas_kernels.matmul_fp8 import tuned

# Time of a tile of so many times 64 rows, by 128 columns: two warpgroups reach 1240 TFLOP/s where
# three reach 1419.
COST = (0.0, 0.76, 0.76, 1.0)
# Bytes of operands that the L2 cache of 50 MiB holds beside what streams through it.
CACHED = 40e6


def tiles_of(rows: int, n: int, k: int, cores: int) -> block_scaled.Tiles:
    """Tiles of the product of so many rows with a weight [n, k]."""
    if rows <= 128:
        measured = tuned.FEW.get((64 if rows <= 64 else 128, n, k))
        if measured is not None:
            return measured
        return few_tiles(1 if rows <= 64 else 2, n, cores)
    tiles = tuned.TILES.get((n, k), block_scaled.Tiles())
    return dataclasses.replace(tiles, row_tiles=balanced_row_tiles(rows, n, k, tiles, cores))


def few_tiles(warpgroups: int, n: int, cores: int) -> block_scaled.Tiles:
    """Tiles of one or two warpgroups' rows: as wide as brings fewest bytes to the busiest SM.

    On 64 rows the order of 32, 64 and 128 columns measured for the six shapes of V3 is this one.
    Deep rings keep enough in flight. With one product at a time a step of 64 x 32 took 0.19 us, of
    64 x 64 0.33 us, far more than its bytes do: so two are.
    """
    rows = 64 * warpgroups
    columns = min((32, 64, 128), key=lambda columns: -(-n // (columns * cores)) * (rows + columns))
    stages = {32: 10, 64: 10, 128: 7} if warpgroups == 1 else {32: 8, 64: 8, 128: 6}
    return block_scaled.Tiles(
        warpgroups=warpgroups,
        columns=columns,
        stages=stages[columns],
        store_buffers=min(2, columns // 32),
        pair=False,
        memory_registers=40,
        in_flight=2,
    )


@functools.cache
def balanced_row_tiles(rows: int, n: int, k: int, tiles: block_scaled.Tiles, cores: int) -> int:
    """How many row tiles to cut the rows into so that no pair of blocks gets much more than others.

    4096 x 4096 in tiles of 192 x 256 is 5.3 tiles a pair, so some have 6; cut into 24 row tiles of
    3 or 2 warpgroups it is at most 4 high ones and 2 low ones, in the time of 5.5 (177 us on an
    H200, 186 uncut). Tiles of unlike times drift apart along the contraction, though: where the
    operands of all that run at once exceed the L2 cache they are then fetched again and again
    (7168 x 16384: 794 us instead of 746).
    """
    slices, pairs = -(-rows // 64), pipeline.column_pairs(n, tiles)
    clusters = cores // pipeline.pair_size(tiles)
    least = -(-slices // tiles.warpgroups)
    band = min(tiles.band, pairs)
    width = pipeline.pair_width(tiles)
    if k * (min(-(-clusters // band), least) * tiles.rows + band * width) > CACHED:
        return least

    def slowest(row_tiles):
        least, higher = divmod(slices, row_tiles)
        cost = np.array(COST)[least + (np.arange(row_tiles) < higher)]
        # The order of pipeline.tile_at: a band row by row, the next one backwards.
        widths = [min(tiles.band, pairs - first) for first in range(0, pairs, tiles.band)]
        order = np.concatenate([np.repeat(cost[:: (-1) ** i], w) for i, w in enumerate(widths)])
        order = np.append(order, np.zeros(-len(order) % clusters))
        return round(order.reshape(-1, clusters).sum(axis=0).max(), 3)

    return min(range(least, max(least, slices // 2) + 1), key=slowest)


# 1.05 to 1.12 of the speed of 3 x 96 on five of V3's six shapes, and 3 x 96 is 1.0 to 1.1 of two
# warpgroups of 160 or 192 columns: the third hides the promotion, which takes two products here.
GRADIENT_TILES = tile_scaled.Tiles(3, 128, 4, band=8, memory_registers=24)


def gradient_tiles_of(n: int, k: int) -> tile_scaled.Tiles:
    """Tiles of a weight gradient [n, k]."""
    return tuned.GRADIENT_TILES.get((n, k), GRADIENT_TILES)


@functools.partial(jax.jit, static_argnames=("tiles", "cores", "out_dtype", "interpret"))
def matmul(
    a_codes_MK, a_scale_kM, b_codes_NK, b_scale_nk, more=(), *, tiles, cores, out_dtype,
    interpret=None,
):  # fmt: skip
    """Tiles of 1 x 128 times blocks of 128 x 128; of `more` the same four operands."""
    return block_scaled.matmul(
        a_codes_MK,
        b_codes_NK,
        a_scale_kM,
        b_scale_nk,
        more=[(a, b, a_scale, b_scale) for a, a_scale, b, b_scale in more],
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
