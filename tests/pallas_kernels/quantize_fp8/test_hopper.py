"""The quantising kernels without a GPU: every form lowers; tiny cases are interpreted."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize_fp8 import (
    Tiles,
    encode,
    hopper,
    quantize_blocks,
    quantize_tiles,
    retile,
    rms_norm_tiles,
    swiglu_gradient_tiles,
    swiglu_tiles,
)
from tests.pallas_kernels.lowering import HOPPER, kernels_in, on, program

ROOT = Path(__file__).resolve().parents[3]
shape_of = jax.ShapeDtypeStruct
BF16, F32, F8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn


@pytest.mark.parametrize("shape", [(4096, 7168), (1001, 2112), (1, 16)], ids=str)
def test_every_form_lowers(shape):
    m, k = shape
    blocks = -(-m // 128)
    norm = functools.partial(rms_norm_tiles, epsilon=1e-6, by="both")
    x, counts = shape_of(shape, BF16), shape_of((blocks,), jnp.int32)
    codes = Tiles(shape_of((m, -(-k // 128) * 128), F8), None)
    codes = codes._replace(scale=shape_of((-(-k // 128), -(-m // 4) * 4), F32))

    def everything(x, up, weight, counts, codes, gain):
        return (
            quantize_tiles(x),
            quantize_tiles(x, by="columns", counts_m=counts),
            quantize_tiles(x, by="both", power_of_two=True, counts_m=counts),
            norm(x, gain),
            swiglu_tiles(x, up, weight, by="both", counts_m=counts),
            swiglu_tiles(x, up),
            swiglu_tiles(x, up, weight, counts_m=counts, keep=True),
            retile(codes, k, counts_m=counts),
            swiglu_gradient_tiles(codes, codes, x, weight, counts_m=counts),
            swiglu_gradient_tiles(codes, codes, x),
        )

    shapes = (x, x, shape_of((m,), F32), counts, codes, shape_of((k,), BF16))
    with on(HOPPER):
        text = jax.jit(everything).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert kernels_in(text) == 10


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(2112, 7168), (3, 1408, 2048), (16, 16)], ids=str)
def test_blocks_lower(shape, dtype):
    with on(HOPPER):
        lowered = jax.jit(quantize_blocks).trace(shape_of(shape, dtype))
        assert kernels_in(lowered.lower(lowering_platforms=("cuda",)).as_text()) == 1


def test_lowers_inside_shard_map():
    text = program(lambda x: quantize_tiles(x, by="columns").codes, shape_of((256, 512), BF16))
    assert kernels_in(text) == 1


@pytest.mark.parametrize("columns", [True, False], ids=["both", "rows"])
@pytest.mark.parametrize("tiles", [(2, 2, 2), (1, 1, 1), (3, 3, 1)], ids=str)
def test_other_tiles_lower(tiles, columns):
    call = functools.partial(
        hopper.quantize,
        form=hopper.Form(columns=columns),
        tiles=hopper.Tiles(*tiles),
        cores=132,
        name="quantize",
    )
    jax.jit(call).trace((shape_of((256, 512), BF16),)).lower(lowering_platforms=("cuda",))


def test_the_blocks_of_an_sm_fit_on_it_together(monkeypatch):
    # One that does not fit runs when the others have ended, alone.
    taken = []
    launch = hopper.mosaic.launch

    def record(body, *, grid, scratch_types, **options):
        sizes = [
            np.prod(ref.shape, dtype=int) * jnp.dtype(ref.dtype).itemsize
            for ref in scratch_types
            if hasattr(ref, "dtype")
        ]
        # Each starts at a multiple of 1 KiB; barriers, and what the system takes of each block.
        rest = 1024 * (1 + len(scratch_types) - len(sizes))
        block = sum(-(-size // 1024) * 1024 for size in sizes) + rest
        taken.append(grid[0] // 132 * block)
        return launch(body, grid=grid, scratch_types=scratch_types, **options)

    monkeypatch.setattr(hopper.mosaic, "launch", record)
    test_every_form_lowers((256, 384))
    for dtype in (BF16, F32):
        test_blocks_lower((256, 384), dtype)
    assert len(taken) == 12 and max(taken) <= 228 * 1024


def test_scales_are_stored_within_their_rows(monkeypatch):
    # A copy of one dimension is linear on the card: past the end it writes the next row.
    sizes = set()
    copy = encode.plgpu.copy_smem_to_gmem

    def record(source, target, **options):
        if len(target.shape) == 1:
            assert source.shape == target.shape
            sizes.add(target.shape[0])
        return copy(source, target, **options)

    monkeypatch.setattr(encode.plgpu, "copy_smem_to_gmem", record)
    # Pieces of 64 are stored from registers; what is copied is the short end of a row.
    for shape, right in (((1001, 2112), {44}), ((3, 16), {4, 16}), ((256, 128), set())):
        sizes.clear()
        with on(HOPPER):
            call = jax.jit(functools.partial(quantize_tiles, by="both"))
            call.trace(shape_of(shape, BF16)).lower(lowering_platforms=("cuda",))
        assert sizes == right


def test_fp32_activations_are_refused():
    with on(HOPPER), pytest.raises(NotImplementedError, match="float32"):
        jax.eval_shape(quantize_tiles, shape_of((4, 16), jnp.float32))


def test_odd_tiles_are_refused():
    with pytest.raises(ValueError, match="stages=0"):
        hopper.Tiles(stages=0)
    with pytest.raises(ValueError, match="warpgroups=3"):
        hopper.Tiles(warpgroups=3)


CASES = ["both", "masked", "swiglu", "swiglu_kept", "swiglu_gradient", "norm", "retile", "blocks"]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax >= 0.11")
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case):
    # After an error the interpreter's process is of no use, so each case has its own.
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret.py"), case],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
