"""LogFMT on Hopper: one pass over pieces of 64 x 128, a tile's bits packed inside each thread.

Each warpgroup walks pieces on its own, so that one's arithmetic hides behind another's loads and
stores; four in a block leave each thread the 128 registers that it needs. What counts is the number
of instructions, 18 to 19 for 32 values encoded: an H200 copies as many in 24 cycles of a scheduler.
Two of them, a logarithm and a power, take 8 cycles each of the special-function unit. Integers come
from FP32 sums, since conversions would take the same unit.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.logfmt.octaves import extremes, octaves, steps_of

TILE = 128
# Rows that a block works on at a time: a warpgroup's layout has no fewer.
HEIGHT = 64
ROWS, COLUMNS, WORD = 16, 8, 16
TINY_BITS = 0x00800000
WGMMA = plgpu.Layout.WGMMA
BY_ROW = WGMMA.reduce(1)
F32, U16, U32 = jnp.float32, jnp.uint16, jnp.uint32
# The sum with a positive number is the nearest integer plus this: its low bits are the integer's.
BASE = 2**23
BASE_BITS = 0x4B000000


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Warpgroups on an SM, and pieces that each has in flight: 227 KiB of shared memory bound both.

    The compiler takes all the registers that the number of threads leaves: 65536 / 512 for four.
    """

    warpgroups: int = 4
    stages: int = 2

    def __post_init__(self):
        if self.warpgroups < 1 or self.stages < 1:
            raise ValueError(f"{self.warpgroups=} and {self.stages=} must be positive")


def tiles_of(dtype) -> Tiles:
    """For encoding: an FP32 piece takes 32 KiB, so only one is in flight."""
    return Tiles(stages=1 if dtype == F32 else 2)


def _bits(x):
    return lax.bitcast_convert_type(x, U32)


def _fast_log2(x):
    """By the special-function unit."""
    if jax.__version_info__ < (0, 11):
        return lax.log(x) * F32(1 / math.log(2))
    return jnp.log2(x)


def _step(low, high, n):
    return octaves(low, high) * F32(1 / steps_of(n))


def _along(row, shape):
    return lax.broadcast_in_dim(row, shape, (0,))


def _upper_half(x):
    """The upper 16 bits; of BF16, all."""
    if x.dtype == F32:
        return (_bits(x) >> U32(16)).astype(U16)
    return lax.bitcast_convert_type(x, U16)


def extremes_of(x):
    """Smallest and largest magnitude [64] of the tiles in registers.

    As integers, those of BF16 two at a time. What is below TINY wraps round to the largest.
    """
    wide = x.dtype == F32
    number = U32 if wide else U16
    tiny = number(TINY_BITS if wide else TINY_BITS >> 16)
    sizes = (_bits(x) if wide else _upper_half(x)) & number(2 ** (8 * x.dtype.itemsize - 1) - 1)
    low, high = jnp.min(sizes - tiny, axis=1) + tiny, jnp.max(sizes, axis=1)
    if not wide:
        low, high = (part.astype(U32) << U32(16) for part in (low, high))
    return extremes(*(lax.bitcast_convert_type(part, F32) for part in (low, high)))


def _pair(low, high):
    """Two BF16 numbers in a word."""
    return (_bits(low) >> U32(16)) | _bits(high)


def thresholds_of(low, high, n):
    """Of each row what codes of n bits depend on, as `codes_of` takes it."""
    step = _step(low, high, n)
    # A tile of one magnitude has a step of 0, and codes of 1; one of zeros has codes of 0.
    step, low = jnp.where(step > 0, step, F32(1)), jnp.where(low > 0, low, F32(1))
    # Near enough, without the scaling of very small and large numbers that a quotient has.
    inverse = lambda x: lax.rsqrt(x) * lax.rsqrt(x)
    # What lies this far below the lowest code has code 0.
    gap = F32(0.6) * step
    floor, scale = low * lax.exp2(-gap), inverse(low) * lax.exp2(gap)
    return floor, scale, inverse(step), step, low * (0.5 + 0.5 * lax.exp2(step))


