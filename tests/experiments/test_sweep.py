"""`sweep`: all setups, their order and front, and what is kept when it is stopped."""

import csv
import dataclasses
import json
import threading
import time

import pytest

from experiments import sweep as sweep_module
from experiments.planning.choose import REACHED, candidates, prediction
from experiments.planning.compile import Compiled
from experiments.planning.fit import FITTED, fit, terms
from experiments.planning.measure import spearman
from experiments.planning.setup import setup
from experiments.recipes import recipe
from experiments.sweep import Row, SweepArgs, run_of, shortlist, sweep
from sharding.cost import Reached
from sharding.hardware import cluster
from tests.experiments.runs import call

TINY = recipe("tiny")(None)
WHERE = cluster("cpux8")


@pytest.fixture(scope="module")
def rows():
    return sweep("tiny", "cpux8")


def test_rows_cover_every_mesh_and_cannot_be_changed(rows):
    assert len({tuple(row.mesh.items()) for row in rows}) == 20
    assert [row.rank for row in rows] == list(range(1, len(rows) + 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows[0].seconds = 0.0


def test_what_fits_comes_first_and_the_fastest_of_it(rows):
    keys = [(not row.fits, row.seconds) for row in rows]
    assert keys == sorted(keys)


def test_on_the_front_nothing_else_is_faster_and_smaller(rows):
    fitting = [row for row in rows if row.fits]
    for row in fitting:
        better = [o for o in fitting if o.seconds < row.seconds and o.bytes < row.bytes]
        if row.front:
            assert not better
    assert fitting[0].front
    assert min(fitting, key=lambda row: row.bytes).front


def test_the_shortlist_has_one_of_each_mesh_before_a_second():
    found = candidates(TINY, WHERE)
    chosen = shortlist(found, 25)
    first = [tuple(c.setup.mesh.items()) for c in chosen[:20]]
    assert len(set(first)) == 20 and len(chosen) == 25
    assert len({c.setup.name for c in chosen}) == 25


def compiled(peak):
    return Compiled("cpu", None, None, 10, 20, peak, (), {}, (), (), (), 1.0, 2.0, 3.0, 0.5)


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    done = []

    def stops(chosen, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(chosen.name)
        return compiled(1000 + len(done))

    monkeypatch.setattr(sweep_module, "compile_setup", stops)
    monkeypatch.setattr(sweep_module.os, "cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        sweep(TINY, WHERE, best=4, out=tmp_path)
    before, again = list(done), []

    def goes_on(chosen, target):
        again.append(chosen.name)
        return compiled(2000)

    monkeypatch.setattr(sweep_module, "compile_setup", goes_on)
    rows = sweep(TINY, WHERE, best=4, out=tmp_path)
    assert len(again) == 2 and not set(again) & set(before)
    assert sorted(r.compiled_bytes for r in rows if r.compiled_bytes) == [1001, 1002, 2000, 2000]


def test_a_note_that_was_cut_off_is_compiled_again_and_a_damaged_one_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "compile_setup", lambda chosen, target: compiled(1000))
    sweep(TINY, WHERE, best=2, out=tmp_path)
    notes = tmp_path / "notes.jsonl"
    first, second = notes.read_text().splitlines(keepends=True)
    for cut in (1, 50):
        notes.write_text(first + second[:-cut])
        tried = []
        again = lambda chosen, target, tried=tried: tried.append(chosen) or compiled(1000)
        monkeypatch.setattr(sweep_module, "compile_setup", again)
        sweep(TINY, WHERE, best=2, out=tmp_path)
        assert len(tried) == 1 and notes.read_text() == first + second
    for damaged in ("{}", '["compiled", 3', '["compiled", "name", 3]'):
        notes.write_text(first + damaged + "\n" + second)
        with pytest.raises(ValueError, match="notes.jsonl is damaged in line 2: delete that line"):
            sweep(TINY, WHERE, best=2, out=tmp_path)


def test_an_interrupted_sweep_does_not_wait_for_what_is_being_compiled(tmp_path, monkeypatch):
    begun, released = threading.Event(), threading.Event()
    first, second = shortlist(candidates(TINY, WHERE), 2)

    def compiles(chosen, target):
        if chosen is first.setup:
            begun.wait(20)
            raise KeyboardInterrupt
        begun.set()
        released.wait(20)
        return compiled(1000)

    monkeypatch.setattr(sweep_module, "compile_setup", compiles)
    monkeypatch.setattr(sweep_module.os, "cpu_count", lambda: 4)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep_module.compile_all([first, second], sweep_module.Notes(None), print)
    assert time.monotonic() - began < 10
    released.set()


def test_a_setup_that_cannot_be_compiled_does_not_end_the_sweep(tmp_path, monkeypatch):
    def fails_first(chosen, target, tried=[]):  # noqa: B006
        tried.append(chosen.name)
        if len(tried) == 1:
            raise ValueError("compiling for cpux8: killed")
        return compiled(1000)

    said = []
    monkeypatch.setattr(sweep_module, "compile_setup", fails_first)
    rows = sweep(TINY, WHERE, best=3, out=tmp_path, say=said.append)
    assert "  compiling for cpux8: killed" in said
    assert sum(row.compiled_bytes is not None for row in rows) == 2
    # It is tried again when the sweep goes on.
    rows = sweep(TINY, WHERE, best=3, out=tmp_path)
    assert sum(row.compiled_bytes is not None for row in rows) == 3


def test_a_sweep_writes_a_table_twice_and_a_picture(tmp_path):
    rows = sweep(TINY, WHERE, out=tmp_path)
    written = json.loads((tmp_path / "table.json").read_text())
    assert [Row(**row) for row in written] == rows
    with open(tmp_path / "table.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert float(lines[3]["seconds"]) == rows[3].seconds
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_fewer_than_none_are_not_compiled():
    args = sweep_module.SweepArgs("tiny", "cpux8", best=-1)
    with pytest.raises(ValueError, match="--best -1 must be at least 0"):
        sweep_module.sweep_command(args)


def test_none_may_be_measured():
    assert sweep("tiny", "cpux8", best=0, measured=True) == sweep("tiny", "cpux8")


def test_precision_and_batch_of_a_sweep_replace_those_of_the_recipe(tmp_path):
    words = "--cluster h200x1 --precision fp8 --batch 8".split()
    path = tmp_path / "rows.json"
    code, out, err = call("sweep", "peer", *words, "--best", 0, "--out", tmp_path, "--json", path)
    assert (code, err) == (0, "") and "not whole" not in out
    found = json.loads(path.read_text())
    shapes = {(row["sequences"], row["accumulation"]) for row in found}
    assert shapes == {(1, 8), (2, 4), (4, 2), (8, 1)} and len(found) == 16
    run = run_of(SweepArgs(recipe="peer", precision="fp8", batch=8))
    assert run.precision.matmul == "fp8" and run.batch_size.phases[-1].end == 8
    alike = setup(run, cluster("h200x1"), FITTED[0] | {"data": 1}, sequences=8, remat="none")
    of_it = [r for r in found if r["sequences"] == 8 and r["remat"] == "none"]
    assert of_it[0]["seconds"] == prediction(alike).seconds


def test_a_batch_that_does_not_divide_is_said_to_be_rounded_up(tmp_path):
    code, out, _ = call("sweep", "tiny", "--cluster", "cpux7", "--best", 0, "--out", tmp_path)
    assert code == 0
    assert "steps of 8 sequences are not whole on these devices: 14 are costed" in out


@pytest.mark.parametrize(
    "words, message",
    [("--batch 0", "--batch 0 must be at least 1"), ("--precision fp4", "unknown precision 'fp4'")],
)
def test_bad_choices_of_a_sweep_are_one_line(words, message):
    code, _, err = call("sweep", "tiny", "--cluster", "cpux8", *words.split())
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1


def test_constants_are_found_again_from_steps_that_follow_the_form():
    true = Reached(products=0.5, core=0.5, memory=0.25, network=2.0, message=3.0, overlap=0.0)
    setups = [setup(TINY, WHERE, mesh) for mesh in FITTED]
    found = fit(setups, [terms(s).at(true) for s in setups])
    for other in [c.setup for c in candidates(TINY, WHERE)][::12]:
        assert terms(other).at(found) == pytest.approx(terms(other).at(true), rel=0.05)


def test_measured_steps_are_ranked_against_predictions(tmp_path, monkeypatch):
    said = []
    true = Reached(products=0.5, core=0.5, memory=0.5, network=1.0, message=2.0, overlap=0.0)
    timed = lambda setups: ((s, [terms(s).at(true)] * 5) for s in setups)
    monkeypatch.setattr(sweep_module, "measure", timed)
    rows = sweep(TINY, WHERE, best=20, measured=True, out=tmp_path, say=said.append)
    assert sum(row.measured is not None for row in rows) == 20
    assert any("over 15 others: 1.000" in line for line in said), said


def test_other_devices_do_not_stand_for_those_of_the_cluster():
    code, _, err = call("sweep", "tiny", "--cluster", "h200x1", "--measure")
    assert code == 2 and "needs 1 x NVIDIA H200, and this machine has" in err


def test_a_setup_that_fails_is_a_row_with_its_reason_and_not_run_again(tmp_path, monkeypatch):
    calls = []

    def timed(setups):
        calls.append(len(setups))
        yield from ((s, "out of memory" if n == 1 else [1.0]) for n, s in enumerate(setups))

    monkeypatch.setattr(sweep_module, "measure", timed)
    for _ in range(2):
        rows = sweep(TINY, WHERE, best=3, measured=True, out=tmp_path)
        assert sum(row.measured is not None for row in rows) == 2
        assert [row.refused for row in rows if row.refused] == ["out of memory"]
    assert calls == [3, 0]


def test_with_nothing_hidden_predictions_are_the_terms_of_the_form():
    chosen = setup(TINY, WHERE, FITTED[4])
    reached = REACHED["cpu"]
    assert prediction(chosen, reached).seconds == pytest.approx(terms(chosen).at(reached))


def test_ranks_share_their_mean_where_values_are_equal():
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)


def test_the_best_shape_is_explained_with_its_neighbours(rows):
    text = sweep_module.explanation(TINY, WHERE, rows[0])
    assert text.startswith(f"The best shape is {rows[0].name}: ")
    assert "another remat policy" in text and "another expert axis" in text
    assert "\n" not in text


@pytest.mark.slow
def test_all_shapes_of_tiny_compile(tmp_path):
    rows = sweep(TINY, WHERE, best=20, out=tmp_path)
    done = [row for row in rows if row.compiled_bytes]
    assert len({tuple(row.mesh.items()) for row in done}) == 20
