"""The train step: update, finite check, accumulation, routing bias, averages, token count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import training
from deepseek_jax.config import AdamW, Phase, Schedule
from deepseek_jax.optimizer import adamw
from tests.configs import (
    ONE_MTP,
    compiled,
    make_batch,
    make_run,
    make_state,
    on_device,
)

# One block body less to compile; clipping is at work: gradients of these weights are longer.
CONFIG = dataclasses.replace(ONE_MTP, num_layers=2, num_dense_layers=0)
RUN = make_run(
    CONFIG,
    batch=8,
    learning_rate=Schedule((Phase(192, 1e-3, 3e-3),)),
    gamma=Schedule((Phase(192, 0.01, 0.02),)),
    mtp_weight=Schedule((Phase(96, 0.7, 0.7), Phase(0, 0.1, 0.1))),
    optimizer=AdamW(clip_norm=0.5),
    ema_decay=0.9,
)
MTP_WEIGHT = np.float32(0.7)


def batch_of(seed):
    """Tokens, and the documents they are of."""
    batch = make_batch(RUN, seed=seed)
    begins = np.random.RandomState(seed).rand(*batch["tokens"].shape) < 0.2
    return {**batch, "segments": np.cumsum(begins, axis=-1).astype(np.int32)}


@pytest.fixture(scope="module")
def step():
    """The compiled train step; arguments in numpy are copied, so donation takes nothing."""
    program = compiled(ds.make_train_step(RUN), training.abstract_state(RUN), batch_of(0))
    return lambda state, batch: jax.device_get(program(on_device(state), on_device(batch)))


@pytest.fixture(scope="module")
def state():
    return make_state(RUN)


@pytest.fixture(scope="module")
def stepped(step, state):
    """The state and metrics after one step."""
    return step(state, batch_of(0))


@pytest.fixture(scope="module")
def accumulated(state):
    """Gradients and sums of 8 sequences, as {micro-batches: result}."""
    results = {}
    for count in (1, 4):
        run = dataclasses.replace(RUN, micro_batch=8 // count)
        batch = {name: x.reshape(count, 8 // count, -1) for name, x in batch_of(0).items()}
        fn = lambda state, batch, weight, run=run: training.accumulate(run, state, batch, weight)
        args = state, batch, MTP_WEIGHT
        results[count] = jax.device_get(compiled(fn, *args)(*args))
    return results


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


# The update.


def test_a_step_is_adamw_on_the_accumulated_gradient(state, stepped, accumulated, relative_error):
    (gradients, sums), (after, metrics) = accumulated[1], stepped
    args = state.params, gradients, state.first, state.second, metrics["grad_norm"]

    def reference(params, gradients, first, second, norm):
        return adamw(params, gradients, first, second, norm=norm, count=jnp.int32(0),
                     learning_rate=jnp.float32(1e-3), settings=RUN.optimizer)

    expected = compiled(reference, *args)(*args)
    for tree, wanted in zip((after.params, after.first, after.second), expected, strict=True):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
            assert relative_error(a, b) < 1e-6
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.5
    assert metrics["loss"] == pytest.approx(float(sums["loss"]), rel=1e-6)


def test_every_parameter_moves_and_counters_advance(state, stepped):
    after, metrics = stepped
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(after.params),
                            jax.tree.leaves(state.params), strict=True):
        assert (a != b).any(), path
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 0, 0)
    assert after.tokens.tolist() == [96, 0] and training.tokens_seen(after) == 96
    assert metrics["tokens"] == 96 and metrics["bad_tensor"] == -1


def test_the_total_loss_is_the_weighted_sum(stepped):
    _, m = stepped
    total = m["loss"] + 0.7 * m["mtp_loss"] + 0.3 * m["sequence_loss"]
    assert m["total_loss"] == pytest.approx(float(total), rel=1e-6)


def test_schedules_are_read_at_the_tokens_before_the_step(step, stepped):
    state, first = stepped
    read = lambda m: [float(m[name]) for name in ("learning_rate", "gamma", "mtp_weight")]
    assert read(first) == pytest.approx([1e-3, 0.01, 0.7])
    state, second = step(state, batch_of(1))
    assert read(second) == pytest.approx([2e-3, 0.015, 0.1])
    _, third = step(state, batch_of(2))
    assert read(third) == pytest.approx([3e-3, 0.02, 0.1])


def test_documents_of_the_batch_are_masked(step, state, stepped):
    batch = batch_of(0)
    _, metrics = step(state, {**batch, "segments": np.zeros_like(batch["segments"])})
    assert abs(metrics["loss"] - stepped[1]["loss"]) > 1e-3


def test_the_step_gives_the_same_bits_again(step, state, stepped):
    assert_same_bits(step(state, batch_of(0)), stepped)


def test_the_step_takes_its_state_for_its_own():
    text = ds.make_train_step(RUN).lower(training.abstract_state(RUN), batch_of(0)).as_text()
    arguments = len(jax.tree.leaves(training.abstract_state(RUN)))
    assert text.count("tf.aliasing_output") == arguments


def test_the_average_of_parameters_follows_with_its_decay(state, stepped):
    after, _ = stepped
    for ema, old, new in zip(*(jax.tree.leaves(t) for t in (after.ema, state.ema, after.params)),
                             strict=True):
        np.testing.assert_allclose(ema, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-7)


def test_without_a_decay_there_is_no_average():
    run = dataclasses.replace(RUN, ema_decay=None)
    assert training.abstract_state(run).ema is None
    assert training.abstract_state(RUN).ema.keys() == training.abstract_state(RUN).params.keys()


# Accumulation.


def test_four_micro_batches_give_the_gradients_of_one_batch(accumulated, relative_error, limits):
    four, one = accumulated[4][0], accumulated[1][0]
    flat = lambda tree: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    assert relative_error(flat(four), flat(one)) < 1e-6
    for a, b in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        assert relative_error(a, b) < limits["fp32"].value


def test_four_micro_batches_give_the_losses_and_counts_of_one_batch(accumulated, relative_error):
    four, one = accumulated[4][1], accumulated[1][1]
    np.testing.assert_array_equal(four["expert_counts_LE"], one["expert_counts_LE"])
    for name in ("total_loss", "loss", "mtp_loss", "sequence_loss"):
        assert relative_error(four[name], one[name]) < 1e-6


# The finite check.


def poisoned(state):
    """The state with one weight that is not a number."""
    params = jax.tree.map(lambda p: p.copy(), state.params)
    params["moe"]["ffn"]["w_gate_EFD"][0, 3, 2, 1] = np.nan
    return dataclasses.replace(state, params=params)


def kept(state):
    return state.params, state.first, state.second, state.biases, state.ema


def test_a_poisoned_batch_changes_nothing_and_is_counted(step, state):
    batch = batch_of(0)
    batch["tokens"][0, 1, 4] = CONFIG.vocab_size  # as a target it has no logit
    after, metrics = step(state, batch)
    assert not np.isfinite(metrics["loss"])
    assert_same_bits(kept(after), kept(state))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == 1
    assert training.tokens_seen(after) == 96  # the data goes on
    assert metrics["bad_tensor"] == -1  # no gradient is bad, the loss alone


def test_a_poisoned_parameter_changes_nothing_and_is_counted(step, state):
    bad = poisoned(state)
    after, metrics = step(bad, batch_of(0))
    assert_same_bits(kept(after), kept(bad))
    assert int(after.skipped) == 1 and metrics["bad_tensor"] >= 0


def test_skips_in_a_row_are_counted_until_a_good_step(step, state):
    rows = []
    for params in (state, poisoned(state), poisoned(state), state, poisoned(state)):
        state = dataclasses.replace(state, params=params.params)
        state, metrics = step(state, batch_of(0))
        rows.append((int(metrics["skipped"]), int(metrics["skipped_in_row"])))
    assert rows == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert int(state.step) == 5 and training.tokens_seen(state) == 5 * 96


def test_skipped_steps_do_not_count_for_the_bias_of_moments(step, state):
    # After a skip the next step is the same as without it, up to the schedules' tokens.
    skipped, _ = step(poisoned(state), batch_of(0))
    resumed = dataclasses.replace(skipped, params=state.params, tokens=state.tokens)
    assert_same_bits(kept(step(resumed, batch_of(0))[0]), kept(step(state, batch_of(0))[0]))


@pytest.mark.parametrize(
    "name, bad",
    [("embed_VD", np.nan), ("moe.ffn.router_ED", np.inf), ("mtp.w_join_DZ", -np.inf),
     ("moe.attention.kv_norm_C", 1e30)],
)
def test_the_first_bad_tensor_is_named(monkeypatch, state, name, bad):
    # A gradient whose square overflows is as bad as one that is not finite.
    names = training.parameter_names(state.params)
    clean = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), state.params)
    sums = {"total_loss": jnp.float32(1.0), "expert_counts_LE": jnp.zeros((3, 28), jnp.int32),
            "lost": jnp.int32(0)}
    index = names.index(name)
    leaves, treedef = jax.tree.flatten(clean)
    leaves[index] = leaves[index].at[..., 0].set(bad)
    later = max(index, len(leaves) - 1)
    if bad != 1e30:
        leaves[later] = leaves[later].at[..., 0].set(np.nan)
    gradients = jax.tree.unflatten(treedef, leaves)
    monkeypatch.setattr(training, "accumulate", lambda *args: (gradients, sums))
    after, metrics = jax.jit(lambda state, batch: training.train_step(RUN, state, batch))(
        state, batch_of(0)
    )
    assert names[int(metrics["bad_tensor"])] == name
    assert int(after.skipped) == 1
    assert_same_bits(kept(jax.device_get(after)), kept(state))


def test_names_of_parameters_are_dotted_paths(state):
    names = training.parameter_names(state.params)
    assert names == sorted(names) and "mtp.block.ffn.shared.w_down_DF" in names


# The routing bias.


def bias_tree(*rows):
    return {"moe": {"ffn": {"bias_E": jnp.asarray(rows, jnp.float32)}}}


def test_busy_experts_go_down_idle_ones_up_and_those_at_the_mean_stay():
    counts_LE = jnp.array([[7, 1, 4, 4], [4, 4, 4, 4]], jnp.int32)
    updated = training.update_biases(
        bias_tree([0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3]), counts_LE, jnp.float32(0.25)
    )
    expected = [[0.25, 0.75, 0.5, 0.5], [0, 1, 2, 3]]
    np.testing.assert_array_equal(updated["moe"]["ffn"]["bias_E"], expected)


def test_counts_go_to_moe_layers_first_and_then_to_mtp():
    biases = {**bias_tree([0.0, 0.0], [0.0, 0.0]),
              "mtp": {"block": {"ffn": {"bias_E": jnp.zeros((1, 2))}}}}
    counts_LE = jnp.array([[3, 1], [1, 3], [2, 2]], jnp.int32)
    updated = training.update_biases(biases, counts_LE, jnp.float32(1.0))
    np.testing.assert_array_equal(updated["moe"]["ffn"]["bias_E"], [[-1, 1], [1, -1]])
    np.testing.assert_array_equal(updated["mtp"]["block"]["ffn"]["bias_E"], [[0, 0]])


def test_the_step_moves_biases_by_its_counts(state, stepped):
    after, metrics = stepped
    counts_LE = metrics["expert_counts_LE"]
    change_LE = 0.01 * np.sign(counts_LE.mean(axis=1, keepdims=True) - counts_LE)
    old = np.concatenate(jax.tree.leaves(state.biases))
    new = np.concatenate(jax.tree.leaves(after.biases))
    np.testing.assert_allclose(new - old, change_LE, atol=1e-7)
    assert (change_LE > 0).any() and (change_LE < 0).any()


def test_softmax_routers_have_no_bias_to_update():
    run = make_run(dataclasses.replace(CONFIG, score="softmax"))
    state = training.abstract_state(run)
    assert jax.tree.leaves(state.biases) == []
    after, _ = jax.eval_shape(
        lambda s, b: training.train_step(run, s, b), state, make_batch(run)
    )
    assert after.biases == {}


# Tokens seen.


@pytest.mark.parametrize("before, count", [
    (0, 48), (2**32 - 1, 1), (2**32 - 48, 96), (5 * 2**32 - 1, 2**32 + 3),
    (14_800_000_000_000 - 1, 62_914_560),
])  # fmt: skip
def test_tokens_are_counted_exactly_past_32_bits(before, count):
    words = jnp.asarray([before % 2**32, before // 2**32], jnp.uint32)
    low, high = (int(word) for word in training.add_tokens(words, count))
    assert low + (high << 32) == before + count
    as_float = float(training.tokens_as_float(training.add_tokens(words, count)))
    assert as_float == pytest.approx(before + count, rel=1e-7)


def test_a_step_carries_the_count_across_32_bits(step, state):
    late = dataclasses.replace(state, tokens=np.array([2**32 - 10, 3], np.uint32))
    after, metrics = step(late, batch_of(0))
    assert training.tokens_seen(after) == 2**34 - 10 + 96
    assert metrics["tokens"] == np.float32(2**34 - 10 + 96)


# The start.


def test_the_first_state_holds_masters_zero_moments_and_an_equal_average():
    config = dataclasses.replace(CONFIG, num_layers=1, num_mtp=0)
    run = dataclasses.replace(RUN, config=config)
    state = training.abstract_state(run)
    made = compiled(lambda: training._init(run))()
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
    assert all(jax.tree.leaves(jax.tree.map(same, made, state)))
    assert not any(np.any(m) for m in jax.tree.leaves((made.first, made.second, made.biases)))
    assert_same_bits(jax.device_get(made.ema), jax.device_get(made.params))
    assert int(made.step) == training.tokens_seen(made) == 0