def codes_of(x, thresholds, n, *, rounded_extremes):
    """Codes [64, 8] of values in registers, without signs, in the lower halves of words.

    In the upper ones is what is left of BASE.
    """
    floor, scale, inverse, step, middle = (_along(row, x.shape) for row in thresholds)
    size = jnp.maximum(jnp.abs(x), floor)
    # The code below, rounded up from a fraction of 0.9: past that, the mean of two neighbours lies
    # below the value even for steps of 32 / 6 octaves. Else the comparison decides.
    # XLA, where it interprets this, would make one of adding BASE and taking it off again.
    number = lax.optimization_barrier(_fast_log2(size * scale) * inverse + F32(BASE))
    if rounded_extremes:
        number = jnp.minimum(number, F32(BASE + steps_of(n)))
    missing = middle * lax.exp2(step * (number - F32(BASE + 1))) - size
    return _bits(number) + (_bits(missing) >> U32(31))


def _decode(code, low, high, step, n):
    """Values of codes [64, 8] in registers."""
    along = functools.partial(_along, shape=code.shape)
    size = code & U32(2 ** (n - 1) - 1)
    number = lax.bitcast_convert_type(size | U32(BASE_BITS), F32) - F32(BASE + 1)
    value = along(low) * lax.exp2(along(step) * number)
    value = jnp.where(size == U32(2 ** (n - 1) - 1), along(high), value)
    value = jnp.where(size == U32(0), along(high * 0), value)
    sign = (code << U32(32 - n)) & U32(2**31)
    return lax.bitcast_convert_type(_bits(value) | sign, F32)


