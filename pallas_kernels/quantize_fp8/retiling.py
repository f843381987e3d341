"""Re-tiling on Hopper: the transposed layout of FP8 codes by rows, for weight gradients.

A piece is 128 rows of 64 channels. Each warpgroup walks pieces of its own, with buffers of its own:
none waits for another, so that one's arithmetic hides behind the loads and stores of the others.
All those of an SM are one block: the compiler then keeps to the registers that so many leave.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.quantize_fp8.encode import (
    BY_COLUMN,
    F8,
    F16,
    LINES_64,
    TILE,
    encode,
    identity,
    index,
    round_up,
    store_line,
    transposed,
)
from pallas_kernels.quantize_fp8.tiles import Tiles

CHANNELS = 64


def _body(*refs, masked, power_of_two, stages, shape, workers):
    code_gmem, factor_gmem, *refs = refs
    counts_gmem = refs.pop(0) if masked else None
    turned_gmem, scale_gmem, code_smem, factor_smem, *refs = refs
    tile_smem, turned_smem, scale_smem, identity_smem, full, met = refs
    warpgroup = lax.axis_index("warpgroup")
    tile, turned, line = (ref.at[warpgroup] for ref in (tile_smem, turned_smem, scale_smem))
    columns = pl.cdiv(shape[1], CHANNELS)
    # Pieces that are left over in the end are spread over the SMs.
    worker = warpgroup * (workers // code_smem.shape[0]) + lax.axis_index("block")
    count = (pl.cdiv(shape[0], TILE) * columns - worker + (workers - 1)) // workers
    everything = pl.ds(0, CHANNELS)

    def place(i):
        piece = worker + i * workers
        return lax.div(piece, columns), lax.rem(piece, columns)

    def factors(i):
        """Where the scales of a piece lie: they are read after its codes, which make way first."""
        return factor_smem.at[warpgroup, lax.rem(i, stages + 1)]

    def fetch(i):
        row, column = place(i)
        slot, rows = lax.rem(i, stages), pl.ds(row * TILE, TILE)
        arrived = full.at[warpgroup * stages + slot]
        codes = code_gmem.at[rows, pl.ds(column * CHANNELS, CHANNELS)]
        plgpu.copy_gmem_to_smem(codes, code_smem.at[warpgroup, slot], arrived)
        source = factor_gmem.at[lax.div(column, TILE // CHANNELS), rows]
        plgpu.copy_gmem_to_smem(source, factors(i), arrived)

    for i in range(stages):
        pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))

    @pl.when(warpgroup == 0)
    def _():
        identity_smem[...] = identity(F16)

    plgpu.commit_smem()
    plgpu.barrier_arrive(met.at[0])
    plgpu.barrier_wait(met.at[0])

    def step(i, _):
        row, column = place(i)
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(full.at[warpgroup * stages + slot])
        # Exact in FP16, and fewer instructions than by FP32 to BF16.
        tile[...] = mosaic.load(code_smem.at[warpgroup, slot], LINES_64).astype(F16)
        plgpu.commit_smem()
        # Every warp has read these codes, and the scales of the piece before.
        pl.when(i + stages < count)(lambda: fetch(i + stages))
        x = transposed(tile, everything, identity_smem)
        factor = mosaic.load(factors(i), BY_COLUMN)
        x = x * lax.broadcast_in_dim(factor, x.shape, (1,))
        if masked:
            x = jnp.where(index(x.shape, 1) < counts_gmem[row], x, jnp.zeros_like(x))
        codes, scale = encode(x, 0, power_of_two)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        turned[...] = codes
        plgpu.commit_smem()
        store_line(scale, line, scale_gmem, row, column)
        target = turned_gmem.at[pl.ds(column * CHANNELS, CHANNELS), pl.ds(row * TILE, TILE)]
        plgpu.copy_smem_to_gmem(turned, target)

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


def retile(
    codes_MK: jax.Array,
    scale_kM: jax.Array,
    counts_m: jax.Array | None,
    *,
    width: int,
    power_of_two: bool,
    tiles: Tiles,
    cores: int,
    name: str,
    interpret=None,
) -> tuple[jax.Array, ...]:
    """Codes [K, 128 m] and scales [m, K] by columns, of the first `width` channels."""
    num_rows, each, stages = codes_MK.shape[0], tiles.blocks * tiles.warpgroups, tiles.stages
    row_tiles = pl.cdiv(num_rows, TILE)
    shape_of = jax.ShapeDtypeStruct
    swizzled = mosaic.swizzled
    kernel = mosaic.launch(
        functools.partial(
            _body,
            masked=counts_m is not None,
            power_of_two=power_of_two,
            stages=stages,
            shape=(num_rows, width),
            workers=cores * each,
        ),
        name=name,
        out_type=(
            shape_of((width, row_tiles * TILE), F8),
            shape_of((row_tiles, round_up(width, 4)), jnp.float32),
        ),
        grid=(cores,),
        grid_names=("block",),
        num_threads=each,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((each, stages, TILE, CHANNELS), F8, transforms=swizzled(CHANNELS, F8)),
            plgpu.SMEM((each, stages + 1, TILE), jnp.float32),
            plgpu.SMEM((each, TILE, CHANNELS), F16, transforms=swizzled(CHANNELS, F16)),
            plgpu.SMEM((each, CHANNELS, TILE), F8, transforms=swizzled(TILE, F8)),
            plgpu.SMEM((each, CHANNELS), jnp.float32),
            plgpu.SMEM((CHANNELS, CHANNELS), F16, transforms=swizzled(CHANNELS, F16)),
            plgpu.Barrier(num_arrivals=2, num_barriers=each * stages),
            plgpu.Barrier(num_arrivals=each, num_barriers=1),
        ],
        interpret=interpret,
    )
    extra = () if counts_m is None else (counts_m,)
    out = kernel(mosaic.pad_rows(codes_MK), scale_kM, *extra)
    return tuple(mosaic.varying_like(codes_MK, array) for array in out)
