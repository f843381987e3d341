"""`convert`: formats, bytes, what is listed, interruption; runs as checkpoints and back."""

import functools
import hashlib
import json

import jax
import numpy as np
import pytest

from deepseek_jax.complete_folder import complete_folder
from deepseek_jax.huggingface import load_huggingface, plan_shards
from deepseek_jax.huggingface_checkpoint import open_checkpoint
from experiments import convert
from experiments.eval import load_run
from experiments.run_directory import RunDirectory
from tests.deepseek_jax.test_huggingface import WIDE, leaves, write_fp8
from tests.experiments import runs
from tests.parity import cases


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An FP8 checkpoint whose matrices are no multiples of 128, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("source") / "fp8"
    write_fp8(folder, WIDE)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(
        convert, "plan_shards", functools.partial(plan_shards, largest=300_000)
    )


def tensors_of(folder):
    return {n: t.read() for n, t in open_checkpoint(folder).tensors.items()}


@pytest.mark.parametrize("format", [(), ("--format", "fp8")], ids=["as-it-is", "fp8"])
def test_fp8_stays_the_same_byte_for_byte(source, tmp_path, format):
    code, out, err = runs.call("convert", source, tmp_path / "out", *format)
    assert code == 0, err
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.tobytes() == after[name].tobytes(), name
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(source).config


@pytest.mark.parametrize("format, error", [("fp32", 0.0), ("bf16", 2**-8)])
def test_other_formats_hold_the_same_numbers(source, tmp_path, format, error):
    assert runs.call("convert", source, tmp_path / "out", "--format", format)[0] == 0
    before, after = leaves(load_huggingface(source)), leaves(load_huggingface(tmp_path / "out"))
    for path, value in before.items():
        np.testing.assert_allclose(after[path], value, rtol=error, err_msg=path)
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in record


def test_fp32_becomes_fp8_blocks(tmp_path, relative_error):
    folder = cases.write_checkpoint("yarn-groups", 0, tmp_path / "in")
    assert runs.call("convert", folder, tmp_path / "out", "--format", "fp8")[0] == 0
    before, after = leaves(load_huggingface(folder)), leaves(load_huggingface(tmp_path / "out"))
    for path, value in before.items():
        assert relative_error(after[path], value) < 0.05, path


def test_the_audit_lists_every_tensor_and_its_bytes(source, tmp_path):
    path = tmp_path / "audit.json"
    code, out, _ = runs.call("convert", source, "--audit", "--checksums", "--json", path)
    rows = {row[0]: row[1:] for row in (line.split("\t") for line in out.splitlines()[:-1])}
    stored = tensors_of(source)
    assert code == 0 and rows.keys() == stored.keys()
    for name, (shape, _, _, digest) in rows.items():
        assert shape == "x".join(map(str, stored[name].shape))
        assert digest == hashlib.sha256(stored[name].tobytes()).hexdigest(), name
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert rows[name][1:3] == ["F8_E4M3", "moe.ffn.w_up_EFD[0, 3]"]
    assert rows[name + "_scale_inv"][1:3] == ["F32", "moe.ffn.w_up_EFD[0, 3] scale"]
    assert "every tensor has its place" in out.splitlines()[-1]
    listed = [list(row.values()) for row in json.loads(path.read_text())]
    assert listed == [[name, *rest] for name, rest in rows.items()]


def test_a_conversion_that_was_interrupted_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    real, calls = convert.write_file, []

    def failing(path, *rest):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, *rest)

    monkeypatch.setattr(convert, "write_file", failing)
    assert runs.call("convert", source, tmp_path / "out", "--format", "bf16")[0] == 130
    assert not (tmp_path / "out").exists()
    begun = list(calls)
    assert runs.call("convert", source, tmp_path / "out", "--format", "bf16")[0] == 0
    # The two that were whole are not written again.
    assert calls[len(begun)] == begun[2] and not set(begun[:2]) & set(calls[len(begun) :])
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(source).config
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_conversions_do_not_write_the_same_folder(source, tmp_path):
    with complete_folder(tmp_path / "out", plan={}) as folder:
        (folder / "model.safetensors").write_bytes(b"mine")
        code, _, err = runs.call("convert", source, tmp_path / "out")
        runs.refused(code, err, f"another process writes {tmp_path / 'out'} now")
        assert (folder / "model.safetensors").read_bytes() == b"mine"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors"]
    code, _, err = runs.call("convert", source, tmp_path / "out")
    runs.refused(code, err, f"{tmp_path / 'out'} exists already")


def test_what_is_listed_does_not_stand_in_the_way_of_what_is_written(source, tmp_path):
    listed = tmp_path / "out" / "list.json"
    code, _, err = runs.call("convert", source, tmp_path / "out", "--json", listed)
    runs.refused(code, err, f"--json {listed} is a file of {tmp_path / 'out'}: name another")
    assert not listed.parent.exists()


def test_another_format_begins_anew(source, tmp_path, monkeypatch):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model-00001-of-00099.safetensors").write_text("of something else")
    assert runs.call("convert", source, tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "model-00001-of-00099.safetensors").exists()


def test_damage_is_one_line_and_nothing_is_written(source, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "in" / "model.safetensors").write_bytes(b"\0" * 100)
    code, out, err = runs.call("convert", tmp_path / "in", tmp_path / "out")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "is not a whole safetensors file" in err and not (tmp_path / "out").exists()


def test_a_run_is_exported_and_trained_on_from(trained, tmp_path):
    out = tmp_path / "out"
    code, _, err = runs.call("convert", trained.run, out, "--audit")
    assert code == 2 and "is a run: export it first" in err and not out.exists()
    code, _, err = runs.call("launch", "tiny", "--from", trained.run, "--run", tmp_path / "x")
    assert code == 2 and "`convert" in err
    assert runs.call("convert", trained.run, out, "--format", "fp32")[0] == 0
    tokenizer = out / "tokenizer.json"
    assert tokenizer.read_bytes() == (trained.run / "tokenizer.json").read_bytes()
    _, state = load_run(RunDirectory(trained.run))
    loaded = leaves(load_huggingface(out))
    for path, value in jax.tree_util.tree_leaves_with_path(state.ema):
        np.testing.assert_array_equal(loaded[jax.tree_util.keystr(path)], value)
    words = ["launch", "tiny", "--from", out, "--run", tmp_path / "on", "--data", trained.data,
             "--steps", 2, "--set", "seq_len=20", "micro_batch=2", "batch_size=4",
             "learning_rate=0.0"]  # fmt: skip
    code, _, err = runs.call(*words)
    assert code == 0, err
    record = runs.record(tmp_path / "on")
    assert record["imported"] == str(out) and record["run"]["config"]["model_dim"] == 16
    # With a learning rate of 0 the weights stay the imported ones.
    after = runs.final_state(tmp_path / "on")
    for path, value in jax.tree_util.tree_leaves_with_path(after.params):
        np.testing.assert_array_equal(value, loaded[jax.tree_util.keystr(path)])
