"""The grouped products on Hopper: persistent, warp-specialised, one ring of stages for all tiles.

The structure is pipeline.py's, with two compute warpgroups. Group sizes are read on the device;
nothing waits for the host.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels import mosaic, pipeline
from pallas_kernels.grouped_matmul import tuned
from pallas_kernels.grouped_matmul.groups import group_of_block, group_starts, padded_sizes
from pallas_kernels.grouped_matmul.tiles import DEPTH, ROWS, Tiles


def tiles_by_rows(rows: int, groups: int, n: int, k: int) -> Tiles:
    """Tiles for so many rows in groups with weights of n outputs and k inputs.

    In pairs: 1.00 to 1.03, 1.01 on average, of the speed without (H200, 8 and 32 groups of 32,768
    rows, both orders of the weight, ten calls of each at a time).
    """
    return tuned.TILES.get((rows // groups, n, k), Tiles())


def tiles_by_contraction(rows: int, groups: int, n: int, k: int) -> Tiles:
    """Tiles for weight gradients [n, k] of so many rows in groups.

    In pairs best or within 1 % of the best of five on an H200, for 8 and 32 groups of 32,768 rows;
    of an odd number of row tiles one would be multiplied for nothing.
    """
    rule = Tiles(store_buffers=1, pair=pl.cdiv(n, ROWS) % 2 == 0)
    return tuned.GRADIENT_TILES.get((rows // groups, n, k), rule)


def _num_tiles(row_tiles, columns: int, tiles) -> tuple:
    """Row tiles, or pairs of them, and column tiles."""
    return pl.cdiv(row_tiles, pipeline.pair_size(tiles)), pl.cdiv(columns, tiles.columns)


def _tile_at(index, num_tiles, tiles):
    """First row tile of this block's pair, and column tile.

    The blocks of a pair lie one below the other and share the operand of the columns, which has up
    to 256 of them where a block has 128 rows.
    """
    pair = pipeline.pair_size(tiles)
    row, column = plgpu.planar_snake(index, num_tiles, 0, max(1, tiles.band // pair))
    return row * pair, column


def _multiply(first, steps, tiles, full, free, mma, prepare=None):
    """Sums `steps` products from the ring; returns the next slot and the sums in registers.

    One product stays in flight: a stage is released when the product after it was issued.
    """

    def scoped(acc):
        def issue(i, slot):
            plgpu.barrier_wait(full.at[slot])
            if prepare is not None:
                prepare(i, slot)
            mma(acc, slot)

        def step(i, previous):
            slot = pipeline.next_slot(previous, tiles.stages)
            issue(i, slot)
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(free.at[previous])
            return slot

        issue(0, first)
        last = lax.fori_loop(1, steps, step, first)
        total = plgpu.wgmma_accumulator_load(acc, wait_n=0)
        plgpu.barrier_arrive(free.at[last])
        return pipeline.next_slot(last, tiles.stages), total

    return pl.run_scoped(scoped, plgpu.ACC((64, tiles.columns), jnp.float32))


def _by_rows_body(
    x_gmem,
    w_gmem,
    groups_gmem,
    used_gmem,
    y_gmem,
    x_smem,
    w_smem,
    y_smem,
    full,
    free,
    *,
    tiles,
    contract_last,
):
    warpgroup = lax.axis_index("warpgroup")
    steps = pl.cdiv(x_gmem.shape[1], DEPTH)
    row_tiles = used_gmem[0]
    num_tiles = _num_tiles(row_tiles, y_gmem.shape[1], tiles)
    # Where a pair has one row tile left, both blocks multiply it and one writes.
    row_of = lambda first, place: jnp.minimum(first + place, row_tiles - 1)
    own_row = lambda first: row_of(first, lax.axis_index("pair"))

    def loop(body):
        @plgpu.nd_loop((math.prod(num_tiles),), collective_axes="cluster", init_carry=jnp.int32(0))
        def last(info, carry):
            (index,) = info.index
            return body(*_tile_at(index, num_tiles, tiles), carry)

        return last

    def fetch(first, column, slot):
        row = own_row(first)
        group = groups_gmem[row]
        rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * tiles.columns, tiles.columns)

        def fill(i, slot, **shared):
            plgpu.barrier_wait(free.at[slot])
            depth = pl.ds(i * DEPTH, DEPTH)
            w_tile = w_gmem.at[
                (group, columns, depth) if contract_last else (group, depth, columns)
            ]
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, depth], x_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(w_tile, w_smem.at[slot], full.at[slot], **shared)
            return pipeline.next_slot(slot, tiles.stages)

        alone = lambda: lax.fori_loop(0, steps, fill, slot)
        if not tiles.pair:
            return alone()
        in_pair = functools.partial(fill, collective_axes="pair")
        together = lambda: lax.fori_loop(0, steps, in_pair, slot)
        # The last rows of a group and the first of the next are multiplied with unlike weights.
        is_shared = groups_gmem[row_of(first, 0)] == groups_gmem[row_of(first, 1)]
        return lax.cond(is_shared, together, alone)

    def produce(first, column, slot):
        row, own = own_row(first), pl.ds(warpgroup * 64, 64)

        def mma(acc, slot):
            w_tile = w_smem.at[slot]
            plgpu.wgmma(
                acc, x_smem.at[slot, own], mosaic.transpose(w_tile) if contract_last else w_tile
            )

        slot, total = _multiply(slot, steps, tiles, full, free, mma)

        def out(start, width):
            columns = pl.ds(column * tiles.columns + start, width)
            return y_gmem.at[pl.ds(row * ROWS + warpgroup * 64, 64), columns]

        @pl.when(first + lax.axis_index("pair") == row)
        def _():
            pipeline.store(pipeline.pieces_of(total, tiles), out, y_smem, tiles)

        return slot

    pipeline.specialise(lambda: loop(fetch), lambda: loop(produce), free, tiles)


def _by_contraction_body(
    y_gmem,
    x_gmem,
    starts_gmem,
    sizes_gmem,
    w_gmem,
    y_smem,
    x_smem,
    w_smem,
    full,
    free,
    *,
    tiles,
):
    warpgroup = lax.axis_index("warpgroup")
    num_groups, n, k = w_gmem.shape
    num_tiles = _num_tiles(pl.cdiv(n, ROWS), k, tiles)

    def loop(body):
        grid = (num_groups, math.prod(num_tiles))

        @plgpu.nd_loop(grid, collective_axes="cluster", init_carry=jnp.int32(0))
        def last(info, carry):
            group, index = info.index
            # An empty group multiplies one step of rows that are all masked: it must write zeros.
            size = sizes_gmem[group]
            steps = jnp.maximum(1, (size + (DEPTH - 1)) // DEPTH)
            first, column = _tile_at(index, num_tiles, tiles)
            row = first + lax.axis_index("pair")
            return body(group, size, steps, row, column, carry)

        return last

    def fetch(group, size, steps, row, column, slot):
        start = starts_gmem[group]
        rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * tiles.columns, tiles.columns)

        def fill(i, slot):
            plgpu.barrier_wait(free.at[slot])
            depth = pl.ds(start + i * DEPTH, DEPTH)
            shared = pipeline.shared_by_pair(tiles)
            plgpu.copy_gmem_to_smem(y_gmem.at[depth, rows], y_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(
                x_gmem.at[depth, columns], x_smem.at[slot], full.at[slot], **shared
            )
            return pipeline.next_slot(slot, tiles.stages)

        return lax.fori_loop(0, steps, fill, slot)

    def produce(group, size, steps, row, column, slot):
        own = pl.ds(warpgroup * 64, 64)

        def mma(acc, slot):
            plgpu.wgmma(acc, mosaic.transpose(y_smem.at[slot, :, own]), x_smem.at[slot])

        def mask(i, slot):
            """Sets the padding rows of a group's last step to 0: they may hold NaN.

            Both warpgroups mask the operand that they share, with equal values.
            """

            @pl.when((i + 1) * DEPTH > size)
            def _():
                _mask_rows(y_smem.at[slot, :, own], size - i * DEPTH)
                width = math.gcd(tiles.columns, 64)
                for column in range(0, tiles.columns, width):
                    _mask_rows(x_smem.at[slot, :, pl.ds(column, width)], size - i * DEPTH)
                plgpu.commit_smem()

        slot, total = _multiply(slot, steps, tiles, full, free, mma, mask)

        def out(start, width):
            columns = pl.ds(column * tiles.columns + start, width)
            return w_gmem.at[group, pl.ds(row * ROWS + warpgroup * 64, 64), columns]

        pipeline.store(pipeline.pieces_of(total, tiles), out, w_smem, tiles)
        return slot

    pipeline.specialise(lambda: loop(fetch), lambda: loop(produce), free, tiles)


def _mask_rows(ref, count):
    """Sets the rows of a tile of 64 from `count` on to 0."""
    layout = plgpu.Layout.WGMMA
    values = mosaic.load(ref, layout)
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, values.shape, 0), layout)
    ref[...] = jnp.where(row < count, values, jnp.zeros_like(values))


def _launch(body, name, out_type, operand_shapes, tiles, cores, interpret):
    tiles = pipeline.narrow(tiles, out_type.shape[-1], tiles.columns)
    return pipeline.launch(
        body,
        name=name,
        tiles=tiles,
        cores=cores,
        out_type=out_type,
        operands=[pipeline.ring(tiles, shape, jnp.bfloat16) for shape in operand_shapes],
        store_type=out_type,
        arrivals=2,
        interpret=interpret,
    )


@functools.partial(
    jax.jit, static_argnames=("alignment", "contract_last", "tiles", "cores", "interpret")
)
def by_rows(
    x_MK: BFloat16[Array, "M K"],
    w_GNK: BFloat16[Array, "G _ _"],
    group_sizes_G: Int32[Array, "G"],
    *,
    alignment: int,
    contract_last: bool,
    tiles: Tiles,
    cores: int,
    interpret=None,
) -> BFloat16[Array, "M _"]:
    """y[m] = x[m] @ w[group of m].T, or x[m] @ w[group of m] when not `contract_last`.

    Rows of padding hold their product, unused rows are not written.
    """
    num_rows = x_MK.shape[0]
    columns = w_GNK.shape[1 if contract_last else 2]
    groups = group_of_block(
        group_sizes_G, num_blocks=num_rows // ROWS, alignment=alignment, block=ROWS
    )
    used = padded_sizes(group_sizes_G, alignment).sum(keepdims=True, dtype=jnp.int32) // ROWS
    w_tile = (tiles.columns, DEPTH) if contract_last else (DEPTH, tiles.columns)
    kernel = _launch(
        functools.partial(_by_rows_body, contract_last=contract_last),
        "grouped_matmul_by_rows",
        jax.ShapeDtypeStruct((num_rows, columns), jnp.bfloat16),
        [(ROWS, DEPTH), w_tile],
        tiles,
        cores,
        interpret,
    )
    return mosaic.varying_like(x_MK, kernel(x_MK, w_GNK, groups, used))


@functools.partial(
    jax.jit, static_argnames=("alignment", "tiles", "cores", "out_dtype", "interpret")
)
def by_contraction(
    y_MN: BFloat16[Array, "M N"],
    x_MK: BFloat16[Array, "M K"],
    group_sizes_G: Int32[Array, "G"],
    *,
    alignment: int,
    tiles: Tiles,
    cores: int,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    interpret=None,
) -> Float[Array, "G N K"]:
    """w[g] = sum over the rows m of group g of outer(y[m], x[m]), summed in FP32."""
    shape = (group_sizes_G.shape[0], y_MN.shape[1], x_MK.shape[1])
    kernel = _launch(
        _by_contraction_body,
        "grouped_matmul_by_contraction",
        jax.ShapeDtypeStruct(shape, out_dtype),
        [(DEPTH, ROWS), (DEPTH, tiles.columns)],
        tiles,
        cores,
        interpret,
    )
    w_GNK = kernel(y_MN, x_MK, group_starts(group_sizes_G, alignment), group_sizes_G)
    return mosaic.varying_like(x_MK, w_GNK)
