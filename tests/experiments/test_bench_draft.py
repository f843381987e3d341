"""`bench draft`: a run's drafts are counted, timed and drawn."""

import json

import pytest

from tests.experiments import runs


@pytest.mark.slow
def test_drafting_a_runs_texts_is_measured_and_drawn(trained, tmp_path):
    words = ["--prompts", 3, "--new", 6, "--timed", 1, "--out", tmp_path / "draft.png"]
    code, out, err = runs.call(
        "bench", "draft", trained.run, *words, "--json", tmp_path / "rows.json"
    )
    assert (code, err) == (0, "") and "bench draft" in out
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert row["same_texts"] == row["texts"] == 3
    assert 0.0 <= row["acceptance"] <= 1.0 and 1.0 <= row["tokens_per_step"] <= 2.0
    assert (tmp_path / "draft.png").stat().st_size > 1000
