"""Sequences for training and validation, each a pure function of its number.

The state of the input is one integer, the number of sequences seen: a run that goes on, or one
spread over any number of hosts, asks for the numbers it needs and gets the same tokens. Nothing
is carried from one call to the next, so there is no iterator to save, and a thread that works
ahead (`prefetch`) cannot change what a step sees. This is all that grain's samplers and
checkpointed iterators would be used for here, and it needs numpy alone.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from experiments.data.packing import Packing
from experiments.data.shards import TokenShards, TokenSplit

Item = TypeVar("Item")
Value = TypeVar("Value")
END = object()


class BatchSource:
    """The training stream cut into windows, which are dealt out in a random order, without end.

    Window w holds tokens [w T, w T + T] of the stream, T + 1 of them: the last, which is only
    predicted, is the first input of window w + 1. So each token is predicted once and none is
    dropped; a window goes on into the next document, and into the next epoch. Sequences are the
    windows of an epoch's length, shuffled, then those of the next: neighbouring windows of one
    document in one batch would teach little. With `segments`, equal numbers mark one document,
    counted from 0 in each sequence.

    Args:
      fim_rate: share of documents filled in the middle, in each epoch another choice.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        seed: int,
        fim_rate: float = 0.1,
        segments: bool = False,
    ):
        if seq_len < 1:
            raise ValueError(f"{seq_len=} must be at least 1")
        if seed < 0:
            raise ValueError(f"{seed=} must be at least 0")
        if not 0 <= fim_rate <= 1:
            raise ValueError(f"{fim_rate=} must lie between 0 and 1")
        if fim_rate and shards.fim is None:
            raise ValueError(f"{fim_rate=} needs a tokenizer with FIM tokens; set fim_rate=0")
        if not shards.train.num_documents:
            raise ValueError("the shards hold no training documents; give data to train on")
        self.seq_len = seq_len
        self.segments = segments
        self.seed = seed
        self._packing = Packing(shards.train, seed=seed, fim=shards.fim, fim_rate=fim_rate)
        self._per_shuffle = max(1, self._packing.epoch_start(1) // seq_len)

    def sequences(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Sequences start, ..., start + count - 1."""
        if start < 0 or count < 1:
            raise ValueError(f"{start=} must be at least 0 and {count=} at least 1")
        tokens_BT = np.empty((count, self.seq_len + 1), np.int32)
        segments_BT = np.empty_like(tokens_BT)
        for row, window in enumerate(self.windows(start, count)):
            first = int(window) * self.seq_len
            tokens_BT[row], segments_BT[row] = self._packing.read(first, first + self.seq_len + 1)
        if not self.segments:
            return {"tokens": tokens_BT}
        return {"tokens": tokens_BT, "segments": segments_BT - segments_BT[:, :1]}

    def windows(self, start: int, count: int) -> np.ndarray:
        """The windows of the stream that sequences start, ..., start + count - 1 hold."""
        numbers = np.arange(start, start + count, dtype=np.int64)
        rounds, within = np.divmod(numbers, self._per_shuffle)
        windows = np.empty_like(numbers)
        for turn in np.unique(rounds):
            here = rounds == turn
            shuffled = permute(within[here], self._per_shuffle, (self.seed, int(turn)))
            windows[here] = turn * self._per_shuffle + shuffled
        return windows

    def epochs_seen(self, num_sequences: int) -> float:
        """How often the corpus has been gone through after so many sequences."""
        position = num_sequences * self.seq_len
        epoch = self._packing.epoch_of(position)
        first = self._packing.epoch_start(epoch)
        return epoch + (position - first) / (self._packing.epoch_start(epoch + 1) - first)


class ValidationBatches(Sequence):
    """Batches in which every token of a split, end-of-sentence included, is scored exactly once.

    Documents stand one after the other as stored, and the first token is predicted from an eos.
    A batch is {"tokens": int32 [B, T + 1], "mask": bool [B, T]} (and "segments"); its mask is
    True where tokens[:, 1:] is to be scored, so bits per byte are the sum of their losses in
    nats / (ln 2 * num_bytes). The last batch is filled up with eos, masked.

    Args:
      context: tokens at the start of each sequence that were scored in the one before and serve
        as its past only; 0 is cheapest, seq_len / 2 costs twice and predicts better.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        eos: int,
        seq_len: int,
        batch_size: int,
        context: int = 0,
        segments: bool = False,
    ):
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"{seq_len=} and {batch_size=} must be at least 1")
        if not 0 <= context < seq_len:
            raise ValueError(f"{context=} must be at least 0 and below {seq_len=}")
        if not split.num_documents:
            raise ValueError("the shards hold no validation documents; hold some out")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.context = context
        self.segments = segments
        self.num_targets = split.num_tokens
        self.num_bytes = split.num_bytes
        self._split = split
        self._eos = eos

    def __len__(self) -> int:
        stride = self.seq_len - self.context
        num_rows = 1 + max(0, -(-(self.num_targets - self.seq_len) // stride))
        return -(-num_rows // self.batch_size)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        if not 0 <= number < len(self):
            raise IndexError(f"{number=} of {len(self)} validation batches")
        stride = self.seq_len - self.context
        first = number * self.batch_size * stride
        count = (self.batch_size - 1) * stride + self.seq_len + 1
        # Position p of the stored tokens is position p + 1 here, behind the eos.
        stored_P = self._split.read(max(first - 1, 0), first - 1 + count)
        tokens_P = np.full(count, self._eos, np.int32)
        tokens_P[first == 0 :][: len(stored_P)] = stored_P
        targets_BT = first + _windows(np.arange(count), self.seq_len, stride)[:, 1:]
        mask_BT = targets_BT <= self.num_targets
        # The very first sequence has no sequence before it that scored its start.
        mask_BT[number == 0 :, : self.context] = False
        batch = {"tokens": _windows(tokens_P, self.seq_len, stride), "mask": mask_BT}
        if self.segments:
            positions_P = np.arange(first - 1, first - 1 + count)
            segments_P = np.searchsorted(self._split.ends_J, positions_P, side="right") + 1
            # The first eos ends a document that is not there.
            segments_P[positions_P < 0] = 0
            batch["segments"] = _windows(segments_P.astype(np.int32), self.seq_len, stride)
            batch["segments"] -= batch["segments"][:, :1]
        return batch


def permute(numbers: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a random permutation of range(size) takes each number, without listing all of it.

    A Feistel network permutes the next power of four; numbers that fall outside go through it
    again until they come back inside.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64)

    def once(values):
        left, right = values >> half, values & mask
        for round_key in keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed = (mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(32)
            left, right = right, left ^ (mixed & mask)
        return (left << half) | right

    values = once(numbers.astype(np.uint64))
    while (outside := values >= np.uint64(size)).any():
        values[outside] = once(values[outside])
    return values.astype(np.int64)


def prefetch(
    function: Callable[[Item], Value], items: Iterable[Item], *, depth: int = 2
) -> Iterator[Value]:
    """Yields function(item) for each item, made up to `depth` ahead by one thread.

    An error of the function is raised where its value would have come. The thread ends with the
    iterator.
    """
    if depth < 1:
        raise ValueError(f"{depth=} must be at least 1")
    return _prefetched(function, items, depth)


def _prefetched(function, items, depth):
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((function(item), None)):
                    return
            put((None, END))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error = ready.get()
            if error is END:
                return
            if error is not None:
                raise error
            yield value
    finally:
        stopped.set()
        thread.join()


def _windows(values_P: np.ndarray, seq_len: int, stride: int) -> np.ndarray:
    """Rows of seq_len + 1 values, each `stride` after the one before."""
    return np.lib.stride_tricks.sliding_window_view(values_P, seq_len + 1)[::stride].copy()
