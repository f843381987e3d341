"""`explain`: what it says of parameters and operations, held against independent knowledge."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

import deepseek_jax as ds
from deepseek_jax.counts import train_flops_per_token
from deepseek_jax.experts_in_place import MOST_TOKENS
from deepseek_jax.training import abstract_state
from experiments import explain, program
from experiments.explain import ExplainArgs
from tests.configs import TINY, WIDE, make_run
from tests.peak_memory import run_measured


def explained(run, mesh=None, device=None):
    state = abstract_state(run)
    ops = explain.forward_operations(run, state, device)
    return ops, explain.parameter_rows(run, state, ops, mesh or {})


@pytest.fixture(scope="module")
def bf16():
    # Of more tokens than are served where their experts lie.
    config = dataclasses.replace(TINY, max_length=2 * MOST_TOKENS)
    return explained(
        make_run(config, precision=ds.Precision.of("bf16"), seq_len=MOST_TOKENS + 1)
    )


def of(rows, name):
    return next(row for row in rows if row["parameter"] == name)


def test_scans_multiply_and_arguments_are_followed_to_the_product():
    def layer(x_TD, w_FD):
        return x_TD @ w_FD.astype(jnp.float32).T, None

    def model(stack, x_TD):
        return jnp.sum(jnp.exp(jax.lax.scan(jax.checkpoint(layer), x_TD, stack["w_LFD"])[0]))

    shape = jax.ShapeDtypeStruct
    ops = program.operations(
        model, stack={"w_LFD": shape((5, 7, 7), jnp.bfloat16)}, x_TD=shape((3, 7), jnp.float32)
    )
    (product,) = (op for op in ops if op.name == "dot_general")
    assert (product.times, product.contracted, product.arguments) == (5, 7, ("stack.w_LFD",))
    assert product.computes == "fp32"
    assert [op.times for op in ops if op.name == "exp"] == [1]


def test_every_parameter_is_used_and_counted_once(bf16):
    _, rows = bf16
    weights = [row for row in rows if not row["parameter"].endswith("bias_E")]
    assert sum(row["parameters"] for row in weights) == ds.param_counts(TINY).total
    assert len({row["parameter"] for row in rows}) == len(rows)
    assert all(row["computes in"] and row["part"] for row in rows)


def test_letters_are_the_dimensions(bf16):
    assert of(bf16[1], "moe.ffn.w_gate_EFD") == {
        "parameter": "moe.ffn.w_gate_EFD",
        "letters": "LEFD",
        "shape": [3, 28, 24, 40],
        "stored": "fp32",
        "moments": "bf16",
        "lies on": "E expert, F tensor, D fsdp",
        "computes in": "grouped_matmul bf16",
        "part": "moe/experts",
        "parameters": 3 * 28 * 24 * 40,
        "bytes": 4 * 3 * 28 * 24 * 40,
    }


def test_matrices_multiply_in_bf16_and_what_must_be_fp32_is(bf16):
    ops, rows = bf16
    for row in rows:
        name = row["parameter"].rpartition(".")[2]
        exact = "norm" in name or name in ("bias_E", "router_ED", "embed_VD")
        assert row["computes in"].split()[-1] == ("fp32" if exact else "bf16"), row
    for op in ops:
        if op.name in ("exp", "log", "rsqrt", "logistic", "cos", "reduce_max"):
            assert op.computes == "fp32", op
        if op.name == "top_k":
            assert op.computes == "fp32", op
    attention = [op for op in ops if op.name == "dot_general" and "BNTS" in op.label]
    assert {op.computes for op in attention} == {"bf16"}


def test_the_same_model_in_fp32_has_no_bf16_at_all():
    ops, rows = explained(make_run())
    assert not any("bf16" in op.computes or op.result.dtype == "bf16" for op in ops)
    assert {row["moments"] for row in rows} == {"fp32", None}


@pytest.mark.parametrize("device", [None, "h100"])
@pytest.mark.parametrize("name", ["tiny", "deepseek_v2_lite", "glm_4_7_flash"])
def test_products_add_up_to_the_published_formula(name, device):
    run = explain.run_of(ExplainArgs(name, seq_len=128, precision="bf16"))
    ops = explain.forward_operations(run, abstract_state(run), device)
    flops = lambda chosen: sum(explain.flops_per_token(run, op) for op in chosen)
    router = flops(op for op in ops if op.part.endswith("router"))
    formula = train_flops_per_token(run.config, run.seq_len, causal=False, mtp=True) / 3
    assert flops(ops) - router == formula
    layers = run.config.num_moe_layers + run.config.num_mtp
    assert router == 2 * layers * run.config.num_experts * run.config.model_dim


def test_kernels_of_a_device_that_is_not_here():
    run = explain.run_of(ExplainArgs("tiny", precision="bf16"))
    names = {op.name for op in explain.forward_operations(run, abstract_state(run), "h100")}
    assert program.ATTENTION in names and "exp" in names
    assert program.ATTENTION not in {op.name for op in explained(run)[0]}


def test_a_mesh_divides_bytes_by_the_axes_an_array_lies_on(bf16):
    run = make_run(precision=ds.Precision.of("bf16"))
    mesh = explain.mesh_sizes(("tensor=2", "fsdp=4"))
    assert list(mesh.items()) == [("fsdp", 4), ("tensor", 2)]
    rows = explain.parameter_rows(run, abstract_state(run), bf16[0], mesh)
    embed = of(rows, "embed_VD")
    assert embed["lies on"] == "V tensor, D fsdp"
    assert embed["bytes a device"] == 104 * 40 * 4 // 8
    assert embed["with moments"] == 104 * 40 * (4 + 2 + 2) // 8
    norm = of(rows, "final_norm_D")
    assert (norm["lies on"], norm["bytes a device"]) == ("", 160)


@pytest.mark.parametrize(
    "args, words",
    [
        (ExplainArgs("deepsek_v3"), "deepseek_v3"),
        (ExplainArgs("tiny", mesh=("rows=2",)), "rows=2"),
        (ExplainArgs("tiny", mesh=("fsdp",)), "fsdp"),
        (ExplainArgs("tiny", device="h300"), "h300"),
        (ExplainArgs("tiny", precision="fp4"), "fp4"),
    ],
)
def test_errors_name_the_value(args, words):
    with pytest.raises(ValueError, match=words):
        explain.explain(args)


def test_the_671b_model_takes_seconds_and_little_memory(tmp_path, root):
    path = tmp_path / "v3.json"
    command = [sys.executable, "-m", "experiments", "explain", "deepseek-v3", "--json", str(path)]
    done, peak = run_measured(command, tmp_path, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert peak < 4e9
    written = json.loads(path.read_text())
    assert written["totals"]["without MTP"] == 671_026_404_352
    assert {row["part"] for row in written["parts"]} >= {
        "embed", "dense/attention", "dense/ffn", "moe/attention", "moe/router", "moe/experts",
        "moe/shared", "loss", "mtp/experts",
    }
    for word in ("moe.ffn.w_down_EDF", "BTQ,NAQ->BTNA", "top_k", "exp (softmax)", "rsqrt (norm)"):
        assert word in done.stdout


# FP8.


@pytest.fixture(scope="module")
def fp8():
    """A model whose inputs are multiples of 16 wide, as an H200 and as a CPU would run it."""
    config = dataclasses.replace(WIDE, num_mtp=0)
    run = make_run(config, precision=ds.Precision.of("fp8"))
    return run, explained(run, device="h200"), explained(run, device="cpu")


def test_every_matrix_of_an_fp8_model_but_router_and_head_multiplies_in_fp8(fp8):
    _, *both = fp8
    for ops, rows in both:
        for row in rows:
            name = row["parameter"]
            if "router" in name:
                assert row["computes in"] == "dot_general fp32"
            elif name == "head_VD":
                assert row["computes in"] == "dot_general bf16"
            elif len(row["letters"].strip("L")) > 1 and name != "embed_VD":
                assert row["computes in"].endswith(("linear fp8", "gated_ffn fp8")), row
        assert {op.computes for op in ops if op.name in program.ONE_OPERATION.values()} == {"fp8"}


def test_explain_names_the_kernels_of_fp8_products_or_the_reference(fp8):
    _, (h200, _), (cpu, _) = fp8
    label = lambda ops: {op.name: op.label for op in ops if op.name.endswith(("linear", "ffn"))}
    assert label(h200)["linear"].endswith("matmul_fp8")
    assert label(h200)["gated_ffn"] == "by matmul_fp8, swiglu_quantize_fp8"
    grouped = "by grouped_matmul_fp8_by_rows, swiglu_quantize_fp8"
    assert label(h200)["grouped_gated_ffn"] == grouped
    assert set(label(cpu).values()) == {"by the reference"}


def test_explain_counts_the_kernels_of_the_gradient(fp8):
    run, *_ = fp8
    rows = {row["kernel"]: row for row in explain.kernel_rows(run, abstract_state(run), "h200")}
    # A dense and a MoE layer: 8 matrices, and 5 + 3 + 3 of which 3 are of experts.
    assert rows["quantize_blocks_fp8"]["calls"] == 8 + 11
    assert rows["weight_gradient_fp8"]["calls"] == 8 + 8
    assert rows["grouped_matmul_fp8_by_contraction"]["calls"] == 3
    assert rows["grouped_matmul_fp8_by_rows"]["returns"] == "bf16"
    assert explain.kernel_rows(run, abstract_state(run), "cpu") == []
