"""Shards hold every document with its eos, map without copies, and are refused when damaged."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import data
from experiments.data import tokenization
from experiments.data.shards import META


def documents_of(split):
    starts = [0, *split.ends_J[:-1].tolist()]
    return [split.read(a, b).tolist() for a, b in zip(starts, split.ends_J.tolist(), strict=True)]


def test_every_document_is_stored_with_its_eos(corpus, tokenizer, shards):
    for split, documents in ((shards.train, corpus.train), (shards.validation, corpus.validation)):
        expected = [[*tokenizer.encode(text).tolist(), tokenizer.eos] for _, text in documents]
        assert documents_of(split) == expected
        assert split.num_tokens == sum(map(len, expected))
        assert split.num_bytes == sum(len(text.encode()) for _, text in documents)


def test_the_text_comes_back_from_the_tokens(corpus, tokenizer, shards):
    assert data.text_bytes(shards.validation, tokenizer) == corpus.validation_bytes


def test_shards_know_the_tokenizer_that_made_them(corpus, tokenizer, shards):
    assert (shards.eos, shards.fim) == (tokenizer.eos, tokenizer.fim)
    assert (shards.vocab_size, shards.tokenizer_hash) == (tokenizer.vocab_size, tokenizer.hash)
    assert shards.corpus_hash == corpus.hash
    assert data.load_tokenizer(shards.tokenizer_file).hash == tokenizer.hash


def test_tokens_are_mapped_not_read(shards):
    assert all(isinstance(tokens_P, np.memmap) for tokens_P in shards.train.files)
    assert shards.train.files[0].dtype == np.uint16


def test_several_files_read_as_one(corpus, tokenizer, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "SHARD_TOKENS", 2000)
    many = data.tokenize(corpus, tokenizer, tmp_path / "many")
    assert len(many.train.files) > 5
    np.testing.assert_array_equal(many.train.ends_J, shards.train.ends_J)
    total = shards.train.num_tokens
    for start, stop in (
        (0, total),
        (1990, 8010),
        (total - 1, total),
        (5, 5),
        (total - 3, total + 9),
    ):
        np.testing.assert_array_equal(many.train.read(start, stop), shards.train.read(start, stop))


def test_a_vocabulary_above_65536_is_stored_in_four_bytes(corpus, tokenizer, tmp_path):
    class Wide:
        def __getattr__(self, name):
            return 70_000 if name == "vocab_size" else getattr(tokenizer, name)

        def encode_batch(self, texts):
            return [tokens_P + 69_000 for tokens_P in tokenizer.encode_batch(texts)]

    wide = data.tokenize(corpus, Wide(), tmp_path / "wide")
    assert wide.train.files[0].dtype == np.uint32
    assert wide.train.files[0].max() > 69_000


def test_several_folders_are_joined_in_order(shards, corpus, tokenizer, tmp_path):
    half = data.Corpus(corpus.train[:7], corpus.validation[:2], "d0" * 32)
    other = data.tokenize(half, tokenizer, tmp_path / "other")
    both = data.open_shards([shards.tokenizer_file.parent, tmp_path / "other" / META])
    assert documents_of(both.train) == documents_of(shards.train) + documents_of(other.train)
    assert both.validation.num_bytes == shards.validation.num_bytes + other.validation.num_bytes
    assert both.corpus_hash not in (shards.corpus_hash, other.corpus_hash)


def test_folders_of_different_tokenizers_are_refused(shards, corpus, tmp_path):
    data.tokenize(corpus, data.train_tokenizer(corpus, 300), tmp_path / "other")
    with pytest.raises(ValueError, match="tokenizer_hash .* differs .*; tokenise both"):
        data.open_shards([shards.tokenizer_file.parent, tmp_path / "other"])


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def edit(key, value):
    def change(path):
        meta = json.loads(path.read_text())
        meta[key] = value
        path.write_text(json.dumps(meta))

    return change


def forget(path):
    meta = json.loads(path.read_text())
    del meta["train"]["files"][0]["tokens"]
    path.write_text(json.dumps(meta))


def claim_nothing(path):
    meta = json.loads(path.read_text())
    meta["train"]["files"][0]["tokens"] = 0
    path.write_text(json.dumps(meta))
    (path.parent / "train-00000.bin").write_bytes(b"")


def shuffle_ends(path):
    np.fromfile(path, "<i8")[::-1].tofile(path)


DAMAGE = {
    "cut-tokens": ("train-00000.bin", cut, "copy the file again"),
    "cut-ends": ("train-00000.ends.bin", cut, "copy the file again"),
    "no-tokens": ("validation-00000.bin", lambda path: path.unlink(), "is missing"),
    "empty-tokens": ("train-00000.bin", lambda path: path.write_bytes(b""), "0 bytes"),
    "cut-meta": (META, cut, "damaged"),
    "no-meta": (META, lambda path: path.unlink(), "no shards.json there"),
    "meta-is-a-list": (META, lambda path: path.write_text("[]"), "damaged"),
    "meta-without-count": (META, forget, "'tokens' is missing"),
    "nothing-claimed": (META, claim_nothing, "0 bytes"),
    "other-format": (META, edit("format", "tokens 7"), "format 'tokens 7'"),
    "other-dtype": (META, edit("dtype", "int8"), "dtype 'int8'"),
    "other-eos": (META, edit("eos", 17), "not with eos 17"),
    "fim-of-two": (META, edit("fim", [1, 2]), "fim [1, 2]"),
    "ends-fall": ("train-00000.ends.bin", shuffle_ends, "do not rise"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shards_are_refused_in_one_line_naming_the_file(shards, tmp_path, name):
    file, damage, reason = DAMAGE[name]
    folder = shutil.copytree(shards.tokenizer_file.parent, tmp_path / "copy")
    damage(folder / file)
    with pytest.raises(ValueError) as raised:
        data.open_shards(folder)
    message = str(raised.value)
    assert str(folder) in message and reason in message and "\n" not in message


def test_no_shards_at_all_are_refused():
    with pytest.raises(ValueError, match="no shards given"):
        data.open_shards([])


def test_training_on_shards_imports_nothing_beyond_numpy(shards, root):
    code = f"""
import sys
for module in ("tokenizers", "grain", "pyarrow", "zstandard", "jax", "rich"):
    sys.modules[module] = None
from experiments import data
shards, corpus = data.prepare([{str(shards.tokenizer_file.parent)!r}], directory="x", vocab_size=0)
assert corpus is None
data.BatchSource(shards, seq_len=16, seed=0).sequences(0, 4)
next(iter(data.ValidationBatches(shards.validation, eos=shards.eos, seq_len=16, batch_size=2)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
