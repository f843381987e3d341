"""Rows by expert: every choice once, aligned, in order; dispatch and combine are transposes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from sharding import exchange, make_mesh
from sharding.expert_parallel import (
    Path,
    combine,
    dispatch,
    dispatch_choices,
    plan_path,
    send,
)
from sharding.placement import Scheme, under_mesh
from sharding.row_layout import plan_rows

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
    slot_M, row_TK, sizes_E = layout.slot_M, layout.row_TK, layout.group_sizes_E
    assert layout.lost == 0
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


# On eight devices, every one with tokens and experts of its own.

EXPERTS = 16


def choices_by_node(nodes, kept, *, tokens=40, k=4, seed=0):
    """K experts a token, of `kept` nodes at most; token t * 8 + d is the t-th of device d."""
    rng, choices = np.random.RandomState(seed), []
    for _ in range(tokens):
        allowed = rng.permutation(nodes)[:kept]
        experts = [e for e in range(EXPERTS) if e * nodes // EXPERTS in allowed]
        choices.append(rng.permutation(experts)[:k])
    return np.asarray(choices, np.int32)


def on_experts(fn, *args, scheme):
    """`fn` of each device's part of arrays cut along their first dimension."""
    mesh, each = make_mesh(expert=8), P("expert")
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(each,) * len(args), out_specs=each)
    return jax.jit(under_mesh(mapped, mesh, scheme))(*args)


