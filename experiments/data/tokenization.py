"""Tokenises a corpus once, on all cores, into a folder of shards: whole or not at all.

The folder is written beside its place and renamed into it, so a folder of that name is complete.
A killed process leaves a hidden folder .NAME.partial-* behind, which nothing reads.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from experiments.data.corpus import Corpus
from experiments.data.readers import Document
from experiments.data.shards import (
    ENDS_DTYPE,
    FORMAT,
    META,
    TokenShards,
    is_shards,
    open_shards,
)
from experiments.data.tokenizer import Tokenizer

# A document never lies across two files, so a file can be longer than this by one document.
SHARD_TOKENS = 2**27
BATCH_CHARACTERS = 2**22


def tokenize(corpus: Corpus, tokenizer: Tokenizer, directory: str | os.PathLike) -> TokenShards:
    """Writes the corpus as shards into a new folder, or opens it if it holds just these."""
    directory = Path(directory)
    if is_shards(directory):
        return _open_same(corpus, tokenizer, directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is no folder of shards; name a new folder")
    partial = directory.with_name(f".{directory.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        _write_folder(corpus, tokenizer, partial)
        os.rename(partial, directory)
    except OSError as error:
        # Another process with the same task may have been quicker.
        if is_shards(directory):
            return _open_same(corpus, tokenizer, directory)
        raise ValueError(
            f"{directory}: cannot write token shards ({error.strerror or error}); "
            f"free space there or choose another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_shards(directory)


def _open_same(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> TokenShards:
    shards = open_shards(directory)
    for what, ours, theirs in (
        ("corpus", corpus.hash, shards.corpus_hash),
        ("tokenizer", tokenizer.hash, shards.tokenizer_hash),
    ):
        if ours != theirs:
            raise ValueError(
                f"{directory} holds tokens of {what} {theirs[:12]}, not {ours[:12]}; "
                f"name a new folder or delete this one"
            )
    return shards


def _write_folder(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
        "fim": tokenizer.fim,
        "tokenizer_hash": tokenizer.hash,
        "corpus_hash": corpus.hash,
    }
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
        files = []
        for number, tokens in enumerate(_shards_of(documents, tokenizer)):
            name = f"{split}-{number:05d}"
            ends_J = np.cumsum([len(tokens_P) for tokens_P in tokens], dtype=ENDS_DTYPE)
            _write_array(folder / f"{name}.bin", np.concatenate(tokens).astype(dtype))
            _write_array(folder / f"{name}.ends.bin", ends_J)
            files.append({"name": name, "documents": len(ends_J), "tokens": int(ends_J[-1])})
        meta[split] = {
            "bytes": sum(len(document.text.encode()) for document in documents),
            "files": files,
        }
    tokenizer.save(folder / "tokenizer.json")
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n")


def _shards_of(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
    """Yields the token arrays of one file after another, each document with its eos."""
    shard: list[np.ndarray] = []
    num_tokens = 0
    for texts in _text_batches(documents):
        for tokens_P in tokenizer.encode_batch(texts):
            shard.append(np.append(tokens_P, np.int32(tokenizer.eos)))
            num_tokens += len(shard[-1])
            if num_tokens >= SHARD_TOKENS:
                yield shard
                shard, num_tokens = [], 0
    if shard:
        yield shard


def _text_batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Groups documents so that all cores are busy and token lists stay small in memory."""
    batch: list[str] = []
    num_characters = 0
    for document in documents:
        batch.append(document.text)
        num_characters += len(document.text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        file.write(array.data)
        file.flush()
        os.fsync(file.fileno())
