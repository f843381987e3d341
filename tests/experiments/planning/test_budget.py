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
from experiments.planning.choose import prediction
from experiments.planning.compare import foreseen
from experiments.planning.measure import spearman
from experiments.planning.memory import argument_bytes, kept_bytes, memory, tile_bytes, tiled
from experiments.planning.setup import Setup, mesh_of, meshes, refusal, setup, setups
from experiments.planning.traffic import hop_rows, step_transfers
from experiments.planning.weights import optimizer_bytes, parameter_bytes
from experiments.planning.work import block_bytes, forward_flops, loss_bytes, step_work
from experiments.recipes import recipe
from sharding.hardware import cluster
from sharding.mesh import AXES
from sharding.placement import Scheme, store_shardings

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "experiments" / "results"
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
    beside = ("router", "rows that fill blocks")
    work = [w for w in step_work(chosen) if w.part not in beside]
    done = sum(w.flops_bf16 + w.flops_core for w in work)
    rule = train_flops_per_token(V3.config, 4096, causal=True, mtp=True)
    assert done * 2048 == pytest.approx(rule * chosen.step_tokens, rel=1e-3)


def test_fp8_products_run_at_their_own_peak():
    run = dataclasses.replace(V3, precision=Precision.of("fp8"))
    work = {w.part: w for w in step_work(setup(run, cluster("h200x8"), mesh_of("expert=8", 8)))}
    assert work["routed experts"].flops_bf16 == 0 < work["routed experts"].flops_fp8
    assert work["attention core"].flops_fp8 == 0 < work["attention core"].flops_core
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
    work = {r: sum(w.flops_bf16 + w.flops_core for w in step_work(chosen))
            for r, chosen in found.items()}  # fmt: skip
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
        ("fsdp=3", "mesh fsdp=3 makes 6 devices, and there are 8"),
        ("pipeline=8", "unknown mesh axis 'pipeline': the axes are data, fsdp, expert, tensor"),
        ("fsdp=0", "--mesh 'fsdp=0' must be AXIS=SIZE"),
        ("fsdp=4,expert=4", "mesh fsdp=4,expert=4 makes 16 devices, and there are 8"),
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


# Of the peer-sized step on one H200, 4 sequences of 4096 tokens in micro-batches of 4, 2 or 1: what
# it reads and writes beside the operands and results of products other than gradients, and its
# peak, counted in the program as XLA of jax 0.11.2 compiles it for the card (2026-11-30).
COMPILED = {
    ("bf16", 4, "none"): (329.3e9, 71.28),
    ("bf16", 4, "paper"): (233.1e9, 46.77),
    ("bf16", 4, "full"): (223.5e9, 41.04),
    ("bf16", 1, "none"): (744.1e9, 57.16),
    ("bf16", 1, "paper"): (608.4e9, 50.12),
    ("bf16", 1, "full"): (595.5e9, 48.63),
    ("fp8", 4, "none"): (250.3e9, 49.90),
    ("fp8", 4, "paper"): (223.3e9, 44.88),
    ("fp8", 1, "paper"): (487.5e9, 53.75),
}
# Seconds of its BF16 steps there on the same day (medians of 5, jax 0.11.2): the constants of
# sharding.cost.Reached are the nearest to these.
MEASURED = {
    (4, "none"): 0.1872, (4, "paper"): 0.1814, (4, "attention"): 0.1818, (4, "full"): 0.1834,
    (2, "none"): 0.2346, (2, "paper"): 0.2240, (2, "attention"): 0.2274, (2, "full"): 0.2281,
    (1, "none"): 0.3037, (1, "paper"): 0.2885, (1, "attention"): 0.2934, (1, "full"): 0.2945,
}  # fmt: skip


def peer(sequences, remat, precision="bf16"):
    run = dataclasses.replace(recipe("peer")(None), precision=Precision.of(precision))
    where = cluster("h200x1")
    return setup(run, where, mesh_of("data=1", 1), sequences=sequences, remat=remat)


