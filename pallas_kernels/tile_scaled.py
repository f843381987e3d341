"""Main loop of the FP8 weight gradients on Hopper: 1 x 128 tiles on both sides, FP32 out.

w[g] = sum over the tokens m of group g of outer(y[:, m], x[:, m]). Both operands come transposed,
with tokens contiguous, since FP8 WGMMA contracts the last dimension only; a tile of 128 tokens has
one scale per row of y and one per row of x. The structure is pipeline.py's, as in block_scaled.py;
the column scales take columns / 4 more registers: those that do not fit beside a product and its
sum are loaded while the product is added. So scales have a ring of their own, one stage longer: a
stage of codes is free as soon as the product is made.

Shared memory is what limits it, 128 bytes a cycle: a step of 128 tokens of 192 x 96 columns reads
60 KiB for the products and 21 KiB of column scales and is written 36 KiB, which takes 936 cycles
where the tensor cores need 576; 192 x 128 takes 1112 for a third more work. Hiding the way from a
product to its sum does not help: two warpgroups of 96 columns with two products in flight each are
0.83 to 0.94 of three warpgroups with one, and 0.94 to 1.02 where only every fourth step waits. Nor
do rows in registers, with columns multiplied in parts so that all scales fit: 3 x 128 in two parts
are 0.86 to 1.02 of the tuned tiles, 2 x 192 in two 0.65 to 0.98, 2 x 256 in four 0.82 to 0.96.
"""

import dataclasses
import functools
import math

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
    # Accumulating: what is there is fetched behind the products, added in registers and written
    # back; otherwise the L2 cache adds what is stored.
    fetch_sums: bool = False
    # Times 64 rows that a warpgroup multiplies one after the other; they share column scales. Two
    # warpgroups of two, 96 columns wide, move 137 KiB a step for products of 768 cycles. (Not
    # measured on a card yet.)
    slices: int = 1

    def __post_init__(self):
        if self.columns % 8 or self.columns > 256:
            raise ValueError(f"{self.columns=} must be a multiple of 8 up to 256")
        pipeline.check_store(self)
        if self.fetch_sums and self.columns != self.store_columns * self.store_buffers:
            raise ValueError(
                f"{self.fetch_sums=} needs a whole tile in store buffers: {self.store_buffers=} of "
                f"{self.store_columns=} are not {self.columns=}"
            )

        if self.fetch_sums and self.slices > 1:
            raise ValueError(f"{self.fetch_sums=} is for one slice, not {self.slices=}")

    @property
    def rows(self) -> int:
        return 64 * self.slices * self.warpgroups


