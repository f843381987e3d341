"""Rules of drawing, and that drafted tokens are distributed as the model's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import sampling
from deepseek_jax.sampling import Sampling, draw, log_probabilities, verify

LOGITS_V = np.array([2.0, 1.0, 0.0, -1.0, 0.5, 1.9])
# 1e-3 of chi-square with so many degrees of freedom lies above.
CHI2 = {5: 20.515, 35: 66.62}


def rules(temperature=1.0, top_k=None, top_p=None, min_p=None):
    return Sampling.of(temperature, top_k, top_p, min_p)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def probabilities(**options):
    return np.exp(np.asarray(log_probabilities(jnp.asarray(LOGITS_V, jnp.float32),
                                               rules(**options))))  # fmt: skip


def only(kept, temperature=1.0):
    """The softmax over some tokens alone."""
    p = np.zeros(len(LOGITS_V))
    p[kept] = softmax(LOGITS_V[kept] / temperature)
    return p


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 1.5}, only([0, 1, 2, 3, 4, 5], 1.5)),
        ({"top_k": 3}, only([0, 1, 5])),
        ({"top_k": 100}, only([0, 1, 2, 3, 4, 5])),
        # The probabilities are 0.36, 0.33, 0.13, 0.08, 0.05, 0.02.
        ({"top_p": 0.4}, only([0, 5])),
        ({"top_p": 0.3}, only([0])),
        ({"top_p": 0.75}, only([0, 1, 5])),
        ({"top_p": 1.0}, only([0, 1, 2, 3, 4, 5])),
        # Of the three that top-k leaves: 0.44, 0.40, 0.16.
        ({"top_k": 3, "top_p": 0.8}, only([0, 5])),
        ({"min_p": 0.3}, only([0, 1, 5])),
        ({"temperature": 2.0, "top_k": 5, "min_p": 0.55}, only([0, 1, 5], 2.0)),
    ],
    ids=str,
)
def test_rules_keep_the_tokens_that_they_name(options, expected):
    np.testing.assert_allclose(probabilities(**options), expected, atol=1e-6)


def test_rules_that_keep_everything_are_left_out_of_greedy():
    assert rules(temperature=0.0, top_k=3) == Sampling()


def test_rules_that_keep_every_token_cost_no_sort():
    assert rules(top_p=1.0, min_p=0.0) == rules()


def test_the_coldest_temperature_is_nearly_greedy():
    log_p = sampling.log_probabilities(jnp.array([1.0, 3.0, 20.0, 7.0]), rules(sampling.COLDEST))
    np.testing.assert_array_equal(jnp.exp(log_p), [0, 0, 1, 0])


def test_greedy_takes_the_most_likely():
    logits_BV = jnp.array([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    assert draw(logits_BV, Sampling(), None, jnp.zeros(2, jnp.int32)).tolist() == [1, 0]


def counts_of(tokens, size):
    return np.bincount(np.asarray(tokens).reshape(-1), minlength=size)


def chi_square(counts, p):
    expected = counts.sum() * p
    return ((counts - expected) ** 2 / expected).sum()


def test_draws_follow_the_softmax_at_their_temperature():
    rows = 20_000
    logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS_V, jnp.float32), (rows, 6))
    fn = jax.jit(lambda key: draw(logits_BV, rules(1.5), key, jnp.zeros(rows, jnp.int32)))
    assert chi_square(counts_of(fn(jax.random.key(0)), 6), softmax(LOGITS_V / 1.5)) < CHI2[5]


# Two positions after a text: the main model's distributions and a draft's, which differ much.
P_LOGITS = np.array([LOGITS_V, LOGITS_V[::-1] * 0.7, LOGITS_V * 0.3])
Q_LOGITS = np.array([LOGITS_V[[3, 0, 5, 1, 4, 2]], LOGITS_V * 1.2])


def drafted_pairs(rows):
    """The first two tokens of many texts, drafted two at a time; the rest is drawn plainly."""

    def tokens(key):
        # With these the distribution of a position does not depend on the tokens before it.
        logits_BWV = jnp.broadcast_to(jnp.asarray(P_LOGITS, jnp.float32), (rows, 3, 6))
        draft_logits_BPV = jnp.broadcast_to(jnp.asarray(Q_LOGITS, jnp.float32), (rows, 2, 6))
        at = lambda d: jnp.full(rows, d, jnp.int32)
        draft_BP = jnp.stack(
            [draw(draft_logits_BPV[:, d], rules(), key, at(d), purpose=3) for d in range(2)], axis=1
        )
        new_BW, accepted_B = verify(
            logits_BWV, draft_logits_BPV, draft_BP, rules(), key, at(0)
        )
        later_B = draw(logits_BWV[:, 1], rules(), jax.random.fold_in(key, 9), at(1))
        return new_BW[:, 0], jnp.where(accepted_B == 0, later_B, new_BW[:, 1]), accepted_B

    return jax.tree.map(np.asarray, jax.jit(tokens)(jax.random.key(1)))


def pairs_chi_square(first_B, second_B):
    joint = np.outer(softmax(P_LOGITS[0]), softmax(P_LOGITS[1])).reshape(-1)
    return chi_square(counts_of(first_B * 6 + second_B, 36), joint)


def test_drafted_tokens_are_distributed_as_the_models_own():
    first_B, second_B, accepted_B = drafted_pairs(100_000)
    assert pairs_chi_square(first_B, second_B) < CHI2[35]
    # As many drafts are accepted as the distributions overlap.
    overlap = [np.minimum(softmax(p), softmax(q)).sum()
               for p, q in zip(P_LOGITS, Q_LOGITS, strict=False)]  # fmt: skip
    assert (accepted_B > 0).mean() == pytest.approx(overlap[0], abs=0.01)
    assert (accepted_B > 1).mean() == pytest.approx(overlap[0] * overlap[1], abs=0.01)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("residual", lambda p_BV, q_BV: p_BV),
        ("leading", lambda true_BP: jnp.full(true_BP.shape[0], 2, jnp.int32)),
    ],
    ids=["rejected-drawn-from-p", "all-accepted"],
)
def test_a_wrong_rule_of_acceptance_is_noticed(monkeypatch, name, wrong):
    monkeypatch.setattr(sampling, name, wrong)
    first_B, second_B, _ = drafted_pairs(20_000)
    assert pairs_chi_square(first_B, second_B) > 10 * CHI2[35]


def test_a_tokens_key_depends_on_its_row_position_and_purpose_alone():
    key, of = jax.random.key(0), sampling.row_keys
    data = lambda *a: np.asarray(jax.random.key_data(of(key, *a)))
    both, longer = data(jnp.array([3, 4]), 0), data(jnp.array([3, 4, 5]), 0)
    np.testing.assert_array_equal(both, longer[:2])
    assert len({tuple(row) for row in longer} | {tuple(data(jnp.array([3]), 1)[0])}) == 4
