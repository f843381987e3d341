"""Rotary embedding: interleaved pairs, relative positions, YaRN's ramp and its softmax scale."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import rope
from deepseek_jax.config import Yarn
from tests.configs import TINY

V3 = ds.configs.deepseek_v3()
TURNED = dataclasses.replace(TINY, rotary_head_dim=4, rope_theta=100.0)


def test_pairs_are_interleaved():
    turns = rope.rotations(jnp.array([[3]], jnp.int32), TURNED)
    x_BTNR = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    angles = 3.0, 3.0 / 10.0  # theta^0 and theta^(-1/2)
    expected = [math.cos(angles[0]), math.sin(angles[0]), -math.sin(angles[1]),
                math.cos(angles[1])]
    np.testing.assert_allclose(rope.rotate(x_BTNR, turns)[0, 0, 0], expected, rtol=1e-6)


def test_position_0_turns_nothing():
    x_BTNR = jnp.arange(12, dtype=jnp.float32).reshape(1, 1, 3, 4)
    turns = rope.rotations(rope.positions(1), TURNED)
    np.testing.assert_array_equal(rope.rotate(x_BTNR, turns), x_BTNR)


@pytest.mark.parametrize("yarn", [None, Yarn(factor=8.0, original_length=16)], ids=str)
def test_scores_depend_on_the_distance_alone(yarn):
    config = dataclasses.replace(TINY, yarn=yarn)
    rng = np.random.RandomState(0)
    q, k = (jnp.asarray(rng.randn(1, 1, 1, 22), jnp.float32) for _ in range(2))

    def score(position_q, position_k):
        turned = [
            rope.rotate(x, rope.rotations(jnp.array([[position]], jnp.int32), config))
            for x, position in ((q, position_q), (k, position_k))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 2) == pytest.approx(score(45, 40), rel=1e-4)
    assert score(7, 2) != pytest.approx(score(8, 2), rel=1e-2)


def test_rotation_is_fp32_and_returns_the_dtype_it_got():
    turns = rope.rotations(rope.positions(5), TINY)
    assert all(table.dtype == jnp.float32 for table in turns)
    x_BTNR = jnp.ones((2, 5, 3, 22), jnp.bfloat16)
    assert rope.rotate(x_BTNR, turns).dtype == jnp.bfloat16


def test_yarn_ramp_of_v3_runs_from_pair_10_to_pair_23():
    plain = rope.frequencies(dataclasses.replace(V3, yarn=None))
    stretched = rope.frequencies(V3)
    ratio = stretched / plain
    np.testing.assert_allclose(ratio[:11], 1.0)
    np.testing.assert_allclose(ratio[23:], 1 / 40)
    ramp = np.arange(0, 14) / 13
    np.testing.assert_allclose(ratio[10:24], ramp / 40 + 1 - ramp)


def test_frequencies_without_yarn():
    freq = rope.frequencies(dataclasses.replace(V3, yarn=None))
    assert freq.shape == (32,)
    assert freq[0] == 1.0
    np.testing.assert_allclose(freq[5], 10000.0 ** (-10 / 64))


def test_softmax_scale_of_v3_with_and_without_yarn():
    assert rope.softmax_scale(dataclasses.replace(V3, yarn=None)) == pytest.approx(192**-0.5)
    assert rope.softmax_scale(V3) == pytest.approx(0.135234, rel=1e-5)
    assert rope.yarn_mscale(40.0, 1.0) == pytest.approx(1.36889, rel=1e-5)


def test_softmax_scale_of_v2_takes_its_own_mscale():
    mscale = 0.0707 * math.log(40.0) + 1.0
    expected = 192**-0.5 * mscale**2
    assert rope.softmax_scale(ds.configs.deepseek_v2()) == pytest.approx(expected, rel=1e-6)


def test_amplitude_is_the_ratio_of_both_mscales():
    yarn = Yarn(factor=40.0, original_length=16, mscale=1.0, mscale_all_dim=0.5)
    cos, _ = rope.rotations(rope.positions(1), dataclasses.replace(TINY, yarn=yarn))
    log = math.log(40.0)
    np.testing.assert_allclose(cos[0, 0], (0.1 * log + 1) / (0.05 * log + 1), rtol=1e-6)


def test_no_stretching_below_factor_1():
    assert rope.yarn_mscale(1.0, 1.0) == rope.yarn_mscale(0.5, 1.0) == 1.0