def _body(y_gmem, x_gmem, y_scale_gmem, x_scale_gmem, starts_gmem, sizes_gmem, *refs, tiles, add):
    """Group g has the tokens starts[g] to starts[g] + sizes[g], both multiples of 128."""
    w_gmem, y_smem, x_smem, y_scale_smem, x_scale_smem, rest, sums, w_smem, full, free = refs
    warpgroup = lax.axis_index("warpgroup")
    num_groups, n, k = w_gmem.shape
    height = 64 * tiles.warpgroups
    row_tiles, pairs = pl.cdiv(n, tiles.rows), pipeline.column_pairs(k, tiles)
    zero = jnp.int32(0)

    def next_slots(slot, scale_slot):
        return (
            pipeline.next_slot(slot, tiles.stages),
            pipeline.next_slot(scale_slot, tiles.stages + 1),
        )

    def loop(body):
        grid = (num_groups, row_tiles * pairs)

        @plgpu.nd_loop(grid, collective_axes="cluster", init_carry=(zero, zero))
        def last(info, carry):
            group, index = info.index
            row, column = pipeline.tile_at(index, row_tiles, pairs, tiles, 1)
            steps = lax.div(sizes_gmem[group], jnp.int32(DEPTH))
            return body(group, steps, row * tiles.rows, column * tiles.columns, carry)

        return last[0]

    def fetch(group, steps, row, column, slots):
        first = lax.div(starts_gmem[group], jnp.int32(DEPTH))
        rows, columns = pl.ds(row, tiles.rows), pl.ds(column, tiles.columns)

        def fill(i, slots):
            slot, scale_slot = slots
            plgpu.barrier_wait(free.at[slot])
            block = first + i
            depth = pl.ds(block * DEPTH, DEPTH)
            shared = pipeline.shared_by_pair(tiles)
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, full.at[slot])
            for j, arrived in enumerate((full, *rest)):
                part = pl.ds(j * height, height)
                source = y_gmem.at[pl.ds(row + part.start, height), depth]
                target = y_smem.at[slot, part]
                plgpu.copy_gmem_to_smem(source, target, arrived.at[slot], **shared)
            copy(x_gmem.at[columns, depth], x_smem.at[slot])
            copy(y_scale_gmem.at[block, rows], y_scale_smem.at[scale_slot])
            copy(x_scale_gmem.at[block, columns], x_scale_smem.at[scale_slot])
            return next_slots(*slots)

        return lax.fori_loop(0, steps, fill, slots)

    def produce(group, steps, row, column, slots):
        width = math.gcd(tiles.store_columns, 16)
        shape, piece_shape = (64, tiles.columns), (64, width)
        layout = plgpu.Layout.WGMMA
        owns = [pl.ds(j * height + warpgroup * 64, 64) for j in range(tiles.slices)]

        def out(start, width, own=owns[0]):
            return w_gmem.at[group, pl.ds(row + own.start, 64), pl.ds(column + start, width)]

        # Column scales are loaded before the products as far as registers are left by a product and
        # the sums, each half of one a column, and by 12 others in the loop; the rest when needed. A
        # load issued after the products waits until the last of them is accepted, and then for the
        # shared memory that they saturate: 3 x 96 was 7 to 26 % faster with all before (H200).
        spare = mosaic.compute_registers(tiles.warpgroups, tiles.memory_registers)
        spare -= (1 + tiles.slices) * tiles.columns // 2 + 12
        pieces = range(0, tiles.columns, width)
        early = pieces[: max(0, min(len(pieces), 4 * spare // width))]

        def step(i, carry):
            slot, scale_slot, totals = carry
            if sums:
                # The last tile was read from the store buffers long ago.
                pl.when(i == jnp.minimum(1, steps - 1))(
                    lambda: pipeline.fetch_sums(out, w_smem, sums[0], tiles)
                )
            plgpu.barrier_wait(full.at[slot])

            def column_scale(start):
                columns = pl.ds(start, width)
                scale = mosaic.load(x_scale_smem.at[scale_slot, columns], layout.reduce(0))
                return lax.broadcast_in_dim(scale, piece_shape, (1,))

            scales = [column_scale(start) for start in early]

            def product(own, totals):
                y_scale = mosaic.load(y_scale_smem.at[scale_slot, own], layout.reduce(1))
                by_row = lax.broadcast_in_dim(y_scale, piece_shape, (0,))

                def scoped(acc):
                    plgpu.wgmma(acc, y_smem.at[slot, own], mosaic.transpose(x_smem.at[slot]))
                    part = plgpu.wgmma_accumulator_load(acc, wait_n=0)
                    if own is owns[-1]:
                        plgpu.barrier_arrive(free.at[slot])
                    found = []
                    for j, (start, total) in enumerate(zip(pieces, totals, strict=True)):
                        by_column = scales[j] if j < len(scales) else column_scale(start)
                        piece = part[:, start : start + width]
                        found.append(total + piece * by_column * by_row)
                    return tuple(found)

                return pl.run_scoped(scoped, plgpu.ACC(shape, jnp.float32))

            found = [product(owns[0], totals[0])]
            for own, total, arrived in zip(owns[1:], totals[1:], rest, strict=True):
                plgpu.barrier_wait(arrived.at[slot])
                found.append(product(own, total))
            return *next_slots(slot, scale_slot), tuple(found)

        def multiply(slots):
            zeros = plgpu.layout_cast(jnp.zeros(piece_shape, jnp.float32), layout)
            totals = ((zeros,) * len(pieces),) * tiles.slices
            *slots, totals = lax.fori_loop(0, steps, step, (*slots, totals))
            each = tiles.store_columns // width

            def store(own, total, **options):
                joined = [
                    mosaic.concatenate_columns(total[i : i + each])
                    for i in range(0, len(total), each)
                ]
                out_of = functools.partial(out, own=own)
                pipeline.store(joined, out_of, w_smem, tiles, **options)

            def store_all(**options):
                for own, total in zip(owns, totals, strict=True):
                    store(own, total, **options)

            if add:
                # Nothing is added for a group without tokens.
                pl.when(steps > 0)(lambda: store_all(add=not sums, sums=sums))
            else:
                store_all()
            return tuple(slots)

        pass_by = lambda slots: pipeline.pass_by(steps, slots, (full, *rest), free, next_slots)
        inside = (row + warpgroup * 64 < n) & (column < k)
        return lax.cond(inside, multiply, pass_by, tuple(slots))

    pipeline.specialise(lambda: loop(fetch), lambda: loop(produce), free, tiles)


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
    tiles = pipeline.narrow(tiles, k, pipeline.pair_width(tiles))
    out_type = jax.ShapeDtypeStruct((sizes_G.shape[0], n, k), jnp.float32)
    # Before jax 0.11 a kernel cannot write into an operand, and none into one that varies over
    # the axes of a mesh.
    in_place = jax.__version_info__ >= (0, 11) and not mosaic.varying_axes(y_NM)
    add = accumulator_GNK is not None and in_place
    scales = lambda size: plgpu.SMEM((tiles.stages + 1, size), jnp.float32)
    sums = plgpu.Barrier(num_arrivals=tiles.store_buffers, num_barriers=tiles.warpgroups)
    kernel = pipeline.launch(
        functools.partial(_body, add=add),
        name=name,
        tiles=tiles,
        cores=cores,
        out_type=() if add else out_type,
        operands=[
            pipeline.ring(tiles, (tiles.rows, DEPTH), F8),
            pipeline.ring(tiles, (tiles.columns, DEPTH), F8),
            scales(tiles.rows),
            scales(tiles.columns),
        ],
        more=[
            # Of the slices after the first.
            [plgpu.Barrier(num_barriers=tiles.stages)] * (tiles.slices - 1),
            [sums] if add and tiles.fetch_sums else [],
        ],
        store_type=out_type,
        arrivals=4,
        interpret=interpret,
    )
    operands = (y_NM, x_KM, y_scale_mN, x_scale_mK, starts_G, sizes_G)
    if add:
        accumulator = jax.new_ref(accumulator_GNK)
        kernel(*operands, accumulator)
        return jax.freeze(accumulator)
    w_GNK = mosaic.varying_like(y_NM, kernel(*operands))
    return w_GNK if accumulator_GNK is None else accumulator_GNK + w_GNK
