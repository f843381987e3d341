"""Data: from text on disk to the batches of a step.

Files are read in this order:
  readers.py        one file -> its texts (plain text, JSONL, Parquet, each also compressed)
  corpus.py         paths -> documents, without doubles, split into training and validation
  tokenizer.py      byte-level BPE with DeepSeek's special tokens, or a given tokenizer.json
  shards.py         memory-mapped tokens on disk
  tokenization.py   documents -> shards, written whole or not at all
  packing.py        the order of an epoch: shuffled documents, some of them filled in the middle
  batches.py        sequence number -> tokens, for training and for validation
  prepare.py        all of it in one call

    load_corpus(paths=(), *, field="text", validation_fraction=0.05) -> Corpus
    Corpus: .train and .validation, tuples of Document(name, text); .hash; .validation_bytes
    train_tokenizer(corpus, vocab_size) -> Tokenizer
    load_tokenizer(path) -> Tokenizer
    Tokenizer: .encode(text, special=False) -> int array; .encode_batch(texts); .decode(ids);
        .save(path); .vocab_size; .eos; .fim, a FimTokens(begin, hole, end) or None; .hash
    tokenize(corpus, tokenizer, directory) -> TokenShards
    open_shards(paths) -> TokenShards
    is_shards(path) -> bool
    TokenShards: .train and .validation, each a TokenSplit; .vocab_size, .eos, .fim,
        .tokenizer_hash, .corpus_hash, .tokenizer_file (a Path or None)
    TokenSplit: .num_tokens, .num_documents, .num_bytes, .read(start, stop)
    BatchSource(shards, *, seq_len, seed, fim_rate=0.1, segments=False)
        .sequences(start, count) -> {"tokens": int32 [count, seq_len + 1], "segments": same}
        .epochs_seen(num_sequences) -> float
    ValidationBatches(split, *, eos, seq_len, batch_size, context=0, segments=False): a sequence
        of {"tokens": int32 [B, T + 1], "mask": bool [B, T], "segments"}; .num_targets, .num_bytes
    text_bytes(split, tokenizer) -> bytes, the text a split was made from
    prefetch(function, items, *, depth=2) -> iterator of function(item), made in a thread
    prepare(paths=(), *, directory, vocab_size, tokenizer_file=None, field="text",
        validation_fraction=0.05) -> (TokenShards, Corpus or None)

Only reading text needs `tokenizers` (and Parquet and zstd the `data` extra), each imported where
it is used: training on ready shards needs numpy alone.

Letters: B sequences, T tokens of a sequence (one more where the last target is included),
P tokens of a stretch of text, J documents, I documents filled in the middle.
"""

from experiments.data.batches import BatchSource, ValidationBatches, prefetch
from experiments.data.corpus import Corpus, load_corpus
from experiments.data.prepare import prepare
from experiments.data.readers import Document
from experiments.data.shards import (
    TokenShards,
    TokenSplit,
    is_shards,
    open_shards,
    text_bytes,
)
from experiments.data.tokenization import tokenize
from experiments.data.tokenizer import FimTokens, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "BatchSource",
    "Corpus",
    "Document",
    "FimTokens",
    "TokenShards",
    "TokenSplit",
    "Tokenizer",
    "ValidationBatches",
    "is_shards",
    "load_corpus",
    "load_tokenizer",
    "open_shards",
    "prefetch",
    "prepare",
    "text_bytes",
    "tokenize",
    "train_tokenizer",
]
