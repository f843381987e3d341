"""The corpus is the same wherever it lies, without doubles, and always holds something out."""

import json
import shutil

import pytest

from experiments import data
from experiments.data.corpus import held_out


def write_folder(folder, num_files, size=400):
    folder.mkdir()
    for number in range(num_files):
        (folder / f"{number:03d}.txt").write_text(f"document {number}\n" * (size // 12))
    return folder


def names(documents):
    return [document.name for document in documents]


def test_default_corpus_is_the_library_without_tests_and_tables(library):
    found = names(library.train) + names(library.validation)
    assert len(found) > 400
    assert all(name.endswith(".py") for name in found)
    left_out = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    assert not any(left_out & set(name.split("/")) for name in found)
    assert "json/decoder.py" in found and "pydoc_data/topics.py" in names(library.train)


def test_default_validation_is_about_half_a_megabyte(library):
    assert 350_000 < len(library.validation_bytes) < 650_000


def test_loading_twice_gives_the_same_corpus(library):
    assert data.load_corpus() == library


def test_documents_are_sorted_by_relative_path(library):
    for documents in (library.train, library.validation):
        assert names(documents) == sorted(names(documents), key=lambda name: name.split("/"))


def test_hash_does_not_depend_on_where_the_folder_lies(tmp_path):
    folder = write_folder(tmp_path / "a", 50)
    shutil.copytree(folder, tmp_path / "elsewhere")
    first, second = data.load_corpus([folder]), data.load_corpus(str(tmp_path / "elsewhere"))
    assert first == second


@pytest.mark.parametrize("change", ["text", "name", "fewer"])
def test_hash_changes_with_the_documents(tmp_path, change):
    folder = write_folder(tmp_path / "a", 50)
    before = data.load_corpus([folder]).hash
    if change == "text":
        (folder / "007.txt").write_text("something else")
    elif change == "name":
        (folder / "007.txt").rename(folder / "7.txt")
    else:
        (folder / "007.txt").unlink()
    assert data.load_corpus([folder]).hash != before


def test_equal_texts_are_kept_once(tmp_path):
    folder = write_folder(tmp_path / "a", 30)
    (folder / "zzz.txt").write_text((folder / "004.txt").read_text())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": (folder / "005.txt").read_text()}))
    corpus = data.load_corpus([folder, tmp_path / "b.jsonl", folder])
    assert len(corpus.train) + len(corpus.validation) == 30


def test_a_document_stays_on_its_side_when_others_come(tmp_path):
    folder = write_folder(tmp_path / "a", 100)
    before = set(names(data.load_corpus([folder]).validation))
    for number in range(100, 300):
        (folder / f"{number:03d}.txt").write_text(f"document {number}\n" * 30)
    after = set(names(data.load_corpus([folder]).validation))
    assert before and before == {name for name in after if name < "100.txt"}


def test_a_twentieth_of_all_names_is_held_out():
    share = sum(held_out(f"folder/{number}.py", 0.05) for number in range(20_000)) / 20_000
    assert 0.045 < share < 0.055


def test_one_file_gives_its_tail_for_validation_cut_at_a_line(tmp_path):
    path = tmp_path / "input.txt"
    text = "".join(f"line {number}\n" for number in range(1000))
    path.write_text(text)
    corpus = data.load_corpus(path)
    assert names(corpus.train) == ["input.txt"]
    assert names(corpus.validation) == ["input.txt#tail"]
    assert corpus.train[0].text + corpus.validation[0].text == text
    assert corpus.train[0].text.endswith("\n")
    assert 0.05 <= len(corpus.validation[0].text) / len(text) < 0.06


def test_a_text_without_lines_still_gives_a_tail(tmp_path):
    (tmp_path / "input.txt").write_text("x" * 1000)
    corpus = data.load_corpus([tmp_path / "input.txt"])
    assert (len(corpus.train[0].text), len(corpus.validation[0].text)) == (950, 50)


def test_validation_fraction_one_holds_out_everything(tmp_path):
    corpus = data.load_corpus([write_folder(tmp_path / "a", 5)], validation_fraction=1)
    assert not corpus.train and len(corpus.validation) == 5


def test_folders_are_read_in_depth_and_what_is_no_text_is_named(tmp_path):
    folder = write_folder(tmp_path / "a", 3)
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "deeper" / "x.md").write_text("deep text " * 50)
    (folder / "empty.py").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG")
    for hidden in (".git", "__pycache__"):
        (folder / hidden).mkdir()
        (folder / hidden / "y.txt").write_text("hidden text")
    (folder / ".hidden.txt").write_text("hidden text")
    corpus = data.load_corpus([folder], validation_fraction=1)
    assert names(corpus.validation) == ["000.txt", "001.txt", "002.txt", "deep/deeper/x.md"]
    assert corpus.skipped == (str(folder / "picture.png"),)


def test_validation_bytes_are_the_texts_one_after_the_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\u00e9"}\n{"text": "b"}\n')
    corpus = data.load_corpus([tmp_path / "a.jsonl"], validation_fraction=1)
    assert corpus.validation_bytes == "\u00e9b".encode()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "nowhere", "no such file or folder"),
        (lambda folder: folder, "no data file in this folder"),
        (lambda folder: write(folder / "a.txt", "x"), "too few to hold out 5%"),
        (lambda folder: write(folder / "a.txt", ""), "is empty"),
        (lambda folder: write(folder / "a.jsonl", "\n\n"), "no row has text"),
        (lambda folder: write(folder / "shards.json", "{}").parent, "token shards where text"),
    ],
    ids=["missing", "empty-folder", "one-letter", "empty-file", "no-rows", "shards"],
)
def test_unusable_paths_are_refused_in_one_line(tmp_path, make, reason):
    path = make(tmp_path)
    with pytest.raises(ValueError) as raised:
        data.load_corpus([path])
    assert reason in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_an_impossible_validation_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="validation_fraction="):
        data.load_corpus(validation_fraction=fraction)


def write(path, text):
    path.write_text(text)
    return path
