"""What a run leaves on disk is read back whole, or not at all."""

import dataclasses
import json
import os

import pytest

import deepseek_jax as ds
from deepseek_jax.config import to_json
from experiments import recipes
from experiments.run_directory import MetricsLog, RunDirectory, check_unchanged, hash_of
from tests.experiments import runs

RUN = recipes.tiny(10)


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 6, "lo', b'{"step": 6, "loss": 1.0}', b"\0\0\0\0", b"\xff\xfe", b"\n"],
    ids=["whole", "cut", "no-newline", "zeros", "no-text", "blank"],
)
def test_metrics_are_cut_back_to_the_step_that_is_resumed(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(b'{"step": %d, "loss": 0.5}\n' % step for step in range(1, 6)) + tail)
    log = MetricsLog(path, resume_step=3)
    log.write({"step": 4, "loss": float("nan")})
    log.close()
    assert [entry["step"] for entry in entries(path)] == [1, 2, 3, 4]
    assert entries(path)[-1]["loss"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_off_before_the_resumed_step_keeps_those_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    MetricsLog(path, resume_step=2).close()
    assert entries(path) == [{"step": 1}]


def test_a_damaged_line_before_the_resumed_step_is_named_and_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    damaged = '{"step": 1}\ngarbage\n{"step": 3}\n'
    path.write_text(damaged)
    with pytest.raises(ValueError, match="metrics.jsonl is damaged in line 2: delete that line"):
        MetricsLog(path, resume_step=3)
    assert path.read_text() == damaged


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    log.write({"step": 1})
    assert entries(tmp_path / "metrics.jsonl") == [{"step": 1}]
    log.close()


def test_metrics_on_a_full_disk_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    message = "metrics.jsonl could not be .* then go on with --resume$"
    with runs.files_limited_to(10), pytest.raises(OSError, match=message):
        log.write({"step": 1, "loss": 0.25})
    log.close()


@pytest.mark.parametrize("write", ["write_config", "write_summary"])
def test_a_record_on_a_full_disk_is_whole_or_absent(tmp_path, write):
    directory = RunDirectory(tmp_path)
    # What has no record cannot go on.
    message = ".json could not be written .* then start again$"
    with runs.files_limited_to(10), pytest.raises(OSError, match=message):
        getattr(directory, write)({"recipe": "tiny", "steps": 100})
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_on_a_full_disk_is_whole_or_absent(tmp_path):
    source = tmp_path / "source.json"
    source.write_text("x" * 100)
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    with runs.files_limited_to(10), pytest.raises(OSError, match="json could not be written"):
        directory.write_tokenizer(source)
    assert os.listdir(tmp_path / "run") == []


def test_a_directory_is_one_process_s_at_a_time(tmp_path):
    one, other = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with one.held():
        with pytest.raises(ValueError, match="another launch trains into .*run now: wait for it"):
            other.held().__enter__()
    with other.held():
        pass
    assert os.listdir(tmp_path / "run") == []


def test_a_run_is_read_back(tmp_path):
    directory = RunDirectory(tmp_path)
    record = dict.fromkeys(("recipe", "command", "tokenizer"), "x")
    record |= {"corpus": {"hash": "x"}, "shards": ["data"], "run_hash": hash_of(to_json(RUN))}
    directory.write_config(record | {"run": to_json(RUN)})
    assert directory.read_run() == RUN


def test_a_changed_configuration_is_listed_field_by_field():
    changed = dataclasses.replace(
        RUN,
        seed=3,
        config=dataclasses.replace(RUN.config, num_experts=32),
        optimizer=dataclasses.replace(RUN.optimizer, beta2=0.99),
        learning_rate=ds.Schedule.constant(1.0),
    )
    with pytest.raises(ValueError) as error:
        check_unchanged(RUN, changed)
    for part in ("seed: 0 -> 3", "config.num_experts: 16 -> 32", "optimizer.beta2: 0.95 -> 0.99",
                 "learning_rate", "start another --run"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change", [{"steps": 20}, {"checkpoint_every": 7}, {"keep_checkpoints": 9}, {"max_skipped": 2}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_changes_no_number_of_a_step_is_free(change):
    check_unchanged(RUN, dataclasses.replace(RUN, **change))
