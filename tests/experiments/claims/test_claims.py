"""Every claim gets the verdict it should, and another one when an input of it is changed."""

import io
import json

import pytest
from rich.console import Console

from experiments.claims import claim as judging
from experiments.claims.claim import (
    AGREES,
    BY_RULE,
    DISAGREES,
    EXACT,
    MODELLED,
    NOT_HERE,
    NOT_YET,
    ROUNDED,
    WRONG,
    Claim,
    apart,
    evaluate,
    judge,
    within,
)
from experiments.claims.command import explained, print_on_terminal, text, where
from experiments.claims.table import CLAIMS, SUBJECTS
from tests.experiments import runs

# The only rows that may stay without a verdict on a value of ours.
NOT_POSSIBLE = {"balance_loss", "figure_5_rate", "figure_6_latency", "figure_8_rate"}


@pytest.fixture(scope="module")
def results():
    """Each claim computed once for all tests."""
    found = {}

    def result(name):
        if name not in found:
            found[name] = evaluate(CLAIMS[name])
        return found[name]

    return result


# It rounds the branches of a model, twice.
LONG = {"logfmt_residual"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CLAIMS]
)
def test_a_claim_gets_its_verdict_and_loses_it_when_an_input_changes(name, results):
    claim = CLAIMS[name]
    assert len(claim.how) > 10 and claim.section and claim.says
    if claim.recorded and results(name).verdict == NOT_YET:
        return
    assert results(name).verdict == claim.verdict != DISAGREES
    if claim.verdict == NOT_HERE:
        assert name in NOT_POSSIBLE
        return
    assert claim.otherwise and set(claim.otherwise) != set()
    assert evaluate(claim, **claim.otherwise).verdict != claim.verdict


def test_names_are_unique_and_no_subject_is_called_like_a_claim():
    assert sum(map(len, SUBJECTS.values())) == len(CLAIMS)
    assert not set(SUBJECTS) & set(CLAIMS)


def test_the_misprints_are_reported():
    wrong = {name for name, claim in CLAIMS.items() if claim.verdict == WRONG}
    assert {"kv_cache_llama", "training_flops_one_rule", "expert_limit_hidden",
            "table_3_sf_graph"} <= wrong  # fmt: skip


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("kv_cache_llama", None, 7.344),
        ("expert_limit_hidden", None, 123.863),
        ("expert_limit_infiniband", "TPOT ms", 14.757),
        ("training_flops_one_rule", "Qwen-72B", 444.86),
        ("table_3_cost_df", None, 1549.47),
        ("fp8_dispatch", "FP32 scales", 0.515625),
        ("fp8_dispatch", "as sent", 7232 / 14336),
        ("node_limit_mean", "8 groups", 5.295),
        ("service_nodes", None, 226.86),
    ],
)
def test_values_are_those_worked_out_by_hand(name, part, value, results):
    ours = results(name).ours
    assert (ours[part] if part else ours) == pytest.approx(value, rel=1e-3)


def a_claim(**changes):
    fields = dict(name="x", section="1", says="x", printed=2.5, compute=lambda v: v,
                  inputs=dict(v=2.5), tolerance=ROUNDED, how="by hand")  # fmt: skip
    return Claim(**fields | changes)


@pytest.mark.parametrize(
    ("claim", "ours", "verdict"),
    [
        (a_claim(), 2.54, AGREES),
        (a_claim(), 2.56, DISAGREES),
        (a_claim(verdict=BY_RULE), 2.5, BY_RULE),
        (a_claim(verdict=MODELLED, tolerance=within(0.1)), 2.74, MODELLED),
        (a_claim(verdict=MODELLED, tolerance=within(0.1)), 2.76, DISAGREES),
        (a_claim(tolerance=apart(0.5)), 3.0, AGREES),
        (a_claim(verdict=WRONG, correct=3.5), 3.5, WRONG),
        (a_claim(verdict=WRONG, correct=3.5), 2.5, DISAGREES),
        (a_claim(verdict=WRONG, correct=3.5), 4.5, DISAGREES),
        (a_claim(verdict=NOT_HERE), 99.0, NOT_HERE),
        (a_claim(printed={"a": 1, "b": 2}), {"a": 1, "b": 2}, AGREES),
        (a_claim(printed={"a": 1, "b": 2}), {"a": 1, "b": 3}, DISAGREES),
        (a_claim(printed={"a": 1, "b": 2}), {"a": 1}, DISAGREES),
        (a_claim(printed={"a": 1, "b": None}), {"a": 1, "b": 7}, AGREES),
        (a_claim(printed=[[1, 2]], tolerance=EXACT), [[1, 2]], AGREES),
        (a_claim(tolerance=judging.AT_MOST), 2.6, DISAGREES),
        (a_claim(printed=67, tolerance=judging.CUT), 67.76, AGREES),
        (a_claim(printed=67, tolerance=judging.CUT), 68.0, DISAGREES),
        (a_claim(printed=67, tolerance=judging.CUT), 66.1, DISAGREES),
        (a_claim(printed=67, tolerance=judging.CUT), 66.6, AGREES),
        (a_claim(printed=0.29, tolerance=judging.CUT), 0.29, AGREES),
        (a_claim(printed=0.29, tolerance=judging.CUT), 0.2999, AGREES),
        (a_claim(printed=0.29, tolerance=judging.CUT), 0.2849, DISAGREES),
    ],
)
def test_verdicts(claim, ours, verdict):
    assert judge(claim, ours) == verdict


