"""Rounding of residual branches: to the values of each format, inside tiles; gradients pass."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.config import RESIDUAL
from deepseek_jax.residual import rounded
from deepseek_jax.training import join, split
from pallas_kernels.logfmt import decode_logfmt, encode_logfmt
from tests.configs import WIDE, make_run
from tests.pallas_kernels.lowering import optimized_for_cuda


def drawn():
    """Rows of 200 channels, the last tile short, with a tile of zeros."""
    x = np.random.default_rng(0).standard_normal((3, 4, 200)) * np.exp(np.arange(4))[:, None]
    x[0, 1, :128] = 0
    return jnp.asarray(x, jnp.bfloat16)


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_fp8_is_scaled_by_the_largest_of_a_tile(form):
    x_BTD = drawn()
    x = np.pad(np.asarray(x_BTD, np.float32), ((0, 0), (0, 0), (0, 56))).reshape(3, 4, 2, 128)
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[form]
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest, 1) * np.float32(1 / float(ml_dtypes.finfo(dtype).max))
    right = ((x / scale).astype(dtype).astype(np.float32) * scale).reshape(3, 4, 256)[..., :200]
    found = np.asarray(jax.jit(rounded, static_argnums=1)(x_BTD, form), np.float32)
    np.testing.assert_array_equal(found, right.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_a_tile_of_tiny_values_is_finite(form):
    x = jnp.zeros((1, 128)).at[0, 3].set(1e-36)
    found = rounded(x, form)
    assert jnp.isfinite(found).all() and jnp.abs(found).max() <= 2e-36


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_the_compiler_for_cuda_keeps_the_rounding(form):
    x_BTD = jax.ShapeDtypeStruct((3, 4, 200), jnp.bfloat16)
    program = optimized_for_cuda(lambda x_BTD: rounded(x_BTD, form), x_BTD)
    # Of normal numbers, and of those below.
    assert "reduce-precision(" in program and "round-nearest-even(" in program


@pytest.mark.parametrize("n", [8, 10])
def test_logfmt_is_what_codes_decode_to(n):
    x_BTD = drawn()

    @jax.jit
    def both(x_BTD):
        right = decode_logfmt(encode_logfmt(x_BTD.reshape(12, 200), n), n, 200)
        return rounded(x_BTD, f"logfmt{n}"), right.reshape(x_BTD.shape)

    found, right = (np.asarray(x, np.float32) for x in both(x_BTD))
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("form", ["e5m2", "logfmt8"])
def test_gradients_pass_as_they_are(form):
    g = jnp.arange(24.0).reshape(2, 12)
    back = jax.jit(lambda x, g: jax.vjp(lambda x: rounded(x, form), x)[1](g)[0])
    np.testing.assert_array_equal(*map(np.asarray, (back(jnp.ones((2, 12)) / 3, g), g)))


def test_fewer_bits_move_the_logits_of_a_model_further():
    config = dataclasses.replace(WIDE, num_layers=1, num_dense_layers=1, num_mtp=0)
    run = make_run(config)
    params, biases = split(ds.Model(config, rngs=nnx.Rngs(0)))
    tokens_BT = jnp.arange(10).reshape(2, 5)

    @jax.jit
    def logits(params):
        of = lambda form: dataclasses.replace(run, precision=ds.Precision(residual=form))
        models = [join(of(form), params, biases) for form in RESIDUAL]
        return [model(tokens_BT)[0] for model in models]

    exact, *others = logits(params)
    e4m3, e5m2, logfmt8, logfmt10 = (float(jnp.linalg.norm(x - exact)) for x in others)
    assert 0 < logfmt10 < 0.5 * logfmt8 < 0.5 * e4m3 < 0.5 * e5m2


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="residual='fp4' must be one of bf16, e4m3"):
        ds.Precision(residual="fp4")
