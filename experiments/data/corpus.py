"""The corpus: documents from any mix of paths, without doubles, some held out for validation."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.data.readers import FORMATS, SHARDS_META, Document, file_format, read_documents

# Tests and character tables are no prose or code worth learning; the last two are other packages.
STDLIB_LEFT_OUT = frozenset(
    "test tests idle_test encodings lib-dynload site-packages dist-packages".split()
)
# Below or above these shares of the bytes a split by document is an accident of few documents.
SMALLEST_SHARE, LARGEST_SHARE = 0.2, 4.0


@dataclass(frozen=True)
class Corpus:
    """Documents held in memory; `hash` covers names, texts and split, not where files lie."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    hash: str
    skipped: tuple[str, ...] = ()  # files of given folders passed over for their suffix

    @property
    def validation_bytes(self) -> bytes:
        """The validation documents one after the other: what gzip and xz are measured on."""
        return b"".join(document.text.encode() for document in self.validation)


def load_corpus(
    paths: str | os.PathLike | Iterable[str | os.PathLike] = (),
    *,
    field: str = "text",
    validation_fraction: float = 0.05,
) -> Corpus:
    """Reads all documents below `paths`; with no path, the Python standard library's sources.

    Folders are walked in order of relative path, hidden files and unknown suffixes passed over.
    Of equal texts the first is kept. A document is held out if the hash of its name (relative
    path and row) falls into the fraction, so the split of a document never depends on others.
    When that leaves too few or too many bytes on one side (few documents, or one file), the tail
    of every document is held out instead, cut at a line. `validation_fraction=1` holds out all.

    Args:
      field: JSONL field and Parquet column of the text.
    """
    if not 0 < validation_fraction <= 1:
        raise ValueError(f"{validation_fraction=} must be above 0 and at most 1")
    paths = path_list(paths)
    skipped: list[str] = []
    if paths:
        documents = _documents(paths, field, skipped)
    else:
        documents = _stdlib_documents()
    kept = _without_doubles(documents)
    if not kept:
        raise ValueError(f"no text in {', '.join(map(str, paths))}; give files with text")
    train, validation = _split(kept, validation_fraction)
    digest = hashlib.sha256()
    for split, members in (("train", train), ("validation", validation)):
        for name, text in members:
            text_hash = hashlib.sha256(text.encode()).hexdigest()
            digest.update(f"{split}\0{name}\0{text_hash}\n".encode())
    return Corpus(tuple(train), tuple(validation), digest.hexdigest(), tuple(skipped))


def path_list(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """One path or many, as a list."""
    return [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


def held_out(name: str, fraction: float) -> bool:
    """True for the given fraction of all names: SHA-256 of the name, read as a number."""
    # Little-endian by choice: read big-endian, the hash would hold out pydoc_data/topics.py,
    # a fourteenth of the default corpus and the only long English text in it.
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return number < fraction * 2**64


def _split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    if fraction == 1:
        return [], documents
    train, validation = [], []
    for document in documents:
        (validation if held_out(document.name, fraction) else train).append(document)
    share = _num_bytes(validation) / _num_bytes(documents)
    if SMALLEST_SHARE * fraction <= share <= min(LARGEST_SHARE * fraction, (1 + fraction) / 2):
        return train, validation
    train, validation = [], []
    for name, text in documents:
        cut = _tail_start(text, fraction)
        train += [Document(name, text[:cut])] if cut else []
        validation += [Document(f"{name}#tail", text[cut:])] if cut < len(text) else []
    if not train or not validation:
        raise ValueError(
            f"{_num_bytes(documents)} bytes of text are too few to hold out "
            f"{fraction:.0%} for validation; give more text"
        )
    return train, validation


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out tail begins: the last line break before it, if one is near."""
    cut = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, cut) + 1
    return line if line > cut - fraction * len(text) else cut


def _num_bytes(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _without_doubles(documents: Iterable[Document]) -> list[Document]:
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def _documents(paths: list[Path], field: str, skipped: list[str]) -> Iterator[Document]:
    for path in paths:
        if path.is_file():
            num_documents = 0
            for document in read_documents(path, path.name, field=field):
                num_documents += 1
                yield document
            if num_documents == 0:
                raise ValueError(f"{path}: no row has text; remove it from the data or fill it")
        elif (path / SHARDS_META).is_file():
            raise ValueError(f"{path}: token shards where text is needed; give text, {FORMATS}")
        elif path.is_dir():
            files = _folder_files(path, skipped)
            if not files:
                raise ValueError(f"{path}: no data file in this folder; give {FORMATS}")
            for file in files:
                yield from read_documents(file, file.relative_to(path).as_posix(), field=field)
        else:
            raise ValueError(f"{path}: no such file or folder; check the path")


def _folder_files(folder: Path, skipped: list[str]) -> list[Path]:
    files = []
    for file in sorted(_walk(folder, frozenset()), key=lambda file: file.relative_to(folder).parts):
        if file_format(file) is None:
            skipped.append(str(file))
        elif file.stat().st_size:  # an empty __init__.py is no mistake; a named empty file is
            files.append(file)
    return files


def _stdlib_documents() -> Iterator[Document]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in _walk(folder, STDLIB_LEFT_OUT)
        # Build settings of this one machine would make the corpus differ between equal Pythons.
        if file.suffix == ".py"
        and not file.name.startswith("_sysconfigdata")
        and not file.parent.name.startswith("config-")
    ]
    if not files:
        raise ValueError(f"{folder}: this Python has no library sources; give data with --data")
    for file in sorted(files, key=lambda file: file.relative_to(folder).parts):
        if file.stat().st_size:
            yield from read_documents(file, file.relative_to(folder).as_posix(), field="")


def _walk(folder: Path, left_out: frozenset[str]) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and name not in left_out
        ]
        for name in names:
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():
                yield file
