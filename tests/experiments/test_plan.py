"""`plan` from the command line: tables, JSON, decoding, and what it refuses in one line."""

import dataclasses
import json

import pytest

from deepseek_jax.config import Precision
from experiments.planning import targets
from experiments.planning.choose import FILL, best_setup, candidates
from experiments.planning.compile import compile_setup
from experiments.planning.decode import decode_mesh, decode_rows, exchange_seconds
from experiments.planning.setup import mesh_of, setup
from experiments.planning.weights import optimizer_bytes, parameter_bytes
from experiments.recipes import recipe
from experiments.study.machine import H800, token_seconds
from sharding.hardware import cluster
from tests.experiments.runs import call

V3 = recipe("deepseek_v3")(None)
HALVES = "two half-batches, one computing while the other sends"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    code, out, err = call("plan", "deepseek_v3", "--cluster", "h200x2048", "--mesh",
                          "fsdp=32,expert=64", "--no-compile", "--json", path)  # fmt: skip
    assert (code, err) == (0, "")
    return out, json.loads(path.read_text())


def test_the_plan_of_v3_prints_the_papers_operations(planned):
    out, _ = planned
    assert "249.81" in out and "280.51" in out and "MTP" in out


def test_the_plan_says_where_it_departs_from_the_paper(planned):
    out, _ = planned
    assert "16,384 sequences: the recipe's 15,360 is no multiple of the 2,048" in out
    assert "in place of the paper's pipeline of 16" in out


def test_the_plan_in_json_holds_the_bytes_of_the_formulas(planned):
    _, found = planned
    mesh = mesh_of("fsdp=32,expert=64", 2048)
    rows = {row["what"]: row["bytes"] for row in found["tables"]["memory of a device"]}
    assert rows["parameters (FP32)"] == parameter_bytes(V3, mesh)
    assert rows["optimizer (moments)"] == optimizer_bytes(V3, mesh)
    assert found["mesh"] == mesh and found["accumulation"] == 8
    assert any(line.startswith("fits: needs") for line in found["remarks"])


@pytest.mark.parametrize(
    "words, message",
    [
        ("--cluster h20x8", "unknown accelerator 'h20' in cluster 'h20x8': did you mean h200x8?"),
        ("--cluster h200x8 --mesh fsdp=3", "mesh fsdp=3 makes 6 devices, and there are 8"),
        ("--cluster h200x8 --mesh node=8", "unknown mesh axis 'node': the axes are data, fsdp"),
        ("--cluster h200x3 --mesh expert=3", "expert=3 must divide num_experts=256"),
        ("--cluster h200x256 --mesh tensor=256", "tensor=256 must divide num_heads=128"),
        ("--cluster h200x32 --mesh tensor=32 --precision fp8", "inside a block of 128"),
        ("--cluster h100x8", "nothing fits h100x8"),
        ("--cluster h200x2048 --mesh fsdp=2048 --zero 2", "--zero 2 must be 1 or 3"),
        ("--cluster h200x8 --mesh expert=8 --target tpu", "--target 'tpu' must be cpu or gpu"),
        ("--cluster h200x2048 --zero 1", "--zero 1 needs --mesh"),
        ("--cluster h200x2048 --mesh fsdp=32,expert=64 --sequences 0", "0 sequences in a micro-b"),
        ("--cluster h200x2048 --sequences 3", "sequences are tried, not 3: for others name a mesh"),
        ("--cluster h200x2048 --sequences 0", "0 sequences in a micro-batch must be at least 1"),
        ("--cluster h200x2048 --remat ful", "remat='ful' must be one of"),
        ("--cluster h200x8 --decode --batch 0", "--batch 0 and --context 4096 must be at least 1"),
        ("--cluster h200x8 --decode --context 1000000",
         "--context 1000000 must be at most 163840, the max_length of deepseek_v3"),
        ("--cluster h200x8 --batch 5", "--batch 5 is an option of decoding: add --decode"),
        ("--cluster h200x8 --context 5", "--context 5 is an option of decoding: add --decode"),
        ("--decode --sequences 3", "--sequences 3 is an option of training"),
        ("--decode --remat full", "--remat full is an option of training"),
        ("--decode --zero 1", "--zero 1 is an option of training"),
        ("--decode --target cpu", "--target cpu is an option of training"),
        ("--no-compile --target cpu", "--target cpu has no use with --no-compile"),
    ],
)
def test_bad_input_is_one_line_that_names_both_values(words, message):
    code, _, err = call("plan", "deepseek_v3", *words.split())
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1


def test_a_cache_is_by_default_as_long_as_a_small_model_allows(tmp_path):
    file = tmp_path / "plan.json"
    code, _, err = call("plan", "tiny", "--cluster", "cpux4", "--decode", "--json", file)
    found = json.loads(file.read_text())
    assert (code, err, found["batch"], found["context"]) == (0, "", 128, 512)
    code, _, err = call("plan", "tiny", "--cluster", "cpux4", "--decode", "--context", 513)
    assert code == 2 and "--context 513 must be at most 512, the max_length of tiny" in err
    words = "plan deepseek-v3 --cluster h800x320 --decode --context 5000".split()
    assert call(*words)[0] == 0


def test_without_a_mesh_the_fastest_that_fits_is_taken():
    where, run = cluster("cpux8"), recipe("tiny")(None)
    chosen = best_setup(run, where, sequences=1)
    alike = [c for c in candidates(run, where) if c.setup.sequences == 1 and c.fits]
    assert chosen == min(alike, key=lambda c: c.seconds).setup
    assert all(c.bytes <= FILL * where.accelerator.memory for c in alike)


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert targets.missing("cpu") is None
    assert "deepseek-jax[plan-cuda]" in targets.missing("gpu")
    assert "deepseek-jax[plan-tpu]" in targets.missing("tpu")


