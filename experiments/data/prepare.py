"""From the paths of the command line to token shards, in one call."""

import os
from collections.abc import Iterable

from experiments.data.corpus import Corpus, load_corpus, path_list
from experiments.data.shards import TokenShards, is_shards, open_shards
from experiments.data.tokenization import tokenize
from experiments.data.tokenizer import load_tokenizer, train_tokenizer


def prepare(
    paths: str | os.PathLike | Iterable[str | os.PathLike] = (),
    *,
    directory: str | os.PathLike,
    vocab_size: int,
    tokenizer_file: str | os.PathLike | None = None,
    field: str = "text",
    validation_fraction: float = 0.05,
) -> tuple[TokenShards, Corpus | None]:
    """Tokenises text once into `directory` and opens it with the ready shards among `paths`.

    With no path the text is the standard library's. Text is tokenised with `tokenizer_file`,
    else with the tokenizer of the ready shards beside it, else with one of `vocab_size` trained
    on it. Only shards given: nothing is written, no tokenizer is loaded and the corpus is None.
    """
    paths = path_list(paths)
    ready = [path for path in paths if is_shards(path)]
    texts = [path for path in paths if not is_shards(path)]
    if ready and not texts:
        return open_shards(ready), None
    corpus = load_corpus(texts, field=field, validation_fraction=validation_fraction)
    if tokenizer_file is None and not ready and is_shards(directory):
        shards = open_shards(directory)
        if (shards.corpus_hash, shards.vocab_size) == (corpus.hash, vocab_size):
            return shards, corpus
    if tokenizer_file is None and ready:
        tokenizer_file = open_shards(ready).tokenizer_file
        if tokenizer_file is None:
            raise ValueError(f"{ready[0]} has no tokenizer.json; give the tokenizer it came from")
    if tokenizer_file is None:
        tokenizer = train_tokenizer(corpus, vocab_size)
    else:
        tokenizer = load_tokenizer(tokenizer_file)
    shards = tokenize(corpus, tokenizer, directory)
    return (open_shards([directory, *ready]) if ready else shards), corpus
