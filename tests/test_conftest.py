"""The measure of error, and the types that tests run under."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_eight_cpu_devices():
    assert len(jax.devices("cpu")) == 8


def test_relative_error_is_a_ratio_of_norms(relative_error):
    assert relative_error([1.1, 0.0], [1.0, 0.0]) == pytest.approx(0.1)
    assert relative_error(jnp.ones(4, jnp.bfloat16), np.ones(4)) == 0


def test_relative_error_demands_exact_zeros(relative_error):
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error([0.0, 1e-30], np.zeros(2)) == np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_relative_error_of_a_broken_value_is_infinite(relative_error, bad):
    assert relative_error([bad], [1.0]) == np.inf
    assert relative_error([1.0], [bad]) == np.inf


def test_relative_error_refuses_broadcasting(relative_error):
    with pytest.raises(AssertionError, match="shape"):
        relative_error(np.ones((2, 1)), np.ones((2, 2)))
