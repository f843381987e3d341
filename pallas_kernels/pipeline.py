"""What the products on Hopper share: a ring of stages, its memory warpgroup, and the store.

A block is one memory warpgroup and some compute warpgroups of 64 rows each. The memory warpgroup
fills a ring of stages in shared memory by TMA and runs ahead across output tiles; the compute
warpgroups free a stage each on its own and are not ordered against each other, so that what one of
them does between its WGMMAs hides behind the WGMMAs of the others. The blocks of a pair share one
operand by multicast: in FP8 they lie side by side along the columns and share that of the rows, in
BF16 one below the other and share that of the columns.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic


def check_store(tiles):
    """One ValueError if the pieces of a tile do not fit its store buffers.

    Piece i of every tile uses buffer i modulo their number: any other number of pieces would
    overwrite a buffer that the last tile's copy may still be reading.
    """
    if tiles.columns % tiles.store_columns:
        raise ValueError(f"{tiles.columns=} must be divisible by {tiles.store_columns=}")
    pieces = tiles.columns // tiles.store_columns
    if pieces % tiles.store_buffers:
        raise ValueError(f"{tiles.store_buffers=} must divide the {pieces} pieces of a tile")


def narrow(tiles, columns: int, reach: int):
    """The tiles, with pieces of half the width where one is as wide as the whole result.

    Mosaic drops the index of a dimension that one piece covers: pieces past its end, which are
    otherwise left out, would be written over it.

    Args:
      reach: columns of a block, or of the two that lie side by side.
    """
    if columns != tiles.store_columns or reach == columns:
        return tiles
    return dataclasses.replace(
        tiles,
        store_columns=tiles.store_columns // 2,
        store_buffers=2 * tiles.store_buffers,
    )


def next_slot(slot, stages: int):
    """The slot after this one in a ring."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def shared_by_pair(tiles) -> dict[str, str]:
    """Options of the copy of the operand that the blocks of a pair share."""
    return {"collective_axes": "pair"} if tiles.pair else {}


def pair_size(tiles) -> int:
    """Blocks of a pair; one without pairs."""
    return 2 if tiles.pair else 1


def pair_width(tiles) -> int:
    """Columns of a pair whose blocks lie side by side; of a block without pairs."""
    return tiles.columns * pair_size(tiles)


def column_pairs(columns: int, tiles) -> int:
    """Pairs of column tiles; single ones without pairs."""
    return pl.cdiv(columns, pair_width(tiles))


def tile_at(index, row_tiles, pairs, tiles, minor: int):
    """Row tile and column tile of this block: bands along one dimension, snaking, for the L2."""
    row, pair = plgpu.planar_snake(index, (row_tiles, pairs), minor, tiles.band)
    return row, pair * pair_size(tiles) + lax.axis_index("pair")


def specialise(memory: Callable, compute: Callable, free, tiles):
    """Runs `memory` in one warpgroup, which returns its last slot, and `compute` in the others."""
    warpgroup = lax.axis_index("warpgroup")
    registers = mosaic.compute_registers(tiles.warpgroups, tiles.memory_registers)

    def run_memory():
        plgpu.set_max_registers(tiles.memory_registers, action="decrease")

        # No barrier may be left behind mid-flight: wait until every stage was consumed.
        def wait(_, slot):
            plgpu.barrier_wait(free.at[slot])
            return next_slot(slot, tiles.stages)

        lax.fori_loop(0, tiles.stages, wait, memory())

    def run_compute():
        plgpu.set_max_registers(registers, action="increase")
        for stage in range(tiles.stages):
            plgpu.barrier_arrive(free.at[stage])
        compute()
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < tiles.warpgroups, run_compute, run_memory)


def pass_by(steps, slots: tuple, full: Sequence, free, next_slots: Callable) -> tuple:
    """Frees stages unused, in a warpgroup that has nothing in this tile, and writes nothing.

    The tensor cores are left to the others. `slots` begins with that of the stages.
    """

    def step(_, slots):
        for arrived in full:
            plgpu.barrier_wait(arrived.at[slots[0]])
        # Without WGMMAs only this keeps the four warps in the same phase.
        plgpu.commit_smem()
        plgpu.barrier_arrive(free.at[slots[0]])
        return next_slots(*slots)

    return lax.fori_loop(0, steps, step, slots)


def pieces_of(total, tiles):
    """A warpgroup's 64 rows as they are stored, one after the other."""
    width = tiles.store_columns
    return (total[:, start : start + width] for start in range(0, tiles.columns, width))


def fetch_sums(out_gmem: Callable, out_smem, sums, tiles):
    """Begins to fetch what a warpgroup's 64 rows are to be added to into its store buffers."""
    warpgroup, width = lax.axis_index("warpgroup"), tiles.store_columns
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for piece in range(tiles.store_buffers):
        source, target = out_gmem(piece * width, width), out_smem.at[warpgroup, piece]
        plgpu.copy_gmem_to_smem(source, target, sums.at[warpgroup])


def store(pieces, out_gmem: Callable, out_smem, tiles, *, add: bool = False, sums=()):
    """Writes the pieces of a warpgroup's 64 rows through shared memory, or adds them.

    A piece waits only until the copy that last used its buffer has read it. With a barrier of
    `sums`, it is added to what `fetch_sums` brought there.
    """
    warpgroup, width = lax.axis_index("warpgroup"), tiles.store_columns
    for barrier in sums:
        plgpu.barrier_wait(barrier.at[warpgroup])
    for piece, values in enumerate(pieces):
        buffer = out_smem.at[warpgroup, piece % tiles.store_buffers]
        if sums:
            values += mosaic.load(buffer, plgpu.Layout.WGMMA)
        else:
            plgpu.wait_smem_to_gmem(tiles.store_buffers - 1, wait_read_only=True)
        buffer[...] = values.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            buffer, out_gmem(piece * width, width), reduction_op="add" if add else None
        )


def ring(tiles, shape: Sequence[int], dtype, swizzle: bool = True):
    """The stages of one operand."""
    transforms = mosaic.swizzled(shape[-1], dtype) if swizzle else ()
    return plgpu.SMEM((tiles.stages, *shape), dtype, transforms=transforms)


def launch(
    body: Callable,
    *,
    name: str,
    tiles,
    cores: int,
    out_type,
    operands: Sequence,
    store_type: jax.ShapeDtypeStruct,
    arrivals: int,
    more: Sequence = (),
    interpret=None,
):
    """The kernel of a persistent grid whose body gets, after its operands and results: the rings of
    the operands, what is in `more`, the store buffers, and the barriers of full and free stages.

    Args:
      store_type: of the array that is written.
      arrivals: copies that fill a stage.
    """
    pair = pair_size(tiles)
    store_buffers = plgpu.SMEM(
        (tiles.warpgroups, tiles.store_buffers, 64, tiles.store_columns),
        store_type.dtype,
        transforms=mosaic.swizzled(tiles.store_columns, store_type.dtype, store_type.shape[-1]),
    )
    return mosaic.launch(
        functools.partial(body, tiles=tiles),
        name=name,
        out_type=out_type,
        grid=(cores // pair,),
        grid_names=("cluster",),
        cluster=(pair,),
        cluster_names=("pair",),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            *operands,
            *more,
            store_buffers,
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.stages),
            plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=tiles.warpgroups, num_barriers=tiles.stages
            ),
        ],
        interpret=interpret,
    )