@pytest.mark.parametrize(
    ("name", "part", "value", "holds"),
    [
        # Bytes and loads exactly; half a percent is for the loss.
        ("combine_formats", "LogFMT-8: bytes", 1.003, False),
        ("combine_formats", "LogFMT-8: loss, %", -0.5, True),
        ("combine_formats", "LogFMT-8: loss, %", 0.51, False),
        ("balance", "busiest expert", 1.003, False),
        ("balance", "busiest expert", 0.3, True),
        ("balance", "validation loss, %", 0.5, True),
        ("balance", "validation loss, %", 0.51, False),
    ],
)
def test_of_recorded_runs_only_the_loss_has_slack(name, part, value, holds):
    claim = CLAIMS[name]
    ours = {**claim.printed, part: value}
    assert (judge(claim, ours) == claim.verdict) == holds


def test_the_command_prints_rows_and_writes_them(tmp_path):
    file, page = tmp_path / "claims.json", tmp_path / "claims.html"
    code, out, err = runs.call(
        "claims", "kv_cache", "serving", "table-5", "--json", file, "--html", page
    )
    assert (code, err) == (0, "")
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == [
        "kv_cache", "table_5", *(claim.name for claim in SUBJECTS["serving"])
    ]  # fmt: skip
    wanted = {"name", "section", "printed", "ours", "tolerance", "verdict"}
    assert all(wanted <= set(row) for row in rows)
    assert rows[0]["printed"]["DeepSeek-V3"] == rows[0]["ours"]["DeepSeek-V3"] == 70.272
    assert "70.272" in out and "agrees: 9" in out
    written = page.read_text()
    assert "<svg" in written and "Table 1" in written and "70.272" in written
    assert "http" not in written.replace("http://www.w3.org", "")


def test_a_terminal_of_a_hundred_columns_shows_names_whole(results):
    file = io.StringIO()
    names = ("table_3_sf_graph", "kv_cache", "service_revenue")
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    print_on_terminal([results(name) for name in names], console)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    for part in (*names, "LLaMA-3.1 405B", "562,100", "printed value is"):
        assert part in file.getvalue()


def test_a_page_draws_every_figure(results):
    from experiments.claims.page import page

    drawn = ("kv_cache", "figure_5", "figure_6", "figure_7", "figure_8_rate", "training_flops",
             "training_flops_one_rule", "table_3_cost", "table_4_parts")  # fmt: skip
    written = page([results(name) for name in drawn])
    assert written.count("<svg") == 8
    assert "43.05" in written and "Figure 8" in written


def test_one_claim_is_explained(results):
    code, out, _ = runs.call("claims", "kv_cache_llama")
    assert code == 0
    for part in ("7.28", "7.34", "printed value is wrong", "kv_latent_dim=512", "memory.py",
                 "With kv_latent_dim=448"):  # fmt: skip
        assert part in out
    assert "disagrees" in explained(results("service_cost"))


def test_every_claim_names_the_function_that_computes_it():
    names = {name: where(claim) for name, claim in CLAIMS.items()}
    assert names["figure_1"] == "precision_map in precision.py"
    assert all(place.endswith(".py") for place in names.values())


def test_values_as_text():
    assert text({"a": 2, "b": None, "c": 70.272}) == "a 2, c 70.272"
    assert text([[1, 2], [3]]) == "1 2 3" and text(1548.9) == "1,549" and text(None) == "-"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["figure_9"], ["unknown claim 'figure_9'", "did you mean figure_8"]),
        (["zzz"], ["unknown claim 'zzz'", "subjects are memory"]),
        (["measured", "--measure", "x"], ["--measure records what an H200 does", "this is cpu"]),
    ],
)
def test_claims_that_do_not_exist(words, parts):
    code, out, err = runs.call("claims", *words)
    assert code == 2 and out == "" and err.count("\n") == 1
    for part in parts:
        assert part in err
