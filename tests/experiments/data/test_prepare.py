"""One call takes any mix of text and ready shards, and does nothing twice."""

import gzip
import importlib
import json

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from experiments import data

# The package's `prepare` is the function of that name.
preparation = importlib.import_module("experiments.data.prepare")


@pytest.fixture
def mixed(tmp_path, corpus):
    """The same documents spread over files of every format."""
    texts = [text for _, text in corpus.train]
    folder = tmp_path / "mixed"
    (folder / "folder" / "deep").mkdir(parents=True)

    def rows(some):
        return "".join(json.dumps({"text": text}) + "\n" for text in some).encode()

    for number, text in enumerate(texts[:6]):
        (folder / "folder" / "deep" / f"{number}.py").write_bytes(text.encode())
    (folder / "one.txt").write_bytes(texts[6].encode())
    (folder / "a.jsonl").write_bytes(rows(texts[7:12]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows(texts[12:18])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(rows(texts[18:24])))
    parquet.write_table(pyarrow.table({"text": texts[24:]}), folder / "d.parquet")
    paths = [folder / "folder", *sorted(path for path in folder.iterdir() if path.is_file())]
    return paths, texts


def test_a_mix_of_formats_gives_every_document_once(mixed, tmp_path):
    paths, texts = mixed
    shards, corpus = data.prepare(
        paths, directory=tmp_path / "shards", vocab_size=300, validation_fraction=0.2
    )
    found = [text for _, text in corpus.train + corpus.validation]
    assert sorted(found) == sorted(texts)
    assert shards.train.num_documents + shards.validation.num_documents == len(texts)


def test_shards_as_data_equal_text_as_data(mixed, tmp_path):
    paths, _ = mixed
    shards, _ = data.prepare(paths, directory=tmp_path / "shards", vocab_size=300)
    ready, corpus = data.prepare([tmp_path / "shards"], directory=tmp_path / "new", vocab_size=1)
    assert corpus is None and not (tmp_path / "new").exists()
    assert ready.corpus_hash == shards.corpus_hash
    first, second = (
        data.BatchSource(source, seq_len=32, seed=5).sequences(0, 50)["tokens"]
        for source in (shards, ready)
    )
    np.testing.assert_array_equal(first, second)


def test_text_beside_shards_takes_their_tokenizer(mixed, shards, tokenizer, tmp_path):
    paths, _ = mixed
    ready = shards.tokenizer_file.parent
    both, corpus = data.prepare(
        [*paths, ready], directory=tmp_path / "shards", vocab_size=300, validation_fraction=0.2
    )
    assert both.tokenizer_hash == tokenizer.hash
    assert both.train.num_documents == len(corpus.train) + shards.train.num_documents


def test_text_beside_shards_of_another_given_tokenizer_is_refused(mixed, corpus, shards, tmp_path):
    data.train_tokenizer(corpus, 300).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match="tokenise both with one tokenizer"):
        data.prepare(
            [*mixed[0], shards.tokenizer_file.parent],
            directory=tmp_path / "shards",
            vocab_size=300,
            tokenizer_file=tmp_path / "other.json",
        )


def test_a_given_tokenizer_is_used(mixed, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "given.json")
    shards, _ = data.prepare(
        mixed[0], directory=tmp_path / "s", vocab_size=300, tokenizer_file=tmp_path / "given.json"
    )
    assert shards.tokenizer_hash == tokenizer.hash


def test_a_second_call_neither_trains_nor_tokenises(mixed, tmp_path, monkeypatch):
    first, _ = data.prepare(mixed[0], directory=tmp_path / "shards", vocab_size=300)
    monkeypatch.setattr(preparation, "train_tokenizer", None)
    monkeypatch.setattr(preparation, "tokenize", None)
    second, corpus = data.prepare(mixed[0], directory=tmp_path / "shards", vocab_size=300)
    assert second.tokenizer_hash == first.tokenizer_hash and corpus.hash == first.corpus_hash


def test_with_no_path_the_text_is_the_library(library, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(preparation, "train_tokenizer", lambda corpus, vocab_size: tokenizer)
    monkeypatch.setattr(preparation, "tokenize", lambda corpus, *_: corpus.hash)
    shards, corpus = data.prepare(directory=tmp_path / "shards", vocab_size=400)
    assert shards == corpus.hash == library.hash