@pytest.mark.parametrize("precision, sequences, remat", COMPILED)
def test_traffic_and_peak_of_the_peer_step_are_those_of_its_program(precision, sequences, remat):
    traffic, peak = COMPILED[precision, sequences, remat]
    chosen = peer(sequences, remat, precision)
    assert sum(w.bytes for w in step_work(chosen)) == pytest.approx(traffic, rel=0.1)
    assert memory(chosen).total / 2**30 == pytest.approx(peak, rel=0.12)


def test_predictions_are_near_the_steps_that_their_constants_come_from():
    found = {key: prediction(peer(*key)).seconds for key in MEASURED}
    assert found == pytest.approx(MEASURED, rel=0.03)
    assert spearman(list(found.values()), list(MEASURED.values())) > 0.95
    # 150.7 ms measured; of the FP8 step only the times of its products are among the constants.
    assert prediction(peer(4, "paper", "fp8")).seconds == pytest.approx(0.1507, rel=0.03)


def traffic(chosen):
    return {w.part: w.bytes for w in step_work(chosen) if w.bytes}


def test_every_micro_batch_casts_the_weights_twice_and_adds_up_their_gradients():
    once, often = traffic(peer(4, "none")), traffic(peer(1, "none"))
    # All but embedding and head, 32,768 x 2,048 each, and norms: FP32 read, BF16 written.
    parameters = 3_148_912_640
    vectors = 6 * (2 * 2048 + 1536 + 512) + 2048
    matrices = parameters - 2 * 32768 * 2048 - vectors
    assert once["casts of weights"] == pytest.approx(2 * 6 * matrices, rel=1e-3)
    assert often["casts of weights"] == 4 * once["casts of weights"]
    # Zeros and a result; with a sum, that and the result read and the sum written too.
    assert once["gradients"] == 8 * parameters
    assert often["gradients"] == 4 * 20 * parameters
    assert once["optimizer"] == often["optimizer"] == 24 * parameters
    # In FP8 codes are written twice, once a step.
    in_fp8 = traffic(peer(1, "none", "fp8"))
    assert in_fp8["casts of weights"] == pytest.approx(6 * matrices, rel=1e-2)
    assert in_fp8["gradients"] == often["gradients"]


def test_a_step_without_remat_keeps_the_fp32_values_of_norms_and_swiglu():
    # A token of a layer with 6 experts of 1,408 channels, 64 x 127 rows that may be padding for
    # 4 x 4096 tokens, and two shared experts.
    rows = 6 + 64 * 127 / 16384
    norms = 2048 + 1536 + 512 + 2048
    operands = norms + 16 * (2 * 192 + 2 * 128) + rows * (2048 + 1408) + 2816
    fp32 = 2 * norms + 2048 + 6 * rows * 1408 + 5 * 2816 + 16 + 2 * 64
    assert kept_bytes(peer(4, "none"), "none") == pytest.approx(2 * operands + 4 * fp32, rel=1e-12)
    # Each stack is zeros first; a layer is written into it, and read backward.
    stacks = 5 * 16384 * (2 * operands + 4 * fp32)
    assert traffic(peer(4, "none"))["kept activations"] == pytest.approx(3 * stacks)


def test_half_a_block_of_each_expert_is_multiplied_for_nothing():
    work = {w.part: w.flops_bf16 for w in step_work(peer(1, "none"))}
    tokens, experts, channels = 4096, 64, 5 * 2 * 3 * 2048 * 1408
    assert work["routed experts"] == 4 * 3 * 6 * tokens * channels
    assert work["rows that fill blocks"] == pytest.approx(4 * 3 * experts * 63.5 * channels)


