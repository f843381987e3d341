"""`bench combine`: bytes of each format, its table, and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from deepseek_jax.config import COMBINE, Precision
from experiments.bench import combine
from experiments.planning.traffic import result_bytes
from experiments.recipes import deepseek_v3
from tests.experiments import runs


def test_bytes_of_a_row_of_v3():
    run = deepseek_v3()
    # BF16; codes of 8 or 10 bits and a pair of BF16 for 128 channels.
    found = [combine.token_bytes(run, name) for name in ("bf16", "logfmt8", "logfmt10")]
    assert found == [14336, 7168 + 224, 8960 + 224]
    fp32 = dataclasses.replace(run, precision=Precision())
    assert combine.token_bytes(fp32, "bf16") == 4 * 7168


def test_a_plan_counts_the_bytes_that_results_travel_in():
    run = deepseek_v3()
    for precision in (run.precision, Precision(), Precision.of("bf16")):
        for name in COMBINE:
            made = dataclasses.replace(run, precision=dataclasses.replace(precision, combine=name))
            assert result_bytes(made) == combine.token_bytes(made, name)


def test_a_row_compares_the_last_losses():
    losses = {"bf16": np.array([9.0, 2.0, 4.0]), "logfmt8": np.array([1.0, 3.0, 3.3])}
    found = combine.row(deepseek_v3(), "logfmt8", losses, 2)
    assert found["loss, last 2"] == pytest.approx(3.15)
    assert found["gap %"] == pytest.approx(5.0)


def test_one_device_is_too_few(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    code, out, err = runs.call("bench", "combine")
    assert code == 2 and out == "" and "needs two devices or more" in err and err.count("\n") == 1


def test_steps_to_compare_must_be_among_those_made():
    code, _, err = runs.call("bench", "combine", "--steps", 5, "--last", 6)
    assert code == 2 and "--last 6 must be from 1 to --steps 5" in err


@pytest.mark.slow
def test_formats_train_alike(tmp_path):
    file = tmp_path / "rows.json"
    code, out, err = runs.call(
        "bench", "combine", "--mesh", "expert=4,data=2", "--steps", 3, "--last", 1, "--json", file
    )
    assert code == 0, err
    rows = json.loads(file.read_text())["rows"]
    assert [row["gap %"] == 0 for row in rows] == [True, False, False]
    assert all(abs(row["gap %"]) < 1 for row in rows)
