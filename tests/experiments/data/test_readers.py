"""Files of every format give the same documents; unusable ones are refused in one line."""

import gzip
import json
import sys

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from experiments.data.readers import file_format, read_documents

TEXTS = ["first line\r\nsecond\u2028still the second\n", "\ufeffmark \u00e9\u4e2d\U0001f600", "x"]
JSONL = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in TEXTS)


def texts_of(path, field="text"):
    return [document.text for document in read_documents(path, path.name, field=field)]


def write_parquet(path, columns):
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", JSONL.encode()),
        ("a.ndjson", JSONL.replace("\n", "\n\n").encode()),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())),
        ("a.jsonl.zst", zstandard.compress(JSONL.encode())),
        ("a.JSONL.GZ", gzip.compress(JSONL.encode())),
    ],
)
def test_every_jsonl_gives_the_same_texts(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert texts_of(tmp_path / name) == TEXTS


def test_parquet_gives_the_same_texts(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": TEXTS})
    assert texts_of(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.py", "README", "a.txt.gz", "a.md.zst"])
def test_text_files_are_read_byte_for_byte(tmp_path, name):
    data = TEXTS[0].encode()
    packed = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)(data)
    (tmp_path / name).write_bytes(packed)
    assert texts_of(tmp_path / name) == [TEXTS[0]]


def test_zstd_of_several_frames_is_read_whole(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(
        zstandard.compress(JSONL.encode()[:50]) + zstandard.compress(JSONL.encode()[50:])
    )
    assert texts_of(path) == TEXTS


def test_rows_are_named_by_their_number_and_empty_rows_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n{"body": ""}\n{"body": "three"}\n')
    documents = list(read_documents(path, "folder/a.jsonl", field="body"))
    assert documents == [("folder/a.jsonl#0", "one"), ("folder/a.jsonl#2", "three")]


@pytest.mark.parametrize("name", ["a.bin", "a.tar.gz", "a.docx", "a.parquet.gz", ".hidden.png"])
def test_unknown_suffixes_have_no_format(tmp_path, name):
    assert file_format(tmp_path / name) is None


BAD = {
    "empty.txt": (b"", "is empty"),
    "empty.txt.gz": (gzip.compress(b""), "is empty"),
    "zeros.txt": (b"text\0more", "binary file (a zero byte at 4)"),
    "latin.txt": ("caf\u00e9".encode("latin-1"), "not UTF-8 (byte 0xe9 at 3)"),
    "picture.png": (b"\x89PNG", "unknown suffix '.png'"),
    "cut.txt.gz": (gzip.compress(b"text" * 100)[:-9], "damaged gzip"),
    "cut.txt.zst": (zstandard.compress(b"text" * 100)[:-9], "damaged zstd"),
    "not.txt.gz": (b"plain", "damaged gzip"),
    "not.txt.zst": (b"plain", "damaged zstd"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "list.jsonl": (b"[1]\n", "no field 'text', found list"),
    "other.jsonl": (b'{"body": "a", "id": 1}\n', "no field 'text', found ['body', 'id']"),
    "number.jsonl": (b'{"text": 1}\n', "'text' is int, not text"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "half a surrogate pair"),
    "damaged.parquet": (b"PAR1 nothing", "damaged Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_file_is_refused_in_one_line_naming_it(tmp_path, name):
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as raised:
        texts_of(tmp_path / name)
    message = str(raised.value)
    assert message.startswith(str(tmp_path / name)) and reason in message
    assert "\n" not in message and ";" in message


@pytest.mark.parametrize(
    ("columns", "reason"),
    [({"body": ["a"]}, "no column 'text', found ['body']"), ({"text": [1]}, "is int, not text")],
    ids=["no-column", "numbers"],
)
def test_parquet_without_text_is_refused(tmp_path, columns, reason):
    write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError) as raised:
        texts_of(tmp_path / "a.parquet")
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_a_missing_reader_names_the_extra_to_install(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{module}; pip install 'deepseek-jax\[data\]'"):
        texts_of(tmp_path / name)
