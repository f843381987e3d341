"""The program of an FP8 train step of two micro-batches, made here for an H200: what it calls."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import deepseek_jax as ds
from deepseek_jax import fp8, training
from experiments import recipes
from experiments.explain import on_device
from sharding import AXES
from tests.configs import WIDE, make_batch, make_run
from tests.deepseek_jax.program_calls import calls

CONFIG = dataclasses.replace(WIDE, num_layers=3, num_mtp=0)
RUN = make_run(CONFIG, batch=2, precision=ds.Precision.of("fp8"), remat="paper",
               batch_size=ds.Schedule.constant(4))
B, T, D, V, E = 2, RUN.seq_len, CONFIG.model_dim, CONFIG.vocab_size, CONFIG.num_experts
STATE = training.abstract_state(RUN)
BF16, F32, F8, BYTE = map(jnp.dtype, ("bfloat16", "float32", "float8_e4m3fn", "uint8"))


@pytest.fixture(scope="module")
def traced():
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch(RUN, accumulation=2)))
    with on_device("h200"):
        return jax.jit(lambda state, batch: training.train_step(RUN, state, batch)).trace(
            STATE, batch
        )


@pytest.fixture(scope="module")
def program(traced):
    return list(calls(traced.jaxpr))


@pytest.fixture(scope="module")
def text(traced):
    """The program lowered for CUDA with the default choice of implementations."""
    with on_device("h200"):
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def matrices():
    """The quantised weights of each stack, as one layer sees them."""
    quantised = jax.eval_shape(fp8.quantize_weights, STATE.params)
    leaves = jax.tree.leaves(quantised, is_leaf=fp8.is_quantized)
    one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return [jax.tree.map(one, leaf) for leaf in leaves if fp8.is_quantized(leaf)]


def shapes(program, names, arrays, loop):
    """How often kernels of these names have such operands or results of each shape in a loop."""
    found = Counter()
    for call in program:
        if call.name in names and call.loops[:1] == ("micro",) and loop in call.loops:
            for aval in arrays(call):
                # A dense gradient leaves as a group of one.
                found[aval.shape[1:] if aval.shape[0] == 1 else aval.shape] += 1
    return found


def weights_of(call):
    """Of a product, or of products that one kernel adds: activations and weights alternate."""
    return [a for a in call.operands if a.dtype == F8][1::2]


def gradient_of(call):
    return call.results[:1]


PRODUCTS = ("matmul_fp8", "grouped_matmul_fp8_by_rows")
GRADIENTS = ("weight_gradient_fp8", "grouped_matmul_fp8_by_contraction")


def test_every_matrix_is_multiplied_in_fp8_forward_and_backward(program):
    weights = matrices()
    assert len(weights) == 8 + 11  # a dense layer and a MoE layer
    forward = shapes(program, PRODUCTS, weights_of, "layers")
    assert forward == Counter(w.blocks.codes.shape for w in weights)
    backward = shapes(program, PRODUCTS, weights_of, "reverse")
    assert backward >= Counter(w.blocks.transposed.shape for w in weights)
    padded = lambda w: (*w.blocks.codes.shape[:-1], w.blocks.transposed.shape[-2])
    assert shapes(program, GRADIENTS, gradient_of, "reverse") == Counter(map(padded, weights))


def test_products_take_fp8_and_sum_in_fp32(program):
    found = [call for call in program if call.name in (*PRODUCTS, *GRADIENTS)]
    assert {a.dtype for call in found for a in call.operands[:2]} == {F8}
    assert {call.results[0].dtype for call in found if call.name in GRADIENTS} == {F32}


def test_no_other_product_is_left_but_those_of_the_head_and_the_router(program):
    found = [call for call in program if call.name == "dot_general"]
    assert len(found) == 3 + 4
    for call in found:
        assert any({V, E} & set(a.shape) for a in (*call.operands, *call.results)), call


def test_the_lowered_program_holds_kernels_and_no_reference(text, program):
    kernels = Counter(call.name for call in program if call.equation.primitive.name == "mpmd_map")
    assert set(kernels) == {
        *PRODUCTS, *GRADIENTS, "quantize_fp8", "rms_norm_quantize_fp8", "swiglu_quantize_fp8",
        "swiglu_gradient_fp8", "retile_fp8", "quantize_blocks_fp8",
    }
    assert text.count("@mosaic_gpu_v2") >= len(kernels)
    assert text.count("stablehlo.dot_general") == 3 + 4
    # Attention, forward and backward, of each stack.
    assert text.count("@__cudnn") == 4


def test_no_array_has_two_dimensions_of_the_sequence(program):
    for call in program:
        for aval in (*call.operands, *call.results):
            assert getattr(aval, "shape", ()).count(T) < 2, call


def test_each_weight_is_quantised_once_outside_the_micro_batches(program):
    found = [call for call in program if call.name == "quantize_blocks_fp8"]
    assert len(found) == len(matrices())
    assert all("micro" not in call.loops for call in found)


def test_gradients_are_added_in_the_products_that_make_them(program):
    """A stacked gradient is never added to another: layers get the sum so far and return it."""
    whole = {leaf.target.shape for leaf in jax.tree.leaves(
        jax.eval_shape(fp8.quantize_weights, STATE.params), is_leaf=fp8.is_quantized)
        if fp8.is_quantized(leaf)}
    added = {call.results[0].shape for call in program
             if call.loops == ("micro",) and call.name in ("add", "add_any")}
    assert STATE.params["head_VD"].shape in added and not added & whole
    for call in program:
        if call.name == "scan" and call.loops == ("micro",) and call.equation.params["reverse"]:
            returned = {a.shape for a in call.results if a.shape in whole}
            taken = {a.shape for a in call.operands if a.shape in whole and a.dtype == F32}
            assert returned and returned <= taken


def test_what_is_kept_for_backward_is_fp8_and_e5m6(program):
    layers = [call for call in program
              if call.name == "scan" and call.loops == ("micro",)
              and call.results[0].shape == (B, T, D)]
    forward = [call for call in layers if not call.equation.params["reverse"]]
    assert len(forward) == 2
    for call, count in zip(forward, (1, 2), strict=True):
        kept = {(a.shape, a.dtype) for a in call.results[1:] if math.prod(a.shape) > count * B * T}
        floats = {shape for shape, dtype in kept if dtype == BF16}
        # The input of the block and of the two latent norms; norms are computed again from them.
        latents = (D, CONFIG.query_latent_dim, CONFIG.cache_dim)
        assert floats == {(count, B, T, width) for width in latents}
        # E5M6 of N U = 96 in 12 bits an element of a tile of 128.
        assert {((count, B, T, 128), BYTE), ((count, B, T, 64), BYTE)} <= kept
        codes = {shape for shape, dtype in kept if dtype == jnp.int8}
        assert {shape[-1] for shape in codes} == {384}
        scales = {shape for shape, dtype in kept if dtype == F32}
        heads = (count, B, CONFIG.num_heads, T)
        assert all(shape[-1] <= 3 or shape == heads for shape in scales), scales


def kept_bytes(precision):
    """Bytes that the layers of the peer-sized step keep for the backward pass."""
    run = dataclasses.replace(
        recipes.peer(), precision=ds.Precision.of(precision), remat="paper"
    )
    shape = (run.micro_batch, run.seq_len, run.config.model_dim)
    batch = {"tokens": jax.ShapeDtypeStruct((1, run.micro_batch, run.seq_len + 1), jnp.int32)}
    step = lambda state, batch: training.accumulate(run, state, batch, jnp.float32(0.3))
    with on_device("h200"):
        traced = jax.jit(step).trace(training.abstract_state(run), batch)
    layers = [call for call in calls(traced.jaxpr)
              if call.name == "scan" and not call.equation.params["reverse"]
              and (call.results[0].shape, call.results[0].dtype) == (shape, BF16)]
    assert len(layers) == 2
    return sum(math.prod(a.shape) * a.dtype.itemsize for call in layers for a in call.results[1:])


@pytest.mark.slow
def test_the_peer_sized_step_keeps_two_thirds_of_the_bytes_of_bf16():
    assert kept_bytes("fp8") <= 0.65 * kept_bytes("bf16")


@pytest.mark.parametrize("kind", ["NVIDIA A100", "TPU v5p"])
def test_a_device_without_kernels_is_refused_by_name(kind):
    platform = "tpu" if "TPU" in kind else "gpu"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=108, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=device)
    step = lambda state: training.accumulate(RUN, state, make_batch(RUN), jnp.float32(0.3))
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError, match=kind):
        jax.eval_shape(step, STATE)


def test_the_reference_runs_anywhere_when_it_is_asked_for(program):
    precision = dataclasses.replace(RUN.precision, implementation="reference")
    run = dataclasses.replace(RUN, precision=precision)
    step = lambda state: training.accumulate(run, state, make_batch(run), jnp.float32(0.3))
    with on_device("h200"):
        found = [call.name for call in calls(jax.make_jaxpr(step)(STATE))]
    assert not set(found) & {call.name for call in program if "fp8" in call.name}
