"""Reads one data file, whatever its format, into documents."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TEXT_SUFFIXES = frozenset(
    "txt text md rst tex org log html htm xml csv tsv yaml yml toml ini cfg json py pyi c h cc cpp "
    "hpp cu cuh rs go java kt scala js ts jsx tsx css sh bash rb pl php lua r jl hs ml swift sql "
    "m f90 s asm vim el lisp clj ex erl tla lean v sv proto cmake".split()
)
ROW_SUFFIXES = frozenset(("jsonl", "ndjson", "parquet"))
COMPRESSIONS = frozenset(("gz", "zst"))
SHARDS_META = "shards.json"  # its presence makes a folder one of token shards
NAME_FIELD = "name the field of the text: --set text_field=NAME"
FORMATS = ".txt, .md, .py and other plain text, .jsonl (all of them also .gz or .zst), .parquet"


class Document(NamedTuple):
    """One text and the name it is known by: its path, and its row where a file holds many."""

    name: str
    text: str


def file_format(path: Path) -> str | None:
    """Returns "text", "jsonl" or "parquet"; None for a suffix we do not know."""
    suffixes = [suffix[1:].lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    elif suffixes and suffixes[-1] == "parquet":
        return "parquet"
    # A file without a suffix (README, Makefile, input) is taken for text; its bytes are checked.
    if not suffixes or suffixes[-1] in TEXT_SUFFIXES:
        return "text"
    return "jsonl" if suffixes[-1] in ("jsonl", "ndjson") else None


def read_documents(path: Path, name: str, *, field: str) -> Iterator[Document]:
    """Yields the documents of one file; rows are called NAME#ROW, counted from 0."""
    kind = file_format(path)
    if kind is None:
        raise ValueError(f"{path}: unknown suffix {''.join(path.suffixes)!r}; use {FORMATS}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; remove it from the data or fill it")
    if kind == "text":
        yield Document(name, _decode(_read_bytes(path), path))
        return
    rows = _parquet_rows(path, field) if kind == "parquet" else _jsonl_rows(path, field)
    for row, text in rows:
        # A row without text teaches nothing and would only add an end-of-sentence token.
        if text:
            yield Document(f"{name}#{row}", text)


def _jsonl_rows(path: Path, field: str) -> Iterator[tuple[int, str]]:
    text = _decode(_read_bytes(path), path)
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it splits at.
    for row, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        where = f"{path}, line {row + 1}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); write one object a line") from None
        if not isinstance(record, dict) or field not in record:
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where}: no field {field!r}, found {found}; {NAME_FIELD}")
        yield row, _checked_text(record[field], where, field)


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[int, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow; pip install 'deepseek-jax[data]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                found = file.schema_arrow.names
                raise ValueError(f"{path}: no column {field!r}, found {found}; {NAME_FIELD}")
            row = 0
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield row, _checked_text(value, f"{path}, row {row}", field)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged Parquet ({reason}); write the file again") from None


def _checked_text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{where}: {field!r} is {kind}, not text; {NAME_FIELD}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: {field!r} holds half a surrogate pair; write whole characters"
        ) from None
    return value


def _read_bytes(path: Path) -> bytes:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        try:
            return gzip.decompress(path.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip ({error}); compress it again") from None
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError(
                f"{path}: reading .zst needs zstandard; pip install 'deepseek-jax[data]'"
            ) from None
        # Frame by frame: the library's stream reader takes a file cut short for a whole one.
        rest, parts = path.read_bytes(), []
        try:
            while rest:
                frame = zstandard.ZstdDecompressor().decompressobj()
                parts.append(frame.decompress(rest))
                if not frame.eof:
                    raise zstandard.ZstdError("the file ends within a frame")
                rest = frame.unused_data
        except zstandard.ZstdError as error:
            raise ValueError(f"{path}: damaged zstd ({error}); compress it again") from None
        return b"".join(parts)
    return path.read_bytes()


def _decode(data: bytes, path: Path) -> str:
    """Bytes to text with nothing changed: no newline translation, a byte order mark stays."""
    if not data:
        raise ValueError(f"{path}: the file is empty; remove it from the data or fill it")
    zero = data.find(b"\0")
    if zero >= 0:
        raise ValueError(f"{path}: binary file (a zero byte at {zero}); give text, {FORMATS}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 (byte {data[error.start]:#04x} at {error.start}); "
            f"convert it, for example with iconv -t UTF-8"
        ) from None
