"""Main loop of the block-scaled FP8 products on Hopper: 1 x 128 tiles times 128 x 128 blocks.

The structure is pipeline.py's. Each compute warpgroup multiplies 128 of the contraction into fresh
registers and adds the scaled product to FP32 sums (promotion), which hides behind the WGMMAs of the
other warpgroups; three of them hide it best.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, pipeline

F8 = jnp.float8_e4m3fn
DEPTH = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Shape of a block's work; 227 KiB of shared memory bound the stages and the store buffers."""

    warpgroups: int = 3
    columns: int = 128
    stages: int = 4
    # Columns and number of the pieces in which a warpgroup stores its rows.
    store_columns: int = 32
    store_buffers: int = 2
    # Column pairs of a band that is walked row by row, for the L2 cache.
    band: int = 8
    pair: bool = True
    # 24 leave 160 to each of three compute warpgroups; fewer than 152 spill.
    memory_registers: int = 24
    # Row tiles of a dense product; 0: as few as cover the rows.
    row_tiles: int = 0
    # Products of a warpgroup in flight before the first is added: where few warpgroups take turns
    # it is the way from a barrier through a product to its sum that takes the time.
    in_flight: int = 1
    # Between rounds of so many steps nothing is in flight; 0: rounds of `in_flight`.
    round: int = 0

    def __post_init__(self):
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"{self.warpgroups=} must be 1, 2 or 3")
        if self.columns not in (16, 32, 64, 128):
            raise ValueError(f"{self.columns=} must divide a block of 128: 16, 32, 64 or 128")
        if not 1 <= self.in_flight <= self.stages:
            raise ValueError(f"{self.in_flight=} must be from 1 to {self.stages=}")
        if self.round and self.round < self.in_flight:
            raise ValueError(f"{self.round=} must be 0 or at least {self.in_flight=}")
        pipeline.check_store(self)

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


def starts_of(slices: int | jax.Array, tiles: int | jax.Array, tile: int | jax.Array):
    """First of the slices (64 rows) of a tile, if so many tiles share so many slices evenly.

    In a tile of 64 rows nothing hides the promotion: 16 slices are better cut as 3, 3, 3, 3, 2, 2
    than as 3, 3, 3, 3, 3, 1.
    """
    least = slices // tiles
    return tile * least + jnp.minimum(tile, slices - least * tiles)


