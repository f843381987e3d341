"""Quantising weights on Hopper: one scale for 128 x 128, codes and their transpose in one pass."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, Tiling

from pallas_kernels import mosaic
from pallas_kernels.quantize_fp8.encode import (
    F8,
    F16,
    TILE,
    WGMMA,
    identity,
    inverse,
    round_up,
    scale_of,
    transposed,
)

WARPGROUPS = 2
# 128 numbers in each warp, four to a lane: their maximum takes shuffles alone.
IN_EACH_WARP = plgpu.Layout.TILED(Tiling(((TILE,), (4,))), (Replicated(4),), (-2,), -1)


def blocks_of(dtype: jax.typing.DTypeLike) -> int:
    """Blocks on an SM: two tiles of FP32 in flight with their buffers take most of its memory."""
    return 1 if dtype == jnp.float32 else 2


def _body(w_gmem, code_gmem, scale_gmem, turned_gmem, turned_scale_gmem, *refs, **options):
    """Weights: one scale for a tile of 128 x 128, so the transposed codes are the same codes.

    Two warpgroups share a tile: 64 rows each, then 64 rows of its transpose.
    """
    w_smem, code_smem, turned_smem, tile_smem, identity_smem, amax_smem, full, met = refs
    blocks, power_of_two = options["blocks"], options["power_of_two"]
    warpgroup, stages = lax.axis_index("warpgroup"), w_smem.shape[0]
    groups, n, k = w_gmem.shape
    row_tiles, column_tiles = pl.cdiv(n, TILE), pl.cdiv(k, TILE)
    total = groups * row_tiles * column_tiles
    block = lax.axis_index("block")
    count = (total - block + (blocks - 1)) // blocks
    own = pl.ds(warpgroup * 64, 64)

    def place(i):
        tile = block + i * blocks
        rest, column = lax.div(tile, column_tiles), lax.rem(tile, column_tiles)
        return lax.div(rest, row_tiles), lax.rem(rest, row_tiles), column

    def fetch(i):
        group, row, column = place(i)
        slot = lax.rem(i, stages)
        tile = w_gmem.at[group, pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)]
        plgpu.copy_gmem_to_smem(tile, w_smem.at[slot], full.at[slot])

    def meet():
        """Both warpgroups have come here, and see what the other has written."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(met.at[0])
        plgpu.barrier_wait(met.at[0])

    @pl.when(warpgroup == 0)
    def _():
        for i in range(stages):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))
        identity_smem[...] = identity(F16)

    def step(i, _):
        group, row, column = place(i)
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(full.at[slot])
        x = mosaic.load(w_smem.at[slot, own], WGMMA).astype(jnp.float32)
        # By rows: for a maximum over warps Mosaic has one buffer, whichever warpgroup asks.
        amax_smem[own] = jnp.max(jnp.abs(x), axis=1)
        meet()
        pl.when((warpgroup == 0) & (i + stages < count))(lambda: fetch(i + stages))
        amax = jnp.max(mosaic.load(amax_smem, IN_EACH_WARP), axis=0)
        scale = scale_of(amax, power_of_two)
        factor = 1 / scale if power_of_two else inverse(scale)
        codes = (x * factor).astype(F8)
        # All but the last copy of this warpgroup have read their buffers.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        code_smem[own] = codes
        tile_smem[own] = codes.astype(F16)

        @pl.when(warpgroup == 0)
        def _():
            scale_gmem[group, row, column] = scale
            turned_scale_gmem[group, column, row] = scale

        meet()
        rows, columns = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
        half = lambda start: pl.ds(start * TILE + warpgroup * 64, 64)
        plgpu.copy_smem_to_gmem(code_smem.at[own], code_gmem.at[group, half(row), columns])
        turned = transposed(tile_smem, own, identity_smem).astype(F8)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        turned_smem[own] = turned
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(turned_smem.at[own], turned_gmem.at[group, half(column), rows])

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
    square = lambda dtype, width=0, stages=(): plgpu.SMEM(
        (*stages, TILE, TILE), dtype, transforms=mosaic.swizzled(TILE, dtype, width)
    )
    stages = 2 if per_core == 1 else 1
    kernel = mosaic.launch(
        functools.partial(_body, blocks=blocks, power_of_two=power_of_two),
        name="quantize_blocks_fp8",
        out_type=tuple(out_type),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            square(w_GNK.dtype, k, (stages,)),
            square(F8),
            square(F8),
            square(F16),
            plgpu.SMEM((64, 64), F16, transforms=mosaic.swizzled(64, F16)),
            plgpu.SMEM((TILE,), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1),
        ],
        interpret=interpret,
    )
    return tuple(mosaic.varying_like(w_GNK, out) for out in kernel(w_GNK))
