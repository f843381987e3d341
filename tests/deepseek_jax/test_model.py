"""The whole model: causality, multi-token prediction, documents, auxiliary values, program size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import training
from tests.configs import TINY, compiled, equations, make_batch, make_run, make_state
from tests.oracle import weights

B, T = 2, 12
RUN = make_run(TINY)


def biases(kind):
    """Routing biases; "skewed" ones send every token to the same K experts of every layer."""
    drawn = weights.make_biases(TINY, seed=0, scale=0.05)
    if kind == "skewed":
        favoured = np.where(np.arange(TINY.num_experts) < TINY.experts_per_token, 100.0, 0.0)
        drawn = jax.tree.map(lambda b: (b + favoured[None, :]).astype(np.float32), drawn)
    return drawn


@pytest.fixture(scope="module")
def params():
    return weights.make_weights(TINY, seed=0)


@pytest.fixture(scope="module")
def tokens_BT():
    """Tokens of which none occurs twice, so that each position has embedding rows of its own."""
    ids = np.random.RandomState(0).permutation(TINY.vocab_size)
    return ids[: B * T].reshape(B, T).astype(np.int32)


@pytest.fixture(scope="module")
def forward(params, tokens_BT):
    """Logits, MTP logits and auxiliary values of (biases, tokens, segments); one program."""
    none = np.zeros_like(tokens_BT)

    def compute(params, biases, tokens_BT, segments_BT):
        model = training.join(RUN, params, biases)
        return model(tokens_BT, segments_BT=segments_BT, hidden=True, mtp=True)

    program = compiled(compute, params, biases("spread"), tokens_BT, none)
    return lambda biases, tokens_BT, segments_BT=none: jax.device_get(
        program(params, biases, tokens_BT, segments_BT)
    )


@pytest.mark.parametrize("routing", ["spread", "skewed"])
def test_future_tokens_do_not_change_the_past_by_a_bit(forward, tokens_BT, routing):
    before, aux = forward(biases(routing), tokens_BT)
    assert routing == "spread" or set(aux.expert_counts_LE.max(axis=1)) == {B * T, B * 11, B * 10}
    for position in range(1, T):
        changed = tokens_BT.copy()
        changed[:, position:] = (changed[:, position:] + 7) % TINY.vocab_size
        after, changed_aux = forward(biases(routing), changed)
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert (after[:, position:] != before[:, position:]).any(axis=-1).all()
        for depth, (mtp, expected) in enumerate(
            zip(changed_aux.mtp_logits, aux.mtp_logits, strict=True), start=1
        ):
            # Depth k at position i has seen tokens up to i + k.
            past = max(position - depth, 0)
            np.testing.assert_array_equal(mtp[:, :past], expected[:, :past])
            assert (mtp[:, past:] != expected[:, past:]).any(axis=-1).all()


@pytest.mark.parametrize("routing", ["spread", "skewed"])
def test_future_tokens_get_no_gradient_from_the_past(embedding_gradient, tokens_BT, routing):
    for depth in range(TINY.num_mtp + 1):
        for position in range(0, T - depth, 3):
            gradient_VD = embedding_gradient(biases(routing), depth, position)
            size_BT = np.abs(gradient_VD).max(axis=-1)[tokens_BT]
            assert not size_BT[:, position + depth + 1 :].any()
            assert size_BT[:, : position + depth + 1].all()


@pytest.fixture(scope="module")
def embedding_gradient(params, tokens_BT):
    """The gradient of a sum of logits of one depth at one position for the embedding rows."""
    mix_V = np.random.RandomState(1).randn(TINY.vocab_size).astype(np.float32)

    def total(embed_VD, params, biases, tokens_BT, depth, position):
        model = training.join(RUN, {**params, "embed_VD": embed_VD}, biases)
        logits_BTV, aux = model(tokens_BT, mtp=True)
        past_end = lambda x: jnp.pad(x, ((0, 0), (0, T - x.shape[1]), (0, 0)))
        all_XBTV = jnp.stack([past_end(x) for x in (logits_BTV, *aux.mtp_logits)])
        return jnp.sum(all_XBTV[depth, :, position] * mix_V[None, :])

    def args(biases, depth, position):
        place = np.int32(depth), np.int32(position)
        return params["embed_VD"], params, biases, tokens_BT, *place

    program = compiled(jax.grad(total), *args(biases("spread"), 0, 0))
    return lambda *where: np.asarray(program(*args(*where)))


def test_documents_do_not_see_each_other(forward, tokens_BT):
    segments_BT = np.repeat([[0, 1, 2]], B, axis=0).repeat([5, 4, 3], axis=1).astype(np.int32)
    before, _ = forward(biases("spread"), tokens_BT, segments_BT)
    for begin, end in ((0, 5), (5, 9), (9, 12)):
        changed = tokens_BT.copy()
        changed[:, begin:end] = (changed[:, begin:end] + 7) % TINY.vocab_size
        after, _ = forward(biases("spread"), changed, segments_BT)
        outside = np.r_[0:begin, end:T]
        np.testing.assert_array_equal(after[:, outside], before[:, outside])
        assert (after[:, begin:end] != before[:, begin:end]).any(axis=-1).all()


def test_a_document_reads_as_if_it_were_alone(forward, tokens_BT, relative_error, limits):
    segments_BT = np.repeat([[0, 1]], B, axis=0).repeat([5, 7], axis=1).astype(np.int32)
    packed, _ = forward(biases("spread"), tokens_BT, segments_BT)
    alone, _ = forward(biases("spread"), np.roll(tokens_BT, -5, axis=1))
    # Rotary positions enter by their differences alone.
    assert relative_error(packed[:, 5:], alone[:, :7]) < limits["fp32"].value


def test_equal_segments_are_no_mask(forward, tokens_BT):
    one = forward(biases("spread"), tokens_BT, np.full_like(tokens_BT, 3))
    none = forward(biases("spread"), tokens_BT)
    np.testing.assert_array_equal(one[0], none[0])


# What is returned.


def test_logits_are_fp32_and_the_head_on_hidden_states(forward, params, tokens_BT):
    logits_BTV, aux = forward(biases("spread"), tokens_BT)
    assert logits_BTV.dtype == np.float32 and logits_BTV.shape == (B, T, TINY.vocab_size)
    assert aux.hidden_LBTD.shape == (TINY.num_layers + 1, B, T, TINY.model_dim)
    head = aux.hidden_LBTD[-1] @ params["head_VD"].T
    np.testing.assert_allclose(logits_BTV, head, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(aux.hidden_LBTD[0], params["embed_VD"][tokens_BT])


def test_counts_cover_moe_layers_then_mtp_depths(forward, tokens_BT):
    _, aux = forward(biases("spread"), tokens_BT)
    assert aux.expert_counts_LE.shape == (TINY.num_moe_layers + TINY.num_mtp, TINY.num_experts)
    positions = np.array([T] * TINY.num_moe_layers + [T - 1, T - 2])
    np.testing.assert_array_equal(
        aux.expert_counts_LE.sum(axis=1), B * positions * TINY.experts_per_token
    )


def test_mtp_logits_are_those_of_the_positions_that_have_a_target(forward, tokens_BT):
    _, aux = forward(biases("spread"), tokens_BT)
    assert [x.shape[1] for x in aux.mtp_logits] == [T - 1, T - 2]


def test_values_that_were_not_asked_for_are_not_computed():
    model = nnx.eval_shape(lambda: ds.Model(TINY, rngs=nnx.Rngs(0)))
    logits_BTV, aux = jax.eval_shape(lambda m, x: m(x), model, jnp.zeros((B, T), jnp.int32))
    assert logits_BTV.shape == (B, T, TINY.vocab_size)
    assert aux.hidden_LBTD is None and aux.mtp_logits is None and aux.latent_LBTY is None
    assert aux.expert_counts_LE.shape[0] == TINY.num_moe_layers


def test_a_model_of_dense_layers_alone_runs():
    config = dataclasses.replace(TINY, num_dense_layers=4)
    model = nnx.eval_shape(lambda: ds.Model(config, rngs=nnx.Rngs(0)))
    call = lambda m, x: m(x, hidden=True, mtp=True)
    logits_BTV, aux = jax.eval_shape(call, model, jnp.zeros((B, T), jnp.int32))
    assert aux.expert_counts_LE.shape == (0, TINY.num_experts)
    assert aux.hidden_LBTD.shape[0] == 5 and len(aux.mtp_logits) == 2




# At initialisation.


FRESH = ds.configs.tiny()


@pytest.fixture(scope="module")
def first_losses():
    """State and losses of the default run's model, freshly initialised, on random tokens."""
    run = make_run(FRESH, batch=8, seq_len=64)
    state = compiled(lambda: training._init(run))()

    def losses(params, biases, tokens_BS):
        model = training.join(run, params, biases)
        return training.loss_and_aux(model, tokens_BS, mtp_weight=0.3, sequence_loss_weight=0.0)

    tokens_BS = make_batch(run)["tokens"][0]
    _, parts = compiled(losses, state.params, state.biases, tokens_BS)(
        state.params, state.biases, tokens_BS
    )
    return jax.device_get((state, parts))


