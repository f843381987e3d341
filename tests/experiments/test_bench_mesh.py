"""`bench mesh`: equal tokens on every mesh, rows and bars from what was found, failures as rows."""

import dataclasses
import json
import os
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.config import Precision
from experiments.bench import children, mesh, mesh_case, mesh_report, mesh_run
from experiments.bench.mesh_cases import Case, cases, cluster_of, legal_meshes, setup_of_tokens
from experiments.planning.compile import setup_of
from experiments.planning.setup import mesh_of
from experiments.recipes import peer
from sharding.hardware import cluster
from tests.configs import ONE_MTP, make_run
from tests.experiments import runs

CONFIG = dataclasses.replace(
    ONE_MTP, num_layers=1, num_dense_layers=0, num_experts=32, num_groups=8, num_mtp=0
)
RUN = make_run(CONFIG)
GPUS = cluster("h100x2")


def cases_of(run, where, words, **more):
    meshes = [mesh_of(word, where.devices) for word in words]
    options = {"micro_batches": (1, 2), "steps": 4} | more
    return list(cases(run, "small", where, meshes, **options))


@pytest.fixture
def two_gpus(monkeypatch):
    """A host that says it has two cards, of which nothing is asked."""
    host = {"count": 2, "kind": "NVIDIA H100 80GB HBM3", "platform": "gpu"}
    monkeypatch.setattr(mesh, "devices_of_host", lambda: dict(host))
    return host


def test_every_mesh_of_two_gpus_with_three_micro_batches_makes_twelve_steps():
    run = peer()
    found = list(cases(run, "peer", GPUS, legal_meshes(run, 2), micro_batches=(1, 2, 4), steps=20))
    meshes = [case for case in found if case.role == "mesh"]
    assert len(meshes) == 12 and len({case.key for case in found}) == len(found)
    for case in meshes:
        assert case.setup.step_tokens == 8 * 4096
        assert case.setup.accumulation == 4 // case.sequences
    assert {case.setup.step_tokens for case in found if case.role == "alone"} == {4 * 4096}
    (reference,) = [case for case in found if case.role == "reference"]
    assert (reference.devices, reference.setup.step_tokens) == (1, 8 * 4096)


def test_more_processes_run_the_largest_micro_batch_of_each_mesh_again():
    found = cases_of(RUN, GPUS, ["data=2", "fsdp=2"], processes=(1, 2))
    again = [(case.setup.mesh["fsdp"], case.sequences) for case in found if case.processes == 2]
    assert again == [(1, 2), (2, 2)]


def test_cards_are_known_by_their_names():
    assert cluster_of("NVIDIA H200", 4) == cluster("h200x4")
    with pytest.raises(ValueError, match="no figures for 'NVIDIA T4'"):
        cluster_of("NVIDIA T4", 2)


def test_cases_of_a_mesh_share_a_process():
    groups = mesh_run.in_groups(cases_of(RUN, GPUS, ["data=2", "fsdp=2"]))
    assert [[case.sequences for case in group] for group in groups] == [[1, 2, 2], [1, 2], [1, 2]]


@pytest.fixture(scope="module")
def measured(compile_cache):
    """The same tokens on one device, and on two that share them and the weights."""
    found = {}
    for words, devices in (("data=1", 1), ("fsdp=2", 2)):
        setup = setup_of_tokens(RUN, cluster(f"cpux{devices}"), mesh_of(words, devices),
                                sequences=2, total=4)  # fmt: skip
        case = Case(setup, "small", steps=4, sequences=2, inspected=devices > 1)
        words = json.loads(json.dumps(case.words))
        program = mesh_case.lowered(setup_of(words["setup"])).compiled()
        found[devices] = json.loads(json.dumps(mesh_case.measured(words, program)))
    return found


def test_losses_and_choices_on_a_mesh_are_those_of_one_device(measured):
    one, two = measured[1], measured[2]
    assert len(one["losses"]) == 4 and len(two["seconds"]) == 2
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert one["counts"] == two["counts"]
    assert np.sum(one["counts"]) == 4 * 12 * CONFIG.experts_per_token
    assert two["differing"] == 0 and two["compiled"] > 0
    # The profile of a CPU shows no streams of a GPU.
    assert two["waits"] is None and "note" not in two and "differing" not in one


