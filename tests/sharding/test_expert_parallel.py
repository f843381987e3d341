"""Rows by expert: every choice once, aligned, in order; dispatch and combine are transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.expert_parallel import Path, combine, dispatch, dispatch_choices, plan_rows

T, K, E = 6, 2, 5


@st.composite
def choices(draw):
    """(expert_TK with K different experts a token, number of experts, alignment)."""
    num_experts = draw(st.sampled_from((1, 2, 5, 9)))
    k = draw(st.integers(1, min(num_experts, 3)))
    tokens = draw(st.sampled_from((1, 2, 7, 16)))
    alignment = draw(st.sampled_from((1, 2, 8)))
    skew = draw(st.booleans())
    rng = np.random.RandomState(draw(st.integers(0, 10**6)))
    rows = [rng.permutation(num_experts)[:k] for _ in range(tokens)]
    if skew:
        rows = [rows[0]] * tokens
    return np.asarray(rows, np.int32), num_experts, alignment


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(choices())
def test_every_choice_has_one_row_of_its_expert_in_token_order(case):
    expert_TK, num_experts, alignment = case
    layout = jax.tree.map(np.asarray, plan_rows(jnp.asarray(expert_TK), num_experts, alignment))
    slot_M, row_TK, sizes_E, lost = layout
    assert lost == 0
    tokens, k = expert_TK.shape

    np.testing.assert_array_equal(sizes_E, np.bincount(expert_TK.ravel(), minlength=num_experts))
    real = slot_M[slot_M >= 0]
    assert sorted(real) == list(range(tokens * k))
    np.testing.assert_array_equal(slot_M[row_TK.ravel()], np.arange(tokens * k))

    assert len(slot_M) % alignment == 0
    begin = 0
    for expert, size in enumerate(sizes_E):
        group = slot_M[begin : begin + size]
        assert (group >= 0).all() and (expert_TK.ravel()[group] == expert).all()
        assert (np.diff(group) > 0).all()
        padded = -(-size // alignment) * alignment
        assert (slot_M[begin + size : begin + padded] == -1).all()
        begin += padded
    assert (slot_M[begin:] == -1).all()


def test_rows_of_a_small_example():
    expert_TK = jnp.array([[2, 0], [0, 3], [2, 3]], jnp.int32)
    layout = plan_rows(expert_TK, 4, alignment=2)
    assert layout.group_sizes_E.tolist() == [2, 0, 2, 2]
    assert layout.slot_M.tolist()[:6] == [1, 2, 0, 4, 3, 5]
    assert layout.row_TK.tolist() == [[2, 0], [1, 4], [3, 5]]


def test_the_bound_on_rows_is_reached_and_never_passed():
    # One expert too few for a full block in every group: the worst padding.
    expert_TK = jnp.arange(4, dtype=jnp.int32)[:, None]
    layout = plan_rows(expert_TK, 4, alignment=8)
    assert layout.slot_M.shape == (32,) and int(layout.row_TK[3, 0]) == 24


@pytest.fixture(scope="module")
def layout():
    rng = np.random.RandomState(1)
    expert_TK = np.asarray([rng.permutation(E)[:K] for _ in range(T)], np.int32)
    return plan_rows(jnp.asarray(expert_TK), E, alignment=4)


def local(layout):
    """The path of tokens that leave no device."""
    return Path((layout,), ())


def normal(seed, *shape):
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def test_dispatch_copies_each_token_to_its_rows_and_zeros_the_rest(layout):
    x_TD = normal(0, T, 3)
    rows_MD = np.asarray(dispatch(x_TD, local(layout)))
    for row, slot in enumerate(np.asarray(layout.slot_M)):
        expected = np.zeros(3) if slot < 0 else x_TD[slot // K]
        np.testing.assert_array_equal(rows_MD[row], expected)


def test_combine_adds_up_the_rows_of_each_token(layout):
    M = layout.slot_M.shape[0]
    y_MD = normal(0, M, 3)
    expected = np.asarray(y_MD)[np.asarray(layout.row_TK)].sum(axis=1)
    np.testing.assert_allclose(combine(y_MD, local(layout)), expected, rtol=1e-6)


def test_combine_of_dispatch_is_k_times_each_token(layout):
    x_TD = normal(0, T, 3)
    rows_MD = dispatch(x_TD, local(layout))
    np.testing.assert_allclose(combine(rows_MD, local(layout)), K * x_TD, rtol=1e-6)


def test_combine_ignores_padding_rows(layout):
    M = layout.slot_M.shape[0]
    y_MD = normal(0, M, 3)
    poisoned = jnp.where(layout.slot_M[:, None] < 0, jnp.nan, y_MD)
    np.testing.assert_array_equal(combine(poisoned, local(layout)), combine(y_MD, local(layout)))


def test_dispatch_and_combine_are_transposes_of_each_other(layout):
    M = layout.slot_M.shape[0]
    x_TD, g_MD = normal(0, T, 3), normal(1, M, 3)
    (dx_TD,) = jax.vjp(lambda x: dispatch(x, local(layout)), x_TD)[1](g_MD)
    np.testing.assert_array_equal(dx_TD, combine(g_MD, local(layout)))
    (dy_MD,) = jax.vjp(lambda y: combine(y, local(layout)), g_MD)[1](x_TD)
    np.testing.assert_array_equal(dy_MD, dispatch(x_TD, local(layout)))
    left = jnp.sum(dispatch(x_TD, local(layout)) * g_MD)
    np.testing.assert_allclose(left, jnp.sum(x_TD * combine(g_MD, local(layout))), rtol=1e-5)


def test_weights_go_with_their_choices_and_gradients_come_back(layout):
    w_TK = normal(0, T, K)
    w_M = np.asarray(dispatch_choices(w_TK, local(layout)))
    slots = np.asarray(layout.slot_M)
    np.testing.assert_array_equal(w_M[slots >= 0], np.asarray(w_TK).ravel()[slots[slots >= 0]])
    assert (w_M[slots < 0] == 0).all()
    g_M = normal(2, len(slots))
    (dw_TK,) = jax.vjp(lambda w: dispatch_choices(w, local(layout)), w_TK)[1](g_M)
    np.testing.assert_array_equal(dw_TK, np.asarray(g_M)[np.asarray(layout.row_TK)])


def test_bf16_rows_are_added_in_fp32():
    # 1 + 2^-8 + 2^-8: each partial sum in BF16 would stay 1.
    layout = plan_rows(jnp.array([[0, 1, 2]], jnp.int32), 3, alignment=1)
    y_MD = jnp.array([[1.0], [2.0**-8], [2.0**-8]], jnp.bfloat16)
    assert float(combine(y_MD, local(layout))[0, 0]) == 1 + 2.0**-7
    assert combine(y_MD, local(layout)).dtype == jnp.bfloat16
