"""The router by hand, and experts that lose no token, against a dense computation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import moe
from tests.configs import TINY, compiled
from tests.oracle import weights

# Six experts in three groups, two groups and two experts a token.
SMALL = dataclasses.replace(
    TINY, num_experts=6, num_groups=3, groups_per_token=2, experts_per_token=2, route_scale=2.0
)
SOFTMAX = dataclasses.replace(SMALL, score="softmax", normalize_weights=False, route_scale=16.0)


def route(scores, biases, config=SMALL):
    """Experts and weights of one token, by expert number."""
    bias_E = None if biases is None else jnp.asarray(biases, jnp.float32)
    score_BTE = jnp.asarray(scores, jnp.float32)[None, None, :]
    expert_BTK, weight_BTK = moe.route(score_BTE, bias_E, config)
    pairs = zip(expert_BTK[0, 0].tolist(), weight_BTK[0, 0].tolist(), strict=True)
    return dict(sorted(pairs))


NO_BIAS = [0.0] * 6


def test_the_best_experts_of_the_best_groups_are_chosen():
    # Sums of two: 0.95, 0.9, 1.1. Group 1 is out although its expert 2 is the second best.
    chosen = route([0.55, 0.4, 0.8, 0.1, 0.9, 0.2], NO_BIAS)
    assert chosen == pytest.approx({0: 2 * 0.55 / 1.45, 4: 2 * 0.9 / 1.45})


def test_a_bias_changes_the_choice_and_no_weight():
    scores = [0.5, 0.4, 0.3, 0.2, 0.6, 0.1]
    plain, biased = route(scores, NO_BIAS), route(scores, [0, 0.3, 0, 0, 0, 0])
    assert set(plain) == {0, 4} and set(biased) == {1, 4}
    assert biased == pytest.approx({1: 2 * 0.4 / 1.0, 4: 2 * 0.6 / 1.0})


def test_a_bias_changes_the_groups_too():
    scores = [0.5, 0.4, 0.3, 0.2, 0.6, 0.1]
    assert set(route(scores, [0, 0, 0.5, 0.5, 0, 0])) == {2, 3}


def test_rejected_groups_lose_even_when_all_biased_scores_are_negative():
    # With 0 in place of -inf the experts 2 and 3 of the worst group would win.
    scores = [0.5, 0.4, 0.3, 0.2, 0.6, 0.1]
    assert set(route(scores, [-1.0] * 6)) == {0, 4}
    assert set(route(scores, [-1.0, -1.0, -9.0, -9.0, -1.0, -1.0])) == {0, 4}


def test_the_last_kept_expert_may_be_negative():
    config = dataclasses.replace(SMALL, experts_per_token=4)
    scores = [0.5, 0.4, 0.3, 0.2, 0.6, 0.1]
    assert set(route(scores, [-1.0] * 6, config)) == {0, 1, 4, 5}


def test_without_normalisation_weights_are_scaled_scores():
    config = dataclasses.replace(SMALL, normalize_weights=False)
    chosen = route([0.5, 0.4, 0.3, 0.2, 0.6, 0.1], NO_BIAS, config)
    assert chosen == pytest.approx({0: 1.0, 4: 1.2})


def test_weights_of_vanishing_scores_are_finite():
    chosen = route([0.0] * 6, NO_BIAS)
    assert all(weight == 0.0 for weight in chosen.values())


def test_softmax_groups_count_by_their_best_expert():
    # Best of groups: 0.3, 0.22, 0.2; by sums of two group 2 would beat group 1.
    scores = [0.3, 0.02, 0.22, 0.07, 0.2, 0.19]
    assert route(scores, None, SOFTMAX) == pytest.approx({0: 16 * 0.3, 2: 16 * 0.22})


def test_softmax_greedy_ignores_groups():
    config = dataclasses.replace(SOFTMAX, num_groups=1, groups_per_token=1, route_scale=1.0)
    assert route([0.1, 0.02, 0.3, 0.28, 0.2, 0.1], None, config) == pytest.approx(
        {2: 0.3, 3: 0.28}
    )


def test_softmax_weights_can_be_normalised():
    config = dataclasses.replace(SOFTMAX, normalize_weights=True, route_scale=1.0)
    scores = [0.3, 0.02, 0.2, 0.1, 0.19, 0.19]
    assert route(scores, None, config) == pytest.approx({0: 0.6, 2: 0.4})


def test_four_groups_of_eight_are_reached_by_nearly_every_token_and_no_more():
    # V3: 256 experts on 8 nodes, 8 a token from at most 4 nodes.
    config = dataclasses.replace(
        SMALL, num_experts=256, num_groups=8, groups_per_token=4, experts_per_token=8
    )
    score_BTE = jnp.asarray(np.random.RandomState(0).rand(1, 16384, 256), jnp.float32)
    expert_BTK, _ = jax.jit(lambda s: moe.route(s, jnp.zeros(256), config))(score_BTE)
    nodes = np.sort(np.asarray(expert_BTK[0]) // 32, axis=1)
    targets = 1 + (np.diff(nodes, axis=1) > 0).sum(axis=1)
    assert targets.max() == 4
    assert targets.mean() == pytest.approx(3.96, abs=0.02)


def test_scores_by_hand():
    x_BTD = jnp.array([1.0, 2.0]).reshape(1, 1, 2)
    router_ED = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    sigmoid = moe.scores(x_BTD, router_ED, SMALL)[0, 0]
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp([0.0, -1.0, 2.0])), rtol=1e-6)
    softmax = moe.scores(x_BTD, router_ED, SOFTMAX)[0, 0]
    exp = np.exp([0.0, 1.0, -2.0])
    np.testing.assert_allclose(softmax, exp / exp.sum(), rtol=1e-6)


def test_no_gradient_reaches_the_bias():
    score_BTE = jnp.asarray(np.random.RandomState(0).rand(1, 5, 6), jnp.float32)

    def total(bias_E):
        return jnp.sum(moe.route(score_BTE, bias_E, SMALL)[1] ** 2)

    assert not np.any(jax.grad(total)(jnp.full((6,), 0.1)))


# Load.


def test_counts_are_the_tokens_of_each_expert_and_skip_invalid_ones():
    expert_BTK = jnp.array([[[0, 1], [1, 2], [1, 3]], [[3, 1], [0, 3], [2, 1]]], jnp.int32)
    assert moe.expert_counts(expert_BTK, 5, None).tolist() == [2, 5, 2, 3, 0]
    valid_BT = jnp.array([[True, True, False], [True, False, False]])
    assert moe.expert_counts(expert_BTK, 5, valid_BT).tolist() == [1, 3, 1, 1, 0]


def test_sequence_loss_by_hand():
    config = dataclasses.replace(SMALL, num_experts=2, num_groups=1, experts_per_token=1,
                                 groups_per_token=1)
    # Shares: 3/4, 1/4; 1/4, 3/4; 3/5, 2/5. Best: 0, 1, 0.
    score_BTE = jnp.array([[[0.6, 0.2], [0.1, 0.3], [0.6, 0.4]]])
    P = (0.75 + 0.25 + 0.6) / 3, (0.25 + 0.75 + 0.4) / 3
    f = 2 / 3 * 2, 2 / 3 * 1
    expected = f[0] * P[0] + f[1] * P[1]
    assert float(moe.sequence_loss(score_BTE, config, None)) == pytest.approx(expected)
    # Without the last token.
    valid_BT = jnp.array([[True, True, False]])
    assert float(moe.sequence_loss(score_BTE, config, valid_BT)) == pytest.approx(1.0)


def test_sequence_loss_is_taken_per_sequence():
    config = dataclasses.replace(SMALL, num_experts=2, num_groups=1, experts_per_token=1,
                                 groups_per_token=1)
    # One sequence for each expert: even over the batch, uneven in each sequence.
    score_BTE = jnp.array([[[0.9, 0.1]] * 4, [[0.1, 0.9]] * 4])
    assert float(moe.sequence_loss(score_BTE, config, None)) == pytest.approx(2 * 0.9)


# Experts.


def layer_weights(config, seed=0):
    """The expert weights of one layer."""
    shapes = weights.block_shapes(config, dense=False)["ffn"]
    return {
        name: jnp.asarray(weights.normal(seed, name, shapes[name]) / shapes[name][-1] ** 0.5,
                          jnp.float32)
        for name in ("w_gate_EFD", "w_up_EFD", "w_down_EDF")
    }


def dense(x_BTD, expert_BTK, weight_BTK, w_gate_EFD, w_up_EFD, w_down_EDF, *, num_experts):
    """Every expert on every token, times a weight that is mostly 0."""
    hit_BTKE = jax.nn.one_hot(expert_BTK, num_experts, dtype=jnp.float32)
    weight_BTE = jnp.einsum("BTK,BTKE->BTE", weight_BTK, hit_BTKE)
    gate = jnp.einsum("BTD,EFD->BTEF", x_BTD, w_gate_EFD)
    up = jnp.einsum("BTD,EFD->BTEF", x_BTD, w_up_EFD)
    y_BTD = jnp.einsum("BTEF,EDF,BTE->BTD", jax.nn.silu(gate) * up, w_down_EDF, weight_BTE)
    return y_BTD, 0


def skewed(kind, B, T, K, E):
    """Choices of K different experts a token: at random, or the same for all."""
    rng = np.random.RandomState(0)
    if kind == "one-expert":
        return np.full((B, T, 1), 5)
    if kind == "same-experts":
        return np.broadcast_to(rng.permutation(E)[:K], (B, T, K))
    return np.stack([rng.permutation(E)[:K] for _ in range(B * T)]).reshape(B, T, K)


@pytest.mark.parametrize("kind", ["random", "same-experts", "one-expert"])
def test_no_token_is_lost_whatever_the_skew(kind, relative_error, limits):
    B, T, E = 3, 13, TINY.num_experts
    expert_BTK = jnp.asarray(skewed(kind, B, T, TINY.experts_per_token, E), jnp.int32)
    rng = np.random.RandomState(1)
    x_BTD = jnp.asarray(rng.randn(B, T, TINY.model_dim), jnp.float32)
    weight_BTK = jnp.asarray(rng.rand(*expert_BTK.shape), jnp.float32)
    w = layer_weights(TINY)

    def value_and_gradients(fn):
        def total(x_BTD, weight_BTK, w):
            y_BTD, _ = fn(x_BTD, expert_BTK, weight_BTK, **w)
            return jnp.sum(jnp.sin(y_BTD)), y_BTD

        compute = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
        (_, y_BTD), gradients = compiled(compute, x_BTD, weight_BTK, w)(x_BTD, weight_BTK, w)
        return y_BTD, gradients

    y_BTD, gradients = value_and_gradients(functools.partial(moe.run_experts, num_places=E))
    expected_BTD, expected = value_and_gradients(functools.partial(dense, num_experts=E))
    assert relative_error(y_BTD, expected_BTD) < limits["fp32"].value
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < limits["fp32"].gradient
    used = np.unique(expert_BTK)
    unused = np.setdiff1d(np.arange(E), used)
    assert not np.any(np.asarray(gradients[2]["w_gate_EFD"])[unused])


def test_a_token_gets_the_same_bits_whatever_the_others_choose():
    B, T, E = 2, 8, TINY.num_experts
    rng = np.random.RandomState(1)
    x_BTD = jnp.asarray(rng.randn(B, T, TINY.model_dim), jnp.float32)
    w = layer_weights(TINY)
    expert_BTK = skewed("random", B, T, 6, E).astype(np.int32)
    args = x_BTD, expert_BTK, jnp.asarray(rng.rand(B, T, 6), jnp.float32), *w.values()
    run = compiled(functools.partial(moe.run_experts, num_places=E), *args)
    before, _ = run(*args)
    others = expert_BTK.copy()
    others[1:] = others[0, 0]
    after, _ = run(x_BTD, others, *args[2:])
    np.testing.assert_array_equal(before[0], after[0])


def test_row_blocks_grow_with_the_load():
    assert moe.row_alignment(6, 28) == 1
    assert moe.row_alignment(4096 * 8, 16) == 128
    sizes = [moe.row_alignment(1 << n, 16) for n in range(16)]
    assert sizes == sorted(sizes) and all(size & (size - 1) == 0 for size in sizes)
