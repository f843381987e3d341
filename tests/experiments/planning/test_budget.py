"""Budgets against shardings that JAX computes, published figures, and sums done by hand."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from deepseek_jax.block import REMAT
from deepseek_jax.config import Precision, Run, Schedule, from_json
from deepseek_jax.counts import train_flops_per_token
from deepseek_jax.training import abstract_state
from experiments.planning.budget import (
    argument_bytes,
    block_bytes,
    forward_flops,
    hop_rows,
    memory,
    step_transfers,
    step_work,
)
from experiments.planning.compare import foreseen
from experiments.planning.setup import Setup, mesh_of, meshes, refusal, setup, setups
from experiments.planning.weights import optimizer_bytes, parameter_bytes
from experiments.recipes import recipe
from sharding.hardware import cluster
from sharding.mesh import AXES
from sharding.placement import Scheme, store_shardings

ROOT = Path(__file__).parents[3]
V3 = recipe("deepseek_v3")(None)
TINY = recipe("tiny")(None)
SHAPES = ("fsdp=32,expert=64", "data=4,fsdp=8,expert=64", "fsdp=256,tensor=8", "data=8,expert=256")


def held(run, mesh, tree):
    """Bytes of a tree of named arrays on a device, from JAX's own shardings."""
    auto = (AxisType.Auto,) * len(AXES)
    abstract = AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES, axis_types=auto)
    shardings = store_shardings(tree, abstract)
    sizes = jax.tree.map(
        lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree, shardings,
    )  # fmt: skip
    return sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_moments_are_the_bytes_of_their_shards(shape):
    mesh = mesh_of(shape, 2048)
    state = abstract_state(V3)
    assert parameter_bytes(V3, mesh) == held(V3, mesh, state.params)
    assert optimizer_bytes(V3, mesh) == held(V3, mesh, state.first) + held(V3, mesh, state.second)


def test_no_big_part_of_v3_is_on_every_device_of_the_papers_cluster():
    # 682.6 B parameters (with MTP) of 4 bytes over 2,048 devices, and norms that stay whole.
    even = 4 * 682.64e9 / 2048
    assert even < parameter_bytes(V3, mesh_of("fsdp=32,expert=64", 2048)) < 2.7 * even


