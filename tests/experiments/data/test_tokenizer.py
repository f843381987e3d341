"""Byte-level BPE loses nothing, is the same every time, and keeps special tokens to itself."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from experiments import data
from experiments.data import tokenizer as tokenizer_file
from experiments.data.tokenizer import FIM_NAMES, SPECIAL_TOKENS, FimTokens

PIECES = ["\n", "\n\n  ", "def f(x):\n", " ", "\u4e2d\u6587", "1234567", "\U0001f600", "\r\n", "__"]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from(PIECES + list(SPECIAL_TOKENS)) | st.text(max_size=5)).map("".join),
)


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == text


def test_every_byte_has_a_token(tokenizer):
    text = bytes(range(1, 128)).decode() + "".join(map(chr, range(128, 2048)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts=st.lists(TEXTS, max_size=4))
@settings(max_examples=30, deadline=None)
def test_a_batch_is_encoded_as_its_texts_are(tokenizer, texts):
    for text, tokens_P in zip(texts, tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(tokens_P, tokenizer.encode(text))


def test_cutting_long_texts_changes_no_token(tokenizer, library, monkeypatch):
    text = max((document.text for document in library.validation), key=len)
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_file, "PIECE_CHARACTERS", 500)
    assert len(tokenizer_file._pieces(text)) > 20
    np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], whole)


def test_special_names_in_a_text_are_text_unless_asked(tokenizer):
    text = "a" + "".join(SPECIAL_TOKENS) + "b"
    special = {tokenizer.eos, *tokenizer.fim}
    assert not special & set(tokenizer.encode(text).tolist())
    assert not special & set(tokenizer.encode_batch([text])[0].tolist())
    assert special < set(tokenizer.encode(text, special=True).tolist())


def test_training_gives_the_size_asked_for_and_the_roles(tokenizer):
    assert tokenizer.vocab_size == 400
    assert sorted((tokenizer.eos, *tokenizer.fim)) == [0, 1, 2, 3]
    assert tokenizer.decode([tokenizer.eos]) == SPECIAL_TOKENS[0]


def test_training_twice_gives_the_same_tokenizer(corpus, tokenizer):
    assert data.train_tokenizer(corpus, 400).hash == tokenizer.hash


def test_training_sees_no_validation_document(corpus, tokenizer):
    assert data.train_tokenizer(data.Corpus(corpus.train, (), "x"), 400).hash == tokenizer.hash


def test_a_large_corpus_is_sampled_all_over(corpus, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "BPE_TRAINING_CHARACTERS", 20_000)
    monkeypatch.setattr(tokenizer_file, "PIECE_CHARACTERS", 1000)
    pieces = list(tokenizer_file._training_pieces(corpus))
    text = "".join(document.text for document in corpus.train)
    assert 5_000 < sum(map(len, pieces)) < 40_000 < len(text)
    assert all(piece in text for piece in pieces)


def test_a_small_corpus_can_end_below_the_size_asked_for():
    corpus = data.Corpus((data.Document("a", "abab abab"),), (), "x")
    assert 260 < data.train_tokenizer(corpus, 1000).vocab_size < 300


def test_saving_and_loading_keep_the_hash(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.hash, loaded.eos, loaded.fim) == (tokenizer.hash, tokenizer.eos, tokenizer.fim)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_added_tokens_of_a_released_file_are_text_even_when_not_marked_special(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in source["added_tokens"]:
        token |= {"special": False, "normalized": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    loaded = data.load_tokenizer(tmp_path / "tokenizer.json")
    text = "x" + SPECIAL_TOKENS[2] + "y"
    assert loaded.fim.begin not in loaded.encode(text)
    assert loaded.fim.begin in loaded.encode(text, special=True)
    assert loaded.decode(loaded.encode(text, special=True)) == text


def write_backend(path, special):
    backend = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.add_special_tokens(list(special))
    backend.save(str(path))
    return path


@pytest.mark.parametrize("names", FIM_NAMES, ids=lambda names: ascii(names[0]))
def test_fim_tokens_of_known_families_are_found_in_order(tmp_path, names):
    path = write_backend(tmp_path / "t.json", ["<|endoftext|>", *names])
    assert data.load_tokenizer(path).fim == FimTokens(begin=3, hole=4, end=5)
    assert data.load_tokenizer(path).eos == 2


def test_a_tokenizer_without_fim_tokens_says_so(tmp_path):
    path = write_backend(tmp_path / "t.json", ["</s>", FIM_NAMES[0][0]])
    assert data.load_tokenizer(path).fim is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path, "no such tokenizer file"),
        (lambda path: path.write_text("not json") and path, "not a tokenizer.json"),
        (lambda path: path.write_text('{"a": 1}') and path, "not a tokenizer.json"),
        (lambda path: path.write_text("[1]") and path, "not a tokenizer.json"),
        (lambda path: path.write_bytes(b"\xff\xfe") and path, "not a tokenizer.json"),
        (lambda path: write_backend(path, []), "no end-of-sentence token"),
    ],
    ids=["missing", "no-json", "other-json", "list", "binary", "no-eos"],
)
def test_a_bad_tokenizer_file_is_refused_in_one_line(tmp_path, make, reason):
    path = make(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError) as raised:
        data.load_tokenizer(path)
    message = str(raised.value)
    assert message.startswith(str(path)) and reason in message and "\n" not in message


def test_a_vocabulary_below_the_bytes_is_refused(corpus):
    with pytest.raises(ValueError, match="vocab_size=259 must be at least 260"):
        data.train_tokenizer(corpus, 259)


def test_training_on_nothing_is_refused(corpus):
    with pytest.raises(ValueError, match="no training documents"):
        data.train_tokenizer(data.Corpus((), corpus.validation, "x"), 400)
