"""Token shards: documents as memory-mapped token files.

A folder of shards holds
  train-00000.bin ...        tokens, uint16 or uint32 little-endian, every document ends with eos
  train-00000.ends.bin ...   int64 little-endian, where each document of that file ends
  validation-00000.bin ...   the same for held-out documents
  tokenizer.json             the tokenizer that made them
  shards.json                counts, token ids and hashes
Reading needs numpy alone; tokenization.py writes them.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from experiments.data.corpus import path_list
from experiments.data.readers import SHARDS_META as META
from experiments.data.tokenizer import FimTokens, Tokenizer

FORMAT = "deepseek_jax token shards 1"
ENDS_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class TokenSplit:
    """The documents of one split as a single stream of tokens, whatever files hold it."""

    files: tuple[np.ndarray, ...]  # tokens_P of each file
    ends_J: np.ndarray  # where each document ends in the stream, its eos included
    num_bytes: int  # of the text in UTF-8; end-of-sentence tokens are not text

    @property
    def num_documents(self) -> int:
        return len(self.ends_J)

    @property
    def num_tokens(self) -> int:
        return int(self.ends_J[-1]) if len(self.ends_J) else 0

    @cached_property
    def _file_ends(self) -> np.ndarray:
        return np.cumsum([len(tokens_P) for tokens_P in self.files], dtype=np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream."""
        parts = []
        number = int(np.searchsorted(self._file_ends, start, side="right"))
        while start < stop and number < len(self.files):
            tokens_P = self.files[number]
            first = int(self._file_ends[number]) - len(tokens_P)
            parts.append(tokens_P[start - first : stop - first])
            start = int(self._file_ends[number])
            number += 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


@dataclass(frozen=True)
class TokenShards:
    """Training and validation tokens, with what is needed to use them."""

    train: TokenSplit
    validation: TokenSplit
    vocab_size: int
    eos: int
    fim: FimTokens | None
    tokenizer_hash: str
    corpus_hash: str
    tokenizer_file: Path | None


def is_shards(path: str | os.PathLike) -> bool:
    """True for a folder of shards and for the shards.json in it."""
    path = Path(path)
    return path.name == META or (path / META).is_file()


def open_shards(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> TokenShards:
    """Maps one or several folders of shards, which must come from the same tokenizer."""
    folders = [_shards_folder(path) for path in path_list(paths)]
    if not folders:
        raise ValueError("no shards given; name at least one folder of shards")
    metas = [_read_meta(folder) for folder in folders]
    for folder, meta in zip(folders, metas, strict=True):
        for key in ("tokenizer_hash", "vocab_size", "eos", "fim"):
            if meta[key] != metas[0][key]:
                raise ValueError(
                    f"{folder}: {key} {meta[key]} differs from {metas[0][key]} of {folders[0]}; "
                    f"tokenise both with one tokenizer"
                )
    first = metas[0]
    hashes = [meta["corpus_hash"] for meta in metas]
    joined = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    files = [folder / "tokenizer.json" for folder in folders]
    return TokenShards(
        train=_map_split("train", folders, metas),
        validation=_map_split("validation", folders, metas),
        vocab_size=first["vocab_size"],
        eos=first["eos"],
        fim=FimTokens(*first["fim"]) if first["fim"] else None,
        tokenizer_hash=first["tokenizer_hash"],
        corpus_hash=joined if len(hashes) > 1 else hashes[0],
        tokenizer_file=next((file for file in files if file.is_file()), None),
    )


def text_bytes(split: TokenSplit, tokenizer: Tokenizer) -> bytes:
    """The text that a split was made from, one document after the other."""
    starts_J = np.concatenate([[0], split.ends_J[:-1]])
    spans = zip(starts_J.tolist(), split.ends_J.tolist(), strict=True)
    return b"".join(tokenizer.decode(split.read(start, end - 1)).encode() for start, end in spans)


def _shards_folder(path: Path) -> Path:
    if path.name == META and path.is_file():
        return path.parent
    if not (path / META).is_file():
        raise ValueError(
            f"{path}: no {META} there; give a folder of token shards, such as data/ of a run"
        )
    return path


def _read_meta(folder: Path) -> dict:
    path = folder / META
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r}, this version reads {FORMAT!r}")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {meta['dtype']!r}")
        for key, kind in (("vocab_size", int), ("eos", int), ("corpus_hash", str)):
            if not isinstance(meta[key], kind):
                raise ValueError(f"{key} {meta[key]!r}")
        if meta["fim"] is not None and len(meta["fim"]) != 3:
            raise ValueError(f"fim {meta['fim']!r}")
        for split in ("train", "validation"):
            int(meta[split]["bytes"])
            for file in meta[split]["files"]:
                _ = str(file["name"]), int(file["documents"]), int(file["tokens"])
        _ = meta["tokenizer_hash"]
    except KeyError as error:
        raise ValueError(f"{path}: damaged, {error} is missing; tokenise again") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); tokenise again") from None
    return meta


def _map_split(split: str, folders: list[Path], metas: list[dict]) -> TokenSplit:
    files, ends = [], [np.zeros(0, np.int64)]
    num_tokens = 0
    for folder, meta in zip(folders, metas, strict=True):
        for file in meta[split]["files"]:
            path = folder / f"{file['name']}.bin"
            tokens_P = _map_array(path, np.dtype(meta["dtype"]), file["tokens"])
            ends_path = folder / f"{file['name']}.ends.bin"
            ends_J = np.array(_map_array(ends_path, ENDS_DTYPE, file["documents"]))
            if ends_J[0] < 1 or ends_J[-1] != len(tokens_P) or np.any(np.diff(ends_J) < 1):
                raise ValueError(f"{ends_path}: document ends do not rise to {len(tokens_P)}")
            if tokens_P[-1] != meta["eos"]:
                raise ValueError(f"{path}: ends with {tokens_P[-1]}, not with eos {meta['eos']}")
            files.append(tokens_P)
            ends.append(ends_J + num_tokens)
            num_tokens += len(tokens_P)
    num_bytes = sum(meta[split]["bytes"] for meta in metas)
    return TokenSplit(tuple(files), np.concatenate(ends), num_bytes)


def _map_array(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing; copy the whole folder or tokenise again")
    size, expected = path.stat().st_size, length * dtype.itemsize
    if size != expected or size == 0:
        raise ValueError(
            f"{path}: {size} bytes, {META} says {expected}; copy the file again or tokenise again"
        )
    return np.memmap(path, dtype.newbyteorder("<"), mode="r")
