"""The float64 reference against transformers' reading of released weights, stored in golden.npz."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.oracle import golden, reference, weights


@pytest.fixture(scope="module")
def inputs():
    config = golden.golden_config()
    return SimpleNamespace(
        config=config,
        weights=weights.make_weights(config, golden.SEED),
        biases=weights.make_biases(config, golden.SEED, **golden.BIAS),
        tokens_BT=weights.make_tokens(golden.SEED, config.vocab_size, golden.SHAPE),
    )


@pytest.fixture(scope="module")
def ours(inputs):
    return reference.forward(inputs.config, inputs.weights, inputs.biases, inputs.tokens_BT)


@pytest.fixture(scope="module")
def theirs():
    return golden.load_golden()


def test_reference_gives_the_stored_logits_and_hidden_states(ours, theirs, relative_error):
    assert relative_error(ours.logits_BTV, theirs["logits_BTV"]) < 1e-12
    for layer, state_BTD in enumerate(theirs["hidden_LBTD"]):
        assert relative_error(ours.hidden_LBTD[layer], state_BTD) < 1e-12, f"{layer=}"


@pytest.mark.parametrize("depth", [1, 2])
def test_reference_gives_the_stored_mtp_logits(ours, theirs, relative_error, depth):
    assert relative_error(ours.mtp_logits[depth - 1], theirs[f"mtp_logits_{depth}"]) < 1e-12


def test_golden_choices_are_clear_and_biases_have_both_signs(inputs, ours):
    assert ours.margin > 1e-4
    assert (ours.expert_counts_LE > 0).all()
    for bias_LE in (
        inputs.biases["moe"]["ffn"]["bias_E"],
        inputs.biases["mtp"]["block"]["ffn"]["bias_E"],
    ):
        assert bias_LE.min() < 0 < bias_LE.max()
    assert inputs.tokens_BT.shape[1] > inputs.config.yarn.original_length


def test_golden_notices_rejected_groups_masked_with_zero(
    inputs, theirs, relative_error, monkeypatch
):
    monkeypatch.setattr(reference, "REJECTED", 0.0)
    out = reference.forward(inputs.config, inputs.weights, inputs.biases, inputs.tokens_BT)
    assert relative_error(out.logits_BTV, theirs["logits_BTV"]) > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"yarn": None}, marks=pytest.mark.slow),
        pytest.param({"norm_eps": 1e-6}, marks=pytest.mark.slow),
        {"latent_norm_eps": 1e-3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_golden_notices_each_setting(inputs, theirs, relative_error, change):
    config = SimpleNamespace(**vars(inputs.config) | change)
    out = reference.forward(config, inputs.weights, inputs.biases, inputs.tokens_BT)
    # 1e-5 is the bar the package is held to.
    assert relative_error(out.logits_BTV, theirs["logits_BTV"]) > 1e-4


def test_draws_are_the_same_bits_on_every_numpy():
    draw = weights.normal(7, "some/path", (4,))
    # Exact binary fractions, so equality is meant.
    assert draw.tolist() == [
        0.4810333251953125,
        -0.9571533203125,
        -1.1630401611328125,
        -0.0785980224609375,
    ]
    assert (draw == draw.astype(np.float32)).all()
    assert weights.make_tokens(7, 1000, (4,)).tolist() == [705, 988, 484, 143]
    many = weights.normal(7, "some/path", (200_000,))
    np.testing.assert_array_equal(many[:4], draw)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
