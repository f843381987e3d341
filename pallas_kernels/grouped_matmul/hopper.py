"""The grouped products on Hopper: persistent, warp-specialised, one ring of stages for all tiles.

One memory warpgroup fills a ring of stages by TMA and runs ahead across output tiles; two compute
warpgroups own 64 rows each of a 128-row tile and are not ordered against each other, so that one's
store overlaps with the other's WGMMAs. Pairs of blocks along the columns share the row operand by
multicast. Group sizes are read on the device; nothing waits for the host.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul.groups import group_of_block, group_starts, padded_sizes

WARPGROUPS = 2
ROWS = 64 * WARPGROUPS
DEPTH = 64
MEMORY_REGISTERS = 40


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Shape of a block's work; 227 KiB of shared memory bound the stages and the store buffers.

    Columns that are no multiple of 64 serve only weights whose last dimension is contracted.
    """

    columns: int = 256
    stages: int = 4
    # Columns and number of the pieces in which a warpgroup stores its rows.
    store_columns: int = 64
    store_buffers: int = 2
    # Row tiles of a band that is walked column by column, for the L2 cache.
    band: int = 16
    pair: bool = True

    def __post_init__(self):
        if self.columns % 8 or not 8 <= self.columns <= 256:
            raise ValueError(f"{self.columns=} must be a multiple of 8 up to 256")
        if self.columns % self.store_columns:
            raise ValueError(f"{self.columns=} must be divisible by {self.store_columns=}")


def tiles_by_rows(columns: int) -> Tiles:
    """Tiles for an output of so many columns.

    Without pairs: best or within 2 % of the best of seven tiles on 8, 32 and 64 groups. Geometric
    mean over torch's `_grouped_mm` 1.07 (H200, 32,768 rows, both orders of the weight).
    """
    return Tiles(pair=False)


def tiles_by_contraction(rows: int, groups: int) -> Tiles:
    """Tiles for weight gradients of so many groups.

    TFLOP/s on an H200, the FP32 output included, beside torch's `_grouped_mm` with a BF16 one:
      rows a group   output       3 stages, pairs   4 stages, no pairs   torch
      4096           4096 x 7168  774               767                  762
      4096           7168 x 2048  765               754                  747
      1024           4096 x 7168  647               675                  714
      1536           1408 x 2048  702               712                  661
    """
    if rows >= 2048 * groups:
        return Tiles(stages=3, store_columns=32, store_buffers=4)
    return Tiles(store_columns=32, pair=False)


