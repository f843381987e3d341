"""The order of the training stream: epoch after epoch of shuffled documents, some with a hole.

The stream is endless: epoch 0, epoch 1, ..., each a permutation of all documents, one after the
other, each ending with eos, so every token of a document comes exactly once an epoch. A document
filled in the middle is cut at two of its token borders and, in PSM order (V3 report, section
4.1), becomes

    begin prefix hole suffix end middle eos

which is three tokens longer than before, wherever it is cut. So the length of each document in an
epoch is known without reading a token, and a prefix sum finds any position of the stream. How
many documents are chosen is spread evenly over the epochs, floor((e + 1) r J) - floor(e r J) of
them in epoch e, so where epoch e starts is known too: no position needs a loop over the past.
Draws are raw Philox numbers keyed by (seed, epoch): numpy promises that those, unlike its
shuffles, stay the same in later versions.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from experiments.data.shards import TokenSplit
from experiments.data.tokenizer import FimTokens


class Epoch(NamedTuple):
    """Where each document lies in one epoch, in stream order."""

    order_J: np.ndarray  # document numbers
    ends_J: np.ndarray  # where each ends, counted from the start of the epoch
    prefix_ends_J: np.ndarray  # the first cut of a document, counted from its start; -1 for none
    middle_ends_J: np.ndarray  # the second cut


class Packing:
    """Random access to the stream of all epochs."""

    def __init__(self, split: TokenSplit, *, seed: int, fim: FimTokens | None, fim_rate: float):
        self.split = split
        self.seed = seed
        self.fim = fim
        # As printed, so that 0.1 is a tenth and not the binary fraction beside it.
        self.fim_rate = Fraction(str(fim_rate))
        self._starts_J = np.concatenate([[0], split.ends_J[:-1]]).astype(np.int64)
        self._epochs: dict[int, Epoch] = {}

    def epoch_start(self, epoch: int) -> int:
        """The stream position of an epoch's first token."""
        return epoch * self.split.num_tokens + 3 * self._num_fim_before(epoch)

    def epoch_of(self, position: int) -> int:
        """The epoch that a stream position lies in."""
        low, high = 0, position // self.split.num_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.epoch_start(middle) <= position:
                low = middle
            else:
                high = middle - 1
        return low

    def epoch(self, number: int) -> Epoch:
        """The layout of one epoch; the last two are kept, for batches that lie in both."""
        if number not in self._epochs:
            kept = {old: self._epochs[old] for old in list(self._epochs)[-1:]}
            self._epochs = kept | {number: self._layout(number)}
        return self._epochs[number]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of the stream, and which of the documents met each belongs to."""
        tokens_P = np.empty(stop - start, np.int32)
        segments_P = np.empty(stop - start, np.int32)
        number, position, segment = self.epoch_of(start), start, 0
        while position < stop:
            epoch, epoch_start = self.epoch(number), self.epoch_start(number)
            slot = int(np.searchsorted(epoch.ends_J, position - epoch_start, side="right"))
            while position < stop and slot < len(epoch.ends_J):
                first = epoch_start + (int(epoch.ends_J[slot - 1]) if slot else 0)
                last = min(epoch_start + int(epoch.ends_J[slot]), stop)
                piece = slice(position - start, last - start)
                self._read_document(epoch, slot, position - first, tokens_P[piece])
                segments_P[piece] = segment
                position, slot, segment = last, slot + 1, segment + 1
            number += 1
        return tokens_P, segments_P

    def _num_fim_before(self, epoch: int) -> int:
        return int(self.fim_rate * epoch * self.split.num_documents)

    def _layout(self, number: int) -> Epoch:
        num_documents = self.split.num_documents
        num_fim = self._num_fim_before(number + 1) - self._num_fim_before(number)
        draws = np.random.Philox(np.random.SeedSequence((self.seed, number)))
        order_J = np.argsort(draws.random_raw(num_documents), kind="stable")
        chosen_I = np.argsort(draws.random_raw(num_documents), kind="stable")[:num_fim]
        lengths_J = self.split.ends_J - self._starts_J
        # n tokens before eos leave n + 1 places for a cut, which is the length with eos.
        places_I = lengths_J[chosen_I].astype(np.uint64)
        first_I = draws.random_raw(num_fim) % places_I
        second_I = draws.random_raw(num_fim) % places_I
        prefix_ends_J = np.full(num_documents, -1, np.int64)
        middle_ends_J = np.full(num_documents, -1, np.int64)
        prefix_ends_J[chosen_I] = np.minimum(first_I, second_I)
        middle_ends_J[chosen_I] = np.maximum(first_I, second_I)
        lengths_J[chosen_I] += 3
        ends_J = np.cumsum(lengths_J[order_J])
        return Epoch(order_J, ends_J, prefix_ends_J[order_J], middle_ends_J[order_J])

    def _read_document(self, epoch: Epoch, slot: int, start: int, out_P: np.ndarray) -> None:
        """Fills `out_P` with the tokens of one document from `start` on."""
        document = int(epoch.order_J[slot])
        first, end = int(self._starts_J[document]), int(self.split.ends_J[document])
        prefix_end = first + int(epoch.prefix_ends_J[slot])
        middle_end = first + int(epoch.middle_ends_J[slot])
        if prefix_end < first:
            out_P[:] = self.split.read(first + start, first + start + len(out_P))
            return
        assert self.fim is not None
        begin, hole, fim_end = self.fim
        # A piece is one special token or a range of the stored stream.
        pieces = (
            begin,
            (first, prefix_end),
            hole,
            (middle_end, end - 1),
            fim_end,
            (prefix_end, middle_end),
            (end - 1, end),
        )
        at, stop = 0, start + len(out_P)
        for piece in pieces:
            source, size = (0, 1) if isinstance(piece, int) else (piece[0], piece[1] - piece[0])
            low, high = max(at, start), min(at + size, stop)
            if low < high:
                out_P[low - start : high - start] = (
                    piece
                    if isinstance(piece, int)
                    else self.split.read(source + low - at, source + high - at)
                )
            at += size
