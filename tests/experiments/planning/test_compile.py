"""A step compiled for eight CPU devices, against the formulas that foresaw it."""

import dataclasses
import json

import jax
import pytest

from experiments.planning.compare import compared, low_precision_sums, purpose
from experiments.planning.compile import (
    abstract_arguments,
    asked_for,
    compiled_here,
    compiled_of,
    repeated_kernels,
    setup_of,
    words_of,
)
from experiments.planning.hlo import Array, Collective
from experiments.planning.measure import random_batch
from experiments.planning.memory import argument_bytes
from experiments.planning.setup import mesh_of, setup
from experiments.planning.weights import optimizer_bytes, parameter_bytes
from sharding.hardware import cluster
from sharding.mesh import make_mesh
from tests.configs import ONE_MTP, QUICK, make_run

# One dense and two MoE layers whose experts, heads and channels eight devices divide.
CONFIG = dataclasses.replace(ONE_MTP, num_layers=2, num_experts=32, num_groups=8, num_mtp=0)
RUN = make_run(CONFIG, batch=8, remat="full")


@pytest.fixture(scope="module")
def chosen():
    return setup(RUN, cluster("cpux8"), mesh_of("fsdp=2,expert=4", 8), sequences=1)


@pytest.fixture(scope="module")
def found(chosen):
    with pytest.MonkeyPatch.context() as patch:
        lowered = jax.stages.Lowered.compile
        patch.setattr(jax.stages.Lowered, "compile", lambda self: lowered(self, QUICK))
        return compiled_here(chosen, "cpu")


def test_the_compiler_holds_what_the_formulas_say(chosen, found):
    assert found.arguments == argument_bytes(chosen)
    state = parameter_bytes(chosen.run, chosen.mesh) + optimizer_bytes(chosen.run, chosen.mesh)
    assert argument_bytes(chosen) - state == 4 * (32 + 5 + chosen.run.seq_len + 1)


@pytest.mark.parametrize("mask_documents", [False, True])
def test_a_measured_step_is_handed_all_that_it_was_compiled_for(chosen, mask_documents):
    run = dataclasses.replace(chosen.run, mask_documents=mask_documents)
    masked = dataclasses.replace(chosen, run=run)
    shapes = abstract_arguments(masked, make_mesh(jax.devices()[:8], **masked.mesh))[1]
    batch = random_batch(run, shapes)
    described = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
    assert jax.tree.map(described, batch) == jax.tree.map(described, shapes)
    assert ("segments" in batch) == mask_documents
    assert 0 < int(batch["tokens"].max()) < run.config.vocab_size


def test_dispatch_sends_what_the_formulas_say(chosen, found):
    traffic = {t.purpose: t for t in compared(chosen, found.collectives)}
    sent = traffic["dispatch and combine"]
    assert sent.compiled == pytest.approx(sent.foreseen, rel=0.02)


def test_weights_are_gathered_and_gradients_summed_in_fp32(chosen, found):
    traffic = {t.purpose: t for t in compared(chosen, found.collectives)}
    assert traffic["weights"].calls > 0 and traffic["gradients"].calls > 0
    assert low_precision_sums(chosen, found.collectives) == []


def test_a_setup_and_what_was_compiled_survive_json(chosen, found):
    again = setup_of(json.loads(json.dumps(words_of(chosen, "cpu"))))
    assert again == chosen
    assert compiled_of(json.loads(json.dumps(found._asdict()))) == found


def test_a_sum_of_gradients_in_bf16_is_found(chosen):
    size = (2, CONFIG.dense_ffn_dim, CONFIG.model_dim // 2)
    low = Collective("reduce-scatter", ("fsdp",), 2, (Array("bf16", size),), 3, "transpose(jvp)/x")
    assert low_precision_sums(chosen, [low]) == [
        f"reduce-scatter of bf16[{','.join(map(str, size))}] over fsdp"
    ]
    assert low_precision_sums(chosen, [low._replace(arrays=(Array("f32", size),))]) == []


@pytest.mark.parametrize(
    "kind, axes, array, scope, wanted",
    [
        ("all-to-all", ("expert",), Array("bf16", (64, 40)), "", "dispatch and combine"),
        ("all-gather", ("fsdp",), Array("f32", (88, 40)), "", "weights"),
        ("all-gather", ("fsdp",), Array("f32", (7, 7)), "", "other"),
        ("all-reduce", ("data",), Array("f32", (88, 40)), "transpose(jvp(dense))", "gradients"),
        ("all-reduce", ("data",), Array("s32", (32,)), "balance", "other"),
        ("all-reduce", ("tensor",), Array("bf16", (4, 12, 40)), "", "tensor sums"),
    ],
)
def test_what_a_collective_is_for(kind, axes, array, scope, wanted):
    assert purpose(Collective(kind, axes, 2, (array,), 1, scope), {88 * 40, 44 * 40}) == wanted


def test_a_refusal_says_how_much_it_needs():
    message = "RESOURCE_EXHAUSTED: Used 37.73G of 31.25G hbm. Exceeded by 6.48G"
    assert asked_for(message) == int(37.73 * 2**30)


def test_kernels_that_are_lowered_twice_are_found():
    call = 'func @a { x = custom_call @mosaic_gpu_v2(%0) {kernel_hash = "abc", n = 1}'
    other = call.replace("abc", "def")
    assert repeated_kernels(f"{call}\n{other}") == ()
    assert repeated_kernels(f"{call}\n{other}\n{call}") == (
        "3 kernels were lowered, 2 of them different",
    )
