"""The Hopper kernels without a GPU: every shape and tile lowers; tiny cases are interpreted."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul, hopper
from tests.pallas_kernels import lowering

ROOT = Path(__file__).resolve().parents[3]
# The peer-sized model's experts (1408 of 2048), V3's (2048 of 7168), and the benchmark's.
SHAPES = [(64, 1408, 2048), (64, 2048, 1408), (8, 2048, 7168), (8, 7168, 2048), (32, 4096, 7168)]
SHAPES += [(3, 192, 64)]
shape_of = jax.ShapeDtypeStruct


def kernels_in(function, *shapes) -> int:
    """Kernels in the program made for a Hopper GPU on this machine."""
    return lowering.kernels_in(lowering.program(function, *shapes))


@pytest.mark.parametrize("w_dtype", [jnp.float32, jnp.bfloat16], ids=["master-fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "G{}-N{}-K{}".format(*shape))
def test_forward_and_both_gradients_lower_for_hopper(shape, w_dtype):
    groups, n, k = shape
    rows = 1024 + groups * 128

    def gradients(x_MK, w_GNK, sizes_G):
        loss = lambda x, w: grouped_matmul(x, w, sizes_G, alignment=128).astype(jnp.float32).sum()
        return jax.grad(loss, (0, 1))(x_MK, w_GNK)

    count = kernels_in(
        gradients,
        shape_of((rows, k), jnp.bfloat16),
        shape_of((groups, n, k), w_dtype),
        shape_of((groups,), jnp.int32),
    )
    assert count == 2


TILES = [
    (hopper.Tiles(columns=176, store_columns=16, store_buffers=1), hopper.Tiles(64, 4, 32)),
    (hopper.Tiles(columns=128, stages=6, pair=False), hopper.Tiles(128, 5, 32, pair=False)),
    (hopper.Tiles(columns=192, band=8, store_buffers=1), hopper.Tiles(192, 4, 32)),
]


@pytest.mark.parametrize("by_rows, by_contraction", TILES, ids=["176", "128", "192"])
def test_other_tiles_lower(by_rows, by_contraction):
    x_MK = shape_of((1024, 512), jnp.bfloat16)
    sizes_G = shape_of((4,), jnp.int32)
    options = dict(alignment=128, cores=132)
    rows = functools.partial(hopper.by_rows, contract_last=True, tiles=by_rows, **options)
    contraction = functools.partial(hopper.by_contraction, tiles=by_contraction, **options)
    for function, *shapes in (
        (rows, x_MK, shape_of((4, 704, 512), jnp.bfloat16), sizes_G),
        (contraction, shape_of((1024, 704), jnp.bfloat16), x_MK, sizes_G),
    ):
        jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def test_odd_tiles_are_refused():
    with pytest.raises(ValueError, match="columns=260"):
        hopper.Tiles(columns=260)
    with pytest.raises(ValueError, match="store_columns=48"):
        hopper.Tiles(columns=256, store_columns=48)
    with pytest.raises(ValueError, match="store_buffers=2 must divide the 3 pieces"):
        hopper.Tiles(columns=192, store_columns=64, store_buffers=2)


@pytest.mark.parametrize(
    "rows, n, k, alignment, message",
    [(128, 72, 64, 128, "N=72"), (128, 64, 72, 128, "K=72"), (192, 64, 64, 64, "alignment=64")],
    ids=["n", "k", "alignment"],
)
def test_unsupported_shapes_are_refused(rows, n, k, alignment, message):
    x_MK, w_GNK = jnp.zeros((rows, k), jnp.bfloat16), jnp.zeros((1, n, k), jnp.bfloat16)
    sizes_G = jnp.array([3], jnp.int32)
    with lowering.on(lowering.HOPPER), pytest.raises(NotImplementedError, match=message):
        grouped_matmul(x_MK, w_GNK, sizes_G, alignment=alignment)


def test_other_devices_are_refused():
    x_MK, w_GNK = jnp.zeros((128, 8), jnp.bfloat16), jnp.zeros((1, 8, 8), jnp.bfloat16)
    sizes_G = jnp.array([3], jnp.int32)
    with pytest.raises(NotImplementedError, match="for Hopper GPUs"):
        grouped_matmul(x_MK, w_GNK, sizes_G, alignment=128, implementation="hopper")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax >= 0.11")
@pytest.mark.parametrize("case", ["by_rows", "by_rows_transposed", "by_contraction"])
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