def words_of(code, x, n):
    """The n words [64, 8] of 16 codes and values [64, 8], which functions of their number give.

    The i-th has bits n i to n i + n of a string: a code, above it a sign.
    """
    words, signs = [None] * n, [None] * n
    add = lambda old, new: new if old is None else old + new
    for i in range(ROWS):
        word, shift = divmod(n * i, WORD)
        field = code(i)
        if shift:
            # With the sign of the value before, which lies below: one instruction for both.
            field, shift = (field << U32(1)) | (_bits(x(i - 1).astype(F32)) >> U32(31)), shift - 1
        words[word] = add(words[word], field << U32(shift) if shift else field)
        if shift + n > WORD:
            words[word + 1] = field >> U32(WORD - shift)
        if n * (i + 1) % WORD == 0:
            # The uppermost bit of a word: of two in a register at a time.
            signs[n * (i + 1) // WORD - 1] = _upper_half(x(i)) & U16(2**15)
    words = [word.astype(U16) for word in words]
    return [
        word if sign is None else (word & U16(2**15 - 1)) | sign
        for word, sign in zip(words, signs, strict=True)
    ]


def _piece(words, i, n):
    """Codes [64, 8] of the values 8 i to 8 i + 8."""
    first, shift = divmod(n * i, WORD)
    code = words[first] >> U32(shift) if shift else words[first]
    if shift + n > WORD:
        code = code | (words[first + 1] << U32(WORD - shift))
    return code & U32(2**n - 1)


def _walk(fetch, work, shape, tiles, cores):
    """Has each warpgroup fetch and work through its share of the pieces."""
    column_tiles = pl.cdiv(shape[1], TILE)
    walkers, stages = cores * tiles.warpgroups, tiles.stages
    own = lax.axis_index("block") * tiles.warpgroups + lax.axis_index("warpgroup")
    count = (pl.cdiv(shape[0], HEIGHT) * column_tiles - own + (walkers - 1)) // walkers

    def place(i):
        tile = own + i * walkers
        return lax.div(tile, column_tiles), lax.rem(tile, column_tiles)

    get = lambda i: fetch(lax.rem(i, stages), *place(i))
    for i in range(stages):
        pl.when(i < count)(functools.partial(get, jnp.int32(i)))

    def step(i, _):
        work(lax.rem(i, stages), *place(i))
        pl.when(i + stages < count)(lambda: get(i + stages))

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


def _encode_body(x_gmem, words_gmem, pair_gmem, *smem, n, tiles, shape, cores):
    full, warpgroup = smem[-1], lax.axis_index("warpgroup")
    x_smem, words_smem, pair_smem = (ref.at[warpgroup] for ref in smem[:-1])
    barrier = lambda slot: full.at[warpgroup * tiles.stages + slot]
    width = COLUMNS * n

    def fetch(slot, row, column):
        tile = x_gmem.at[pl.ds(row * HEIGHT, HEIGHT), pl.ds(column * TILE, TILE)]
        plgpu.copy_gmem_to_smem(tile, x_smem.at[slot], barrier(slot))

    def work(slot, row, column):
        plgpu.barrier_wait(barrier(slot))
        x = mosaic.load(x_smem.at[slot], WGMMA)
        low, high = extremes_of(x)
        thresholds = thresholds_of(low, high, n)
        piece = lambda i: lax.slice(x, (0, COLUMNS * i), (HEIGHT, COLUMNS * (i + 1)))
        code = lambda i: codes_of(
            piece(i).astype(F32), thresholds, n, rounded_extremes=x.dtype == F32
        )
        # The last tile's stores have read what is overwritten now.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pair_smem[...] = _pair(low, high)
        words = mosaic.concatenate_columns(words_of(code, piece, n))
        if _word_transforms(n):
            words_smem[...] = words
        else:
            mosaic.store(words_smem, words)
        plgpu.commit_smem()
        rows = pl.ds(row * HEIGHT, HEIGHT)
        plgpu.copy_smem_to_gmem(words_smem, words_gmem.at[rows, pl.ds(column * width, width)])
        plgpu.copy_smem_to_gmem(pair_smem, pair_gmem.at[column, rows])

    _walk(fetch, work, shape, tiles, cores)


def _decode_body(words_gmem, lines_gmem, x_gmem, *smem, n, tiles, shape, cores):
    full, warpgroup = smem[-1], lax.axis_index("warpgroup")
    words_smem, low_smem, high_smem, x_smem = (ref.at[warpgroup] for ref in smem[:-1])
    barrier = lambda slot: full.at[warpgroup * tiles.stages + slot]
    width, num_tiles = COLUMNS * n, pl.cdiv(shape[1], TILE)

    def fetch(slot, row, column):
        rows = pl.ds(row * HEIGHT, HEIGHT)
        words = words_gmem.at[rows, pl.ds(column * width, width)]
        plgpu.copy_gmem_to_smem(words, words_smem.at[slot], barrier(slot))
        for line, smem in ((column, low_smem), (num_tiles + column, high_smem)):
            plgpu.copy_gmem_to_smem(lines_gmem.at[line, rows], smem.at[slot], barrier(slot))

    def work(slot, row, column):
        plgpu.barrier_wait(barrier(slot))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        lines = (mosaic.load(ref.at[slot], BY_ROW) for ref in (low_smem, high_smem))
        low, high = (line.astype(F32) for line in lines)
        step = _step(low, high, n)
        word = lambda i: words_smem.at[slot, :, pl.ds(COLUMNS * i, COLUMNS)]
        words = [mosaic.load(word(i), WGMMA, optimized=False).astype(U32) for i in range(n)]
        pieces = [_decode(_piece(words, i, n), low, high, step, n) for i in range(ROWS)]
        x_smem[...] = mosaic.concatenate_columns(pieces).astype(x_smem.dtype)
        plgpu.commit_smem()
        rows, columns = pl.ds(row * HEIGHT, HEIGHT), pl.ds(column * TILE, TILE)
        plgpu.copy_smem_to_gmem(x_smem, x_gmem.at[rows, columns])

    _walk(fetch, work, shape, tiles, cores)


def _word_transforms(n):
    """Rows of an odd number of 16 bytes have no bank conflicts as they are."""
    return () if n % 2 else mosaic.swizzled(COLUMNS * n, U16)


def _launch(body, name, out_type, scratch, arrivals, *, n, tiles, cores, shape, interpret):
    each = lambda ref: plgpu.SMEM(
        (tiles.warpgroups, *ref.shape), ref.dtype, transforms=ref.transforms
    )
    barriers = plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.warpgroups * tiles.stages)
    return mosaic.launch(
        functools.partial(body, n=n, tiles=tiles, shape=shape, cores=cores),
        name=name,
        approx_math=True,
        out_type=out_type,
        grid=(cores,),
        grid_names=("block",),
        num_threads=tiles.warpgroups,
        thread_name="warpgroup",
        scratch_types=[*map(each, scratch), barriers],
        interpret=interpret,
    )


