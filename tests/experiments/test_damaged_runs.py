"""Runs that are there already, damaged or another's: one line, and nothing of them changes."""

import json
import shutil

import pytest

from experiments.data import load_corpus, load_tokenizer, tokenize, train_tokenizer
from tests.experiments import runs


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained.run, tmp_path / "copy")


def test_a_directory_that_holds_a_run_already(trained):
    before = runs.metrics(trained.run)
    code, _, err = runs.call(*runs.launch_words(trained.run, trained.data))
    runs.refused(code, err, f"{trained.run} holds a run already", "--resume")
    assert runs.metrics(trained.run) == before


def test_checkpoints_of_a_run_that_has_lost_its_record(trained, copy):
    (copy / "config.json").unlink()
    code, _, err = runs.call(*runs.launch_words(copy, trained.data))
    runs.refused(code, err, f"{copy} holds checkpoints", "name another --run")


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
    runs.refused(code, err, "differs from the run to resume", "resume with the same", *parts)
    assert (trained.run / "config.json").read_text() == record


def test_fewer_steps_than_are_done(trained):
    record = (trained.run / "config.json").read_text()
    code, _, err = runs.call("launch", "--run", trained.run, "--resume", "--steps", 12)
    runs.refused(code, err, "--steps 12 must be at least the 24 steps already done")
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
        ("list", ["config.json is damaged (list, no object)", "copy it again"]),
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
    runs.refused(code, err, str(run), *parts)
    assert out == ""


@pytest.mark.parametrize("words", [["report"], ["place"]], ids=lambda words: words[0])
@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_record_that_is_no_object(words, content, trained, copy):
    (copy / "config.json").write_text(content)
    code, _, err = runs.call(*words, copy)
    runs.refused(code, err, f"{copy / 'config.json'} is damaged", "name the folder of a run")


@pytest.mark.parametrize("words", [["launch", "--resume", "--run"], ["report"], ["place"]],
                         ids=lambda words: words[0])  # fmt: skip
@pytest.mark.parametrize("line", ["garbage", "[]", "{}", "\0\0"])
def test_a_damaged_line_of_metrics_is_named(words, line, copy):
    metrics = copy / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:9], line, *lines[10:]]) + "\n")
    code, _, err = runs.call(*words, copy)
    runs.refused(code, err, f"{metrics} is damaged in line 10", "delete that line")


def test_metrics_that_end_before_the_checkpoint_are_said_to(copy):
    metrics = copy / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:20]))
    code, out, _ = runs.call("launch", "--resume", "--run", copy)
    assert code == 0 and f"{metrics} ends at step 20: its curves will miss those up to 24" in out


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
    runs.refused(code, err, f"{copy / 'checkpoints' / '24'} cannot be restored", "remove it")
    assert capfd.readouterr().err == ""
    assert not (copy / "summary.json").exists()
    # And the fix that it names works.
    shutil.rmtree(copy / "checkpoints" / "24")
    if words == ["sample"]:
        assert runs.call(*words, copy, "--max-new-tokens", 1)[0] == 0


@pytest.mark.parametrize("words", [["eval"], ["sample"]], ids=lambda words: words[0])
def test_checkpoints_that_are_not_there(words, copy, trained):
    code, _, err = runs.call(*words, trained.run, "--step", 3)
    runs.refused(code, err, "no complete checkpoint of step 3", "use one of 20, 24")
    shutil.rmtree(copy / "checkpoints")
    code, _, err = runs.call(*words, copy)
    runs.refused(code, err, f"{copy} has no checkpoint yet", "launch --resume")
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
    runs.refused(code, err, str(copy / "tokenizer.json"), "does not match the checkpoint's")
    assert out == ""


def test_a_run_does_not_go_on_with_a_tokenizer_of_another(copy, other_tokenizer):
    shutil.copy(other_tokenizer, copy / "tokenizer.json")
    code, _, err = runs.call("launch", "--resume", "--run", copy)
    runs.refused(code, err, str(copy / "tokenizer.json"), "does not match the checkpoint's")


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
    runs.refused(code, err, f"the {what} of {copy / 'data'}", "does not match the checkpoint's")


def test_token_shards_and_the_tokenizer_of_others(trained, other_tokenizer, tmp_path):
    words = runs.launch_words(
        tmp_path / "run", trained.run / "data", "--tokenizer", str(other_tokenizer)
    )
    code, _, err = runs.call(*words)
    runs.refused(code, err, str(other_tokenizer), "did not make the given shards", "leave out")
    runs.nothing_whole(tmp_path / "run")


def test_a_tokenizer_larger_than_the_vocabulary(trained, tmp_path):
    words = runs.launch_words(
        tmp_path / "run", trained.data, "--tokenizer", str(trained.run / "tokenizer.json"),
        settings=("config.vocab_size=280",),
    )
    code, _, err = runs.call(*words)
    runs.refused(code, err, "vocab_size=280", "--set config.vocab_size=300")
    runs.nothing_whole(tmp_path / "run")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"], ids=["absent", "empty", "no", "b"])
def test_a_tokenizer_file_that_is_none(content, trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    words = runs.launch_words(tmp_path / "run", trained.data, "--tokenizer", str(path))
    code, _, err = runs.call(*words)
    runs.refused(code, err, str(path))
    runs.nothing_whole(tmp_path / "run")