def rows_of(found_of, *, planned=1.0, words=("data=2", "expert=2"), **more):
    found_cases = cases_of(RUN, GPUS, words, **more)
    found = {case.key: found_of(case) for case in found_cases}
    plans = {case.key: {"bytes": planned * 2**30} for case in found_cases}
    return found_cases, mesh_report.rows(found_cases, found, plans)


def plausible(case):
    """A device's share takes a second alone and 1.25 s on a mesh; small micro-batches take more."""
    seconds = (1.0 if case.role == "alone" else 1.25) * (1.5 if case.sequences == 1 else 1.0)
    counts = [[5, 3]] if case.setup.mesh["expert"] == 1 else [[4, 4]]
    return {"seconds": [seconds] * 3, "losses": [2.0, 1.0], "counts": counts, "peak": 2**30,
            "compiled": 2**30, "differing": 0}  # fmt: skip


def test_rows_compare_meshes_with_one_device():
    _, rows = rows_of(plausible)
    by_name = {(row["mesh"], row["micro-batch"]): row for row in rows}
    assert by_name["data=2", 2]["efficiency"] == pytest.approx(0.8)
    assert by_name["data=2", 1]["efficiency"] == pytest.approx(0.8)
    assert by_name["data=2", 2]["choices differ"] == 0
    assert by_name["expert=2", 2]["choices differ"] == 1
    assert by_name["expert=2", 2]["of choices"] == 8
    assert by_name["one device", 1]["efficiency"] is None


def test_bars_are_judged_on_the_rows_that_they_speak_of():
    run = dataclasses.replace(RUN, precision=Precision.of("bf16"))
    found_cases = cases_of(run, GPUS, ["data=2", "expert=2"])
    found = {case.key: plausible(case) for case in found_cases}
    plans = {case.key: {"bytes": 1.04 * 2**30} for case in found_cases}
    verdicts = {v["bar"]: v for v in mesh_report.verdicts(
        mesh_report.rows(found_cases, found, plans))}  # fmt: skip
    scaling = verdicts["weak scaling in bf16, data=2"]
    assert (scaling["limit"], scaling["holds"]) == (0.92, False)
    assert verdicts["weak scaling in bf16, expert=2"]["limit"] == 0.85
    assert verdicts["expert choices of step 0 in bf16 that differ"]["found"] == 1
    memory = [v["found"] for name, v in verdicts.items() if name.startswith("memory beside")]
    assert memory == [pytest.approx(1 - 1 / 1.04), 0]
    assert verdicts["Spearman over 4 meshes and micro-batches"]["limit"] == 0.8


def test_what_failed_is_a_row_and_the_others_stay():
    broken = lambda case: {"error": "it hung"} if case.setup.mesh["data"] == 2 else plausible(case)
    found_cases, rows = rows_of(broken)
    assert [row["note"] for row in rows if row["mesh"] == "data=2"] == ["it hung"] * 2
    assert mesh_report.verdicts(rows)
    exposed = mesh_report.exposed(found_cases, {})
    mesh_report.show({"card": "none", "rows": rows, "exposed": exposed, "verdicts": []})
    picture = mesh_report.picture(rows)
    assert picture.startswith("<svg") and "expert=2" in picture and "data=2" not in picture


