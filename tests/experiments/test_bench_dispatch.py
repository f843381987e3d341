"""`bench dispatch`: what is sent, timed and compared, and what cannot be run."""

import dataclasses
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from experiments.bench import children, dispatch, dispatch_case
from experiments.bench.dispatch import ALL, BenchDispatchArgs
from sharding.mesh import make_mesh
from sharding.parts import placing
from sharding.placement import Scheme
from tests.experiments import runs

WORDS = {"key": "small", "tokens": 24, "width": 128, "experts": 16, "chosen": 3, "nodes": 1,
         "ragged": False, "wire": "bf16", "room": 2.0, "directions": list(ALL)}  # fmt: skip
ARGS = BenchDispatchArgs()


@pytest.fixture
def two_gpus(monkeypatch):
    host = {"count": 2, "kind": "NVIDIA H200", "platform": "gpu"}
    monkeypatch.setattr(dispatch, "devices_of_host", lambda: dict(host))
    monkeypatch.setattr(dispatch, "exchange_times", lambda *_, **__: {})
    return host


def test_tokens_choose_different_experts_of_half_of_the_groups():
    choices = dispatch_case.choices_of({"experts": 64, "chosen": 6}, 4000)
    assert all(len(set(row)) == 6 for row in choices.tolist())
    assert max(len(set(row)) for row in (choices // 8).tolist()) == 4
    counts = np.bincount(choices.reshape(-1), minlength=64)
    assert counts.min() > 0.7 * counts.mean() and counts.max() < 1.3 * counts.mean()


@pytest.mark.parametrize("wire, bytes_of_a_token", [("bf16", 256), ("fp8", 144)])
def test_bytes_are_those_of_the_buffers_that_are_exchanged(wire, bytes_of_a_token):
    mesh = make_mesh(jax.devices()[:4], expert=4)
    case = {**WORDS, "wire": wire, "nodes": 2}
    layouts, filled = dispatch_case.planned(case, mesh, Scheme(expert_nodes=2, room=2.0))
    found = dispatch_case.directions(case, mesh, layouts, filled)
    # Two nodes of two devices: room for every token twice, then for those of both nodes twice.
    assert found["dispatch"].bytes == (2 + 4) * 24 * bytes_of_a_token
    assert found["combine"].bytes == (2 + 4) * 24 * 256
    # Of each hop's buffer half goes to the other device of its group.
    assert found["dispatch"].leaving == (2 + 4) / 2 * 24 * bytes_of_a_token
    assert len(filled) == 2 and 0 < filled[1] < filled[0] <= 1
    ragged = {**case, "ragged": True}
    less = dispatch_case.directions(ragged, mesh, layouts, filled)
    assert less["dispatch"].bytes == pytest.approx(
        (2 * filled[0] + 4 * filled[1]) * 24 * bytes_of_a_token
    )


def test_a_program_repeats_what_it_times_on_new_operands():
    mesh = make_mesh(jax.devices()[:2], expert=2)
    layouts, _ = dispatch_case.planned(WORDS, mesh, Scheme(room=2.0))
    doubled = lambda x, _: 2 * x
    run = dispatch_case.repeated(doubled, 3, mesh, Scheme())
    x = jax.device_put(np.ones((4, 2), np.float32), placing(mesh, "expert"))
    # The first element of each device is the last result's: 0, then 0 for ever; others stay.
    np.testing.assert_array_equal(run(x, layouts), [[0, 2], [2, 2], [0, 2], [2, 2]])


def test_each_direction_is_timed(monkeypatch, compile_cache):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(dispatch_case, "make_mesh", lambda **sizes: make_mesh(
        jax.devices()[:2], **sizes))  # fmt: skip
    monkeypatch.setattr(dispatch_case, "times", lambda _: 2)
    with ThreadPoolExecutor() as pool:
        found = json.loads(json.dumps(dispatch_case.timed(dispatch_case.begin(WORDS, pool))))
        assert set(found["us"]) == set(ALL) and found["errors"] == {}
        assert all(us > 0 for us in found["us"].values())
        with pytest.raises(jax.errors.JaxRuntimeError, match="ragged-all-to-all"):
            dispatch_case.begin({**WORDS, "ragged": True}, pool)


@pytest.mark.slow
def test_a_process_times_its_cases_and_says_which_cannot_be_run(tmp_path):
    cases = [dispatch.Case(2048, tokens, path, "bf16", ("combine",), 1, 1)
             for tokens, path in ((16, "padded"), (16, "ragged"), (32, "padded"))]  # fmt: skip
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    rows = [row for _, row in children.run_cases(
        dispatch.COMMAND, cases, env, limit=200, until=time.monotonic() + 200)]  # fmt: skip
    assert [row.get("us", {}).keys() == {"combine"} for row in rows] == [True, False, True]
    assert "ragged-all-to-all" in rows[1]["error"]


def test_two_hops_need_nodes_of_several_devices():
    paths = lambda count, **more: {
        case.path: case.nodes
        for case in dispatch.cases(dataclasses.replace(ARGS, **more), count)
    }
    assert paths(2) == {"padded": 1, "ragged": 1}
    assert paths(8) == {"padded": 1, "ragged": 1, "two-hop": 2}
    assert paths(8, devices_per_node=2)["two-hop"] == 4


def plausible(case):
    """1 us a token and direction; FP8 takes 0.6 of it."""
    us = case.tokens * (0.6 if case.wire == "fp8" else 1.0)
    size = case.tokens * 2 * case.width * (1 if case.wire == "bf16" else 0.516)
    return {"filled": [0.9], "us": dict.fromkeys(case.directions, us), "errors": {},
            "bytes": dict.fromkeys(case.directions, size),
            "leaving": dict.fromkeys(case.directions, size / 2)}  # fmt: skip


def test_rows_stand_beside_the_same_bytes_and_bars_beside_the_worst():
    todo = list(dispatch.cases(ARGS, 2))
    found = {case.key: plausible(case) for case in todo}
    found[todo[0].key] = {"error": "it hung"}
    peers = {str(dispatch.exchanged(size / 2, 2)): 0.85 * size / 2 / 7168
             for row in found.values() for size in row.get("bytes", {}).values()}  # fmt: skip
    assert dispatch.exchanged(3 * 1280, 4) == 4 * 1280
    rows = list(dispatch.table(todo, found, 2, peers))
    assert rows[0]["note"] == "it hung"
    row = next(r for r in rows if (r["width"], r["tokens"], r["wire"]) == (7168, 32768, "bf16"))
    assert row["of NCCL"] == pytest.approx(0.85)
    assert row["GB/s"] == pytest.approx(32768 * 2 * 7168 / 2 / 32768 / 1e3)
    bars = {v["bar"].partition(",")[0]: v for v in dispatch.judged(rows)}
    assert bars["padded dispatch beside NCCL"]["found"] == pytest.approx(
        0.85 * 0.516 * 2048 / 7168 / 0.6
    )
    gain = [v for v in dispatch.judged(rows) if "FP8 beside BF16" in v["bar"]]
    assert [v["found"] for v in gain] == pytest.approx([1 / 0.6] * 2)
    assert "NCCL" in dispatch.picture(rows)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--processes", "3"], ["--processes 3", "2 devices"]),
        (["--devices-per-node", "4"], ["--devices-per-node 4", "2 devices"]),
        (["--width", "4096"], ["--width 4096", "7168, 2048"]),
    ],
    ids=lambda value: value[0].lstrip("-") if value[0].startswith("--") else "",
)
def test_what_cannot_be_run_is_one_line(two_gpus, words, parts):
    code, _, err = runs.call("bench", "dispatch", *words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_without_torch_rows_stay_and_one_line_says_so(two_gpus, monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(dispatch, "run_cases", lambda command, todo, *_, **__: (
        (case, plausible(case)) for case in todo))  # fmt: skip
    words = ("--json", tmp_path / "d.json", "--picture", tmp_path / "d.svg")
    code, out, err = runs.call("bench", "dispatch", "--tokens", "8192", *words)
    assert code == 0 and err.startswith("torch is not installed: ")
    assert "FP8 beside BF16" in out and "beside NCCL" not in out
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["card"] == "2 x NVIDIA H200" and len(found["rows"]) == 4 * 6 + 4 * 2
    assert (tmp_path / "d.svg").read_text().startswith("<svg")


def test_one_gpu_alone_is_refused(two_gpus, monkeypatch):
    monkeypatch.setattr(dispatch, "devices_of_host", lambda: {**two_gpus, "count": 1})
    code, _, err = runs.call("bench", "dispatch")
    assert code == 2 and err.count("\n") == 1 and "one NVIDIA H200" in err
