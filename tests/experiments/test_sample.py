"""`sample`: streams exactly what `generate` returns."""

import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from deepseek_jax.generate import generate
from experiments.data import load_tokenizer
from experiments.eval import load_run, trained_model
from experiments.run_directory import RunDirectory
from experiments.sample import SampleArgs, sample
from tests.experiments import runs


@pytest.fixture(scope="module")
def model(trained):
    return trained_model(*load_run(RunDirectory(trained.run)))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_prints_what_generate_returns(trained, model, tmp_path, temperature):
    words = ["--prompt", "abc de", "--temperature", temperature, "--seed", 5]
    path = tmp_path / "out.json"
    code, out, err = runs.call(
        "sample", trained.run, *words, "--max-new-tokens", 12, "--json", path
    )
    assert (code, err) == (0, "")
    tokenizer = load_tokenizer(trained.run / "tokenizer.json")
    prompt_BT = np.asarray([tokenizer.encode("abc de")], np.int32)
    [tokens] = np.asarray(
        generate(
            model, prompt_BT, max_new_tokens=12, temperature=temperature, key=jax.random.key(5)
        )
    ).tolist()
    if tokenizer.eos in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos)]
    written = json.loads(path.read_text())
    assert written == {"prompt": "abc de", "text": tokenizer.decode(tokens), "tokens": tokens}
    assert out == "abc de" + tokenizer.decode(tokens) + "\n"


def test_another_seed_draws_another_text(trained):
    texts = {
        runs.call("sample", trained.run, "--max-new-tokens", 12, "--seed", seed)[1]
        for seed in range(3)
    }
    assert len(texts) == 3


class Recorder(io.StringIO):
    """Remembers what had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.getvalue())


def test_text_appears_token_by_token_and_characters_whole(trained, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    sample(SampleArgs(run=trained.run, prompt="abc", max_new_tokens=20, seed=1))
    assert len(set(recorder.flushed)) > 5
    for shorter, longer in zip(recorder.flushed, recorder.flushed[1:], strict=False):
        assert longer.startswith(shorter) and not shorter.endswith("\ufffd")


def test_a_cpu_stands_for_the_devices_of_a_mesh(trained):
    words = [sys.executable, "-m", "experiments", "sample", trained.run, "--mesh", "expert=2",
             "--max-new-tokens", "2"]
    # Made before JAX looks for devices, which it has done in this process.
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(words, cwd=runs.ROOT, env=alone, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("def ")


def test_an_empty_prompt_begins_a_document(trained, model):
    code, out, err = runs.call(
        "sample", trained.run, "--prompt", "", "--max-new-tokens", 8, "--temperature", 0
    )
    assert (code, err) == (0, "")
    tokenizer = load_tokenizer(trained.run / "tokenizer.json")
    [tokens] = generate(model, np.asarray([[tokenizer.eos]]), max_new_tokens=8).tolist()
    tokens = tokens[: tokens.index(tokenizer.eos)] if tokenizer.eos in tokens else tokens
    assert out == tokenizer.decode(tokens) + "\n"


def test_without_a_length_it_goes_on_as_far_as_the_model_has_room(trained, tmp_path):
    path, prompt = tmp_path / "out.json", "abc " * 3
    room = load_run(RunDirectory(trained.run))[0].config.max_length
    room -= len(load_tokenizer(trained.run / "tokenizer.json").encode(prompt))
    words = "sample", trained.run, "--prompt", prompt, "--seed", 1
    code, _, err = runs.call(*words, "--json", path)
    assert (code, err) == (0, "") and 0 < len(json.loads(path.read_text())["tokens"]) <= room < 200
    code, _, err = runs.call(*words, "--max-new-tokens", 200)
    assert code == 2 and "max_new_tokens=200 exceeds max_length" in err
