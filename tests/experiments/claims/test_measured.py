"""Claims on recorded measurements, from files made by hand: verdicts, and what changes them."""

import json

import pytest

from experiments.bench import accumulation, logfmt, residual
from experiments.claims import claim as judging
from experiments.claims import command, measured, training
from experiments.claims.claim import DISAGREES, NOT_YET, evaluate
from experiments.claims.table import CLAIMS
from tests.experiments.test_residual_bench import curves

WHERE = {"card": "NVIDIA H200", "date": "2026-01-01"}


def logfmt_rows():
    """Ours takes 1.5 times as long as a copy of the rows."""
    return [
        {"section": f"{way} {bits} bits", "shape": "4096 x 7168", "kernel": kernel, "us": us}
        for bits in logfmt.BITS for way in ("encode", "decode")
        for kernel, us in (("ours", 150.0), (logfmt.COPY, 90.0), (logfmt.MOVED, 100.0))
    ]  # fmt: skip


def sums():
    errors = {accumulation.FAST: (0.2, 7.0), accumulation.PRECISE: (1e-4, 1e-4),
              accumulation.OURS: (0.01, 0.05)}  # fmt: skip
    return [{"data": kind, "sum": name, "error %": error} for name, pair in errors.items()
            for kind, error in zip(accumulation.KINDS, pair, strict=True)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results with a file of each measurement."""
    for module in (judging, measured, command):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    found = curves()
    combine = [{"combine": name, "bytes a row": size, "gap %": gap} for name, size, gap in (
        ("plain", 1024, 0.0), ("logfmt8", 264, 0.05), ("logfmt10", 328, -0.02))]  # fmt: skip
    files = {
        measured.RESIDUAL: {**WHERE, "curves": found, "formats": residual.compare(found)},
        measured.LOGFMT: {**WHERE, "rows": logfmt_rows()},
        measured.ACCUMULATION: {**WHERE, "rows": sums()},
        measured.COMBINE: {**WHERE, "rows": combine},
    }
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    return tmp_path


@pytest.mark.parametrize("claim", measured.CLAIMS, ids=lambda claim: claim.name)
def test_a_recorded_claim_gets_its_verdict_and_loses_it(claim, results):
    assert evaluate(claim).verdict == claim.verdict
    assert evaluate(claim, **claim.otherwise).verdict == DISAGREES
    (results / claim.recorded).unlink()
    assert evaluate(claim).verdict == NOT_YET and "not measured yet" in command.explained(
        evaluate(claim)
    )


@pytest.mark.parametrize(
    ("name", "command_words"),
    [
        ("logfmt_overhead", "claims --measure experiments/results"),
        ("combine_formats", "bench combine tiny --steps 200 --json experiments/results/combine"),
        ("balance", "bench balance --json experiments/results/balance.json"),
        ("own_utilisation", "bench train peer --precision bf16 --json experiments/results/bench"),
    ],
)
def test_without_its_file_a_claim_names_the_command_that_makes_it(
    name, command_words, tmp_path, monkeypatch
):
    for module in (judging, command):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    found = evaluate(CLAIMS[name])
    assert found.verdict == NOT_YET and f"which `{command_words}" in command.explained(found)


def test_utilisation_is_read_off_what_bench_train_writes(tmp_path, monkeypatch):
    for module in (judging, training):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    values = []
    for found in ([{"tokens/s": 1e5}], {"rows": [{"tokens/s": 1e5}]}):
        (tmp_path / training.TRAIN).write_text(json.dumps(found))
        values.append(evaluate(CLAIMS["own_utilisation"]).ours["causal MFU %"])
    assert values[0] == values[1] > 0


def test_values_are_those_of_the_files(results):
    value = lambda name: evaluate(CLAIMS[name]).ours
    assert value("logfmt_overhead") == {"8 bits": pytest.approx(50), "10 bits": pytest.approx(50)}
    assert value("accumulation_card_gain") == {"zero-mean": 20, "positive": pytest.approx(140)}
    assert value("combine_formats")["LogFMT-10: bytes"] == 1.0
    training = value("logfmt_training")
    assert training["gradient error, logfmt8 over e4m3"] == pytest.approx(0.5)
    assert training["loss of logfmt8: above e4m3, over noise"] < 0


def test_a_row_says_where_it_was_measured(results):
    record = command.record(evaluate(CLAIMS["accumulation_card"]))
    assert record["recorded"] == {"file": measured.ACCUMULATION, **WHERE}
    assert "NVIDIA H200, 2026-01-01" in command.explained(evaluate(CLAIMS["accumulation_card"]))
