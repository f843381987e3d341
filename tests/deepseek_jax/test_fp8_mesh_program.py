"""The program of an FP8 train step made here for meshes of H200: kernels work on local shards."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import deepseek_jax as ds
from deepseek_jax import training
from experiments.planning import targets
from experiments.planning.compile import compile_setup
from experiments.planning.setup import mesh_of, setup
from sharding import AXES
from sharding.hardware import cluster
from tests.configs import WIDE, make_run
from tests.deepseek_jax.program_calls import calls
from tests.pallas_kernels.lowering import HOPPER, kernels_in

# Wide enough for a tensor axis, which cuts between blocks of 128.
CONFIG = dataclasses.replace(
    WIDE, num_mtp=0, content_head_dim=128, rotary_head_dim=64, value_head_dim=128,
    dense_ffn_dim=512, expert_ffn_dim=256, num_experts=64, num_groups=8, max_length=256,
)
MESHES = [
    pytest.param({"data": 2, "fsdp": 2, "expert": 2}, id="data2-fsdp2-expert2"),
    pytest.param({"fsdp": 4, "tensor": 2}, id="fsdp4-tensor2", marks=pytest.mark.slow),
    pytest.param({"fsdp": 32, "expert": 64}, id="fsdp32-expert64"),
]
# No weight has a dimension of these sizes: tokens of a device, all or those that it keeps between
# the products that the tensor axis splits.
T, HALF = 160, 80


def tiles(rows):
    """A contraction over tokens, filled up to tiles."""
    return -(-rows // 128) * 128


def run_of(batch):
    return make_run(
        CONFIG, batch=batch, seq_len=T, precision=ds.Precision.of("fp8"), remat="paper"
    )


class Step:
    """A traced step of one sequence for each device that has some of its own."""

    def __init__(self, sizes):
        self.sizes = {**dict.fromkeys(AXES, 1), **sizes}
        auto = (AxisType.Auto,) * len(AXES)
        mesh = AbstractMesh(tuple(self.sizes.values()), AXES, auto, abstract_device=HOPPER)
        B = math.prod(self.sizes.values()) // self.sizes["tensor"]
        run = run_of(B)
        batch = {"tokens": jax.ShapeDtypeStruct((1, B, T + 1), jnp.int32)}
        self.state = training.abstract_state(run)
        step = lambda state, batch: training.train_step(run, state, batch)
        with jax.sharding.use_abstract_mesh(mesh):
            self.traced = jax.jit(step).trace(self.state, batch)
            self.text = self.traced.lower(lowering_platforms=("cuda",)).as_text()
        self.calls = list(calls(self.traced.jaxpr))

    def kernels(self, *names):
        return [call for call in self.calls
                if call.equation.primitive.name == "mpmd_map" and call.name in names]

    @property
    def expert_rows(self):
        """Rows of a device's experts: each token of those it trades with may have chosen all."""
        held = CONFIG.num_experts // self.sizes["expert"]
        most = T * self.sizes["expert"] * min(CONFIG.experts_per_token, held)
        return tiles(most + min(held, most) * 127)

    @property
    def rows(self):
        return {T} if self.sizes["tensor"] == 1 else {T, HALF}


@pytest.fixture(scope="module", params=MESHES)
def step(request):
    return Step(request.param)


def test_products_take_the_tokens_and_the_weights_of_one_device(step):
    dense, grouped = step.kernels("matmul_fp8"), step.kernels("grouped_matmul_fp8_by_rows")
    assert {call.operands[0].shape[0] for call in dense} == step.rows
    assert {call.operands[0].shape[0] for call in grouped} == {step.expert_rows}
    held = CONFIG.num_experts // step.sizes["expert"]
    F, D = CONFIG.expert_ffn_dim // step.sizes["tensor"], CONFIG.model_dim
    assert {call.operands[1].shape for call in grouped} == {
        (held, F, -(-D // 128) * 128), (held, D, F)
    }
    heads = CONFIG.num_heads // step.sizes["tensor"]
    weights = {call.operands[1].shape for call in dense}
    assert (heads * (CONFIG.content_head_dim + CONFIG.rotary_head_dim), 384) in weights
    assert (D, CONFIG.dense_ffn_dim // step.sizes["tensor"]) in weights


def test_gradients_of_weights_contract_the_tokens_of_one_device(step):
    dense = step.kernels("weight_gradient_fp8")
    grouped = step.kernels("grouped_matmul_fp8_by_contraction")
    for found, rows in ((dense, step.rows), (grouped, {step.expert_rows})):
        contracted = {a.shape[1] for call in found for a in call.operands[:2]}
        assert contracted == set(map(tiles, rows))


def test_what_is_quantised_is_local(step):
    rows = step.rows | {step.expert_rows}
    for name in ("quantize_fp8", "rms_norm_quantize_fp8", "swiglu_quantize_fp8", "retile_fp8",
                 "swiglu_gradient_fp8"):  # fmt: skip
        found = step.kernels(name)
        assert found and {call.operands[0].shape[0] for call in found} <= rows, name


def test_every_kernel_is_inside_a_function_on_local_shards_and_is_lowered(step):
    outside, everywhere = [], 0
    for call in step.calls:
        if call.equation.primitive.name == "mpmd_map":
            everywhere += 1
            outside += [call.name] if not call.equation.ctx.cur_abstract_mesh.manual_axes else []
    assert everywhere and not outside
    assert kernels_in(step.text) > 0 and step.text.count("@__cudnn") == 4


def test_no_activation_is_gathered_but_sequences_over_the_tensor_axis(step):
    gathers = [call for call in step.calls if call.name.startswith("all_gather")]
    assert gathers
    for call in gathers:
        if step.rows & set(call.operands[0].shape):
            assert call.equation.params["axis_name"] == ("tensor",), call.operands


@pytest.mark.slow
def test_the_compiler_for_cuda_adds_no_gather_of_an_activation():
    reason = targets.missing("gpu")
    if reason is not None:
        pytest.skip(reason)
    mesh = mesh_of("data=2,fsdp=2,expert=2", 8)
    found = compile_setup(setup(run_of(8), cluster("h200x8"), mesh), "gpu")
    gathers = [array for c in found.collectives if c.kind == "all-gather" for array in c.arrays]
    assert gathers and not [array for array in gathers if T in array.shape]
    assert found.repeated == ()