def _up(size, multiple):
    return -(-size // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("n", "tiles", "cores", "interpret"))
def encode(x_MK: jax.Array, *, n: int, tiles: Tiles, cores: int, interpret=None):
    """Words [M, 8 n k], smallest and largest magnitudes [M, k] in BF16."""
    num_rows, num_tiles = x_MK.shape[0], pl.cdiv(x_MK.shape[1], TILE)
    padded = mosaic.pad_rows(x_MK)
    shape_of = jax.ShapeDtypeStruct
    transforms = mosaic.swizzled(TILE, x_MK.dtype, x_MK.shape[1])
    kernel = _launch(
        _encode_body,
        "encode_logfmt",
        (
            shape_of((padded.shape[0], COLUMNS * n * num_tiles), U16),
            shape_of((num_tiles, _up(num_rows, HEIGHT)), U32),
        ),
        [
            plgpu.SMEM((tiles.stages, HEIGHT, TILE), x_MK.dtype, transforms=transforms),
            plgpu.SMEM((HEIGHT, COLUMNS * n), U16, transforms=_word_transforms(n)),
            plgpu.SMEM((HEIGHT,), U32),
        ],
        1,
        n=n, tiles=tiles, cores=cores, shape=x_MK.shape, interpret=interpret,
    )  # fmt: skip
    words_MW, pair_kM = (mosaic.varying_like(x_MK, out) for out in kernel(padded))
    # Both halves in one kernel of XLA's.
    pair_Mk = pair_kM[:, :num_rows].T
    half = lambda part: lax.bitcast_convert_type(part.astype(U16), jnp.bfloat16)
    return words_MW[:num_rows], half(pair_Mk), half(pair_Mk >> U32(16))


@functools.partial(jax.jit, static_argnames=("n", "width", "dtype", "tiles", "cores", "interpret"))
def decode(
    words_MW: jax.Array, low_Mk: jax.Array, high_Mk: jax.Array, *, n: int, width: int, dtype,
    tiles: Tiles, cores: int, interpret=None,
):  # fmt: skip
    """Rows [M, width]."""
    num_rows = words_MW.shape[0]
    words = mosaic.pad_rows(words_MW)
    # Together, which XLA transposes in one kernel.
    extremes_ML = jnp.concatenate((low_Mk, high_Mk), axis=1).astype(jnp.bfloat16)
    lines_LM = jnp.pad(extremes_ML, ((0, -num_rows % HEIGHT), (0, 0))).T
    stage = lambda *shape: (tiles.stages, *shape)
    kernel = _launch(
        _decode_body,
        "decode_logfmt",
        jax.ShapeDtypeStruct((words.shape[0], width), dtype),
        [
            plgpu.SMEM(stage(HEIGHT, COLUMNS * n), U16),
            plgpu.SMEM(stage(HEIGHT), jnp.bfloat16),
            plgpu.SMEM(stage(HEIGHT), jnp.bfloat16),
            plgpu.SMEM((HEIGHT, TILE), dtype, transforms=mosaic.swizzled(TILE, dtype, width)),
        ],
        3,
        n=n, tiles=tiles, cores=cores, shape=(num_rows, width), interpret=interpret,
    )  # fmt: skip
    return mosaic.varying_like(words_MW, kernel(words, lines_LM))[:num_rows]
