"""Bad input: one line that names the value and the fix, and nothing left that looks whole."""

import json
import shutil
import subprocess
import sys

import pytest

from experiments.data import load_corpus, load_tokenizer, tokenize, train_tokenizer
from tests.experiments import runs


def refused(code: int, err: str, *parts: str) -> None:
    """Holds an error against what it must say."""
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and "DEEPSEEK_JAX_TRACEBACK" not in err, err
    for part in parts:
        assert part in err


def nothing_whole(run) -> None:
    """Nothing there that eval, sample, --resume or a reader would take for a run."""
    for name in ("config.json", "metrics.jsonl", "summary.json", "report.html"):
        assert not (run / name).exists()
    assert not list(run.glob("checkpoints/*")) and not list(run.glob("**/.*partial*"))


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
    refused(code, err, *parts)
    nothing_whole(tmp_path / "run")


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
    refused(code, err, *parts)
    nothing_whole(run)


def test_the_order_of_settings_is_free(trained, tmp_path):
    # Either alone does not fit the recipe's batch of 16 or length of 512.
    settings = ["micro_batch=24", "batch_size=48", "seq_len=600", "config.max_length=700"]
    for order in (settings, settings[::-1]):
        code, _, err = runs.call(
            "launch", "--run", tmp_path / "run", "--data", trained.data, "--set", *order, "steps=0"
        )
        refused(code, err, "steps=0 must be at least 1")


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
    refused(code, err, *parts)
    nothing_whole(tmp_path / "run")


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
        refused(code, err, f"--json {path}")
        assert out == ""
    assert (tmp_path / "run" / "mine.json").read_text() == "mine"
    nothing_whole(tmp_path / "run")


def test_a_run_path_that_is_a_file(trained, tmp_path):
    (tmp_path / "run").write_text("mine")
    code, _, err = runs.call(*runs.launch_words(tmp_path / "run", trained.data))
    refused(code, err, f"run path {tmp_path / 'run'} is a file", "name a directory")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_path_that_cannot_be_made(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    run = tmp_path / "file" / "run"
    code, _, err = runs.call(*runs.launch_words(run, trained.data))
    refused(code, err, str(run), "Not a directory", "name another --run")


def test_a_folder_without_permission(trained, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    try:
        (locked / "probe").touch()
        pytest.skip("this user may write anywhere")
    except PermissionError:
        pass
    code, _, err = runs.call(*runs.launch_words(locked / "run", trained.data))
    refused(code, err, str(locked / "run"), "Permission denied", "name another --run")


def test_a_directory_that_holds_a_run_already(trained):
    before = runs.metrics(trained.run)
    code, _, err = runs.call(*runs.launch_words(trained.run, trained.data))
    refused(code, err, f"{trained.run} holds a run already", "--resume")
    assert runs.metrics(trained.run) == before


def test_checkpoints_of_a_run_that_has_lost_its_record(trained, copy):
    (copy / "config.json").unlink()
    code, _, err = runs.call(*runs.launch_words(copy, trained.data))
    refused(code, err, f"{copy} holds checkpoints", "name another --run")


# What a run may be resumed with.


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained.run, tmp_path / "copy")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--seed", "3"], ["seed: 0 -> 3"]),
        (["--precision", "bf16"], ["precision.activations: fp32 -> bf16",
                                   "precision.moments: fp32 -> bf16"]),
        (["--data", "elsewhere"], ["data: (", "elsewhere"]),
        (["--tokenizer", "other.json"], ["tokenizer: None -> other.json"]),
        (["--set", "config.num_experts=16", "remat=full"],
         ["config.num_experts: 8 -> 16; remat: none -> full"]),
        (["tiny"], ["config.model_dim: 16 -> 128", "seq_len: 20 -> 128"]),
    ],
    ids=["seed", "precision", "data", "tokenizer", "set", "recipe"],
)  # fmt: skip
def test_a_changed_configuration(words, parts, trained):
    record = (trained.run / "config.json").read_text()
    code, _, err = runs.call("launch", "--run", trained.run, "--resume", *words)
    refused(code, err, "differs from the run to resume", "resume with the same", *parts)
    assert (trained.run / "config.json").read_text() == record


