"""Main loop of the FP8 weight gradients on Hopper: 1 x 128 tiles on both sides, FP32 out.

w[g] = sum over the tokens m of group g of outer(y[:, m], x[:, m]). Both operands come transposed,
with tokens contiguous, since FP8 WGMMA contracts the last dimension only; a tile of 128 tokens has
one scale per row of y and one per row of x. The structure is that of block_scaled.py; the column
scales take columns / 4 more registers, so three compute warpgroups fit with 96 columns.
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

    warpgroups: int = 2
    columns: int = 128
    stages: int = 5
    # Columns and number of the pieces in which a warpgroup stores its rows.
    store_columns: int = 32
    store_buffers: int = 2
    # Column pairs of a band that is walked row by row, for the L2 cache.
    band: int = 8
    pair: bool = True
    memory_registers: int = 40

    def __post_init__(self):
        if self.columns % 8 or self.columns % self.store_columns or self.columns > 256:
            raise ValueError(
                f"{self.columns=} must be at most 256 and divisible by {self.store_columns=}"
            )

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


def _body(y_gmem, x_gmem, y_scale_gmem, x_scale_gmem, starts_gmem, sizes_gmem, *refs, tiles, add):
    """Group g has the tokens starts[g] to starts[g] + sizes[g], both multiples of 128."""
    w_gmem, y_smem, x_smem, y_scale_smem, x_scale_smem, w_smem, full, free = refs
    warpgroup = lax.axis_index("warpgroup")
    num_groups, n, k = w_gmem.shape
    pair = 2 if tiles.pair else 1
    row_tiles, column_pairs = pl.cdiv(n, tiles.rows), pl.cdiv(pl.cdiv(k, tiles.columns), pair)
    shared = {"collective_axes": "pair"} if tiles.pair else {}
    next_slot = lambda slot: lax.select(slot == tiles.stages - 1, jnp.int32(0), slot + 1)

    def loop(body):
        grid = (num_groups, row_tiles * column_pairs)

        @plgpu.nd_loop(grid, collective_axes="cluster", init_carry=jnp.int32(0))
        def slot(info, carry):
            group, index = info.index
            row, column = plgpu.planar_snake(index, (row_tiles, column_pairs), 1, tiles.band)
            column = column * pair + lax.axis_index("pair")
            steps = lax.div(sizes_gmem[group], jnp.int32(DEPTH))
            return body(group, steps, row * tiles.rows, column * tiles.columns, carry)

        return slot

    def memory():
        plgpu.set_max_registers(tiles.memory_registers, action="decrease")

        def fetch(group, steps, row, column, slot):
            first = lax.div(starts_gmem[group], jnp.int32(DEPTH))
            rows, columns = pl.ds(row, tiles.rows), pl.ds(column, tiles.columns)

            def fill(i, slot):
                plgpu.barrier_wait(free.at[slot])
                block = first + i
                depth = pl.ds(block * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(
                    y_gmem.at[rows, depth], y_smem.at[slot], full.at[slot], **shared
                )
                plgpu.copy_gmem_to_smem(x_gmem.at[columns, depth], x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    y_scale_gmem.at[block, rows], y_scale_smem.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    x_scale_gmem.at[block, columns], x_scale_smem.at[slot], full.at[slot]
                )
                return next_slot(slot)

            return lax.fori_loop(0, steps, fill, slot)

        # No barrier may be left behind mid-flight: wait until every stage was consumed.
        def wait(_, slot):
            plgpu.barrier_wait(free.at[slot])
            return next_slot(slot)

        lax.fori_loop(0, tiles.stages, wait, loop(fetch))

    def compute():
        plgpu.set_max_registers(
            mosaic.compute_registers(tiles.warpgroups, tiles.memory_registers), action="increase"
        )
        for stage in range(tiles.stages):
            plgpu.barrier_arrive(free.at[stage])
        own = pl.ds(warpgroup * 64, 64)
        shape = (64, tiles.columns)
        layout = plgpu.Layout.WGMMA

        def produce(group, steps, row, column, slot):
            def step(i, carry):
                slot, total = carry
                plgpu.barrier_wait(full.at[slot])
                y_scale = mosaic.load(y_scale_smem.at[slot, own], layout.reduce(1))
                x_scale = mosaic.load(x_scale_smem.at[slot], layout.reduce(0))

                def multiply(acc):
                    plgpu.wgmma(acc, y_smem.at[slot, own], mosaic.transpose(x_smem.at[slot]))
                    part = plgpu.wgmma_accumulator_load(acc, wait_n=0)
                    plgpu.barrier_arrive(free.at[slot])
                    by_column = part * lax.broadcast_in_dim(x_scale, shape, (1,))
                    return total + by_column * lax.broadcast_in_dim(y_scale, shape, (0,))

                total = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                return next_slot(slot), total

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
            slot, total = lax.fori_loop(0, steps, step, (slot, zeros))
            width = tiles.store_columns
            for piece in range(tiles.columns // width):
                buffer = w_smem.at[warpgroup, piece % tiles.store_buffers]
                plgpu.wait_smem_to_gmem(tiles.store_buffers - 1, wait_read_only=True)
                buffer[...] = total[:, piece * width : (piece + 1) * width]
                plgpu.commit_smem()
                columns = pl.ds(column + piece * width, width)
                plgpu.copy_smem_to_gmem(
                    buffer,
                    w_gmem.at[group, pl.ds(row + warpgroup * 64, 64), columns],
                    reduction_op="add" if add else None,
                )
            return slot

        loop(produce)
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < tiles.warpgroups, compute, memory)


def matmul(
    y_NM: jax.Array,
    x_KM: jax.Array,
    y_scale_mN: jax.Array,
    x_scale_mK: jax.Array,
    starts_G: jax.Array,
    sizes_G: jax.Array,
    accumulator_GNK: jax.Array | None = None,
    *,
    tiles: Tiles,
    cores: int,
    name: str,
    interpret=None,
) -> jax.Array:
    """Weight gradients [G, N, K] in FP32, added into the accumulator in place if there is one.

    Groups start at multiples of 128 tokens and sizes are multiples of 128: padding tokens are zeros
    with finite scales. A group without tokens gets exactly 0.
    """
    n, k = y_NM.shape[0], x_KM.shape[0]
    pair = 2 if tiles.pair else 1
    stage = lambda rows: plgpu.SMEM(
        (tiles.stages, rows, DEPTH), F8, transforms=mosaic.swizzled(DEPTH, F8)
    )
    out_type = jax.ShapeDtypeStruct((sizes_G.shape[0], n, k), jnp.float32)
    # Before jax 0.11 a kernel cannot write into an operand.
    add = accumulator_GNK is not None and jax.__version_info__ >= (0, 11)
    kernel = mosaic.launch(
        functools.partial(_body, tiles=tiles, add=add),
        name=name,
        out_type=() if add else out_type,
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
            plgpu.SMEM((tiles.stages, tiles.columns), jnp.float32),
            plgpu.SMEM(
                (tiles.warpgroups, tiles.store_buffers, 64, tiles.store_columns),
                jnp.float32,
                transforms=mosaic.swizzled(tiles.store_columns, jnp.float32, k),
            ),
            plgpu.Barrier(num_arrivals=4, num_barriers=tiles.stages),
            plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=tiles.warpgroups, num_barriers=tiles.stages
            ),
        ],
        interpret=interpret,
    )
    operands = (y_NM, x_KM, y_scale_mN, x_scale_mK, starts_G, sizes_G)
    if add:
        accumulator = jax.new_ref(accumulator_GNK)
        kernel(*operands, accumulator)
        return jax.freeze(accumulator)
    w_GNK = mosaic.varying_like(y_NM, kernel(*operands))
    return w_GNK if accumulator_GNK is None else accumulator_GNK + w_GNK
