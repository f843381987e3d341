"""`eval`: every byte scored once, by the same figures as at the end of training."""

import dataclasses
import json
import math
import shutil
import tempfile

import numpy as np
import pytest

from experiments.data import load_corpus
from experiments.eval import compressors, load_run, recorded_shards, score
from experiments.run_directory import RunDirectory
from tests.experiments import runs


@pytest.fixture(scope="module")
def summary(trained):
    return json.loads((trained.run / "summary.json").read_text())


def evaluate(*words, path):
    code, out, err = runs.call("eval", *words, "--json", path)
    assert (code, err) == (0, "")
    [row] = json.loads(path.read_text())
    assert "bits_per_byte" in out
    return row


@pytest.mark.parametrize("batch_size", [2, 7])
def test_the_validation_text_scores_as_it_did_after_training(
    trained, summary, tmp_path, batch_size
):
    row = evaluate(trained.run, "--batch-size", batch_size, path=tmp_path / "row.json")
    assert row["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-6)
    assert row["bytes"] == summary["val_bytes"] and row["tokens"] == summary["val_tokens"]


def test_the_same_text_given_as_data_scores_the_same(trained, summary, tmp_path, monkeypatch):
    corpus = load_corpus(trained.data)
    (tmp_path / "text").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name, text in corpus.validation:
        (tmp_path / "text" / name.replace("#", "-")).write_text(text)
    row = evaluate(trained.run, "--data", tmp_path / "text", path=tmp_path / "row.json")
    assert row["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-6)
    assert row["bytes"] == summary["val_bytes"] == len(corpus.validation_bytes)
    assert not list((tmp_path / "temporary").iterdir())


def test_data_without_a_path_is_refused(trained):
    code, _, err = runs.call("eval", trained.run, "--data")
    runs.refused(code, err, "--data needs a path")


def test_an_earlier_checkpoint_scores_worse(trained, summary, tmp_path):
    row = evaluate(trained.run, "--step", 20, path=tmp_path / "row.json")
    assert row["bits_per_byte"] > summary["val_bits_per_byte"]


def test_the_averaged_parameters_are_scored_where_there_are_any(trained, summary):
    directory = RunDirectory(trained.run)
    run, state = load_run(directory)
    shards = recorded_shards(directory)
    bits = lambda state: score(run, state, shards, shards.validation, batch_size=2)["bits_per_byte"]
    averaged = dataclasses.replace(state, params=state.ema, ema=None)
    assert bits(averaged) == pytest.approx(summary["val_bits_per_byte"], rel=1e-6)
    assert bits(dataclasses.replace(state, ema=None)) != pytest.approx(bits(averaged), rel=1e-6)


def test_reading_a_run_does_not_disturb_the_process_that_trains_it(trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    half = run / "checkpoints" / "28.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "24", half)
    evaluate(run, path=tmp_path / "row.json")
    assert half.is_dir()


def test_compressors_measure_bits_per_byte():
    text = b"a" * 1000
    assert compressors(text)["gzip_bits_per_byte"] < 0.5
    noise = np.random.default_rng(0).bytes(100_000)
    assert compressors(noise)["xz_bits_per_byte"] == pytest.approx(8, rel=0.01)
    assert math.isclose(compressors(noise)["gzip_bits_per_byte"], 8, rel_tol=0.01)
