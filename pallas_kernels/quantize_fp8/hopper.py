"""Quantisation on Hopper: one pass over tiles, the transposed layout by WGMMA.

Each block walks tiles of 128 x 128, or of 64 x 128 if only the layout by rows leaves, with some in
flight; blocks on an SM and warpgroups in a block are independent enough that the arithmetic of one
hides behind the loads and stores of the others. A tile's transpose is its product with the
identity: exact, it lands in registers with a row per channel, where a maximum over tokens costs
two shuffles, and it leaves as FP8 without a single-byte store to shared memory.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.quantize_fp8 import retiling, tuned
from pallas_kernels.quantize_fp8.encode import (
    BF16,
    F8,
    LINES_64,
    TILE,
    WGMMA,
    encode,
    identity,
    index,
    round_up,
    rounded,
    spread,
    store_line,
    straight,
    swish,
    transposed,
)
from pallas_kernels.quantize_fp8.form import Form
from pallas_kernels.quantize_fp8.tiles import Tiles


def tiles_of(form: Form) -> Tiles:
    """As measured, or as many bytes in flight as fit."""
    if form.key in tuned.TILES:
        return tuned.TILES[form.key]
    if form.codes:
        return Tiles(blocks=5)
    if not form.columns:
        return Tiles(blocks=2 if form.inputs == 2 else 4)
    return Tiles(blocks=1 if form.inputs == 2 else 2, warpgroups=2)


def _body(*refs, form, tiles, shape, blocks):
    """A piece is 64 rows of a tile, or 64 channels of its transpose: a warpgroup's work at a time.

    Each piece has its own buffers, and the pieces of a tile are shared among the warpgroups.
    """
    refs = list(refs)
    take = lambda count: [refs.pop(0) for _ in range(count)]
    x_gmem = take(form.inputs)
    (row_gmem,) = take(1) if form.by_row else (None,)
    (column_gmem,) = take(1) if form.by_column else (None,)
    (counts_gmem,) = take(1) if form.masked else (None,)
    code_gmem, scale_gmem = take(2) if form.rows else (None, None)
    kept_gmem = [take(2) for _ in range(form.inputs * form.keep)]
    turned_gmem, turned_scale_gmem = take(2) if form.columns else (None, None)
    x_smem = take(form.inputs)
    (row_smem,) = take(1) if form.by_row else (None,)
    (column_smem,) = take(1) if form.by_column else (None,)
    code_smem, scale_smem = take(2) if form.rows else (None, None)
    kept_smem = [take(2) for _ in kept_gmem]
    turned_smem, turned_scale_smem, identity_smem = take(3) if form.columns else (None,) * 3
    # The products read their operand from where the input was.
    tile_smem = x_smem[0]
    full, free, written = refs
    warpgroup = lax.axis_index("warpgroup")
    height = form.height
    column_tiles = pl.cdiv(shape[1], TILE)
    total = pl.cdiv(shape[0], height) * column_tiles
    block = lax.axis_index("block")
    count = (total - block + (blocks - 1)) // blocks
    pieces = [warpgroup] if tiles.warpgroups == 2 else range(height // 64)
    # With one piece a tile the buffers of the stages take turns.
    buffers = tiles.stages if form.one_piece else 1
    turns = len(pieces) * (form.rows + form.columns + len(kept_gmem)) * buffers

    def place(i):
        tile = block + i * blocks
        row, column = lax.div(tile, column_tiles), lax.rem(tile, column_tiles)
        return row, column, pl.ds(row * height, height), pl.ds(column * TILE, TILE)

    def fetch(i):
        slot = lax.rem(i, tiles.stages)
        _, _, rows, columns = place(i)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(
            source, target.at[slot], full.at[slot]
        )
        for source, target in zip(x_gmem, x_smem, strict=True):
            copy(source.at[rows, columns], target)
        if form.by_row:
            copy(row_gmem.at[rows], row_smem)
        if form.by_column:
            copy(column_gmem.at[columns], column_smem)

    def meet():
        """All warpgroups of the block have come here."""
        plgpu.commit_smem()
        if tiles.warpgroups > 1:
            plgpu.barrier_arrive(written.at[0])
            plgpu.barrier_wait(written.at[0])

    @pl.when(warpgroup == 0)
    def _():
        for i in range(tiles.stages):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))
        if form.columns:
            identity_smem[...] = identity()

    if form.columns:
        meet()

    # Eight to a lane, unless the swizzle is that of a narrow width, or the factors of eight
    # columns would be needed, which are more than one load.
    lines = WGMMA if form.by_column or x_gmem[0].shape[1] % 64 else LINES_64

    def masked(x, half, valid, layout=WGMMA):
        if not form.masked:
            return x
        return jnp.where(index(x.shape, 0, layout) < valid - half.start, x, jnp.zeros_like(x))

    def operand(ref, place, layout=WGMMA):
        return mosaic.load(ref.at[place], layout).astype(jnp.float32)

    def values(slot, half, valid, columns, layout=WGMMA):
        """64 rows as FP32 in registers, not rounded yet."""
        x = [operand(ref, (slot, half, columns), layout) for ref in x_smem]
        x = swish(*x) if form.inputs == 2 else x[0]
        if form.by_row:
            factor = mosaic.load(row_smem.at[slot, half], layout.reduce(1))
            x = x * spread(factor, x.shape, 0, layout)
        if form.by_column:
            factor = mosaic.load(column_smem.at[slot, columns], layout.reduce(0))
            x = x * spread(factor, x.shape, 1, layout)
        return masked(x, half, valid, layout)

    def store(encoded, code_smem, scale_smem, code_gmem, line):
        """Codes and scales of a piece, once the copies that last used its buffers have read them.

        All pieces take turns, and the copies of one are one group.
        """
        codes, scale = encoded
        plgpu.wait_smem_to_gmem(turns - 1, wait_read_only=True)
        code_smem[...] = codes
        plgpu.commit_smem()
        store_line(scale, scale_smem, *line)
        plgpu.copy_smem_to_gmem(code_smem, code_gmem)

    def step(i, _):
        slot = lax.rem(i, tiles.stages)
        row, column, rows, columns = place(i)
        valid = TILE
        if form.masked:
            start = row * height
            valid = counts_gmem[lax.div(start, TILE)] - lax.rem(start, TILE)
        plgpu.barrier_wait(full.at[slot])
        for piece in pieces:
            half = pl.ds(piece * 64, 64)
            place_of = (pl.ds(row * height + piece * 64, 64), columns)
            line = (column, row * (height // 64) + piece)
            for ref, (code, scale), kept in zip(x_smem, kept_gmem, kept_smem, strict=False):
                x = masked(operand(ref, (slot, half)), half, valid)
                buffers_of = (ref.at[0] for ref in kept)
                encoded = encode(x, 0, form.power_of_two)
                store(encoded, *buffers_of, code.at[place_of], (scale, *line))
            if form.made:
                # The products read the values from where the input was; a few at a time in
                # registers, of which there are enough for two blocks on an SM.
                def make(chunk, _, half=half):
                    part = pl.ds(chunk * 64, 64)
                    x = values(slot, half, valid, part, lines)
                    tile_smem[slot, half, part] = x.astype(BF16)

                lax.fori_loop(0, TILE // 64, make, None)
            if form.rows:
                if form.made:
                    plgpu.commit_smem()
                if form.columns:
                    x = straight(tile_smem.at[slot], half, identity_smem)
                else:
                    x = values(slot, half, valid, pl.ds(0, TILE))
                    x = x if form.plain else rounded(x)
                buffer = slot if form.one_piece else piece
                store(
                    encode(x, 0, form.power_of_two),
                    code_smem.at[buffer],
                    scale_smem.at[buffer],
                    code_gmem.at[place_of],
                    (scale_gmem, *line),
                )
        if form.columns:
            if form.made:
                meet()
            for piece in pieces:
                half = pl.ds(piece * 64, 64)
                x = transposed(tile_smem.at[slot], half, identity_smem)
                store(
                    encode(x, 0, form.power_of_two),
                    turned_smem.at[piece],
                    turned_scale_smem.at[piece],
                    turned_gmem.at[pl.ds(column * TILE + piece * 64, 64), rows],
                    (turned_scale_gmem, row, column * 2 + piece),
                )
        # Every warp has read the stage: the last piece's commit stands between.
        if tiles.warpgroups > 1:
            plgpu.barrier_arrive(free.at[slot])

        @pl.when((warpgroup == 0) & (i + tiles.stages < count))
        def _():
            if tiles.warpgroups > 1:
                plgpu.barrier_wait(free.at[slot])
            fetch(i + tiles.stages)

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


@functools.partial(
    jax.jit, static_argnames=("form", "tiles", "cores", "name", "width", "interpret")
)
def quantize(
    x: tuple[jax.Array, ...],
    row_M: jax.Array | None = None,
    column_K: jax.Array | None = None,
    counts_m: jax.Array | None = None,
    *,
    form: Form,
    tiles: Tiles,
    cores: int,
    name: str,
    width: int | None = None,
    interpret=None,
) -> tuple[jax.Array, ...]:
    """Codes [M, 128 k] and scales [k, M] by rows, then codes [K, 128 m] and scales [m, K].

    Both only as the form says; after those by rows, the same of the inputs, if they are kept. The
    last dimension of scales is rounded up to a multiple of 4 (TMA).
    """
    num_rows, width, blocks = x[0].shape[0], width or x[0].shape[1], cores * tiles.blocks
    if form.codes:
        return retiling.retile(
            x[0],
            row_M,
            counts_m,
            width=width,
            power_of_two=form.power_of_two,
            tiles=tiles,
            cores=cores,
            name=name,
            interpret=interpret,
        )
    if not form.columns:
        tiles = dataclasses.replace(tiles, warpgroups=1)
    x = tuple(map(mosaic.pad_rows, x))
    row_tiles, column_tiles = pl.cdiv(num_rows, TILE), pl.cdiv(width, TILE)
    shape_of = jax.ShapeDtypeStruct
    out_type, scratch = [], []
    stage = lambda shape, dtype, transforms=(): plgpu.SMEM(
        (tiles.stages, *shape), dtype, transforms=transforms
    )
    buffers = tiles.stages if form.one_piece else form.height // 64
    pieces = plgpu.SMEM((buffers, 64, TILE), F8, transforms=mosaic.swizzled(TILE, F8))
    lines = plgpu.SMEM((buffers, 64), jnp.float32)
    scratch += [
        stage((form.height, TILE), x[0].dtype, mosaic.swizzled(TILE, x[0].dtype, x[0].shape[1]))
    ] * form.inputs
    scratch += [stage((form.height,), jnp.float32)] * form.by_row
    scratch += [stage((TILE,), jnp.float32)] * form.by_column
    # Both operands of the products want the same swizzle.
    if form.rows:
        out_type += [
            shape_of((x[0].shape[0], column_tiles * TILE), F8),
            shape_of((column_tiles, round_up(num_rows, 4)), jnp.float32),
        ]
        out_type += out_type * form.inputs * form.keep
        scratch += [pieces, lines] * (1 + form.inputs * form.keep)
    if form.columns:
        out_type += [
            shape_of((width, row_tiles * TILE), F8),
            shape_of((row_tiles, round_up(width, 4)), jnp.float32),
        ]
        scratch += [
            pieces,
            lines,
            plgpu.SMEM((64, 64), BF16, transforms=mosaic.swizzled(64, BF16, x[0].shape[1])),
        ]
    arrivals = form.inputs + form.by_row + form.by_column
    scratch += [
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=1),
    ]
    kernel = mosaic.launch(
        functools.partial(_body, form=form, tiles=tiles, shape=(num_rows, width), blocks=blocks),
        name=name,
        out_type=tuple(out_type),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=tiles.warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        interpret=interpret,
        # Of the exponential of SwiGLU: what it flushes to zero is added to 1.
        approx_math=form.inputs == 2,
    )
    extra = [a for a in (row_M, column_K, counts_m) if a is not None]
    out = [mosaic.varying_like(x[0], array) for array in kernel(*x, *extra)]
    cut = range(0, 2 * form.rows * (1 + form.inputs * form.keep), 2)
    return tuple(array[:num_rows] if i in cut else array for i, array in enumerate(out))
