"""A folder of shards appears whole or not at all, and is never written twice or over."""

import errno
import os
import subprocess
import sys

import pytest

from experiments import data
from experiments.data import tokenization


def test_tokenising_again_opens_what_is_there(corpus, tokenizer, shards, monkeypatch):
    monkeypatch.setattr(tokenization, "_write_folder", None)
    again = data.tokenize(corpus, tokenizer, shards.tokenizer_file.parent)
    assert again.train.num_tokens == shards.train.num_tokens


def test_shards_of_another_corpus_are_not_written_over(corpus, tokenizer, shards):
    other = data.Corpus(corpus.train[:3], corpus.validation, "e0" * 32)
    with pytest.raises(ValueError, match="holds tokens of corpus c0c0c0c0c0c0, not e0e0"):
        data.tokenize(other, tokenizer, shards.tokenizer_file.parent)


def test_shards_of_another_tokenizer_are_not_written_over(corpus, shards):
    with pytest.raises(ValueError, match="holds tokens of tokenizer .*; name a new folder"):
        data.tokenize(corpus, data.train_tokenizer(corpus, 300), shards.tokenizer_file.parent)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_and_is_no_shards_is_left_alone(corpus, tokenizer, tmp_path, kind):
    path = tmp_path / "there"
    path.write_text("mine") if kind == "file" else (path / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="exists and is no folder of shards"):
        data.tokenize(corpus, tokenizer, path)
    assert path.exists() and len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_is_filled(corpus, tokenizer, tmp_path):
    assert data.tokenize(corpus, tokenizer, tmp_path).train.num_documents == len(corpus.train)


def fail_on_third_write(monkeypatch, error):
    write, calls = tokenization._write_array, []

    def failing(path, array):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(array.tobytes()[:7])
            raise error
        write(path, array)

    monkeypatch.setattr(tokenization, "_write_array", failing)


def test_an_interrupted_write_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    fail_on_third_write(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        data.tokenize(corpus, tokenizer, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    fail_on_third_write(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(ValueError, match=r"shards: cannot write .*No space left.*; free space"):
        data.tokenize(corpus, tokenizer, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_is_one_line_and_leaves_nothing(tmp_path, root):
    code = """
import resource, sys
from experiments import data
corpus = data.Corpus((data.Document("a", "some text " * 4000),), (data.Document("b", "x"),), "c")
tokenizer = data.train_tokenizer(corpus, 260)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    data.tokenize(corpus, tokenizer, sys.argv[1])
except ValueError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "shards")]
    done = subprocess.run(arguments, check=True, cwd=root, capture_output=True, text=True)
    assert "cannot write token shards (File too large)" in done.stdout
    assert done.stdout.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_no_folder_of_that_name(corpus, tokenizer, tmp_path, monkeypatch):
    fail_on_third_write(monkeypatch, KeyboardInterrupt())
    with monkeypatch.context() as killed:
        # A killed process clears nothing away.
        killed.setattr(tokenization.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            data.tokenize(corpus, tokenizer, tmp_path / "shards")
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".shards.partial-")
    with pytest.raises(ValueError, match="no shards.json"):
        data.open_shards(partial)
    whole = data.tokenize(corpus, tokenizer, tmp_path / "shards")
    assert whole.train.num_documents == len(corpus.train)


def test_of_two_processes_at_once_the_second_uses_the_folder_of_the_first(
    corpus, tokenizer, tmp_path, monkeypatch
):
    write = tokenization._write_folder

    def overtaken(*arguments):
        monkeypatch.setattr(tokenization, "_write_folder", write)
        data.tokenize(corpus, tokenizer, tmp_path / "shards")
        write(*arguments)

    monkeypatch.setattr(tokenization, "_write_folder", overtaken)
    shards = data.tokenize(corpus, tokenizer, tmp_path / "shards")
    assert shards.train.num_documents == len(corpus.train)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
