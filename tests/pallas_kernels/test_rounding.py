"""Roundings to FP8 and BF16: the bits of a cast, on every backend."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize_fp8 import reference
from pallas_kernels.rounding import to_bf16, to_fp8
from tests.pallas_kernels.lowering import optimized_for_cuda

FP8 = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
ROUNDS = "reduce-precision("


def fp32_numbers():
    """Every sign, exponent and first 7 bits of a mantissa, with what decides ties below."""
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    numbers = (upper | lower).ravel().view(np.float32)
    # Processors take numbers below the normal ones for zeros.
    return numbers[(np.abs(numbers) >= 2.0**-126) | (numbers == 0)]


@pytest.mark.parametrize("back", [False, True], ids=["codes", "and-back"])
@pytest.mark.parametrize("dtype", FP8, ids=lambda dtype: dtype.__name__)
def test_codes_are_those_of_a_saturating_cast(dtype, back):
    x, most = fp32_numbers(), float(ml_dtypes.finfo(dtype).max)
    right = np.clip(x, -most, most).astype(dtype)
    codes = jax.jit(functools.partial(to_fp8, dtype=dtype))
    found = np.asarray(jax.jit(lambda x: codes(x).astype(jnp.float32))(x) if back else codes(x))
    right = right.astype(np.float32) if back else right
    # The sign of zero too.
    assert found.tobytes() == right.tobytes()


@pytest.mark.parametrize("dtype", FP8, ids=lambda dtype: dtype.__name__)
def test_fp8_numbers_stay_as_they_are(dtype):
    x = np.arange(256, dtype=np.uint8).view(dtype)
    x = x[np.isfinite(x.astype(np.float32))]
    assert np.asarray(to_fp8(x.astype(np.float32), dtype)).tobytes() == x.tobytes()


def test_nan_stays_nan():
    for dtype in FP8:
        assert np.isnan(np.asarray(to_fp8(jnp.float32(np.nan), dtype), np.float32))


def test_bf16_is_that_of_a_cast():
    x = fp32_numbers()
    found, right = np.asarray(jax.jit(to_bf16)(x)), x.astype(ml_dtypes.bfloat16)
    assert np.asarray(found, np.float32).tobytes() == right.astype(np.float32).tobytes()


def test_the_compiler_for_cuda_leaves_out_two_casts_but_no_rounding():
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    plain = optimized_for_cuda(lambda x: x.astype(reference.F8).astype(jnp.float32), x)
    assert "f8e4m3fn" not in plain and ROUNDS not in plain
    decoded = lambda x: reference.decode_tiles(*reference.tiles(x, False))
    for function in (
        lambda x: to_fp8(x).astype(jnp.float32),
        lambda x: to_bf16(x).astype(jnp.float32),
        decoded,
    ):
        assert ROUNDS in optimized_for_cuda(function, x)
