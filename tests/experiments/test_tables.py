"""Tables for people, and the same rows for programs."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.tables import print_table, show, write_json

ROWS = [
    {"name": "wq_a_QD[0]", "shape": [1536, 7168], "size": 11_010_048},
    {"name": "bias_E", "shape": [256], "size": 256, "note": "x" * 90},
]


def printed(rows, **keywords) -> str:
    file = io.StringIO()
    print_table(rows, console=Console(file=file), **keywords)
    return file.getvalue()


def test_a_table_shows_every_column_in_full_when_piped():
    text = printed(ROWS, title="parameters [all]")
    for part in ("parameters [all]", "wq_a_QD[0]", "1536 x 7168", "11,010,048", "x" * 90):
        assert part in text, text


def test_the_same_rows_are_written_as_json(tmp_path):
    printed(ROWS, json_path=tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_json_is_strict_whatever_the_values_are(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": np.float32(0.5), "b": float("nan"), "c": (1, np.int32(2)), "d": path})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": None, "c": [1, 2], "d": str(path)}


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "absent" / "value.json", {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        (None, "-"),
        (True, "yes"),
    ],
)
def test_cells_are_short(value, text):
    assert show(value) == text


def test_no_rows_is_no_error():
    printed([])
