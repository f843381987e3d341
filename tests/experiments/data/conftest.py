"""A small corpus, its tokenizer and its shards, and shards made up from numbers."""

import numpy as np
import pytest

from experiments import data


@pytest.fixture(scope="session")
def library():
    """The default corpus."""
    return data.load_corpus()


@pytest.fixture(scope="session")
def corpus(library):
    """Some small files of the default corpus."""
    train = tuple(document for document in library.train if len(document.text) < 6000)[:40]
    validation = tuple(document for document in library.validation if len(document.text) < 6000)
    return data.Corpus(train, validation[:6], hash="c0" * 32)


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return data.train_tokenizer(corpus, 400)


@pytest.fixture(scope="session")
def shards(corpus, tokenizer, tmp_path_factory):
    return data.tokenize(corpus, tokenizer, tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def numbered():
    """Makes shards whose documents are ranges of numbers from 10 on, each ending with eos = 0."""

    def make(lengths, num_files=2):
        documents, first = [], 10
        for length in lengths:
            documents.append(np.append(np.arange(first, first + length), 0).astype(np.uint32))
            first += length
        ends_J = np.cumsum([len(document) for document in documents])
        cut = len(documents) // num_files
        files = [part for part in (documents[:cut], documents[cut:]) if part]
        split = data.TokenSplit(tuple(map(np.concatenate, files)), ends_J, 3 * int(ends_J[-1]))
        return data.TokenShards(
            train=split,
            validation=split,
            vocab_size=first,
            eos=0,
            fim=data.FimTokens(begin=1, hole=2, end=3),
            tokenizer_hash="t",
            corpus_hash="c",
            tokenizer_file=None,
        )

    return make