def test_every_chunk_of_logits_adds_to_the_gradient_of_the_head():
    chosen = peer(2, "none")
    # 8,192 x 32,768 logits of 4 bytes are 4 chunks of 256 MiB; two micro-batches.
    logits, head = 8192 * 32768, 32768 * 2048
    assert loss_bytes(chosen) == 2 * (logits * 22 + head * (4 * 8 + 4 + 8 + 6))


def test_micro_batches_may_fill_the_step_that_single_sequences_make():
    # 15,360 sequences become 16,384 on 2,048 devices: 8, or 4 times 2, ..., or one micro-batch.
    mesh = mesh_of("fsdp=32,expert=64", 2048)
    found = {(s.sequences, s.accumulation) for s in setups(V3, cluster("h200x2048"))
             if s.mesh == mesh}  # fmt: skip
    assert found == {(1, 8), (2, 4), (4, 2), (8, 1)}


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("plan_*_h200*.json")), ids=lambda p: p.stem
)
def test_formulas_foresee_what_was_compiled_for_gpus(path):
    found = json.loads(path.read_text())
    chosen, handed = compiled_plan(found)
    assert argument_bytes(chosen) == handed
    sent = {row["for"]: row for row in found["tables"]["bytes a device sends in a step"]}
    other = sent.pop("other")["compiled GB"]
    assert other < 0.05 * sum(row["compiled GB"] for row in sent.values())
    expected = dict.fromkeys(sent, 0.0)
    for (purpose, _), total in foreseen(chosen).items():
        expected[purpose] += total / 1e9
    for purpose, row in sent.items():
        assert row["compiled GB"] == pytest.approx(expected[purpose], rel=0.02), purpose


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("plan_*_v5p*.json")), ids=lambda p: p.stem
)
def test_formulas_foresee_what_a_tpu_is_handed_and_what_its_experts_exchange(path):
    found = json.loads(path.read_text())
    chosen, handed = compiled_plan(found)
    assert argument_bytes(chosen) + tile_bytes(chosen) == pytest.approx(handed, rel=2e-4)
    rows = {row["for"]: row for row in found["tables"]["bytes a device sends in a step"]}
    sent = rows["dispatch and combine"]
    assert sent["compiled GB"] == pytest.approx(sent["formula GB"], rel=0.02)


def compiled_plan(found):
    """The setup of a stored plan, and the bytes that its compiler says a step is handed."""
    scheme = Scheme(**found["scheme"])
    chosen = Setup(from_json(Run, found["run"]), cluster(found["cluster"]), found["mesh"], scheme)
    memory = {row["what"]: row["bytes"] for row in found["tables"]["memory of a device"]}
    handed = next(n for what, n in memory.items() if what.endswith("compiler: state and batch"))
    return chosen, handed


@pytest.mark.parametrize(
    "shape, kept",
    [((5,), 128), ((58, 2, 192, 48), 58 * 2 * 48 * 256), ((58, 9, 224), 9 * 64 * 256),
     ((3, 7168), 4 * 7168), ((1, 9, 224), 9 * 256), ((0, 256), 0)],
)  # fmt: skip
def test_a_tpu_keeps_arrays_in_whole_tiles(shape, kept):
    # As v5p's compiler was seen to lay out the weights of V3, but for the first and the last.
    assert tiled(shape) == kept


@pytest.mark.parametrize("cut", [False, True], ids=["without-tensor-axis", "with-tensor-axis"])
def test_formulas_foresee_what_the_compiled_setups_of_a_sweep_send(cut):
    rows = json.loads((RESULTS / "sweep_v3_h200x2048.json").read_text())["rows"]
    rows = [row for row in rows if row["compiled_sent"] and (row["tensor"] > 1) == cut]
    assert len(rows) >= (5 if cut else 8)
    for row in rows:
        mesh = {axis: row[axis] for axis in AXES}
        chosen = setup(V3, cluster("h200x2048"), mesh, sequences=row["sequences"],
                       remat=row["remat"])  # fmt: skip
        assert sum(foreseen(chosen).values()) == pytest.approx(row["compiled_sent"], rel=0.02)