def path_of(expert_TK):
    return plan_path(expert_TK, EXPERTS, 1, held=EXPERTS // 8)


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_token_crosses_once_to_each_node_that_it_needs(nodes):
    expert_TK = choices_by_node(nodes, kept=nodes // 2 + 1)

    def arrived(expert_TK):
        path = path_of(expert_TK)
        first = Path(path.layouts[:1], path.hops[:1])
        return send(jnp.ones((expert_TK.shape[0], 1)), first).reshape(1, nodes, -1)

    scheme = Scheme(expert_nodes=nodes)
    rows = np.asarray(on_experts(arrived, jnp.asarray(expert_TK), scheme=scheme))
    inside = 8 // nodes
    crossed = sum(rows[d, n].sum() for d in range(8) for n in range(nodes) if n != d // inside)
    padding = sum((rows[d, n] == 0).sum() for d in range(8) for n in range(nodes)
                  if n != d // inside)
    targets = expert_TK * nodes // EXPERTS
    own = np.arange(40) // 5 // inside
    wanted = sum(len(set(row) - {node}) for row, node in zip(targets, own, strict=True))
    assert crossed == wanted
    assert crossed + padding == 8 * (nodes - 1) * 5
    # Without node-limited sending each expert elsewhere would have cost a row.
    assert crossed < (targets != own[:, None]).sum()


@pytest.mark.parametrize(
    "nodes, skew", [(1, False), (1, True), (4, False), (4, True), (8, False)],
    ids=["one-hop", "one-hop-skewed", "two-hops", "two-hops-skewed", "a-node-each"],
)
def test_every_way_through_the_network_gives_the_sums_and_gradients_of_one_device(
    nodes, skew, relative_error, limits
):
    expert_TK = choices_by_node(4, kept=4)
    if skew:
        expert_TK = np.broadcast_to(expert_TK[:1], expert_TK.shape)
    x_TD, w_TK = normal(0, 40, 3), normal(1, 40, 4)
    scale_E = 1.0 + jnp.arange(EXPERTS) / EXPERTS

    def experts(x_TD, w_TK, expert_TK, path, first):
        """Each expert multiplies by a number of its own."""
        layout = path.rows
        starts = jnp.cumsum(layout.group_sizes_E) - layout.group_sizes_E
        ends = starts + layout.group_sizes_E
        number_M = jnp.arange(layout.slot_M.shape[0])[:, None]
        own_ME = ((number_M >= starts[None]) & (number_M < ends[None])).astype(jnp.float32)
        local_E = jax.lax.dynamic_slice(scale_E, (first,), (own_ME.shape[1],))
        rows_MD = dispatch(x_TD, path) * (own_ME @ local_E[:, None])
        return combine(rows_MD * dispatch_choices(w_TK, path)[:, None], path)

    def loss(x_TD, w_TK, expert_TK):
        path = path_of(expert_TK)
        y_TD = experts(x_TD, w_TK, expert_TK, path, jax.lax.axis_index("expert") * 2)
        return jnp.sum(jnp.sin(y_TD)), (y_TD, path.lost[None])

    def on_mesh(*args):
        gradients, (y_TD, lost) = jax.grad(loss, argnums=(0, 1), has_aux=True)(*args)
        return y_TD, *gradients, lost

    def dense(x_TD, w_TK):
        y_TD = x_TD * jnp.sum(w_TK * scale_E[expert_TK], axis=1)[:, None]
        return jnp.sum(jnp.sin(y_TD)), y_TD

    gradients, y_TD = jax.grad(dense, argnums=(0, 1), has_aux=True)(x_TD, w_TK)
    actual = on_experts(on_mesh, x_TD, w_TK, jnp.asarray(expert_TK),
                        scheme=Scheme(expert_nodes=nodes))
    for a, b in zip(actual[:3], (y_TD, *gradients), strict=True):
        assert relative_error(a, b) < limits["fp32"].value
    assert not np.any(actual[3])


def test_bounded_buffers_say_how_many_choices_found_no_room():
    # All 40 tokens choose expert 0: each device sends 5 rows to the first and has room for 2.
    expert_TK = jnp.zeros((40, 1), jnp.int32)
    lost = lambda room: on_experts(lambda e: path_of(e).lost[None], expert_TK,
                                   scheme=Scheme(room=room))
    # The first device has room for 10 of the 16 rows that arrive.
    assert lost(2.0).tolist() == [3 + 6, *[3] * 7]
    assert lost(4.0).tolist() == [2 + 4, *[2] * 7]
    assert not np.any(lost(8.0))


def test_two_hops_round_partial_sums_and_nothing_else():
    expert_TK, x_TD = choices_by_node(4, kept=4), normal(0, 40, 3).astype(jnp.bfloat16)

    def there_and_back(x_TD, expert_TK):
        path = path_of(expert_TK)
        return combine(dispatch(x_TD, path), path)

    one, two = (
        np.asarray(on_experts(there_and_back, x_TD, jnp.asarray(expert_TK),
                              scheme=Scheme(expert_nodes=nodes)), np.float32)
        for nodes in (1, 4)
    )
    np.testing.assert_allclose(one, two, rtol=2**-8)


RAGGED = Scheme(expert_nodes=4, room=4.0, ragged=True)


def there_and_back(x_TD, expert_TK):
    """Sums of each token's rows, and a gradient through both ways."""
    path = path_of(expert_TK)
    back = lambda x_TD: combine(dispatch(x_TD, path), path)
    return back(x_TD), jax.grad(lambda x_TD: jnp.sum(jnp.sin(back(x_TD))))(x_TD)


def ragged_by_gathers(x, out, *updates, axis_name, axis_index_groups):
    """What jax.lax.ragged_all_to_all does, from everything on every device."""
    me = jax.lax.axis_index(axis_name)
    rows_NW, *every = (jax.lax.all_gather(y, axis_name) for y in (x, *updates))
    size, out = len(axis_index_groups[0]), jnp.full_like(out, 99)
    blocks = [y.reshape(8, size, -1) for y in every]  # of a source, for each target
    number_N1, announced = jnp.arange(out.shape[0])[:, None], True
    for group in axis_index_groups:
        for to, rank in enumerate(group):
            for place, source in enumerate(group):
                start_U, sent_U, place_U, _ = (y[source, to] for y in blocks)
                there = (number_N1 >= place_U) & (number_N1 < place_U + sent_U) & (me == rank)
                taken = jnp.sum(jnp.where(there, start_U + number_N1 - place_U, 0), axis=1)
                out = jnp.where(jnp.any(there, axis=1)[:, None], rows_NW[source][taken], out)
                announced &= jnp.all((blocks[3][rank, place] == sent_U) | (me != rank))
    # What does not arrive as announced is wrong for all to see.
    return jnp.where(announced, out, jnp.full_like(out, 77))


@pytest.mark.parametrize(
    "by_row, nodes",
    [pytest.param(False, 1, id="a-message-each-one-hop"),
     pytest.param(True, 4, id="row-by-row-two-hops"),
     pytest.param(True, 1, marks=pytest.mark.slow, id="row-by-row-one-hop"),
     pytest.param(False, 4, marks=pytest.mark.slow, id="a-message-each-two-hops")],
)  # fmt: skip
def test_only_rows_that_hold_tokens_need_to_travel(monkeypatch, by_row, nodes):
    args = normal(0, 40, 3), jnp.asarray(choices_by_node(4, kept=4))
    padded = Scheme(expert_nodes=nodes, room=4.0)
    wanted = on_experts(there_and_back, *args, scheme=padded)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathers)
    monkeypatch.setattr(exchange, "is_written_by_peers", lambda hop: by_row)
    with jax.numpy_rank_promotion("allow"):
        found = on_experts(there_and_back, *args, scheme=dataclasses.replace(padded, ragged=True))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_peers_that_write_get_an_odd_number_of_rows():
    assert [exchange.odd(n) for n in (1, 8192, 8193, 65_535)] == [1, 8193, 8193, 65_535]
    assert exchange.odd(65_536) == 2 * 32_769
    assert exchange.odd(200_000) == 4 * 50_001


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32", "int8"])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 7), (5, 3, 2)], ids=str)
def test_rows_of_any_type_and_width_come_back_from_words(dtype, shape):
    bits = np.random.RandomState(0).randint(0, 120, (5, 64)).astype(np.int8)
    width = int(np.prod(shape[1:])) * jnp.dtype(dtype).itemsize
    x = jnp.asarray(np.ascontiguousarray(bits[:, :width]).view(jnp.dtype(dtype)).reshape(shape))
    words = exchange.words_of(x)
    assert words.dtype == jnp.uint32 and words.shape == (5, -(-width // 4))
    back = exchange.values_of(words, x)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(back).view(np.int8), np.asarray(x).view(np.int8))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_send_only_such_rows(platform):
    # No CPU can.
    mesh, each = make_mesh(expert=8), P("expert")
    mapped = jax.shard_map(there_and_back, mesh=mesh, in_specs=(each, each), out_specs=each)
    args = normal(0, 40, 3), jnp.asarray(choices_by_node(4, kept=4))
    lowered = jax.jit(under_mesh(mapped, mesh, RAGGED)).trace(*args).lower(
        lowering_platforms=(platform,)
    )
    # On each of two hops: the experts' numbers, tokens out and back, and a gradient of both.
    assert lowered.as_text().count("ragged_all_to_all(") == 2 * (1 + 2 + 4)
