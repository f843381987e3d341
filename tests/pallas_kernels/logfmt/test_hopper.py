"""The LogFMT kernels without a GPU: every width of code lowers; a tiny case is interpreted."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.logfmt import LogFMT, decode_logfmt, encode_logfmt, hopper
from tests.pallas_kernels.lowering import HOPPER, kernels_in, on, program

ROOT = Path(__file__).resolve().parents[3]
shape_of = jax.ShapeDtypeStruct


def codes_of(rows, width, n):
    tiles = -(-width // 128)
    line = shape_of((rows, tiles), jnp.bfloat16)
    return LogFMT(shape_of((rows, 8 * n * tiles), jnp.uint16), line, line)


@pytest.mark.parametrize(
    "n, shape, dtype",
    [
        (8, (4096, 7168), jnp.bfloat16),
        (10, (1001, 7168), jnp.bfloat16),
        (5, (3, 200), jnp.float32),
    ],
    ids=["n8", "n10-odd-rows", "n5-fp32"],
)
def test_kernels_lower(n, shape, dtype):
    rows, width = shape
    encode = functools.partial(encode_logfmt, n=n)
    decode = functools.partial(decode_logfmt, n=n, width=width, dtype=dtype)
    both = lambda x, codes: (encode(x), decode(codes))
    with on(HOPPER):
        traced = jax.jit(both).trace(shape_of(shape, dtype), codes_of(rows, width, n))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernels_in(text) == 2


def test_lowers_inside_shard_map():
    x = shape_of((128, 256), jnp.bfloat16)
    trip = lambda x: decode_logfmt(encode_logfmt(x, 6), 6, 256)
    assert kernels_in(program(trip, x)) == 2


def test_widths_that_do_not_fit_are_refused():
    with on(HOPPER), pytest.raises(NotImplementedError, match="129"):
        jax.eval_shape(lambda x: encode_logfmt(x, 8), shape_of((4, 129), jnp.bfloat16))
    with on(HOPPER), pytest.raises(NotImplementedError, match="pad"):
        jax.eval_shape(lambda codes: decode_logfmt(codes, 8, 130), codes_of(4, 130, 8))


def test_odd_tiles_are_refused():
    with pytest.raises(ValueError, match="stages=0"):
        hopper.Tiles(stages=0)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax >= 0.11")
@pytest.mark.parametrize("n", [5, 8], ids="n{}".format)
def test_interpreted(n):
    # After an error the interpreter's process is of no use, so each case has its own.
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret.py"), str(n)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