def test_losses_at_initialisation_are_ln_v(first_losses):
    _, losses = first_losses
    ln_v = np.log(FRESH.vocab_size)
    assert float(losses["loss"]) == pytest.approx(ln_v, rel=0.02)
    # Depth k has T - k targets and divides by T = 64.
    share = np.mean([(64 - k) / 64 for k in range(1, FRESH.num_mtp + 1)])
    assert float(losses["mtp_loss"]) == pytest.approx(ln_v * share, rel=0.02)


def test_matrices_start_normal_with_the_configured_deviation(first_losses):
    state, _ = first_losses
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = path[-1].key
        if "norm" in name:
            assert (leaf == 1).all(), name
        else:
            assert leaf.std() == pytest.approx(FRESH.init_std, rel=0.1), name
            assert abs(leaf.mean()) < 5 * FRESH.init_std / leaf.size**0.5, name
    assert not any(np.any(bias) for bias in jax.tree.leaves(state.biases))


def test_layers_start_different(first_losses):
    state, _ = first_losses
    w_LEFD = np.asarray(state.params["moe"]["ffn"]["w_gate_EFD"])
    assert len({layer.tobytes() for layer in w_LEFD}) == FRESH.num_moe_layers
    assert not np.array_equal(state.params["embed_VD"], state.params["head_VD"])