def test_products_of_the_main_model_are_those_of_the_paper():
    chosen = setup(V3, cluster("h200x2048"), mesh_of("fsdp=32,expert=64", 2048))
    flops = forward_flops(chosen)
    counted = sum(n for part, n in flops.items() if part not in ("router", "MTP"))
    # Forward, and twice that backward; 249.81 GFLOP a token is the paper's (ISCA, table 4).
    assert 3 * counted / chosen.tokens == pytest.approx(249.81e9, rel=2e-5)
    mtp = train_flops_per_token(V3.config, 4096, causal=True, mtp=True) - 249.81e9
    assert 3 * flops["MTP"] / chosen.tokens == pytest.approx(mtp, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_devices_share_the_products_of_a_step(shape):
    where = cluster("h200x2048")
    chosen = setup(V3, where, mesh_of(shape, 2048), remat="none")
    done = sum(work.flops_bf16 for work in step_work(chosen) if work.part != "router")
    rule = train_flops_per_token(V3.config, 4096, causal=True, mtp=True)
    assert done * 2048 == pytest.approx(rule * chosen.step_tokens, rel=1e-3)


def test_fp8_products_run_at_their_own_peak():
    run = dataclasses.replace(V3, precision=Precision.of("fp8"))
    work = {w.part: w for w in step_work(setup(run, cluster("h200x8"), mesh_of("expert=8", 8)))}
    assert work["routed experts"].flops_bf16 == 0 < work["routed experts"].flops_fp8
    assert work["attention core"].flops_fp8 == 0 < work["attention core"].flops_bf16
    assert work["head and loss"].flops_fp8 == 0


def test_dispatch_crosses_nodes_once_a_token_and_node():
    chosen = setup(V3, cluster("h200x2048"), mesh_of("fsdp=32,expert=64", 2048))
    assert chosen.scheme.expert_nodes == 8
    tokens, room = 4096, chosen.scheme.room
    (_, across, rows), (_, within, most) = hop_rows(chosen)
    assert (across, within) == ((8, 1), (8, 8))
    assert rows == 8 * min(tokens, room * tokens * 8 // 8)
    assert most == 8 * min(rows, room * tokens * 8 // 8)


def test_a_mesh_of_replicas_only_sums_gradients():
    chosen = setup(TINY, cluster("cpux8"), mesh_of("data=8", 8))
    transfers = step_transfers(chosen)
    assert {(t.part, t.kind, t.axes) for t in transfers} == {("gradients", "all-reduce", ("data",))}
    # Embedding and head have a second gradient, from the MTP module.
    config, parameters = TINY.config, parameter_bytes(TINY, chosen.mesh)
    second = 2 * 4 * config.vocab_size * config.model_dim
    assert sum(t.bytes for t in transfers) == (parameters + second) * chosen.accumulation


def test_everything_on_one_device_sends_nothing():
    chosen = setup(TINY, cluster("cpux1"), mesh_of("data=1", 1))
    assert all(math.prod(chosen.mesh[a] for a in t.axes) == 1 for t in step_transfers(chosen))


def test_keeping_less_needs_less_memory_and_more_work():
    found = {
        remat: setup(V3, cluster("h200x2048"), mesh_of("fsdp=32,expert=64", 2048), remat=remat)
        for remat in REMAT
    }
    kept = {remat: memory(chosen).kept for remat, chosen in found.items()}
    work = {r: sum(w.flops_bf16 for w in step_work(chosen)) for r, chosen in found.items()}
    assert kept["none"] > kept["paper"] > kept["attention"] > kept["full"]
    assert work["none"] < work["paper"] < work["full"]


def test_the_papers_batch_is_rounded_to_what_the_mesh_divides():
    chosen = setup(V3, cluster("h200x2048"), mesh_of("fsdp=32,expert=64", 2048))
    assert chosen.run.batch_size == Schedule.constant(16384)
    assert (chosen.sequences, chosen.accumulation) == (1, 8)
    assert chosen.step_tokens == 16384 * 4096


def test_tiny_lies_on_every_mesh_of_eight_devices():
    found = list(meshes(TINY, 8))
    assert len(found) == 20
    assert all(math.prod(mesh.values()) == 8 for mesh in found)
    assert len({tuple(mesh.items()) for mesh in found}) == 20


def test_v3_has_more_than_a_hundred_shapes_on_the_papers_cluster():
    found = {tuple(s.mesh.items()) for s in setups(V3, cluster("h200x2048"))}
    assert len(found) >= 100


@pytest.mark.parametrize(
    "mesh, precision, message",
    [
        ("expert=3,data=1", "bf16", "expert=3 must divide num_experts=256"),
        ("tensor=3,data=1", "bf16", "tensor=3 must divide seq_len=4096"),
        ("tensor=256,data=1", "bf16", "tensor=256 must divide num_heads=128"),
        ("tensor=32,data=1", "fp8",
         "tensor=32 cuts dense_ffn_dim=18432 into parts of 576, inside a block.*tensor=16"),
    ],
)  # fmt: skip
def test_why_a_model_cannot_lie_on_a_mesh_names_both_values(mesh, precision, message):
    run = dataclasses.replace(V3, precision=Precision.of(precision))
    sizes = mesh_of(mesh, math.prod(int(word.split("=")[1]) for word in mesh.split(",")))
    assert re.search(message, refusal(run, sizes))


@pytest.mark.parametrize(
    "words, message",
    [
        ("fsdp=3", "mesh fsdp=3 makes 6 devices, the cluster has 8"),
        ("pipeline=8", "unknown mesh axis 'pipeline': the axes are data, fsdp, expert, tensor"),
        ("fsdp=0", "--mesh 'fsdp=0' must be AXIS=SIZE"),
        ("fsdp=4,expert=4", "mesh fsdp=4,expert=4 makes 16 devices, the cluster has 8"),
    ],
)
def test_a_mesh_that_is_none_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(words, 8)


def test_blocks_of_experts_are_those_of_the_layout_that_dispatch_makes():
    # 128 tokens of 2 choices on one of 8 devices with 2 of 16 experts, room for twice as many:
    # blocks of 4 rows, and up to 3 rows of padding for each expert.
    chosen = setup(TINY, cluster("cpux8"), mesh_of("expert=8", 8))
    assert chosen.scheme.room == 2.0 and chosen.run.remat == "none"
    blocks = (2 * 128 * 2 + 2 * 3) / 4
    matrices = 3 * 128 * 64 * 4
    # A copy written and read, forward and backward; a gradient written, read and added.
    assert block_bytes(chosen) == blocks * matrices * 7


def test_micro_batches_may_fill_the_step_that_single_sequences_make():
    # 15,360 sequences become 16,384 on 2,048 devices: 8, or 4 times 2, ..., or one micro-batch.
    mesh = mesh_of("fsdp=32,expert=64", 2048)
    found = {(s.sequences, s.accumulation) for s in setups(V3, cluster("h200x2048"))
             if s.mesh == mesh}  # fmt: skip
    assert found == {(1, 8), (2, 4), (4, 2), (8, 1)}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments" / "results").glob("plan_*.json")), ids=lambda p: p.stem
)
def test_formulas_foresee_what_was_compiled_for_the_target(path):
    found = json.loads(path.read_text())
    scheme = Scheme(**found["scheme"])
    chosen = Setup(from_json(Run, found["run"]), cluster(found["cluster"]), found["mesh"], scheme)
    memory = {row["what"]: row["bytes"] for row in found["tables"]["memory of a device"]}
    handed = next(n for what, n in memory.items() if what.endswith("compiler: state and batch"))
    assert argument_bytes(chosen) == handed
    sent = {row["for"]: row for row in found["tables"]["bytes a device sends in a step"]}
    other = sent.pop("other")["compiled GB"]
    assert other < 0.05 * sum(row["compiled GB"] for row in sent.values())
    expected = dict.fromkeys(sent, 0.0)
    for (purpose, _), total in foreseen(chosen).items():
        expected[purpose] += total / 1e9
    for purpose, row in sent.items():
        assert row["compiled GB"] == pytest.approx(expected[purpose], rel=0.02), purpose
