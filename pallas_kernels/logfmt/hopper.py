"""LogFMT on Hopper: one pass over pieces of 64 x 128, a tile's bits packed inside each thread.

Each warpgroup walks pieces on its own, so that one's arithmetic hides behind another's loads and
stores; four in a block leave each thread the 128 registers that it needs. The special-function
unit makes a logarithm and a power for each value encoded, a power for each decoded: a quarter to a
half of what it can do at the speed of a copy. Integers come from FP32 sums, since conversions
would take the same unit.
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
from pallas_kernels.logfmt.octaves import TINY, extremes, octaves, steps_of

TILE = 128
# Rows that a block works on at a time: a warpgroup's layout has no fewer.
HEIGHT = 64
ROWS, COLUMNS, WORD = 16, 8, 16
TINY_BITS = 0x00800000
WGMMA = plgpu.Layout.WGMMA
BY_ROW = WGMMA.reduce(1)
F32, U32 = jnp.float32, jnp.uint32
# Added to a small number, the next integer above it is in the low bits, rounded to nearest.
MAGIC = 1.5 * 2**23 + 1
# Below them, an integer's bits are those of 2^23 + integer.
EXPONENT = 0x4B000000


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


def _extremes(x):
    """Smallest and largest magnitude [64] of the tiles in registers."""
    high = jnp.max(jnp.abs(x), axis=1)
    # As integers, without the sign, what is below TINY wraps round to the largest.
    lowest = jnp.min(_bits(x) * U32(2) - U32(2 * TINY_BITS), axis=1)
    low = lax.bitcast_convert_type((lowest + U32(2 * TINY_BITS)) >> U32(1), F32)
    return extremes(low, high)


def _encode(x, low, step, n, rounded_extremes):
    """Codes [64, 8] of values in registers."""
    along = functools.partial(_along, shape=x.shape)
    # A tile of one magnitude has a step of 0, and codes of 1.
    inverse = 1 / jnp.where(step > 0, step, F32(1))
    start = _fast_log2(jnp.maximum(low, F32(TINY))) + F32(0.4) * step
    middle = low * (0.5 + 0.5 * lax.exp2(step))
    # Steps above the lowest code, rounded up from a fraction of 0.9: past that, the mean of two
    # neighbours lies below the value even for steps of 32 / 6 octaves. Else the comparison decides.
    size = jnp.abs(x)
    rounded = (_fast_log2(size) - along(start)) * along(inverse) + F32(MAGIC)
    rounded = jnp.maximum(rounded, F32(MAGIC - 1))
    if rounded_extremes:
        rounded = jnp.minimum(rounded, F32(MAGIC + steps_of(n) - 1))
    missing = along(middle) * lax.exp2(along(step) * (rounded - F32(MAGIC))) - size
    code = _bits(rounded) + (_bits(missing) >> U32(31))
    sign = (_bits(x) >> U32(32 - n)) & U32(2 ** (n - 1))
    return (code & U32(2 ** (n - 1) - 1)) | sign


def _decode(code, low, high, step, n):
    """Values of codes [64, 8] in registers."""
    along = functools.partial(_along, shape=code.shape)
    size = code & U32(2 ** (n - 1) - 1)
    number = lax.bitcast_convert_type(size | U32(EXPONENT), F32) - F32(2**23 + 1)
    value = along(low) * lax.exp2(along(step) * number)
    value = jnp.where(size == U32(2 ** (n - 1) - 1), along(high), value)
    value = jnp.where(size == U32(0), along(high * 0), value)
    sign = (code << U32(32 - n)) & U32(2**31)
    return lax.bitcast_convert_type(_bits(value) | sign, F32)


def _words(code, n):
    """The n words [64, 8] of 16 codes [64, 8]: the i-th has bits n i to n i + n of a string."""
    words = [None] * n
    put = lambda old, new: new if old is None else old | new
    for i in range(ROWS):
        word, shift = divmod(n * i, WORD)
        piece = code(i)
        words[word] = put(words[word], piece << U32(shift) if shift else piece)
        if shift + n > WORD:
            words[word + 1] = put(words[word + 1], piece >> U32(WORD - shift))
    return [word.astype(jnp.uint16) for word in words]


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


def _encode_body(x_gmem, words_gmem, low_gmem, high_gmem, *smem, n, tiles, shape, cores):
    full, warpgroup = smem[-1], lax.axis_index("warpgroup")
    x_smem, words_smem, low_smem, high_smem = (ref.at[warpgroup] for ref in smem[:-1])
    barrier = lambda slot: full.at[warpgroup * tiles.stages + slot]

    def fetch(slot, row, column):
        tile = x_gmem.at[pl.ds(row * HEIGHT, HEIGHT), pl.ds(column * TILE, TILE)]
        plgpu.copy_gmem_to_smem(tile, x_smem.at[slot], barrier(slot))

    def work(slot, row, column):
        plgpu.barrier_wait(barrier(slot))
        # The last tile's stores have read what is overwritten now.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        x = mosaic.load(x_smem.at[slot], WGMMA)
        low, high = _extremes(x.astype(F32))
        low_smem[...], high_smem[...] = low, high
        step = _step(low, high, n)
        piece = lambda i: lax.slice(x, (0, COLUMNS * i), (HEIGHT, COLUMNS * (i + 1))).astype(F32)
        words = _words(lambda i: _encode(piece(i), low, step, n, x.dtype == F32), n)
        for i, word in enumerate(words):
            mosaic.store(words_smem.at[:, pl.ds(COLUMNS * i, COLUMNS)], word)
        plgpu.commit_smem()
        rows = pl.ds(row * HEIGHT, HEIGHT)
        width = COLUMNS * n
        plgpu.copy_smem_to_gmem(words_smem, words_gmem.at[rows, pl.ds(column * width, width)])
        plgpu.copy_smem_to_gmem(low_smem, low_gmem.at[column, rows])
        plgpu.copy_smem_to_gmem(high_smem, high_gmem.at[column, rows])

    _walk(fetch, work, shape, tiles, cores)


def _decode_body(words_gmem, low_gmem, high_gmem, x_gmem, *smem, n, tiles, shape, cores):
    full, warpgroup = smem[-1], lax.axis_index("warpgroup")
    words_smem, low_smem, high_smem, x_smem = (ref.at[warpgroup] for ref in smem[:-1])
    barrier = lambda slot: full.at[warpgroup * tiles.stages + slot]
    width = COLUMNS * n

    def fetch(slot, row, column):
        rows = pl.ds(row * HEIGHT, HEIGHT)
        words = words_gmem.at[rows, pl.ds(column * width, width)]
        plgpu.copy_gmem_to_smem(words, words_smem.at[slot], barrier(slot))
        plgpu.copy_gmem_to_smem(low_gmem.at[column, rows], low_smem.at[slot], barrier(slot))
        plgpu.copy_gmem_to_smem(high_gmem.at[column, rows], high_smem.at[slot], barrier(slot))

    def work(slot, row, column):
        plgpu.barrier_wait(barrier(slot))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        low, high = (mosaic.load(ref.at[slot], BY_ROW) for ref in (low_smem, high_smem))
        step = _step(low, high, n)
        word = lambda i: words_smem.at[slot, :, pl.ds(COLUMNS * i, COLUMNS)]
        words = [mosaic.load(word(i), WGMMA, optimized=False).astype(U32) for i in range(n)]
        pieces = [_decode(_piece(words, i, n), low, high, step, n) for i in range(ROWS)]
        x_smem[...] = mosaic.concatenate_columns(pieces).astype(x_smem.dtype)
        plgpu.commit_smem()
        rows, columns = pl.ds(row * HEIGHT, HEIGHT), pl.ds(column * TILE, TILE)
        plgpu.copy_smem_to_gmem(x_smem, x_gmem.at[rows, columns])

    _walk(fetch, work, shape, tiles, cores)


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
    """Words [M, 8 n k], smallest and largest magnitudes [M, k] in FP32."""
    num_rows, num_tiles = x_MK.shape[0], pl.cdiv(x_MK.shape[1], TILE)
    padded = mosaic.pad_rows(x_MK)
    shape_of = jax.ShapeDtypeStruct
    line = shape_of((num_tiles, _up(num_rows, HEIGHT)), F32)
    transforms = mosaic.swizzled(TILE, x_MK.dtype, x_MK.shape[1])
    kernel = _launch(
        _encode_body,
        "encode_logfmt",
        (shape_of((padded.shape[0], COLUMNS * n * num_tiles), jnp.uint16), line, line),
        [
            plgpu.SMEM((tiles.stages, HEIGHT, TILE), x_MK.dtype, transforms=transforms),
            plgpu.SMEM((HEIGHT, COLUMNS * n), jnp.uint16),
            plgpu.SMEM((HEIGHT,), F32),
            plgpu.SMEM((HEIGHT,), F32),
        ],
        1,
        n=n, tiles=tiles, cores=cores, shape=x_MK.shape, interpret=interpret,
    )  # fmt: skip
    words_MW, low_kM, high_kM = (mosaic.varying_like(x_MK, out) for out in kernel(padded))
    return words_MW[:num_rows], low_kM[:, :num_rows].T, high_kM[:, :num_rows].T


@functools.partial(jax.jit, static_argnames=("n", "width", "dtype", "tiles", "cores", "interpret"))
def decode(
    words_MW: jax.Array, low_Mk: jax.Array, high_Mk: jax.Array, *, n: int, width: int, dtype,
    tiles: Tiles, cores: int, interpret=None,
):  # fmt: skip
    """Rows [M, width]."""
    num_rows = words_MW.shape[0]
    words = mosaic.pad_rows(words_MW)
    lines = [jnp.pad(x.astype(F32), ((0, -num_rows % HEIGHT), (0, 0))).T for x in (low_Mk, high_Mk)]
    stage = lambda *shape: (tiles.stages, *shape)
    kernel = _launch(
        _decode_body,
        "decode_logfmt",
        jax.ShapeDtypeStruct((words.shape[0], width), dtype),
        [
            plgpu.SMEM(stage(HEIGHT, COLUMNS * n), jnp.uint16),
            plgpu.SMEM(stage(HEIGHT), F32),
            plgpu.SMEM(stage(HEIGHT), F32),
            plgpu.SMEM((HEIGHT, TILE), dtype, transforms=mosaic.swizzled(TILE, dtype, width)),
        ],
        3,
        n=n, tiles=tiles, cores=cores, shape=(num_rows, width), interpret=interpret,
    )  # fmt: skip
    return mosaic.varying_like(words_MW, kernel(words, *lines))[:num_rows]
