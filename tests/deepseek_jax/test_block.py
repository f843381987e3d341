"""Remat policies: the gradients of none, in less memory each."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax import training
from deepseek_jax.block import REMAT, checkpointed
from tests.configs import TINY, compiled, make_batch, make_run
from tests.oracle import weights

# Many layers and positions, so that what is kept for the backward pass is most of the memory.
CONFIG = dataclasses.replace(TINY, num_layers=8, num_dense_layers=0, num_mtp=0)


@pytest.fixture(scope="module")
def results():
    """(bytes of temporary memory, gradients) of each policy."""
    params = weights.make_weights(CONFIG, seed=0)
    biases = weights.make_biases(CONFIG, seed=0)
    run = make_run(CONFIG, seq_len=64)
    tokens_BS = make_batch(run)["tokens"][0]

    def measure(policy):
        def loss(params):
            model = training.join(run, params, biases)
            return training.loss_and_aux(
                model, jnp.asarray(tokens_BS), mtp_weight=0.0, sequence_loss_weight=0.1,
                remat=policy,
            )

        program = compiled(jax.grad(loss, has_aux=True), params)
        gradients, _ = program(params)
        return program.memory_analysis().temp_size_in_bytes, jax.device_get(gradients)

    return {policy: measure(policy) for policy in REMAT}


def test_the_policies_are_named():
    assert list(REMAT) == ["none", "paper", "attention", "full"]


@pytest.mark.parametrize("policy", [name for name in REMAT if name != "none"])
def test_gradients_are_those_without_remat(results, policy, relative_error, limits):
    for a, b in zip(
        jax.tree.leaves(results[policy][1]), jax.tree.leaves(results["none"][1]), strict=True
    ):
        assert relative_error(a, b) < limits["fp32"].value


def test_each_policy_takes_less_memory_than_the_one_before(results):
    sizes = [results[policy][0] for policy in ("none", "paper", "attention", "full")]
    assert sizes == sorted(sizes, reverse=True)
    # Measured: 40, 15, 10 and 9 MB.
    assert sizes[1] < 0.5 * sizes[0] and sizes[3] < 0.3 * sizes[0], sizes


def test_an_unknown_policy_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="unknown remat policy 'some': use none, paper, attention"):
        checkpointed(lambda x: x, "some")
