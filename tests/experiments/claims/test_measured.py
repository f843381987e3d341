"""Claims on recorded measurements, from files made by hand: verdicts, and what changes them."""

import json

import pytest

from experiments.bench import accumulation, logfmt, residual
from experiments.claims import claim as judging
from experiments.claims import command, measured
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
