"""`launch` from text to report: what it prints, what it leaves, what it needs."""

import json
import math
import subprocess
import sys
from unittest import mock

import pytest

from deepseek_jax.config import Run, from_json, to_json
from experiments import launch
from sharding.placement import current_scheme
from tests.experiments import runs

FIELDS = {
    "step", "tokens", "loss", "mtp_loss", "sequence_loss", "total_loss", "grad_norm",
    "learning_rate", "gamma", "mtp_weight", "bits_per_byte", "busiest_over_mean",
    "expert_load_LE", "skipped", "skipped_in_row", *runs.TIMES,
}  # fmt: skip


@pytest.fixture(scope="module")
def summary(trained):
    return json.loads((trained.run / "summary.json").read_text())


def test_the_directory_of_a_run_holds_what_is_documented(trained):
    assert sorted(path.name for path in trained.run.iterdir()) == [
        "checkpoints", "config.json", "data", "events", "metrics.jsonl", "report.html",
        "summary.json", "tokenizer.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (trained.run / "checkpoints").iterdir()) == ["20", "24"]
    assert list((trained.run / "events").iterdir())
    assert (trained.run / "report.html").read_text().startswith("<!")


def test_the_header_is_printed_before_training_and_the_result_after(trained):
    labels = ("preparing data", "recipe", "model", "parameters", "device", "precision", "data",
              "step", "memory", "step 1/", "step 24/", "result", "sample", "report")
    lines = trained.printed.splitlines()
    at = 0
    for label in labels:
        at = next(n for n in range(at, len(lines)) if lines[n].startswith(label)) + 1


def test_the_record_makes_the_same_run_again(trained):
    record = runs.record(trained.run)
    run = from_json(Run, record["run"])
    assert json.loads(json.dumps(to_json(run))) == record["run"]
    assert run.steps == runs.STEPS and run.config.num_experts == 8 and run.ema_decay == 0.5
    assert record["recipe"] == "tiny"
    assert record["command"].startswith("python -m experiments launch --run ")
    assert record["shards"] == ["data"]
    assert record["parameters"]["total"] > record["parameters"]["active"] > 0


def test_every_step_has_a_line_of_metrics(trained):
    lines = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    for line in lines:
        assert set(line) == FIELDS
        assert line["tokens"] == line["step"] * 4 * 20
        assert [len(load_E) for load_E in line["expert_load_LE"]] == [8, 8]
        for load_E in line["expert_load_LE"]:
            assert sum(load_E) / 8 == pytest.approx(1, abs=1e-4)
        assert line["mfu_causal"] is None  # the peak of this CPU is not known
    # At the start, nothing is known of the next token nor of the one after.
    assert lines[0]["loss"] == pytest.approx(math.log(300), rel=0.02)
    assert lines[0]["mtp_loss"] == pytest.approx(19 / 20 * math.log(300), rel=0.02)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3


def test_the_summary_says_how_it_went(summary):
    assert summary["steps"] == runs.STEPS and summary["tokens"] == runs.STEPS * 80
    assert summary["skipped"] == 0 and summary["train_seconds"] > 0
    bits = summary["val_loss"] / math.log(2) * summary["val_tokens"] / summary["val_bytes"]
    assert summary["val_bits_per_byte"] == pytest.approx(bits)
    assert 0 < summary["gzip_bits_per_byte"] < 8 and 0 < summary["xz_bits_per_byte"] < 8
    assert set(summary["sample"]) == {"prompt", "text"}


def test_token_shards_as_data_give_the_same_run(trained, summary, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.finish.write_report_if_possible", lambda directory: None)
    words = runs.launch_words(tmp_path / "run", trained.run / "data", "--json",
                              str(tmp_path / "summary.json"))
    code, _, err = runs.call(*words)
    assert (code, err) == (0, "")
    runs.assert_same_run(tmp_path / "run", trained.run)
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again | {"train_seconds": 0} == summary | {"train_seconds": 0}
    assert runs.record(tmp_path / "run")["shards"] == [
        str(trained.run / "data")
    ]
    assert not (tmp_path / "run" / "data").exists()


def test_text_beside_token_shards_is_tokenised_like_them(trained, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.finish.write_report_if_possible", lambda directory: None)
    more = runs.write_text(tmp_path / "more")
    (more / "new.txt").write_text("a document that the shards do not hold\n" * 20)
    words = runs.launch_words(tmp_path / "run", trained.run / "data", settings=("steps=1",))
    words.insert(words.index("--data") + 1, str(more))
    code, _, err = runs.call(*words)
    assert (code, err) == (0, "")
    record = runs.record(tmp_path / "run")
    assert record["shards"] == ["data", str(trained.run / "data")]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    code, _, err = runs.call("eval", tmp_path / "run", "--json", tmp_path / "row.json")
    assert (code, err) == (0, "")
    [row] = json.loads((tmp_path / "row.json").read_text())
    assert row["bytes"] == summary["val_bytes"]


# Imports what only text or plots need only where those are asked for.
LEAN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tokenizers", "grain", "matplotlib"):
            raise ModuleNotFoundError(f"{name} is not to be imported")

sys.meta_path.insert(0, Blocked())
from experiments import recipes
from experiments.__main__ import main
from experiments.run_directory import RunDirectory

recipes.RECIPES["small"] = lambda steps, run=sys.argv[1]: RunDirectory(run).read_run()
for words in sys.argv[2:]:
    sys.argv = ["experiments/__main__.py", *words.split()]
    code = main()
    if code:
        sys.exit(code)
"""


def test_shards_and_benchmarks_need_no_tokenizers_grain_or_plots(
    trained, compile_cache, tmp_path
):
    commands = [
        " ".join(runs.launch_words(tmp_path / "run", trained.run / "data")),
        "bench train small --steps 1 --mtp 0",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEAN, str(trained.run), *commands],
        env=runs.child_environment(compile_cache), cwd=tmp_path, capture_output=True, text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens/s" in done.stdout
    assert runs.metrics(tmp_path / "run") == runs.metrics(trained.run)
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_run_is_scored_with_room_for_any_load(trained, tmp_path, monkeypatch):
    # Training runs a batch again that found no room; nothing would run the score again.
    found = {}
    monkeypatch.setattr(launch, "first_state", lambda *_, **__: mock.Mock(step=0))
    monkeypatch.setattr(launch.Checkpoints, "check_room", lambda *_: None)
    monkeypatch.setattr(
        launch, "train", lambda *args, **_: found.update(trained=args[6].scheme.room)
    )
    monkeypatch.setattr(launch, "finish", lambda *_: found.update(scored=current_scheme().room))
    words = runs.launch_words(
        tmp_path / "run", trained.data, "--mesh", "expert=8",
        settings=("micro_batch=8", "batch_size=8"),
    )  # fmt: skip
    assert runs.call(*words)[0] == 0
    assert found == {"trained": 2.0, "scored": None}