def _body(*refs, tiles, grouped, products):
    """Grouped: tile t has rows rows[t] to ends[t] and the weights of groups[t]; used[0] tiles."""
    operands, refs = [refs[4 * i : 4 * i + 4] for i in range(products)], refs[4 * products :]
    table, refs = (refs[:4], refs[4:]) if grouped else ((), refs)
    out_gmem, a_smem, b_smem, a_scale_smem, b_scale_smem, scales, out_smem, full, free = refs
    warpgroup = lax.axis_index("warpgroup")
    num_rows, n = out_gmem.shape
    each = operands[0][0].shape[1] // DEPTH
    steps = products * each
    slices = pl.cdiv(num_rows, 64)
    row_tiles = table[3][0] if grouped else tiles.row_tiles or pl.cdiv(num_rows, tiles.rows)
    pairs = pipeline.column_pairs(n, tiles)
    num_scales = b_scale_smem.shape[0]
    next_slot = functools.partial(pipeline.next_slot, stages=tiles.stages)
    next_scale = functools.partial(pipeline.next_slot, stages=num_scales)
    zero = jnp.int32(0)

    def rows_of(tile):
        if grouped:
            return table[0][tile], table[2][tile]
        return tuple(64 * starts_of(slices, row_tiles, tile + i) for i in (0, 1))

    def loop(body):
        @plgpu.nd_loop((row_tiles * pairs,), collective_axes="cluster", init_carry=(zero, zero))
        def last(info, carry):
            (index,) = info.index
            tile, column = pipeline.tile_at(index, row_tiles, pairs, tiles, 1)
            slot, scale = carry
            return body(tile, column * tiles.columns, slot, scale), next_scale(scale)

        return last[0]

    def fetch(tile, column, slot, scale):
        row, _ = rows_of(tile)
        group = (table[1][tile],) if grouped else ()
        rows, columns = pl.ds(row, tiles.rows), pl.ds(column, tiles.columns)

        def fetch_scales():
            for product, (*_, b_scale_gmem) in enumerate(operands):
                weight = b_scale_gmem.at[(*group, column // 128)]
                target = b_scale_smem.at[scale, product]
                plgpu.copy_gmem_to_smem(weight, target, scales.at[scale])

        def fill(i, slot, product):
            a_gmem, b_gmem, a_scale_gmem, _ = operands[product]
            plgpu.barrier_wait(free.at[slot])
            if product == 0:
                pl.when(i == 0)(fetch_scales)
            depth = pl.ds(i * DEPTH, DEPTH)
            shared = pipeline.shared_by_pair(tiles)
            copy = lambda source, target, **options: plgpu.copy_gmem_to_smem(
                source, target.at[slot], full.at[slot], **options
            )
            copy(a_gmem.at[rows, depth], a_smem, **shared)
            copy(b_gmem.at[(*group, columns, depth)], b_smem)
            copy(a_scale_gmem.at[i, rows], a_scale_smem)
            return next_slot(slot)

        for product in range(products):
            slot = lax.fori_loop(0, each, functools.partial(fill, product=product), slot)
        return slot

    def produce(tile, column, slot, scale):
        own = pl.ds(warpgroup * 64, 64)
        shape = (64, tiles.columns)
        row, end = rows_of(tile)
        row = row + warpgroup * 64
        plgpu.barrier_wait(scales.at[scale])

        def weight_of(step):
            """Which product a step is of, and its block of 128 there."""
            if products == 1:
                return 0, step
            product = lax.div(jnp.int32(step), jnp.int32(each))
            return product, step - product * each

        def multiply(slot):
            def several(step, slot, total, left, issued=()):
                """Adds the products in flight, the oldest first, and `left` more."""
                if len(issued) == min(tiles.in_flight, len(issued) + left):
                    if not issued:
                        return slot, total
                    (acc, used, factor), *issued = issued
                    part = plgpu.wgmma_accumulator_load(acc, wait_n=len(issued))
                    plgpu.barrier_arrive(free.at[used])
                    return several(step, slot, total + part * factor, left, issued)
                plgpu.barrier_wait(full.at[slot])
                a_scale = mosaic.load(a_scale_smem.at[slot, own], plgpu.Layout.WGMMA.reduce(1))
                factor = a_scale * b_scale_smem[(scale, *weight_of(step))]
                factor = lax.broadcast_in_dim(factor, shape, (0,))

                def issue(acc):
                    plgpu.wgmma(acc, a_smem.at[slot, own], mosaic.transpose(b_smem.at[slot]))
                    more = (*issued, (acc, slot, factor))
                    return several(step + 1, next_slot(slot), total, left - 1, more)

                # Right before its product: with a barrier between them, ptxas clears the
                # accumulator in every step (0.85 to 0.95 of the speed).
                return pl.run_scoped(issue, plgpu.ACC(shape, jnp.float32))

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            together = tiles.round or tiles.in_flight
            rounds, rest = divmod(steps, together)
            several_of = lambda i, carry: several(i * together, *carry, together)
            slot, total = lax.fori_loop(0, rounds, several_of, (slot, zeros))
            slot, total = several(rounds * together, slot, total, rest)
            out = lambda start, width: out_gmem.at[pl.ds(row, 64), pl.ds(column + start, width)]
            pipeline.store(pipeline.pieces_of(total, tiles), out, out_smem, tiles)
            return slot

        def pass_by(slot):
            next_slots = lambda slot: (next_slot(slot),)
            return pipeline.pass_by(steps, (slot,), (full,), free, next_slots)[0]

        return lax.cond((row < end) & (column < n), multiply, pass_by, slot)

    pipeline.specialise(lambda: loop(fetch), lambda: loop(produce), free, tiles)


def matmul(
    a_MK: jax.Array,
    b_NK: jax.Array,
    a_scale_kM: jax.Array,
    b_scale_nk: jax.Array,
    table: tuple[jax.Array, ...] = (),
    more: Sequence[tuple[jax.Array, jax.Array, jax.Array, jax.Array]] = (),
    *,
    tiles: Tiles,
    cores: int,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    interpret=None,
) -> jax.Array:
    """sum over blocks k of 128 of a_scale[k, m] b_scale[n, k] (a block . b block).

    With a table (rows, groups, ends of the row tiles and their number) `b` and its scales have a
    leading dimension of groups. The products of `more` operands, of the same shapes, are added
    before the sum is rounded. TMA wants rows of `a_scale_kM` to be multiples of 4 and Mosaic
    those of `b_scale_nk` of 32: what is added at their ends is not read.
    """
    num_rows, k = a_MK.shape
    products = ((a_MK, b_NK, a_scale_kM, b_scale_nk), *more)
    products = [(mosaic.pad_rows(a), *others) for a, *others in products]
    rows, n = products[0][0].shape[0], b_NK.shape[-2]
    tiles = pipeline.narrow(tiles, n, pipeline.pair_width(tiles))
    # The memory warpgroup is at most `stages` steps ahead of the weight scales in use.
    num_scales = -(-tiles.stages // (len(products) * k // DEPTH)) + 1
    out_type = jax.ShapeDtypeStruct((rows, n), out_dtype)
    kernel = pipeline.launch(
        functools.partial(_body, grouped=bool(table), products=len(products)),
        name=name,
        tiles=tiles,
        cores=cores,
        out_type=out_type,
        operands=[
            pipeline.ring(tiles, (tiles.rows, DEPTH), F8),
            pipeline.ring(tiles, (tiles.columns, DEPTH), F8),
            pipeline.ring(tiles, (tiles.rows,), jnp.float32, swizzle=False),
        ],
        more=[
            plgpu.SMEM((num_scales, len(products), b_scale_nk.shape[-1]), jnp.float32),
            plgpu.Barrier(num_arrivals=len(products), num_barriers=num_scales),
        ],
        store_type=out_type,
        arrivals=3,
        interpret=interpret,
    )
    out_MN = kernel(*(array for product in products for array in product), *table)
    return mosaic.varying_like(a_MK, out_MN)[:num_rows]