@pytest.mark.parametrize(
    "name, topology",
    [("v5px2048", "v5p:8x16x16"), ("v5px256", "v5p:4x8x8"), ("v6ex256", "v6e:16x16"),
     ("tpu7xx256", "tpu7x:4x4x8"), ("v6ex8", "v6e:2x4")],
)  # fmt: skip
def test_slices_have_sides_as_equal_as_they_can(name, topology):
    assert targets.tpu_topology(cluster(name)) == topology


def test_decoding_holds_the_latent_cache_and_a_share_of_the_experts():
    where = cluster("h800x320")
    run = dataclasses.replace(V3, precision=Precision.of("fp8"))
    rows = {r["what"]: r for r in decode_rows(run, where, None, batch=32, context=5000)}
    # 576 elements of 2 bytes for each token and layer.
    assert rows["cache"]["GiB a device"] == pytest.approx(61 * 32 * 5000 * 576 * 2 / 2**30)
    # 64 of 320 devices divide 256 experts; codes of one byte and a scale for 128 x 128 of them.
    assert decode_mesh(run, where)["expert"] == 64
    held = 58 * 4 * 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert rows["routed experts"]["GiB a device"] == pytest.approx(held / 2**30)


def test_few_tokens_read_the_experts_that_they_chose():
    run, where = recipe("peer")(None), cluster("h200x1")
    seconds = {}
    for batch in (1, 1024):
        rows = {r["what"]: r for r in decode_rows(run, where, None, batch=batch, context=1)}
        seconds[batch] = rows["routed experts"]["us a token"]
    chosen = run.config.experts_per_token / run.config.num_experts
    assert seconds[1] == pytest.approx(chosen * seconds[1024], rel=1e-3)
    # Both halves of the batch read all other weights.
    assert rows[HALVES]["us a token"] > 1.5 * (
        rows["one after the other"]["us a token"]
    )


def decoded(words, *, devices=8, batch, context):
    run, where = dataclasses.replace(V3, precision=Precision.of("fp8")), cluster(f"h200x{devices}")
    rows = decode_rows(run, where, mesh_of(words, devices), batch=batch, context=context)
    return {row["what"]: row for row in rows}


def test_a_tensor_group_shares_requests_and_heads_but_not_the_cache():
    alone, pair = (
        decoded(words, batch=64, context=4096) for words in ("expert=8", "expert=4,tensor=2")
    )
    assert pair["cache"]["GiB a device"] == alone["cache"]["GiB a device"]
    for found, devices in ((alone, 1), (pair, 2)):
        for name in ("one after the other", HALVES):
            seconds = 1e-6 * found[name]["us a token"]
            assert found[name]["tokens/s of a device"] == pytest.approx(64 / devices / seconds)
    # Two sums a layer: 7168 elements of 2 bytes of each request, all-reduced by two devices.
    moved, messages = 2 * 61 * 64 * 7168 * 2, 2 * 61 * 2
    sums = moved / 450e9 / 0.8 + messages * 3.33e-6
    assert pair["tensor sums"]["us a token"] == pytest.approx(1e6 * sums)
    assert "tensor sums" not in alone
    parts = sum(row["us a token"] for row in pair.values() if "tokens/s of a device" not in row)
    assert pair["one after the other"]["us a token"] == pytest.approx(parts)


def test_half_batches_wait_for_four_messages_a_layer():
    # Over so many nodes sending is the limit, as it is in the study's time per token.
    found = decoded("expert=256", devices=256, batch=2048, context=1)
    more = found[HALVES]["us a token"] - found["dispatch and combine"]["us a token"]
    studied = token_seconds(dataclasses.replace(H800, latency=3.7e-6)) - token_seconds(H800)
    # Of these the whole batch waits for two.
    assert more == pytest.approx(58 * 2 * 3.7) == pytest.approx(1e6 * studied / 61 * 58 / 2)


def test_a_layers_exchange_is_the_papers_speed_limit():
    # 3 bytes x 32 tokens x 8 experts x 7168 (and 56 exponents of scales, 64 bytes) over 50 GB/s.
    run = dataclasses.replace(V3, precision=Precision.of("fp8"))
    where = cluster("h200x256")
    mesh = mesh_of("expert=256", 256)
    ideal = 32 * 8 * (3 * 7168 + 64) / 50e9 * (256 - 8) / 256
    found = exchange_seconds(run, where, mesh, 32)
    assert found == pytest.approx(ideal / 0.8 + 2 * 3.7e-6, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["fsdp=2,expert=4", "data=2,tensor=4"])
def test_tiny_compiles_for_eight_cpu_devices_in_a_process_of_its_own(shape):
    run = recipe("tiny")(None)
    chosen = setup(run, cluster("cpux8"), mesh_of(shape, 8))
    found = compile_setup(chosen, "cpu")
    held = parameter_bytes(run, chosen.mesh) + optimizer_bytes(run, chosen.mesh)
    assert held < found.arguments < held + 2**14
    assert found.refused is None and found.warnings == ()


@pytest.mark.slow
def test_a_step_for_an_absent_gpu_compiles():
    reason = targets.missing("gpu")
    if reason is not None:
        pytest.skip(reason)
    config = dataclasses.replace(V3.config, num_layers=4)
    run = dataclasses.replace(V3, config=config)
    chosen = setup(run, cluster("h200x256"), mesh_of("fsdp=4,expert=64", 256))
    found = compile_setup(chosen, "gpu")
    held = parameter_bytes(run, chosen.mesh) + optimizer_bytes(run, chosen.mesh)
    assert held < found.arguments < held + 2**20
    assert found.warnings == ()
