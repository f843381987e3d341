"""Options, settings, data and places that cannot be: one line that names the value and the fix."""

import json

import pytest

from tests.experiments import runs


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["launch", "tinny"], ["unknown recipe 'tinny'", "tiny, hundred_million, peer"]),
        (["launch", "--precision", "fp7"], ["unknown precision 'fp7'", "fp32, bf16, fp8"]),
        (["launch", "--steps", "-5"], ["--steps -5", "at least 1"]),
        (["launch", "--steps", "0"], ["--steps 0", "at least 1"]),
        (["launch", "--steps", "many"], ["many"]),
        (["launch", "--seed", "-1", "--steps", "1"], ["seed=-1", "at least 0"]),
        (["launch", "--steps", "9", "--profile", "5", "3"], ["--profile 5 3", "from 0 to 9"]),
        (["launch", "--steps", "9", "--profile", "-1", "3"], ["--profile -1 3", "from 0 to 9"]),
        (["launch", "--steps", "9", "--profile", "8", "10"], ["--profile 8 10", "from 0 to 9"]),
        (["launch", "--stepz", "3"], ["unknown option --stepz", "did you mean --steps?"]),
        (["launch", "--resume"], ["--resume needs --run"]),
        (["launch", "--data"], ["--data needs a path"]),
        (["launch", "--seed", "99999999999", "--steps", "1"], ["seed=99999999999", "4294967295"]),
    ],
    ids=lambda value: "-".join(value[1:]).lstrip("-") if "launch" in value else "",
)
def test_options_that_cannot_be(words, parts, trained, tmp_path):
    if words[1] not in ("--resume", "--data"):
        words += ["--run", tmp_path / "run", "--data", trained.data, "--set", *runs.SETTINGS]
    code, _, err = runs.call(*words)
    runs.refused(code, err, *parts)
    runs.nothing_whole(tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("widht=3", ["unknown field widht", "micro_batch"]),
        ("config.widht=3", ["unknown field config.widht", "model_dim"]),
        ("config.yarn.factor=3", ["config.yarn is None", "factor"]),
        ("steps", ["--set 'steps'", "FIELD=VALUE"]),
        ("steps=1.5", ["steps='1.5'", "int"]),
        ("config.score=relu", ["config.score='relu'", "'sigmoid', 'softmax'"]),
        ("config.num_experts=9", ["num_experts=9", "divisible by num_groups=4"]),
        ("config.rotary_head_dim=3", ["rotary_head_dim=3", "even"]),
        ("config.experts_per_token=7", ["experts_per_token=7", "4 experts"]),
        ("batch_size=3", ["batch_size 3", "multiple of micro_batch=2"]),
        ("batch_size=nan", ["batch_size nan", "multiple of micro_batch=2"]),
        ("seq_len=65", ["seq_len=65", "max_length=64"]),
        ("seq_len=1", ["seq_len=1", "num_mtp=1"]),
        ("precision=fp7", ["unknown precision 'fp7'", "fp32, bf16, fp8"]),
        ("fim_rate=1.5", ["fim_rate=1.5", "between 0 and 1"]),
        ("ema_decay=1", ["ema_decay=1.0", "[0, 1)"]),
        ("remat=some", ["remat='some'", "'paper'"]),
        ("learning_rate=-1", ["learning_rate=-1.0", "must not be negative"]),
        ("config.vocab_size=200", ["vocab_size=200", "at least 260"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_cannot_be(setting, parts, trained, tmp_path):
    run = tmp_path / "run"
    code, _, err = runs.call(*runs.launch_words(run, trained.data, settings=(setting,)))
    runs.refused(code, err, *parts)
    runs.nothing_whole(run)


def test_the_order_of_settings_is_free(trained, tmp_path):
    # Either alone does not fit the recipe's batch of 16 or length of 512.
    settings = ["micro_batch=24", "batch_size=48", "seq_len=600", "config.max_length=700"]
    for order in (settings, settings[::-1]):
        code, _, err = runs.call(
            "launch", "--run", tmp_path / "run", "--data", trained.data, "--set", *order, "steps=0"
        )
        runs.refused(code, err, "steps=0 must be at least 1")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.txt", b"", ["empty.txt", "empty"]),
        ("binary.txt", b"\x7fELF\0\0\0", ["binary.txt", "binary"]),
        ("latin.txt", "caf\u00e9".encode("latin-1") * 50, ["latin.txt", "UTF-8"]),
        ("table.xlsx", b"PK", ["table.xlsx", "unknown suffix"]),
        ("rows.jsonl", b'{"body": "x"}\n', ["rows.jsonl, line 1", "'text'", "--set text_field"]),
        ("short.txt", b"a", ["1 bytes", "give more text"]),
        (None, b"", ["absent", "no such file"]),
    ],
    ids=["empty", "binary", "not-utf8", "unknown-suffix", "no-field", "too-short", "absent"],
)
def test_data_that_is_no_text(name, content, parts, tmp_path):
    data = tmp_path / (name or "absent")
    if name:
        data.write_bytes(content)
    code, _, err = runs.call(*runs.launch_words(tmp_path / "run", data))
    runs.refused(code, err, *parts)
    runs.nothing_whole(tmp_path / "run")


def test_the_field_of_the_text_can_be_named(trained, tmp_path):
    texts = [path.read_text() for path in sorted(trained.data.iterdir())]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    words = runs.launch_words(tmp_path / "run", rows, settings=("text_field=body",), steps=1)
    code, _, err = runs.call(*words)
    assert code == 0, err


# Where a run may go.


def test_json_that_cannot_be_written_is_refused_before_training(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.json").write_text("mine")
    for path in (tmp_path, tmp_path / "file" / "summary.json", tmp_path / "run" / "mine.json"):
        words = runs.launch_words(tmp_path / "run", trained.data, "--json", str(path))
        code, out, err = runs.call(*words)
        runs.refused(code, err, f"--json {path}")
        assert out == ""
    assert (tmp_path / "run" / "mine.json").read_text() == "mine"
    runs.nothing_whole(tmp_path / "run")


def test_a_run_path_that_is_a_file(trained, tmp_path):
    (tmp_path / "run").write_text("mine")
    code, _, err = runs.call(*runs.launch_words(tmp_path / "run", trained.data))
    runs.refused(code, err, f"run path {tmp_path / 'run'} is a file", "name a directory")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_path_that_cannot_be_made(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    run = tmp_path / "file" / "run"
    code, _, err = runs.call(*runs.launch_words(run, trained.data))
    runs.refused(code, err, str(run), "Not a directory", "name another --run")


def test_a_folder_without_permission(trained, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    try:
        (locked / "probe").touch()
        pytest.skip("this user may write anywhere")
    except PermissionError:
        pass
    code, _, err = runs.call(*runs.launch_words(locked / "run", trained.data))
    runs.refused(code, err, str(locked / "run"), "Permission denied", "name another --run")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["eval", "--batch-size", "0"], ["batch_size=0"]),
        (["eval", "--data", "absent"], ["absent", "no such file"]),
        (["sample", "--max-new-tokens", "0"], ["max_new_tokens=0"]),
        (["sample", "--max-new-tokens", "900"], ["max_new_tokens=900", "max_length=64"]),
        (["sample", "--temperature", "-1", "--max-new-tokens", "8"], ["temperature=-1.0"]),
        (["sample", "--seed", "-1"], ["--seed -1", "4294967295"]),
        (["sample", "--prompt", "\udcff"], ["--prompt", "UTF-8"]),
        (["sample", "--precision", "bf16"], ["is a run", "leave out --precision"]),
        (["sample", "--prompt", 99 * "the words of it "], ["leaves no room", "max_length=64"]),
    ],
    ids=lambda value: "-".join(value[1:]).lstrip("-") if value[0] in ("eval", "sample") else "",
)
def test_requests_that_cannot_be(words, parts, trained):
    code, out, err = runs.call(words[0], trained.run, *words[1:])
    runs.refused(code, err, *parts)
    assert out == ""
