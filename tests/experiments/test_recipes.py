"""The named runs; the paper's recipe at every corner point it prints."""

import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from experiments import recipes

BILLION, TRILLION = 10**9, 10**12


@pytest.fixture(scope="module")
def paper():
    return recipes.deepseek_v3()


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (0, 0.0),
        (10 * TRILLION, 2.2e-4),
        (12.15 * TRILLION, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (14.3 * TRILLION, 2.2e-5),
        (14.632 * TRILLION, 2.2e-5),
        (14.634 * TRILLION, 7.3e-6),
        (14.8 * TRILLION, 7.3e-6),
    ],
)
def test_learning_rate_at_the_printed_points(paper, tokens, expected):
    assert paper.learning_rate.at(tokens) == pytest.approx(expected, rel=1e-6)
    traced = paper.learning_rate.at(jnp.float32(tokens), jnp)
    assert float(traced) == pytest.approx(expected, rel=1e-4)


def test_warm_up_takes_2000_steps_and_ends_at_the_peak(paper):
    tokens = paper.position_at(2000) * paper.seq_len
    assert paper.learning_rate.at(tokens) == pytest.approx(2.2e-4, rel=1e-6)
    half = paper.learning_rate.at(tokens / 2)
    assert half == pytest.approx(1.1e-4, rel=1e-6)
    assert paper.learning_rate.at(0.99 * tokens) < 2.2e-4
    assert paper.learning_rate.at(1.5 * tokens) == pytest.approx(2.2e-4, rel=1e-6)


def test_phases_of_the_learning_rate_are_the_whole_14_8_trillion_tokens(paper):
    assert paper.learning_rate.length == 14.8 * TRILLION


def test_the_run_ends_after_14_8_trillion_tokens(paper):
    step = paper.seq_len * 15360
    assert 14.8 * TRILLION <= paper.position_at(paper.steps) * paper.seq_len
    assert paper.position_at(paper.steps) * paper.seq_len < 14.8 * TRILLION + step


@pytest.mark.parametrize(
    "tokens, sequences", [(0, 3072), (469 * BILLION, 15360), (14 * TRILLION, 15360)]
)
def test_batch_at_the_printed_points(paper, tokens, sequences):
    assert paper.accumulation_at(tokens) * paper.micro_batch == sequences


def test_the_batch_never_shrinks(paper):
    ramp = [paper.accumulation_at(tokens) for tokens in np.linspace(0, 469 * BILLION, 200)]
    assert ramp == sorted(ramp) and set(ramp) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    "tokens, gamma", [(0, 0.001), (14.299 * TRILLION, 0.001), (14.3 * TRILLION, 0.0)]
)
def test_gamma_at_the_printed_points(paper, tokens, gamma):
    assert paper.gamma.at(tokens) == pytest.approx(gamma, rel=1e-6)


@pytest.mark.parametrize(
    "tokens, weight", [(0, 0.3), (9.999 * TRILLION, 0.3), (10 * TRILLION, 0.1)]
)
def test_mtp_weight_at_the_printed_points(paper, tokens, weight):
    assert paper.mtp_weight.at(tokens) == pytest.approx(weight, rel=1e-6)


def test_other_settings_of_the_paper(paper):
    optimizer = paper.optimizer
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert paper.seq_len == 4096
    assert paper.sequence_loss_weight == 1e-4
    assert paper.config.init_std == 0.006
    assert paper.config.yarn is None
    assert paper.precision.moments == "bf16" and paper.precision.weights == "fp32"
    assert not paper.mask_documents and paper.fim_rate == 0.1


def test_balance_is_on_by_default():
    run = recipes.tiny()
    assert run.config.num_groups > run.config.groups_per_token
    assert float(run.gamma.at(0)) > 0 and run.sequence_loss_weight > 0


def test_schedules_of_tiny_stretch_with_its_steps():
    for steps in (100, 500):
        run = recipes.tiny(steps)
        tokens = run.position_at(steps) * run.seq_len
        assert run.learning_rate.length == pytest.approx(tokens)
        assert float(run.learning_rate.at(tokens)) == pytest.approx(0.0, abs=1e-9)


def test_recipes_are_found_by_name_with_hyphens_too():
    assert recipes.recipe("deepseek-v3") is recipes.deepseek_v3
    with pytest.raises(ValueError, match="unknown recipe 'gpt': use one of tiny"):
        recipes.recipe("gpt")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_complete_run(name):
    run = recipes.RECIPES[name](None)
    assert isinstance(run, ds.Run)
    assert recipes.RECIPES[name](7).steps == 7