def test_fewer_steps_than_are_done(trained):
    record = (trained.run / "config.json").read_text()
    code, _, err = runs.call("launch", "--run", trained.run, "--resume", "--steps", 12)
    refused(code, err, "--steps 12 must be at least the 24 steps already done")
    assert (trained.run / "config.json").read_text() == record


@pytest.mark.parametrize(
    "words", [["launch", "--resume", "--run"], ["eval"], ["sample"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize(
    ("there", "parts"),
    [
        ("nothing", ["is not the directory of a run", "no config.json"]),
        ("file", ["is not the directory of a run", "no config.json"]),
        ("empty", ["is not the directory of a run", "no config.json"]),
        ("garbage", ["config.json is damaged", "copy it again"]),
        ("binary", ["config.json is damaged", "copy it again"]),
        ("half", ["config.json is damaged", "copy it again"]),
        ("list", ["config.json is damaged", "recipe is missing"]),
        ("no-run", ["config.json is damaged", "run is missing"]),
        ("unknown-field", ["unknown field widht"]),
        ("wrong-type", ["config.json is damaged", "copy it again"]),
        ("edited", ["config.json was edited", "another --run"]),
        ("no-hash", ["config.json is damaged (corpus)", "copy it again"]),
        ("no-shards", ["config.json is damaged (shards)", "copy it again"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_path_that_is_no_run(words, there, parts, trained, tmp_path):
    run = tmp_path / "run"
    record = runs.record(trained.run)
    if there == "file":
        run.write_text("mine")
    elif there != "nothing":
        run.mkdir()
    content = {
        "garbage": b"no json", "binary": b"\xff\0\xff", "list": b"[]",
        "half": json.dumps(record).encode()[:900],
        "no-run": json.dumps({k: v for k, v in record.items() if k != "run"}).encode(),
        "unknown-field": json.dumps(record | {"run": record["run"] | {"widht": 3}}).encode(),
        "no-hash": json.dumps(record | {"corpus": {}}).encode(),
        "no-shards": json.dumps(record | {"shards": None}).encode(),
        "edited": json.dumps(record | {"run": record["run"] | {"seed": 3}}).encode(),
        "wrong-type": json.dumps(record | {"run": record["run"] | {"seq_len": "long"}}).encode(),
    }.get(there)  # fmt: skip
    if content is not None:
        (run / "config.json").write_bytes(content)
    code, out, err = runs.call(*words, run)
    refused(code, err, str(run), *parts)
    assert out == ""


# Checkpoints and tokenizers.


@pytest.mark.parametrize(
    "words", [["launch", "--resume", "--run"], ["eval"], ["sample"]], ids=lambda words: words[0]
)
def test_a_truncated_checkpoint(words, copy, capfd):
    # All files of arrays: which of them Orbax reads, and whether it left a dead one, depends on
    # the order in which its threads wrote.
    files = [path for path in (copy / "checkpoints" / "24").glob("**/d/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (copy / "summary.json").unlink()
    code, _, err = runs.call(*words, copy)
    refused(code, err, f"{copy / 'checkpoints' / '24'} cannot be restored", "remove it")
    assert capfd.readouterr().err == ""
    assert not (copy / "summary.json").exists()
    # And the fix that it names works.
    shutil.rmtree(copy / "checkpoints" / "24")
    if words == ["sample"]:
        assert runs.call(*words, copy, "--max-new-tokens", 1)[0] == 0


@pytest.mark.parametrize("words", [["eval"], ["sample"]], ids=lambda words: words[0])
def test_checkpoints_that_are_not_there(words, copy, trained):
    code, _, err = runs.call(*words, trained.run, "--step", 3)
    refused(code, err, "no complete checkpoint of step 3", "use one of 20, 24")
    shutil.rmtree(copy / "checkpoints")
    code, _, err = runs.call(*words, copy)
    refused(code, err, f"{copy} has no checkpoint yet", "launch --resume")
    assert not (copy / "checkpoints").exists()


@pytest.fixture(scope="module")
def other_tokenizer(trained, tmp_path_factory):
    """A tokenizer.json of the same size, trained on other text."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "other.txt").write_text("zyx wvu tsr qpo nml kji\n" * 50)
    train_tokenizer(load_corpus(folder / "other.txt"), 300).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    "words", [["sample"], ["eval", "--data", "text"]], ids=lambda words: words[0]
)
def test_a_tokenizer_of_another_run(words, copy, trained, other_tokenizer):
    shutil.copy(other_tokenizer, copy / "tokenizer.json")
    words = [trained.data if word == "text" else word for word in words]
    code, out, err = runs.call(words[0], copy, *words[1:])
    refused(code, err, str(copy / "tokenizer.json"), "does not match the checkpoint's")
    assert out == ""


def test_a_run_does_not_go_on_with_a_tokenizer_of_another(copy, other_tokenizer):
    shutil.copy(other_tokenizer, copy / "tokenizer.json")
    code, _, err = runs.call("launch", "--resume", "--run", copy)
    refused(code, err, str(copy / "tokenizer.json"), "does not match the checkpoint's")


@pytest.mark.parametrize(
    "words", [["launch", "--resume", "--run"], ["eval"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize("what", ["tokenizer", "corpus"])
def test_tokens_of_another_run(words, what, copy, trained, other_tokenizer, tmp_path):
    shutil.rmtree(copy / "data")
    tokenizer = other_tokenizer if what == "tokenizer" else trained.run / "tokenizer.json"
    corpus = load_corpus(trained.data / "00.txt" if what == "corpus" else trained.data)
    tokenize(corpus, load_tokenizer(tokenizer), copy / "data")
    code, _, err = runs.call(*words, copy)
    refused(code, err, f"the {what} of {copy / 'data'}", "does not match the checkpoint's")


def test_token_shards_and_the_tokenizer_of_others(trained, other_tokenizer, tmp_path):
    words = runs.launch_words(
        tmp_path / "run", trained.run / "data", "--tokenizer", str(other_tokenizer)
    )
    code, _, err = runs.call(*words)
    refused(code, err, str(other_tokenizer), "did not make the given shards", "leave out")
    nothing_whole(tmp_path / "run")


def test_a_tokenizer_larger_than_the_vocabulary(trained, tmp_path):
    words = runs.launch_words(
        tmp_path / "run", trained.data, "--tokenizer", str(trained.run / "tokenizer.json"),
        settings=("config.vocab_size=280",),
    )
    code, _, err = runs.call(*words)
    refused(code, err, "vocab_size=280", "--set config.vocab_size=300")
    nothing_whole(tmp_path / "run")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"], ids=["absent", "empty", "no", "b"])
def test_a_tokenizer_file_that_is_none(content, trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    words = runs.launch_words(tmp_path / "run", trained.data, "--tokenizer", str(path))
    code, _, err = runs.call(*words)
    refused(code, err, str(path))
    nothing_whole(tmp_path / "run")


# What eval and sample may be asked for.


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
    ],
    ids=lambda value: "-".join(value[1:]).lstrip("-") if value[0] in ("eval", "sample") else "",
)
def test_requests_that_cannot_be(words, parts, trained):
    code, out, err = runs.call(words[0], trained.run, *words[1:])
    refused(code, err, *parts)
    assert out == ""


# A disk that fills.


def test_a_disk_that_tokens_fill(trained, tmp_path):
    with runs.files_limited_to(100):
        code, _, err = runs.call(*runs.launch_words(tmp_path / "run", trained.data))
    refused(code, err, str(tmp_path / "run" / "data"), "free space there")
    nothing_whole(tmp_path / "run")


LIMITED = """
import resource, sys
{}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from experiments.__main__ import main
sys.exit(main())
"""


# As if the disk had had room when writing began.
FILLING = "from deepseek_jax.checkpoint import Checkpoints as C; C._check_room = lambda *_: None"


@pytest.mark.parametrize("before", ["", FILLING], ids=["before", "while-it-is-written"])
def test_a_disk_that_a_checkpoint_fills(before, trained, compile_cache, tmp_path):
    run = tmp_path / "run"
    # Programs are read from the cache, but none of those limited files is written there.
    never = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(before), *runs.launch_words(run, trained.data)],
        env=runs.child_environment(compile_cache) | never, capture_output=True, text=True,
    )
    refused(done.returncode, done.stderr, str(run / "checkpoints"), "free space there and resume")
    assert not (run / "summary.json").exists() and not (run / "report.html").exists()
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