CHILD = """
import json, sys, time
for case in json.load(open(sys.argv[-1])):
    if case["key"] == "hangs":
        time.sleep(60)
    if case["key"] == "dies":
        sys.exit("error: no memory left")
    print("progress")
    print(json.dumps({"key": case["key"], "value": len(case["key"])}), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Named:
    key: str
    processes: int = 1

    @property
    def words(self):
        return {"key": self.key}


def test_a_case_that_hangs_or_dies_costs_its_own_row(tmp_path):
    (tmp_path / "some_child.py").write_text(CHILD)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    names = ["one", "dies", "three", "hangs", "fifth"]
    began = time.monotonic()
    found = {case.key: row for case, row in children.run_cases(
        ("some_child",), [Named(name) for name in names], env, limit=2, until=began + 50)}
    assert [found[name].get("value") for name in ("one", "three", "fifth")] == [3, 5, 5]
    assert found["dies"]["error"] == "the process ended: error: no memory left"
    assert found["hangs"]["error"] == "no answer within 2 s"
    assert time.monotonic() - began < 30
    late = children.run_cases(("some_child",), [Named("one")], env, limit=2, until=began)
    assert [row["error"] for _, row in late] == ["not run: out of time"]


def test_the_devices_of_a_host_are_asked_in_another_process():
    found = children.devices_of_host(120)
    assert (found["count"], found["platform"]) == (jax.device_count(), "cpu")


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--mesh", "fsdp=4"], ["mesh fsdp=4 makes 4 devices", "there are 2"]),
        (["--processes", "3"], ["--processes 3", "2 devices"]),
        (["--micro-batch", "3", "4"], ["--micro-batch 3 4", "divide the largest"]),
        (["--precision", "fp8", "--mesh", "tensor=2"], ["tensor=2 cuts dense_ffn_dim=10944"]),
        (["tinny"], ["unknown recipe 'tinny'"]),
        (["deepseek_v3", "--mesh", "fsdp=2", "--no-small"],
         ["no mesh of h100x2", "GiB by formula"]),
    ],
    ids=lambda value: value[0].lstrip("-") if value[0].startswith("--") else "",
)
def test_what_cannot_be_run_is_one_line(two_gpus, words, parts):
    code, _, err = runs.call("bench", "mesh", *words)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in err
    for part in parts:
        assert part in last


def test_one_gpu_alone_is_told_what_to_run(two_gpus, monkeypatch):
    monkeypatch.setattr(mesh, "devices_of_host", lambda: {**two_gpus, "count": 1})
    code, _, err = runs.call("bench", "mesh")
    assert code == 2 and err.count("\n") == 1 and "one NVIDIA H100" in err and "bench train" in err


def test_a_step_beyond_the_memory_of_a_device_is_not_run():
    (case, *_) = cases_of(RUN, GPUS, ["data=2"])
    sizes = SimpleNamespace(argument_size_in_bytes=80 * 2**30, output_size_in_bytes=2**30,
                            alias_size_in_bytes=2**30, temp_size_in_bytes=10 * 2**30)  # fmt: skip
    step = SimpleNamespace(memory_analysis=lambda: sizes)
    with pytest.raises(ValueError, match="needs 90.0 GiB, a device has 78"):
        mesh_case.measured(case.words, mesh_case.Program(None, step, None, None))


WAITS = """
import json, sys, time
from pathlib import Path
chosen, turn, file = sys.argv[1:]
log = Path(sys.argv[0]).with_name("log")
say = lambda word: log.open("a").write(word + "\\n")
keys = [case["key"] for case in json.load(open(file))]
while chosen != "-" and not Path(chosen).exists():
    time.sleep(0.01)
name = keys[0]
if "slow" in name:
    for _ in range(150):
        say("compiles " + name)
        time.sleep(0.01)
if "dies early" in name:
    sys.exit("error: no compiler")
say("compiled " + name)
for size, key in enumerate(reversed(keys)):
    print(json.dumps({"key": key, "compiled": size}), flush=True)
while not Path(turn).exists():
    time.sleep(0.01)
