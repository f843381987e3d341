"""Main loop of the block-scaled FP8 products on Hopper: 1 x 128 tiles times 128 x 128 blocks.

One memory warpgroup fills a ring of stages by TMA, running ahead across output tiles; each compute
warpgroup owns 64 rows, multiplies 128 of the contraction into fresh registers and adds the scaled
product to FP32 sums (promotion). The warpgroups are not ordered against each other, so one's
promotion hides behind the others' WGMMAs; three of them hide it best. Pairs of blocks along the
columns share the row operand by multicast.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic

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

    def __post_init__(self):
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"{self.warpgroups=} must be 1, 2 or 3")
        if self.columns not in (16, 32, 64, 128):
            raise ValueError(f"{self.columns=} must divide a block of 128: 16, 32, 64 or 128")
        if self.columns % self.store_columns:
            raise ValueError(f"{self.columns=} must be divisible by {self.store_columns=}")

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


def _body(
    a_gmem,
    b_gmem,
    a_scale_gmem,
    b_scale_gmem,
    *refs,
    tiles,
    grouped,
):
    """Grouped: tile t has rows rows[t] to ends[t] and the weights of groups[t]; used[0] tiles."""
    table, refs = (refs[:4], refs[4:]) if grouped else ((), refs)
    out_gmem, a_smem, b_smem, a_scale_smem, b_scale_smem, out_smem, full, free, scales = refs
    warpgroup = lax.axis_index("warpgroup")
    num_rows, n = out_gmem.shape
    steps = a_gmem.shape[1] // DEPTH
    pair = 2 if tiles.pair else 1
    row_tiles = table[3][0] if grouped else pl.cdiv(num_rows, tiles.rows)
    column_pairs = pl.cdiv(pl.cdiv(n, tiles.columns), pair)
    grid = (row_tiles * column_pairs,)
    shared = {"collective_axes": "pair"} if tiles.pair else {}
    num_scales = b_scale_smem.shape[0]
    next_slot = lambda slot: lax.select(slot == tiles.stages - 1, jnp.int32(0), slot + 1)
    next_scale = lambda i: lax.select(i == num_scales - 1, jnp.int32(0), i + 1)
    zero = jnp.int32(0)

    def tile_of(info):
        (index,) = info.index
        tile, column = plgpu.planar_snake(index, (row_tiles, column_pairs), 1, tiles.band)
        return tile, column * pair + lax.axis_index("pair")

    def memory():
        plgpu.set_max_registers(tiles.memory_registers, action="decrease")

        @plgpu.nd_loop(grid, collective_axes="cluster", init_carry=(zero, zero))
        def last(info, carry):
            slot, scale = carry
            tile, column = tile_of(info)
            row = table[0][tile] if grouped else tile * tiles.rows
            group = (table[1][tile],) if grouped else ()
            rows, columns = pl.ds(row, tiles.rows), pl.ds(column * tiles.columns, tiles.columns)

            def fill(i, slot):
                plgpu.barrier_wait(free.at[slot])

                @pl.when(i == 0)
                def _():
                    block = column * tiles.columns // 128
                    plgpu.copy_gmem_to_smem(
                        b_scale_gmem.at[(*group, block)], b_scale_smem.at[scale], scales.at[scale]
                    )

                depth = pl.ds(i * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(
                    a_gmem.at[rows, depth], a_smem.at[slot], full.at[slot], **shared
                )
                plgpu.copy_gmem_to_smem(
                    b_gmem.at[(*group, columns, depth)], b_smem.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    a_scale_gmem.at[i, rows], a_scale_smem.at[slot], full.at[slot]
                )
                return next_slot(slot)

            return lax.fori_loop(0, steps, fill, slot), next_scale(scale)

        # No barrier may be left behind mid-flight: wait until every stage was consumed.
        def wait(_, slot):
            plgpu.barrier_wait(free.at[slot])
            return next_slot(slot)

        lax.fori_loop(0, tiles.stages, wait, last[0])

    def compute():
        plgpu.set_max_registers(
            mosaic.compute_registers(tiles.warpgroups, tiles.memory_registers), action="increase"
        )
        for stage in range(tiles.stages):
            plgpu.barrier_arrive(free.at[stage])
        own = pl.ds(warpgroup * 64, 64)
        shape = (64, tiles.columns)

        @plgpu.nd_loop(grid, collective_axes="cluster", init_carry=(zero, zero))
        def _(info, carry):
            slot, scale = carry
            tile, column = tile_of(info)
            row = (table[0][tile] if grouped else tile * tiles.rows) + warpgroup * 64
            plgpu.barrier_wait(scales.at[scale])

            def multiply(slot):
                def step(i, carry):
                    slot, total = carry
                    plgpu.barrier_wait(full.at[slot])
                    a_scale = mosaic.load(a_scale_smem.at[slot, own], plgpu.Layout.WGMMA.reduce(1))
                    factor = lax.broadcast_in_dim(a_scale * b_scale_smem[scale, i], shape, (0,))

                    def chunk(acc):
                        plgpu.wgmma(acc, a_smem.at[slot, own], mosaic.transpose(b_smem.at[slot]))
                        part = plgpu.wgmma_accumulator_load(acc, wait_n=0)
                        plgpu.barrier_arrive(free.at[slot])
                        return total + part * factor

                    return next_slot(slot), pl.run_scoped(chunk, plgpu.ACC(shape, jnp.float32))

                zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                slot, total = lax.fori_loop(0, steps, step, (slot, zeros))
                width = tiles.store_columns
                for piece in range(tiles.columns // width):
                    buffer = out_smem.at[warpgroup, piece % tiles.store_buffers]
                    plgpu.wait_smem_to_gmem(tiles.store_buffers - 1, wait_read_only=True)
                    part = total[:, piece * width : (piece + 1) * width]
                    buffer[...] = part.astype(out_smem.dtype)
                    plgpu.commit_smem()
                    columns = pl.ds(column * tiles.columns + piece * width, width)
                    plgpu.copy_smem_to_gmem(buffer, out_gmem.at[pl.ds(row, 64), columns])
                return slot

            # The last tile of a group (or of the rows) may have fewer rows than it is high: a
            # warpgroup without rows leaves the tensor cores to the others, and writes nothing.
            def pass_by(slot):
                def step(_, slot):
                    plgpu.barrier_wait(full.at[slot])
                    # Without WGMMAs only this keeps the four warps in the same phase.
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(free.at[slot])
                    return next_slot(slot)

                return lax.fori_loop(0, steps, step, slot)

            end = table[2][tile] if grouped else num_rows
            return lax.cond(row < end, multiply, pass_by, slot), next_scale(scale)

        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < tiles.warpgroups, compute, memory)


def matmul(
    a_MK: jax.Array,
    b_NK: jax.Array,
    a_scale_kM: jax.Array,
    b_scale_nk: jax.Array,
    table: tuple[jax.Array, ...] = (),
    *,
    tiles: Tiles,
    cores: int,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    interpret=None,
) -> jax.Array:
    """sum over blocks k of 128 of a_scale[k, m] b_scale[n, k] (a block . b block).

    With a table (rows, groups, ends of the row tiles and their number) `b` and its scales have a
    leading dimension of groups. TMA wants rows of `a_scale_kM` to be multiples of 4 and Mosaic
    those of `b_scale_nk` of 32: what is added at their ends is not read.
    """
    num_rows, k = a_MK.shape
    a_MK = mosaic.pad_rows(a_MK)
    n = b_NK.shape[-2]
    pair = 2 if tiles.pair else 1
    # The memory warpgroup is at most `stages` steps ahead of the weight scales in use.
    num_scales = -(-tiles.stages // (k // DEPTH)) + 1
    stage = lambda rows: plgpu.SMEM(
        (tiles.stages, rows, DEPTH), F8, transforms=mosaic.swizzled(DEPTH, F8)
    )
    kernel = mosaic.launch(
        functools.partial(_body, tiles=tiles, grouped=bool(table)),
        name=name,
        out_type=jax.ShapeDtypeStruct((a_MK.shape[0], n), out_dtype),
        grid=(cores // pair,),
        grid_names=("cluster",),
        cluster=(pair,),
        cluster_names=("pair",),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            stage(tiles.rows),
            stage(tiles.columns),
            plgpu.SMEM((tiles.stages, tiles.rows), jnp.float32),
            plgpu.SMEM((num_scales, b_scale_nk.shape[-1]), jnp.float32),
            plgpu.SMEM(
                (tiles.warpgroups, tiles.store_buffers, 64, tiles.store_columns),
                out_dtype,
                transforms=mosaic.swizzled(tiles.store_columns, out_dtype, n),
            ),
            plgpu.Barrier(num_arrivals=3, num_barriers=tiles.stages),
            plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=tiles.warpgroups, num_barriers=tiles.stages
            ),
            plgpu.Barrier(num_arrivals=1, num_barriers=num_scales),
        ],
        interpret=interpret,
    )
    out_MN = kernel(a_MK, b_NK, a_scale_kM, b_scale_nk, *table)
    return mosaic.varying_like(a_MK, out_MN)[:num_rows]
