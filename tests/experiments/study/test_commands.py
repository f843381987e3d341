"""The commands `study`: tables, pictures, the map of recommendations, what is refused."""

import json

import pytest

from experiments.__main__ import COMMANDS
from experiments.study import accumulation, convergence, fabric
from experiments.study.recommendations import RECOMMENDATIONS
from tests.experiments import runs


@pytest.mark.parametrize(
    ("words", "question"),
    [
        (["accumulation", "--bits", 13, 20, "--elements", 256], "13 bits, by the interval"),
        (["convergence", "--sms", 20, "--ratios", 4, "--limits", 4], "KV caches"),
        (["fabric", "--nodes", 4, "--seeds", 1, "--latency", 0, 3.7], "Latency of a message"),
    ],
)
def test_a_study_prints_draws_and_writes(words, question, tmp_path):
    picture, file = tmp_path / "study.svg", tmp_path / "study.json"
    code, out, err = runs.call("study", *words, "--picture", picture, "--json", file)
    assert (code, err) == (0, "")
    assert question in out and "<svg" in picture.read_text()
    assert len({row["question"] for row in json.loads(file.read_text())}) >= 2


def test_every_recommendation_has_a_study_or_a_reason():
    code, out, _ = runs.call("study", "map")
    assert code == 0 and "not modelled" in out
    titles = {
        "accumulation": [accumulation.errors((13,), 128), accumulation.intervals(128)],
        "convergence": [convergence.sms((20,)), convergence.node_limits((4,), (4,)),
                        convergence.in_network(), convergence.pcie((0,))],
        "fabric": [fabric.latencies((0,)), fabric.links(0), fabric.routing(2, 1)],
    }  # fmt: skip
    sections = {r.section for r in RECOMMENDATIONS}
    assert sections == {"3.1.2", "3.2.2", "4.4.2", "4.5.2", "5.1", "5.2.2", "5.2.3", "6.1", "6.2",
                        "6.3", "6.4", "6.5", "6.6"}  # fmt: skip
    for r in RECOMMENDATIONS:
        if r.study is None:
            assert len(r.because) > 20
            continue
        study, _, part = r.study.partition(": ")
        assert f"study {study}" in COMMANDS
        assert any(section.title.lower().startswith(part.lower()) for section in titles[study])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["fabrics"], "did you mean fabric"),
        (["accumulation", "--bits", "0"], "must be from 1 to 40"),
        (["accumulation", "--elements", "100"], "multiple of 128"),
        (["convergence", "--sms", "140"], "communication_sms=140"),
        (["convergence", "--sms", "0"], "nothing communicates"),
        (["fabric", "--nodes", "1"], "--nodes 1 must be from 2 to 256"),
        (["accumulation", "--elements", "100000000000"], "--elements 100000000000 must be a mult"),
        (["convergence", "--kv", "8", "inf"], "--kv inf must be from 0 to 1e+12"),
        (["convergence", "--kv", "nan"], "--kv nan must be"),
        (["convergence", "--kv", "-1"], "--kv -1.0 must be"),
        (["convergence", "--kv", "1e308"], "--kv 1e+308 must be"),
        (["fabric", "--nodes", "100000"], "--nodes 100000 must be from 2 to 256"),
        (["fabric", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["fabric", "--proxy", "-1"], "--proxy -1.0 must be"),
        (["fabric", "--proxy", "nan"], "--proxy nan must be"),
        (["fabric", "--latency", "1", "nan"], "--latency nan must be"),
        (["fabric", "--latency", "inf"], "--latency inf must be"),
        (["fabric", "--picture", "/proc/x.svg"], "--picture /proc/x.svg cannot be written"),
        (["fabric", "--picture", "x.gif"], "must end in .svg"),
    ],
)
def test_bad_input_is_one_line(words, part):
    code, out, err = runs.call("study", *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and part in err