# The program.


def test_the_train_step_does_not_grow_with_depth():
    def count(num_layers):
        run = make_run(dataclasses.replace(TINY, num_layers=num_layers, num_mtp=1))
        step = lambda state, batch: training.train_step(run, state, batch)
        traced = jax.make_jaxpr(step)(training.abstract_state(run), make_batch(run))
        return sum(1 for _ in equations(traced))

    assert count(4) == count(7) > 1000


def test_state_for_tests_has_the_shapes_of_a_state():
    expected = training.abstract_state(RUN)
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
    assert all(jax.tree.leaves(jax.tree.map(same, make_state(RUN), expected)))


def test_a_text_shorter_than_the_depths_has_no_logits_of_the_last():
    def ahead():
        return ds.Model(TINY, rngs=nnx.Rngs(0))(jnp.zeros((2, 1), jnp.int32), mtp=True)[1]

    assert [x.shape for x in jax.eval_shape(ahead).mtp_logits] == [(2, 0, 104), (2, 0, 104)]


@pytest.mark.parametrize(
    "tokens, words",
    [
        (np.zeros((1, 3)), "dtype float64 must be integers"),
        (np.zeros(3, int), r"shape \(3,\)"),
        (np.zeros((1, 65), int), "65 tokens exceed max_length=64"),
        (np.array([[0, 104]]), r"token 104 is outside 0\.\.103"),
        (jnp.array([[-1]]), "token -1"),
        ([[0, 1]], "an array, not a list"),
    ],
)
def test_tokens_that_a_model_cannot_read_are_named(tokens, words):
    model = nnx.eval_shape(lambda: ds.Model(TINY, rngs=nnx.Rngs(0)))
    for method in (model, model.hidden):
        with pytest.raises(ValueError, match=words):
            method(tokens)
