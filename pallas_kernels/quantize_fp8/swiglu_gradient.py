"""SwiGLU backward on Hopper: from kept FP8 inputs to the FP8 operands of all that follows.

A tile of 128 x 128 is decoded once; the gradients of gate and up and the recomputed product are
rounded to BF16 in shared memory, leave by rows (the two gradients) and, transposed, by columns (all
three). Four warpgroups share a tile: a quarter each to decode, then 64 rows of a gradient, 64 of
its channels and 64 channels of half the product; the next one is fetched once this is decoded.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.quantize_fp8.encode import (
    BF16,
    BY_ROW,
    F8,
    LINES_32,
    TILE,
    codes_of,
    encode,
    identity,
    index,
    round_up,
    scale_of,
    spread,
    store_line,
    straight,
    transposed,
)

WARPGROUPS = 4
# Decoded by pieces of 64 x 32: three operands and three results of 64 x 64 would spill.
CHUNK = 32
BY_LINE = LINES_32.reduce(1)


def _body(*refs, weighted, masked, power_of_two, shape, blocks):
    refs = list(refs)
    take = lambda count: [refs.pop(0) for _ in range(count)]
    values_gmem, factors_gmem = take(3), take(2 + weighted)
    (counts_gmem,) = take(1) if masked else (None,)
    rows_gmem = [take(2) for _ in range(2)]
    columns_gmem = [take(2) for _ in range(3)]
    (dweight_gmem,) = take(1) if weighted else (None,)
    values_smem, factors_smem = take(3), take(2 + weighted)
    tiles_smem, code_smem, line_smem, half_smem, last_smem, *refs = refs
    amax_smem, sum_smem, identity_smem, full, met = refs
    warpgroup = lax.axis_index("warpgroup")
    # 64 rows or, of what leaves by columns, 64 channels; and the other half of the choice.
    half, part = lax.rem(warpgroup, 2), lax.div(warpgroup, 2)
    own = pl.ds(half * 64, 64)
    tiles = [tiles_smem.at[j] for j in range(3)]
    column_tiles = pl.cdiv(shape[1], TILE)
    total = pl.cdiv(shape[0], TILE) * column_tiles
    block = lax.axis_index("block")
    count = (total - block + (blocks - 1)) // blocks

    def place(i):
        tile = block + i * blocks
        return lax.div(tile, column_tiles), lax.rem(tile, column_tiles)

    def fetch(i):
        row, column = place(i)
        rows, columns = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, full.at[0])

        # One operand a warpgroup, as the others would wait for one that fetched them all.
        def operand(j):
            copy(values_gmem[j].at[rows, columns], values_smem[j])
            if j < len(factors_gmem):
                source = factors_gmem[j]
                copy(source.at[rows] if j == 2 else source.at[column, rows], factors_smem[j])

        for j in range(3):
            pl.when(warpgroup == j)(functools.partial(operand, j))

    def meet():
        """All warpgroups have come here."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(met.at[0])
        plgpu.barrier_wait(met.at[0])

    pl.when(count > 0)(lambda: fetch(jnp.int32(0)))

    @pl.when(warpgroup == 0)
    def _():
        identity_smem[...] = identity()

    meet()

    def decode(chunk, sums, valid):
        """Writes gradients and product of a piece as BF16; adds the row sums of dy * product."""
        columns = pl.ds(part * 64 + chunk * CHUNK, CHUNK)
        wide = lambda factor: spread(factor, (64, CHUNK), 0, LINES_32)
        factors = [mosaic.load(ref.at[own], BY_LINE) for ref in factors_smem]
        # Of an odd width dy has a narrow swizzle: with conflicts between banks then.
        gate, up, dy = (
            mosaic.load(ref.at[own, columns], LINES_32, optimized=j < 2 or shape[1] % 32 == 0)
            for j, ref in enumerate(values_smem)
        )
        gate, up, dy = (x.astype(jnp.float32) for x in (gate, up, dy))
        gate = gate * wide(factors[0])
        if masked:
            real = index(dy.shape, 0, LINES_32) < valid - own.start
            dy = jnp.where(real, dy, jnp.zeros_like(dy))
        # A square of a root for the quotient, as in encode.swish.
        root = lax.rsqrt(1 + lax.exp2(gate * jnp.float32(-math.log2(math.e))))
        sigmoid = root * root
        silu = gate * sigmoid
        dup = dy * silu
        factor = factors[1]
        if weighted:
            sums = sums + jnp.sum(dup * up, axis=1) * factor
            factor, dup = factor * factors[2], dup * wide(factors[2])
        # Times the weight, if there is one: so are the product and the gradient of gate.
        up = up * wide(factor)
        dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
        for smem, x in zip(tiles, (dgate, dup, silu * up), strict=True):
            smem[own, columns] = x.astype(BF16)
        return sums

    def step(i, _):
        row, column = place(i)
        valid = counts_gmem[row] if masked else TILE

        def store(x, outputs, first, second):
            """A piece as codes at 64 of `first` and 128 of `second`, its scales in row `second`."""
            codes, scale = encode(x, 0, power_of_two)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            code_smem[warpgroup] = codes
            plgpu.commit_smem()
            target = (pl.ds(first * TILE + half * 64, 64), pl.ds(second * TILE, TILE))

            def leave(code_gmem, scale_gmem):
                line = line_smem.at[warpgroup]
                store_line(scale, line, scale_gmem, second, first * 2 + half)
                plgpu.copy_smem_to_gmem(code_smem.at[warpgroup], code_gmem.at[target])

            for j in range(2):
                pl.when(part == j)(functools.partial(leave, *outputs[j]))

        plgpu.barrier_wait(full.at[0])
        sums = plgpu.layout_cast(jnp.zeros(64, jnp.float32), BY_LINE)
        # A loop, not unrolled: two pieces at a time would spill.
        piece = functools.partial(decode, valid=valid)
        sums = lax.fori_loop(0, 64 // CHUNK, piece, sums)
        if weighted:
            sum_smem[part, own] = sums
        meet()
        pl.when(i + 1 < count)(lambda: fetch(i + 1))
        own_smem = tiles_smem.at[part]
        store(straight(own_smem, own, identity_smem), rows_gmem, row, column)
        store(transposed(own_smem, own, identity_smem), columns_gmem, column, row)
        # Channels of the product: each of two warpgroups has half of their rows, and its maximum.
        tokens = pl.ds(part * 64, 64)
        product = transposed(tiles[2], own, identity_smem, (tokens,))
        amax_smem[part, own] = jnp.max(jnp.abs(product), axis=1)
        both = lambda ref: [mosaic.load(ref.at[j, own], BY_ROW) for j in range(2)]
        # The copies that last used these buffers were waited for with those of this tile's rows.
        last = last_smem.at[warpgroup]
        if weighted:

            @pl.when(part == 1)
            def _():
                line = sum(both(sum_smem))
                store_line(line, last, dweight_gmem, column, row * 2 + half)

        # The next tile is written where all have read.
        meet()
        scale = scale_of(jnp.maximum(*both(amax_smem)), power_of_two)
        half_smem[warpgroup] = codes_of(product, scale, 0, power_of_two)
        code_gmem, scale_gmem = columns_gmem[2]
        plgpu.commit_smem()
        line = (scale, last, scale_gmem, row, column * 2 + half)
        pl.when(part == 0)(lambda: store_line(*line))
        channels = pl.ds(column * TILE + half * 64, 64)
        target = code_gmem.at[channels, pl.ds(row * TILE + part * 64, 64)]
        plgpu.copy_smem_to_gmem(half_smem.at[warpgroup], target)

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=("power_of_two", "cores", "interpret"))
def swiglu_gradient(
    gate: tuple[jax.Array, jax.Array],
    up: tuple[jax.Array, jax.Array],
    dy_MK: jax.Array,
    weight_M: jax.Array | None,
    counts_m: jax.Array | None,
    *,
    power_of_two: bool,
    cores: int,
    interpret=None,
) -> tuple[jax.Array, ...]:
    """Codes and scales by rows of dgate and dup, by columns of dgate, dup and the product; with
    weights also the sums over each 128 channels [k, M] of dy times the product without weight."""
    num_rows, width = dy_MK.shape
    values = tuple(map(mosaic.pad_rows, (gate[0], up[0], dy_MK)))
    padded = values[0].shape[0]
    row_tiles, column_tiles = pl.cdiv(num_rows, TILE), pl.cdiv(width, TILE)
    shape_of = jax.ShapeDtypeStruct
    line = shape_of((column_tiles, round_up(num_rows, 4)), jnp.float32)
    rows = [shape_of((padded, column_tiles * TILE), F8), line]
    columns = [
        shape_of((width, row_tiles * TILE), F8),
        shape_of((row_tiles, round_up(width, 4)), jnp.float32),
    ]
    weighted = weight_M is not None
    square = lambda dtype, side, of=0: plgpu.SMEM(
        (TILE, TILE), dtype, transforms=mosaic.swizzled(side, dtype, of)
    )
    kernel = mosaic.launch(
        functools.partial(
            _body,
            weighted=weighted,
            masked=counts_m is not None,
            power_of_two=power_of_two,
            shape=(num_rows, width),
            blocks=cores,
        ),
        name="swiglu_gradient_fp8",
        out_type=(*rows, *rows, *columns, *columns, *columns, *[line] * weighted),
        grid=(cores,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            square(F8, CHUNK),
            square(F8, CHUNK),
            square(BF16, CHUNK, width),
            *[plgpu.SMEM((TILE,), jnp.float32)] * (2 + weighted),
            plgpu.SMEM((3, TILE, TILE), BF16, transforms=mosaic.swizzled(CHUNK, BF16)),
            plgpu.SMEM((WARPGROUPS, 64, TILE), F8, transforms=mosaic.swizzled(TILE, F8)),
            plgpu.SMEM((WARPGROUPS, 64), jnp.float32),
            plgpu.SMEM((WARPGROUPS, 64, 64), F8, transforms=mosaic.swizzled(64, F8)),
            plgpu.SMEM((WARPGROUPS, 64), jnp.float32),
            plgpu.SMEM((2, TILE), jnp.float32),
            plgpu.SMEM((2, TILE), jnp.float32),
            plgpu.SMEM((64, 64), BF16, transforms=mosaic.swizzled(CHUNK, BF16)),
            plgpu.Barrier(num_arrivals=5 + weighted, num_barriers=1),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1),
        ],
        interpret=interpret,
        approx_math=True,
    )
    factors = (gate[1], up[1], *([weight_M.astype(jnp.float32)] if weighted else []))
    extra = () if counts_m is None else (counts_m,)
    out = [mosaic.varying_like(dy_MK, array) for array in kernel(*values, *factors, *extra)]
    out[0], out[2] = out[0][:num_rows], out[2][:num_rows]
    return tuple(out)