def _next(slot, stages):
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def _tile(info, row_tiles, column_tiles, tiles):
    """Row and column of the output tile: pairs along columns, bands of rows, snaking."""
    pair = 2 if tiles.pair else 1
    (index,) = info.index
    row, column = plgpu.planar_snake(index, (row_tiles, -(-column_tiles // pair)), 0, tiles.band)
    return row, column * pair + lax.axis_index("pair")


def _ring_is_free(free, slot, tiles):
    """Waits until every stage was consumed: no barrier may be left behind mid-flight."""

    def wait(_, slot):
        plgpu.barrier_wait(free.at[slot])
        return _next(slot, tiles.stages)

    lax.fori_loop(0, tiles.stages, wait, slot)


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
            slot = _next(previous, tiles.stages)
            issue(i, slot)
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(free.at[previous])
            return slot

        issue(0, first)
        last = lax.fori_loop(1, steps, step, first)
        total = plgpu.wgmma_accumulator_load(acc, wait_n=0)
        plgpu.barrier_arrive(free.at[last])
        return _next(last, tiles.stages), total

    return pl.run_scoped(scoped, plgpu.ACC((64, tiles.columns), jnp.float32))


def _store(total, out_gmem, out_smem, warpgroup, tiles):
    """Writes a warpgroup's 64 rows piece by piece through shared memory."""
    width = tiles.store_columns
    for piece in range(tiles.columns // width):
        buffer = out_smem.at[warpgroup, piece % tiles.store_buffers]
        plgpu.wait_smem_to_gmem(tiles.store_buffers - 1, wait_read_only=True)
        buffer[...] = total[:, piece * width : (piece + 1) * width].astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_gmem(piece * width, width))


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
    column_tiles = pl.cdiv(y_gmem.shape[1], tiles.columns)
    row_tiles = used_gmem[0]
    grid = (row_tiles * pl.cdiv(column_tiles, 2 if tiles.pair else 1),)
    shared = {"collective_axes": "pair"} if tiles.pair else {}

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @plgpu.nd_loop(grid, collective_axes="cluster", init_carry=jnp.int32(0))
        def slot(info, carry):
            row, column = _tile(info, row_tiles, column_tiles, tiles)
            group = groups_gmem[row]
            rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * tiles.columns, tiles.columns)

            def fill(i, slot):
                plgpu.barrier_wait(free.at[slot])
                depth = pl.ds(i * DEPTH, DEPTH)
                w_tile = w_gmem.at[
                    (group, columns, depth) if contract_last else (group, depth, columns)
                ]
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[rows, depth], x_smem.at[slot], full.at[slot], **shared
                )
                plgpu.copy_gmem_to_smem(w_tile, w_smem.at[slot], full.at[slot])
                return _next(slot, tiles.stages)

            return lax.fori_loop(0, steps, fill, carry)

        _ring_is_free(free, slot, tiles)

    def compute():
        plgpu.set_max_registers(
            mosaic.compute_registers(WARPGROUPS, MEMORY_REGISTERS), action="increase"
        )
        for stage in range(tiles.stages):
            plgpu.barrier_arrive(free.at[stage])
        own = pl.ds(warpgroup * 64, 64)

        def mma(acc, slot):
            w_tile = w_smem.at[slot]
            plgpu.wgmma(
                acc, x_smem.at[slot, own], mosaic.transpose(w_tile) if contract_last else w_tile
            )

        @plgpu.nd_loop(grid, collective_axes="cluster", init_carry=jnp.int32(0))
        def _(info, carry):
            row, column = _tile(info, row_tiles, column_tiles, tiles)
            slot, total = _multiply(carry, steps, tiles, full, free, mma)

            def out(start, width):
                columns = pl.ds(column * tiles.columns + start, width)
                return y_gmem.at[pl.ds(row * ROWS + warpgroup * 64, 64), columns]

            _store(total, out, y_smem, warpgroup, tiles)
            return slot

        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < WARPGROUPS, compute, memory)


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
    row_tiles, column_tiles = pl.cdiv(n, ROWS), pl.cdiv(k, tiles.columns)
    tiles_of_group = row_tiles * pl.cdiv(column_tiles, 2 if tiles.pair else 1)
    shared = {"collective_axes": "pair"} if tiles.pair else {}

    def loop(body):
        @plgpu.nd_loop(
            (num_groups, tiles_of_group), collective_axes="cluster", init_carry=jnp.int32(0)
        )
        def slot(info, carry):
            group, index = info.index
            tile = dataclasses.replace(info, index=(index,))
            # An empty group multiplies one step of rows that are all masked: it must write zeros.
            size = sizes_gmem[group]
            steps = jnp.maximum(1, (size + (DEPTH - 1)) // DEPTH)
            return body(group, size, steps, *_tile(tile, row_tiles, column_tiles, tiles), carry)

        return slot

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def fetch(group, size, steps, row, column, slot):
            start = starts_gmem[group]

            def fill(i, slot):
                plgpu.barrier_wait(free.at[slot])
                depth = pl.ds(start + i * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(
                    y_gmem.at[depth, pl.ds(row * ROWS, ROWS)],
                    y_smem.at[slot],
                    full.at[slot],
                    **shared,
                )
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[depth, pl.ds(column * tiles.columns, tiles.columns)],
                    x_smem.at[slot],
                    full.at[slot],
                )
                return _next(slot, tiles.stages)

            return lax.fori_loop(0, steps, fill, slot)

        _ring_is_free(free, loop(fetch), tiles)

    def compute():
        plgpu.set_max_registers(
            mosaic.compute_registers(WARPGROUPS, MEMORY_REGISTERS), action="increase"
        )
        for stage in range(tiles.stages):
            plgpu.barrier_arrive(free.at[stage])
        own = pl.ds(warpgroup * 64, 64)

        def mma(acc, slot):
            plgpu.wgmma(acc, mosaic.transpose(y_smem.at[slot, :, own]), x_smem.at[slot])

        def produce(group, size, steps, row, column, slot):
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

            _store(total, out, w_smem, warpgroup, tiles)
            return slot

        loop(produce)
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < WARPGROUPS, compute, memory)