for key in reversed(keys):
    say("begins " + key)
    time.sleep(0.3)
    if key == "dies":
        sys.exit("error: no memory")
    say("ends " + key)
    print(json.dumps({"key": key, "value": len(key)}), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Step:
    """A case as far as what runs it looks."""

    key: str
    name: str
    precision: str = "bf16"
    devices: int = 2
    processes: int = 1
    recipe: str = "none"
    role: str = "mesh"

    @property
    def words(self):
        return {"key": self.key}

    @property
    def setup(self):
        return SimpleNamespace(mesh={"name": self.name})


def test_meshes_compile_side_by_side_and_run_in_turn(tmp_path, monkeypatch):
    (tmp_path / "waits.py").write_text(WAITS)
    monkeypatch.setattr(mesh_run, "COMMAND", "waits")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    steps = [Step("all tokens", "one", devices=1), Step("alone", "one", devices=1),
             Step("dies early", "a"), Step("third", "b"), Step("dies", "b"), Step("second", "b"),
             Step("slow", "c", precision="fp8")]  # fmt: skip
    rows = {}
    mesh_run.run_all(steps, env, jobs=4, limit=30, until=time.monotonic() + 100, cards=("",),
                     found=lambda case, row: rows.setdefault(case.key, row))  # fmt: skip
    values = {key: row.get("value") for key, row in rows.items()}
    assert values == {"alone": 5, "all tokens": 10, "dies early": None, "second": 6, "dies": None,
                      "third": 5, "slow": 4}  # fmt: skip
    assert rows["dies early"]["error"] == (
        "while it compiled: the process ended: error: no compiler")
    assert rows["dies"]["error"] == "the process ended: error: no memory"
    log = (tmp_path / "log").read_text().splitlines()
    # Others take up one device's choices, and nothing else happens while a mesh runs.
    assert log.index("compiled all tokens") < log.index("compiled third")
    for key in ("all tokens", "alone", "second", "third", "slow"):
        begins = log.index(f"begins {key}")
        assert log[begins + 1] == f"ends {key}"


def test_what_there_is_no_time_for_is_not_begun():
    rows = {}
    mesh_run.run_all([Step("late", "a")], {}, jobs=1, limit=1, until=time.monotonic(), cards=("",),
                     found=lambda case, row: rows.setdefault(case.key, row))  # fmt: skip
    assert rows == {"late": {"error": "not run: out of time"}}


@pytest.mark.slow
def test_processes_compile_wait_and_run_on_this_host():
    chosen = cases_of(RUN, cluster("cpux2"), ["fsdp=2"], micro_batches=(2,))
    rows = {}
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    mesh_run.run_all(chosen, env, jobs=3, limit=200, until=time.monotonic() + 400, cards=("",),
                     found=lambda case, row: rows.setdefault(case.key, row))  # fmt: skip
    assert all("seconds" in row for row in rows.values()), rows
    (row,) = [row for row in mesh_report.rows(chosen, rows, {}) if row["mesh"] == "fsdp=2"]
    assert row["steps"] == 4 and row["loss differs"] < 1e-5 and row["choices differ"] == 0


def test_bench_mesh_runs_from_the_command_line_to_its_files(monkeypatch, tmp_path):
    """With what compiles and measures replaced: what lies between is under test."""
    monkeypatch.setattr(mesh, "devices_of_host", lambda: {
        "count": 2, "kind": "NVIDIA H100", "platform": "gpu"})
    written = []

    def run_all(cases, *_, found, **__):
        for case in cases:
            found(case, plausible(case))
            rows = json.loads((tmp_path / "mesh.json").read_text())["rows"]
            written.append(sum(row["ms"] is not None for row in rows))

    monkeypatch.setattr(mesh, "run_all", run_all)
    monkeypatch.setattr(mesh, "compile_setup", lambda setup, target, limit: SimpleNamespace(
        peak=2**30))
    code, out, err = runs.call("bench", "mesh", "--json", tmp_path / "mesh.json", "--picture",
                               tmp_path / "mesh.svg")  # fmt: skip
    assert code == 0 and "weak scaling in fp8, fsdp=2" in out, err
    # Each row is in the file as soon as it is known.
    assert written == list(range(1, len(written) + 1))
    found = json.loads((tmp_path / "mesh.json").read_text())
    precisions = [row["precision"] for row in found["rows"] if row["mesh"] == "tensor=2"]
    # Heads and channels of the benchmark's model cannot be cut in blocks of 128.
    assert "bf16" in precisions and "fp8" not in precisions and "fp32" in precisions
    assert (tmp_path / "mesh.svg").read_text().startswith("<svg")
