"""The LogFMT kernels without a GPU: every width of code lowers; a tiny case is interpreted."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.logfmt import LogFMT, decode_logfmt, encode_logfmt, hopper, reference
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


@pytest.mark.parametrize("n", range(4, 11), ids="n{}".format)
def test_words_hold_codes_and_signs_whatever_is_above_the_codes(n):
    rng = np.random.default_rng(n)
    code, x = rng.integers(0, 2 ** (n - 1), (64, 128)), rng.standard_normal((64, 128))
    above = code.astype(np.uint32) + np.uint32(hopper.BASE_BITS)
    x = jnp.asarray(x, jnp.bfloat16)
    piece = lambda array: lambda i: array[:, 8 * i : 8 * i + 8]
    code = code | np.signbit(x.astype(np.float32)).astype(np.int64) << (n - 1)

    @jax.jit
    def both(above, x, code):
        words = hopper.words_of(piece(above), piece(x), n)
        return jnp.concatenate(words, axis=1), reference.pack(code[:, None], n)

    np.testing.assert_array_equal(*both(above, x, code.astype(np.uint32)))


def edges(rng, exponent):
    """Tiles about 2^exponent: wide and narrow ones, of one magnitude (in FP32 also of one that BF16
    extremes round down), with and without zeros."""
    one = np.exp2(exponent)
    draw = lambda *values: one * rng.choice(values, 128)
    wide = lambda octaves: one * np.exp2(rng.uniform(-octaves, octaves, 128))
    return [draw(1, 1.0078125), draw(0, 1, -1.0078125), draw(0, 1), draw(-1), draw(1.001),
            draw(0, -0.0), wide(1), wide(5), wide(5) * rng.choice([0, 1, -1], 128),
            wide(25)]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [4, 8, 10], ids="n{}".format)
def test_codes_in_registers_are_those_of_the_reference(n, dtype):
    rng = np.random.default_rng(n)
    x = jnp.asarray(np.stack([t for e in (-90, -20, 0, 9, 90) for t in edges(rng, e)]), dtype)

    @jax.jit
    def both(x):
        low, high = hopper.extremes_of(x)
        given = x.astype(jnp.float32), hopper.thresholds_of(low, high, n), n
        found = hopper.codes_of(*given, rounded_extremes=dtype == jnp.float32)
        words, *extremes = reference.encode(x, n)
        right = reference.unpack(words, n)[:, 0] & (2 ** (n - 1) - 1)
        return (found & 0xFFFF, right), ((low, high), [array[:, 0] for array in extremes])

    (found, right), extremes = both(x)
    np.testing.assert_array_equal(*extremes)
    different = np.abs(np.asarray(found, np.int64) - np.asarray(right, np.int64))
    assert different.max() <= 1 and np.mean(different > 0) <= 1e-3


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
