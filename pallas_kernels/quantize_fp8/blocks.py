"""Quantising weights on Hopper: one scale for 128 x 128, codes and their transpose in one pass."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.quantize_fp8.encode import (
    BF16,
    F8,
    HALVES,
    TILE,
    WGMMA,
    identity,
    inverse,
    round_up,
    scale_of,
    transposed,
)


def blocks_of(dtype: jax.typing.DTypeLike) -> int:
    """Blocks on an SM: a tile of FP32 with its buffers takes over half of the shared memory."""
    return 1 if dtype == jnp.float32 else 2


def _body(w_gmem, code_gmem, scale_gmem, turned_gmem, turned_scale_gmem, *refs, **options):
    """Weights: one scale for a tile of 128 x 128, so the transposed codes are the same codes."""
    w_smem, code_smem, turned_smem, tile_smem, identity_smem, full = refs
    blocks, power_of_two = options["blocks"], options["power_of_two"]
    groups, n, k = w_gmem.shape
    row_tiles, column_tiles = pl.cdiv(n, TILE), pl.cdiv(k, TILE)
    total = groups * row_tiles * column_tiles
    block = lax.axis_index("block")
    count = (total - block + (blocks - 1)) // blocks

    def place(i):
        tile = block + i * blocks
        rest, column = lax.div(tile, column_tiles), lax.rem(tile, column_tiles)
        return lax.div(rest, row_tiles), lax.rem(rest, row_tiles), column

    def fetch(i):
        group, row, column = place(i)
        tile = w_gmem.at[group, pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)]
        plgpu.copy_gmem_to_smem(tile, w_smem, full.at[0])

    pl.when(count > 0)(lambda: fetch(jnp.int32(0)))
    identity_smem[...] = identity()

    def step(i, _):
        group, row, column = place(i)
        plgpu.barrier_wait(full.at[0])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        values = lambda half: mosaic.load(w_smem.at[half], WGMMA).astype(jnp.float32)
        amax = [jnp.max(jnp.abs(values(half)), axis=1) for half in HALVES]
        scale = scale_of(jnp.max(jnp.maximum(*amax), axis=0), power_of_two)
        factor = 1 / scale if power_of_two else inverse(scale)
        for half in HALVES:
            codes = (values(half) * factor).astype(F8)
            code_smem[half] = codes
            tile_smem[half] = codes.astype(jnp.float32).astype(BF16)
        scale_gmem[group, row, column] = scale
        turned_scale_gmem[group, column, row] = scale
        plgpu.commit_smem()
        pl.when(i + 1 < count)(lambda: fetch(i + 1))
        rows, columns = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
        plgpu.copy_smem_to_gmem(code_smem, code_gmem.at[group, rows, columns])
        for half in HALVES:
            turned_smem[half] = transposed(tile_smem, half, identity_smem).astype(F8)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(turned_smem, turned_gmem.at[group, columns, rows])

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=("power_of_two", "per_core", "cores", "interpret"))
def quantize_blocks(
    w_GNK: jax.Array, *, power_of_two: bool, per_core: int, cores: int, interpret=None
) -> tuple[jax.Array, ...]:
    """Codes [G, N, 128 k] and scales [G, n, k], then codes [G, K, 128 n] and scales [G, k, n].

    The last dimension of scales is rounded up to a multiple of 32; what is added is not written.
    """
    groups, n, k = w_GNK.shape
    blocks = cores * per_core
    shape_of = jax.ShapeDtypeStruct
    out_type = []
    for rows, columns in ((n, k), (k, n)):
        scales = (groups, pl.cdiv(rows, TILE), round_up(pl.cdiv(columns, TILE), 32))
        out_type += [shape_of((groups, rows, round_up(columns, TILE)), F8)]
        out_type += [shape_of(scales, jnp.float32)]
    square = lambda dtype, width=0: plgpu.SMEM(
        (TILE, TILE), dtype, transforms=mosaic.swizzled(TILE, dtype, width)
    )
    kernel = mosaic.launch(
        functools.partial(_body, blocks=blocks, power_of_two=power_of_two),
        name="quantize_blocks_fp8",
        out_type=tuple(out_type),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[
            square(w_GNK.dtype, k),
            square(F8),
            square(F8),
            square(BF16),
            plgpu.SMEM((64, 64), BF16, transforms=mosaic.swizzled(64, BF16)),
            plgpu.Barrier(num_arrivals=1, num_barriers=1),
        ],
        interpret=interpret,
    )
    return tuple(mosaic.varying_like(w_GNK, out) for out in kernel(w_GNK))
