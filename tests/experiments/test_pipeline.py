"""The command `pipeline`: its table, its picture, what it refuses."""

import json

import pytest

from tests.experiments import runs


def test_table_and_picture(tmp_path):
    file, picture = tmp_path / "rows.json", tmp_path / "timelines.svg"
    code, out, err = runs.call(
        "pipeline", "--ranks", 4, "--micro-batches", 8, "--json", file, "--picture", picture
    )
    assert (code, err) == (0, "")
    rows = json.loads(file.read_text())
    assert [(r["schedule"], r["devices"], r["bubble"], r["by formula"]) for r in rows] == [
        ("1f1b", 4, 9, 9), ("zb1p", 4, 3, 3), ("dualpipe", 4, 2, 2), ("dualpipe_v", 2, 2, 2)
    ]  # fmt: skip
    assert "chunks held" in out and "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["dualpip"], "did you mean dualpipe"),
        (["dualpipe", "--ranks", "3"], "even ranks=3"),
        (["dualpipe_v", "--ranks", "3"], "even number of stages"),
        (["--picture", "x.gif"], "must end in .svg"),
    ],
)
def test_bad_input_is_one_line(words, part):
    code, out, err = runs.call("pipeline", *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and part in err