def _mask_rows(ref, count):
    """Sets the rows of a tile of 64 from `count` on to 0."""
    layout = plgpu.Layout.WGMMA
    values = mosaic.load(ref, layout)
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, values.shape, 0), layout)
    ref[...] = jnp.where(row < count, values, jnp.zeros_like(values))


def _launch(body, name, out_type, operand_shapes, tiles, cores, interpret):
    pair = 2 if tiles.pair else 1
    stage = lambda shape: plgpu.SMEM(
        (tiles.stages, *shape), jnp.bfloat16, transforms=mosaic.swizzled(shape[1], jnp.bfloat16)
    )
    store = plgpu.SMEM(
        (WARPGROUPS, tiles.store_buffers, 64, tiles.store_columns),
        out_type.dtype,
        transforms=mosaic.swizzled(tiles.store_columns, out_type.dtype),
    )
    return mosaic.launch(
        body,
        name=name,
        out_type=out_type,
        grid=(cores // pair,),
        grid_names=("cluster",),
        cluster=(pair,),
        cluster_names=("pair",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            *map(stage, operand_shapes),
            store,
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=WARPGROUPS, num_barriers=tiles.stages
            ),
        ],
        interpret=interpret,
    )


@functools.partial(
    jax.jit, static_argnames=("alignment", "contract_last", "tiles", "cores", "interpret")
)
def by_rows(
    x_MK: BFloat16[Array, "M K"],
    w_GNK: BFloat16[Array, "G N K"],
    group_sizes_G: Int32[Array, "G"],
    *,
    alignment: int,
    contract_last: bool,
    tiles: Tiles,
    cores: int,
    interpret=None,
) -> BFloat16[Array, "M N"]:
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
        functools.partial(_by_rows_body, tiles=tiles, contract_last=contract_last),
        "grouped_matmul_by_rows",
        jax.ShapeDtypeStruct((num_rows, columns), jnp.bfloat16),
        [(ROWS, DEPTH), w_tile],
        tiles,
        cores,
        interpret,
    )
    return mosaic.varying_like(x_MK, kernel(x_MK, w_GNK, groups, used))


@functools.partial(jax.jit, static_argnames=("alignment", "tiles", "cores", "interpret"))
def by_contraction(
    y_MN: BFloat16[Array, "M N"],
    x_MK: BFloat16[Array, "M K"],
    group_sizes_G: Int32[Array, "G"],
    *,
    alignment: int,
    tiles: Tiles,
    cores: int,
    interpret=None,
) -> Float32[Array, "G N K"]:
    """w[g] = sum over the rows m of group g of outer(y[m], x[m]) in FP32."""
    shape = (group_sizes_G.shape[0], y_MN.shape[1], x_MK.shape[1])
    kernel = _launch(
        functools.partial(_by_contraction_body, tiles=tiles),
        "grouped_matmul_by_contraction",
        jax.ShapeDtypeStruct(shape, jnp.float32),
        [(DEPTH, ROWS), (DEPTH, tiles.columns)],
        tiles,
        cores,
        interpret,
    )
    w_GNK = kernel(y_MN, x_MK, group_starts(group_sizes_G, alignment), group_sizes_G)
    return mosaic.varying_like(x_MK, w_GNK)
