"""Byte-level BPE: trained on a corpus, or read from any tokenizer.json, V3's own included."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.corpus import Corpus
from experiments.files import whole

# V3's names; \uff5c is its full-width bar, \u2581 its blank.
END_OF_SENTENCE = "<\uff5cend\u2581of\u2581sentence\uff5c>"
FIM_BEGIN = "<\uff5cfim\u2581begin\uff5c>"
FIM_HOLE = "<\uff5cfim\u2581hole\uff5c>"
FIM_END = "<\uff5cfim\u2581end\uff5c>"
SPECIAL_TOKENS = (END_OF_SENTENCE, FIM_HOLE, FIM_BEGIN, FIM_END)

# What other families call the same roles, in order of preference.
END_NAMES = (END_OF_SENTENCE, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
FIM_NAMES = (
    (FIM_BEGIN, FIM_HOLE, FIM_END),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)

# V3's pre-tokenizer: digits in threes, then CJK, then words, marks with line breaks, blanks.
SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# Texts longer than this are cut after a line break, so that one long file keeps all cores busy.
PIECE_CHARACTERS = 65536
BPE_TRAINING_CHARACTERS = 2**28


class FimTokens(NamedTuple):
    """Token ids around the parts of a document filled in the middle."""

    begin: int
    hole: int
    end: int


class Tokenizer:
    """Text to token ids and back without loss.

    Names of special tokens inside a text are text: only `special=True` reads them as tokens, so
    no document can end itself or open a hole.
    """

    def __init__(self, source: str):
        from tokenizers import Tokenizer as Backend

        self._source = source
        # Some of V3's added tokens (the FIM ones) are not marked special in its file, and the
        # library would then always read their names in a text as tokens.
        parsed = json.loads(source)
        for token in parsed.get("added_tokens", ()):
            token["special"] = True
        self._plain = Backend.from_str(json.dumps(parsed))
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        self._parsed = parsed

    @cached_property
    def _special(self):
        from tokenizers import Tokenizer as Backend

        special = Backend.from_str(json.dumps(self._parsed))
        special.no_truncation()
        special.no_padding()
        return special

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the least vocabulary of a model for this tokenizer."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self._source.encode()).hexdigest()

    @cached_property
    def eos(self) -> int:
        """The token that ends every document; padding, always masked, uses it too."""
        for name in END_NAMES:
            token = self._plain.token_to_id(name)
            if token is not None:
                return token
        raise ValueError(f"the tokenizer has no end-of-sentence token; name one of {END_NAMES}")

    @cached_property
    def fim(self) -> FimTokens | None:
        for names in FIM_NAMES:
            tokens = [self._plain.token_to_id(name) for name in names]
            if None not in tokens:
                return FimTokens(*tokens)
        return None

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        backend = self._special if special else self._plain
        return np.array(backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes many texts on all cores."""
        pieces = [_pieces(text) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        encodings = iter(self._plain.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encodings).ids, np.int32) for _ in parts])
            for parts in pieces
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        return self._plain.decode([int(token) for token in tokens], skip_special_tokens=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json exactly as it was read, so that its hash stays."""
        with whole(Path(path)) as partial:
            partial.write_text(self._source, encoding="utf-8", newline="")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer.json; it must name an end-of-sentence token."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer file; give a tokenizer.json")
    try:
        tokenizer = Tokenizer(path.read_bytes().decode())
    # The library raises bare Exception for a file it cannot read.
    except Exception as error:
        if isinstance(error, ImportError):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a tokenizer.json ({reason}); give another file") from None
    try:
        _ = tokenizer.eos
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tokenizer


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Learns byte-level BPE on the training documents; the same corpus gives the same tokenizer.

    A small corpus can run out of merges: `.vocab_size` is then below the one asked for.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"{vocab_size=} must be at least {smallest}: 256 bytes, special tokens")
    if not corpus.train:
        raise ValueError("no training documents to learn a tokenizer from; give more data")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_training_pieces(corpus), trainer)
    return Tokenizer(backend.to_str())


def _training_pieces(corpus: Corpus) -> Iterator[str]:
    """The training texts; of a corpus above the limit every n-th piece, spread over all of it."""
    num_characters = sum(len(document.text) for document in corpus.train)
    every = -(-num_characters // BPE_TRAINING_CHARACTERS)
    pieces = (piece for document in corpus.train for piece in _pieces(document.text))
    for number, piece in enumerate(pieces):
        if number % every == 0:
            yield piece


def _pieces(text: str) -> list[str]:
    """Cuts a long text after line breaks followed by a word, where no token crosses anyway."""
    pieces = []
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = text.find("\n", start + PIECE_CHARACTERS) + 1
        while 0 < cut < len(text) and text[cut].isspace():
            cut = text.find("\n", cut) + 1
        if not 0 < cut < len(text):
            break
        pieces.append(text[start:cut])
        start = cut
    pieces.append(text[start:])
    return pieces
