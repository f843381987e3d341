"""What quantising kernels do with a piece in registers: scales, codes, transpose, stores."""

import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling

from pallas_kernels import mosaic

F8 = jnp.float8_e4m3fn
BF16, F16 = jnp.bfloat16, jnp.float16
TILE = 128
# amax is floored here; 1 / 448 in FP32 times amax is the scale.
AMAX_FLOOR = 1e-30
INVERSE_MAX = 1 / 448
WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
# Rows of 32 or 64 with eight neighbours to a lane, where WGMMA's layout has two.
LINES_32 = plgpu.Layout.WGMMA_UPCAST_4X
LINES_64 = plgpu.Layout.TILED(Tiling(((16, 64), (4, 64), (8,))), (-5,), (-3, -2), -1)
HALVES = (pl.ds(0, 64), pl.ds(64, 64))


def round_up(size, multiple):
    return -(-size // multiple) * multiple


def scale_of(amax, power_of_two):
    """NaN where amax is not finite: it reaches every product of the tile."""
    scale = jnp.maximum(amax, AMAX_FLOOR) * jnp.float32(INVERSE_MAX)
    if power_of_two:
        bits = lax.bitcast_convert_type(scale, jnp.int32)
        scale = lax.bitcast_convert_type((bits + 0x7FFFFF) & ~0x7FFFFF, jnp.float32)
    return jnp.where(amax < jnp.inf, scale, jnp.float32(jnp.nan))


def inverse(scale):
    """1 / scale in FP32, rounded to nearest.

    The card's quotient may be off by one in its last bit (rcp.approx). That decides ties, of which
    values that are codes times scales have many: with all reciprocals off by one 1e-3 of re-tiled
    codes differ.
    """
    return refined(1 / scale, scale)


def refined(guess, scale):
    """1 / scale from a neighbour: a step of Newton's, its residual from exact half products."""
    bits = lambda x: lax.bitcast_convert_type(x, jnp.int32)
    upper = lambda x: lax.bitcast_convert_type(bits(x) & ~0xFFF, jnp.float32)
    high, near = upper(scale), upper(guess)
    low, rest = scale - high, guess - near
    residual = 1 - high * near - high * rest - low * near - low * rest
    return guess + guess * residual


def encode(x, axis, power_of_two):
    """Codes of a piece in registers, and their scales: one for each index of `axis`."""
    scale = scale_of(jnp.max(jnp.abs(x), axis=1 - axis), power_of_two)
    return codes_of(x, scale, axis, power_of_two), scale


def codes_of(x, scale, axis, power_of_two):
    # The conversion saturates. Of a power of two the reciprocal is exact as it is.
    factor = 1 / scale if power_of_two else inverse(scale)
    return (x * lax.broadcast_in_dim(factor, x.shape, (axis,))).astype(F8)


def rounded(x):
    """FP32 rounded to BF16, a pair in one conversion: casts there and back take two slow ones."""
    bits = lax.bitcast_convert_type(x.astype(BF16), jnp.int16).astype(jnp.int32)
    return lax.bitcast_convert_type(bits << 16, jnp.float32)


def spread(x, shape, axis, layout=WGMMA):
    """A factor for each index of `axis` as an array of the whole shape."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (axis,)), layout)


def index(shape, axis, layout=WGMMA):
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, axis), layout)


def identity(dtype=BF16):
    row, column = index((64, 64), 0), index((64, 64), 1)
    return jnp.where(row == column, jnp.float32(1), jnp.float32(0)).astype(dtype)


def transposed(tile_smem, half, identity_smem, rows=HALVES):
    """64 columns of a 16-bit tile [128, 128] as [64, 128] in FP32 registers, or of fewer rows."""

    def multiply(acc):
        for place, source in zip(HALVES, rows, strict=False):
            piece = mosaic.transpose(tile_smem.at[source, half])
            plgpu.wgmma(acc.at[:, place], piece, identity_smem)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((64, 64 * len(rows)), jnp.float32))


def straight(tile_smem, half, identity_smem):
    """64 rows of a BF16 tile as FP32 in registers: a product needs none of the conversions."""

    def multiply(acc):
        for columns in HALVES:
            plgpu.wgmma(acc.at[:, columns], tile_smem.at[half, columns], identity_smem)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((64, TILE), jnp.float32))


def swish(gate, up):
    """silu(gate) * up; a square of a root for the quotient: IEEE division takes twice the time."""
    root = lax.rsqrt(1 + lax.exp2(gate * jnp.float32(-math.log2(math.e))))
    return gate * (root * root) * up


def store_line(scale, line_smem, scale_gmem, row, piece):
    """64 scales from registers to memory; of a row's short end, what it has.

    That goes by way of shared memory, which must be free, and is committed with what is copied
    next. Mosaic makes a linear copy of it: a whole piece would run on into the next row.
    """
    full, rest = divmod(scale_gmem.shape[1], 64)
    if full:

        @pl.when(piece < full)
        def _():
            scale_gmem[row, pl.ds(piece * 64, 64)] = scale

    if rest:

        @pl.when(piece == full)
        def _():
            line_smem[...] = scale
            plgpu.commit_smem()
            target = scale_gmem.at[row, pl.ds(piece * 64, rest)]
            plgpu.copy_smem_to_gmem(line_smem.at[pl.ds(0, rest)], target, commit_group=False)
