"""Each epoch holds every document once, in another order, a tenth of them with a hole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.packing import Packing
from experiments.data.shards import TokenSplit

LENGTHS = [5, 0, 1, 30, 2, 2, 17, 9, 1, 100, 4, 3]


def packing_of(shards, *, fim_rate=0.1, seed=0):
    return Packing(shards.train, seed=seed, fim=shards.fim, fim_rate=fim_rate)


def epoch_documents(packing, number):
    """The documents of one epoch as lists of tokens, in stream order."""
    tokens_P, segments_P = packing.read(
        packing.epoch_start(number), packing.epoch_start(number + 1)
    )
    borders = np.flatnonzero(np.diff(segments_P)) + 1
    return [part.tolist() for part in np.split(tokens_P, borders)]


def without_hole(document, fim):
    """A document in plain order, whether or not it is filled in the middle."""
    if fim.begin not in document:
        return document
    begin, hole, end = (document.index(token) for token in fim)
    assert begin == 0 < hole < end < len(document) - 1
    prefix, suffix, middle = document[1:hole], document[hole + 1 : end], document[end + 1 : -1]
    return prefix + middle + suffix + document[-1:]


@pytest.mark.parametrize("fim_rate", [0, 0.1, 0.5, 1])
def test_each_epoch_holds_every_token_of_every_document_once(numbered, fim_rate):
    shards = numbered(LENGTHS)
    packing = packing_of(shards, fim_rate=fim_rate)
    stored = np.split(shards.train.read(0, 10**6).astype(int), shards.train.ends_J[:-1])
    expected = sorted(document.tolist() for document in stored)
    for number in range(4):
        documents = epoch_documents(packing, number)
        assert sorted(without_hole(document, shards.fim) for document in documents) == expected


@pytest.mark.parametrize("fim_rate", [0.1, 0.25, 1 / 3, 1])
def test_the_share_of_holes_is_the_rate_over_epochs(numbered, fim_rate):
    shards = numbered(LENGTHS)
    packing = packing_of(shards, fim_rate=fim_rate)
    counts = [
        sum(shards.fim.begin in document for document in epoch_documents(packing, number))
        for number in range(60)
    ]
    assert abs(sum(counts) - fim_rate * len(LENGTHS) * 60) <= 1
    assert max(counts) - min(counts) <= 1


def test_every_document_gets_a_hole_in_some_epoch(numbered):
    shards = numbered(LENGTHS)
    packing = packing_of(shards, fim_rate=0.25)
    holed = set()
    for number in range(40):
        for document in epoch_documents(packing, number):
            if shards.fim.begin in document:
                holed.add(tuple(without_hole(document, shards.fim)))
    assert len(holed) == len(LENGTHS)


def test_cuts_reach_from_end_to_end(numbered):
    shards = numbered([3])
    packing = packing_of(shards, fim_rate=1)
    cuts = {
        (document.index(2) - 1, len(document) - document.index(3) - 2)
        for number in range(200)
        for document in epoch_documents(packing, number)
    }
    # Lengths of prefix and middle: all ten ways to cut three tokens at two of four places.
    assert cuts == {(prefix, middle) for prefix in range(4) for middle in range(4 - prefix)}


def test_prefix_suffix_middle_decode_to_the_document(corpus, tokenizer, shards):
    packing = packing_of(shards)
    originals = {text for _, text in corpus.train}
    num_holes = 0
    for number in range(3):
        for document in epoch_documents(packing, number):
            assert document[-1] == tokenizer.eos
            num_holes += tokenizer.fim.begin in document
            plain = without_hole(document, tokenizer.fim)
            assert tokenizer.decode(plain[:-1]) in originals
    assert num_holes == int(0.3 * len(corpus.train))


def test_order_changes_with_epoch_and_seed(numbered):
    shards = numbered(LENGTHS)
    orders = [
        packing_of(shards, seed=seed).epoch(number).order_J.tolist()
        for seed in range(3)
        for number in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 9


def test_layout_is_pinned():
    """A change of these numbers changes the data of every run that is to be resumed."""
    split = TokenSplit((), np.array([4, 9, 11, 20, 26]), num_bytes=1)
    epoch = Packing(split, seed=1, fim=None, fim_rate=0.5).epoch(3)
    assert [column.tolist() for column in epoch] == [
        [2, 1, 4, 3, 0],
        [5, 13, 19, 28, 35],
        [0, 0, -1, -1, 1],
        [1, 1, -1, -1, 2],
    ]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_stretch_equals_the_same_stretch_of_a_longer_one(long_stream, data):
    packing, tokens_P, segments_P = long_stream
    start = data.draw(st.integers(0, len(tokens_P) - 2))
    stop = data.draw(st.integers(start + 1, min(start + 300, len(tokens_P))))
    found_P, found_segments_P = packing.read(start, stop)
    np.testing.assert_array_equal(found_P, tokens_P[start:stop])
    np.testing.assert_array_equal(found_segments_P, segments_P[start:stop] - segments_P[start])


@pytest.fixture(scope="module")
def long_stream(shards):
    small = TokenSplit(
        files=(shards.train.read(0, int(shards.train.ends_J[5])),),
        ends_J=shards.train.ends_J[:6],
        num_bytes=1,
    )
    packing = Packing(small, seed=3, fim=shards.fim, fim_rate=0.4)
    return packing, *packing.read(0, packing.epoch_start(4))


def test_epochs_far_ahead_are_found_without_the_ones_before(numbered):
    packing = packing_of(numbered(LENGTHS))
    for number in (10**6, 10**6 + 1):
        start = packing.epoch_start(number)
        assert (packing.epoch_of(start - 1), packing.epoch_of(start)) == (number - 1, number)
    tokens_P, _ = packing.read(start, start + 50)
    assert tokens_P.shape == (50,) and len(packing._epochs) <= 2
