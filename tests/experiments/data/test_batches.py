"""Sequences depend on their number alone; validation scores every token once."""

import threading
import time

import numpy as np
import pytest

from experiments import data
from experiments.data import batches

LENGTHS = [5, 0, 1, 30, 2, 2, 17, 9, 1, 100, 4, 3]


def stream_of(source, num_sequences):
    """The stream that sequences are cut from, put together again."""
    order = np.argsort(source.windows(0, num_sequences))
    tokens_BT = source.sequences(0, num_sequences)["tokens"][order]
    return np.append(tokens_BT[:, :-1].ravel(), tokens_BT[-1, -1])


def shuffle_length(source):
    """Windows that are shuffled together: as many as one epoch has."""
    return next(n for n in range(1, 10_000) if set(source.windows(0, n)) == set(range(n)))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_a_permutation_takes_every_number_once_and_differs_by_key(size):
    numbers = np.arange(size)
    first, second = (batches.permute(numbers, size, (0, turn)) for turn in (0, 1))
    np.testing.assert_array_equal(np.sort(first), numbers)
    np.testing.assert_array_equal(np.sort(second), numbers)
    if size > 16:
        assert not np.array_equal(first, second)
        # Neighbours are torn apart: a random permutation keeps about 2 of them together.
        assert (np.abs(np.diff(first)) == 1).sum() < 0.02 * size + 3


def test_every_window_of_an_epoch_is_dealt_out_once_before_the_next(numbered):
    source = data.BatchSource(numbered([40, 30, 20, 80]), seq_len=8, seed=3)
    length = shuffle_length(source)
    assert length == (40 + 30 + 20 + 80 + 4) // 8
    for turn in range(3):
        windows = source.windows(turn * length, length)
        assert set(windows) == set(range(turn * length, (turn + 1) * length))
        assert not np.array_equal(windows, np.sort(windows))


def test_the_last_target_is_the_next_windows_first_input(numbered):
    source = data.BatchSource(numbered(LENGTHS), seq_len=16, seed=0)
    count = 3 * shuffle_length(source)
    tokens_BT = source.sequences(0, count)["tokens"]
    assert tokens_BT.shape == (count, 17) and tokens_BT.dtype == np.int32
    tokens_BT = tokens_BT[np.argsort(source.windows(0, count))]
    np.testing.assert_array_equal(tokens_BT[1:, 0], tokens_BT[:-1, -1])


def test_sequences_depend_on_their_number_alone(numbered):
    shards = numbered(LENGTHS)
    whole = data.BatchSource(shards, seq_len=16, seed=0).sequences(0, 60)["tokens"]
    source = data.BatchSource(shards, seq_len=16, seed=0)
    for number in (59, 3, 30, 3, 0):
        np.testing.assert_array_equal(source.sequences(number, 1)["tokens"][0], whole[number])


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 6])
def test_any_number_of_hosts_sees_the_same_batches(shards, num_hosts):
    batch_size, share = 12, 12 // num_hosts
    expected = data.BatchSource(shards, seq_len=32, seed=7, segments=True)
    hosts = [data.BatchSource(shards, seq_len=32, seed=7, segments=True) for _ in range(num_hosts)]
    for step in (0, 1, 50):
        parts = [
            source.sequences(step * batch_size + host * share, share)
            for host, source in enumerate(hosts)
        ]
        for key, whole in expected.sequences(step * batch_size, batch_size).items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole)


def test_a_new_process_goes_on_where_the_old_one_stopped(shards):
    old = data.BatchSource(shards, seq_len=32, seed=7)
    before = [old.sequences(step * 8, 8)["tokens"] for step in range(6)]
    new = data.BatchSource(shards, seq_len=32, seed=7)
    for step in range(3, 6):
        np.testing.assert_array_equal(new.sequences(step * 8, 8)["tokens"], before[step])


def test_seeds_give_different_orders(numbered):
    shards = numbered(LENGTHS)
    first, second = (
        data.BatchSource(shards, seq_len=16, seed=seed).sequences(0, 8)["tokens"] for seed in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_a_sequence_goes_on_into_the_next_epochs(numbered):
    shards = numbered([3, 2])
    source = data.BatchSource(shards, seq_len=70, seed=0, fim_rate=0)
    tokens_P = source.sequences(0, 1)["tokens"][0]
    epochs = np.split(tokens_P[:70], 10)
    assert all(sorted(epoch) == [0, 0, 10, 11, 12, 13, 14] for epoch in epochs)
    assert source.epochs_seen(1) == pytest.approx(10)


def test_stored_documents_come_in_whole_and_end_with_eos(corpus, tokenizer, shards):
    source = data.BatchSource(shards, seq_len=64, seed=0, fim_rate=0)
    num_sequences = shuffle_length(source)
    texts = tokenizer.decode(stream_of(source, num_sequences)).split(tokenizer.decode([0]))
    assert len(texts) > 30 and set(texts[:-1]) <= {text for _, text in corpus.train}


def test_segments_number_the_documents_of_a_sequence(numbered):
    shards = numbered(LENGTHS)
    batch = data.BatchSource(shards, seq_len=16, seed=0, segments=True).sequences(3, 50)
    tokens_BT, segments_BT = batch["tokens"], batch["segments"]
    assert segments_BT.dtype == np.int32 and segments_BT.shape == tokens_BT.shape
    # A new number follows each eos and nothing else.
    np.testing.assert_array_equal(np.diff(segments_BT, axis=1), tokens_BT[:, :-1] == shards.eos)
    assert not segments_BT[:, 0].any()


def test_segments_are_given_only_when_asked_for(numbered):
    batch = data.BatchSource(numbered(LENGTHS), seq_len=16, seed=0).sequences(0, 2)
    assert list(batch) == ["tokens"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"seed": -1}, "seed=-1"),
        ({"fim_rate": 1.5}, "fim_rate=1.5"),
        ({"fim_rate": -0.1}, "fim_rate=-0.1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_sources_are_refused(numbered, change, reason):
    with pytest.raises(ValueError, match=reason):
        data.BatchSource(numbered(LENGTHS), **({"seq_len": 8, "seed": 0} | change))


def test_fim_without_its_tokens_is_refused(numbered):
    shards = numbered(LENGTHS)
    plain = data.TokenShards(**(vars(shards) | {"fim": None}))
    with pytest.raises(ValueError, match="fim_rate=0.1 needs a tokenizer with FIM tokens"):
        data.BatchSource(plain, seq_len=8, seed=0)
    data.BatchSource(plain, seq_len=8, seed=0, fim_rate=0).sequences(0, 1)


def test_training_on_no_documents_is_refused(numbered):
    empty = data.TokenSplit((), np.zeros(0, np.int64), 0)
    shards = data.TokenShards(**(vars(numbered(LENGTHS)) | {"train": empty}))
    with pytest.raises(ValueError, match="no training documents"):
        data.BatchSource(shards, seq_len=8, seed=0)


@pytest.mark.parametrize(("start", "count"), [(-1, 4), (0, 0)])
def test_impossible_sequence_numbers_are_refused(numbered, start, count):
    with pytest.raises(ValueError, match="start=.*count="):
        data.BatchSource(numbered(LENGTHS), seq_len=8, seed=0).sequences(start, count)


SIZES = [(16, 4, 0), (16, 4, 8), (16, 3, 15), (16, 1, 5), (1, 7, 0), (500, 2, 100), (186, 2, 9)]


@pytest.mark.parametrize(("seq_len", "batch_size", "context"), SIZES)
def test_every_validation_token_is_scored_once(numbered, seq_len, batch_size, context):
    split = numbered(LENGTHS).validation
    batches = data.ValidationBatches(
        split, eos=0, seq_len=seq_len, batch_size=batch_size, context=context
    )
    scored = []
    for batch in batches:
        assert batch["tokens"].shape == (batch_size, seq_len + 1)
        assert batch["mask"].shape == (batch_size, seq_len)
        assert batch["tokens"].dtype == np.int32 and batch["mask"].any()
        scored.append(batch["tokens"][:, 1:][batch["mask"]])
    np.testing.assert_array_equal(np.concatenate(scored), split.read(0, split.num_tokens))
    assert batches.num_targets == split.num_tokens and batches.num_bytes == split.num_bytes


@pytest.mark.parametrize("context", [0, 8])
def test_validation_predicts_from_what_comes_before(numbered, context):
    split = numbered(LENGTHS).validation
    stream_P = np.append([0], split.read(0, split.num_tokens)).astype(int)
    followers = dict(zip(stream_P[1:], stream_P[:-1], strict=True))
    first, *_ = batches = data.ValidationBatches(
        split, eos=0, seq_len=16, batch_size=3, context=context
    )
    np.testing.assert_array_equal(first["tokens"][0], stream_P[:17])
    for batch in batches:
        inputs_P = batch["tokens"][:, :-1][batch["mask"]]
        targets_P = batch["tokens"][:, 1:][batch["mask"]]
        for given, target in zip(inputs_P, targets_P, strict=True):
            assert target == 0 or followers[target] == given


def test_every_scored_token_but_the_first_ones_has_its_context(numbered):
    split = numbered([2000]).validation
    batches = data.ValidationBatches(split, eos=0, seq_len=32, batch_size=4, context=24)
    masks_BT = np.concatenate([batch["mask"] for batch in batches])
    assert masks_BT[0].all() and not masks_BT[1:, :24].any()


def test_validation_batches_can_be_taken_in_any_order(numbered):
    batches = data.ValidationBatches(
        numbered(LENGTHS).validation, eos=0, seq_len=8, batch_size=2, segments=True
    )
    in_order = list(batches)
    assert len(in_order) == len(batches)
    for key, value in batches[3].items():
        np.testing.assert_array_equal(value, in_order[3][key])
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_validation_segments_follow_the_documents(numbered):
    split = numbered(LENGTHS).validation
    for batch in data.ValidationBatches(
        split, eos=0, seq_len=16, batch_size=3, context=4, segments=True
    ):
        # The token before a scored target belongs to an earlier document if and only if it is eos.
        steps_BT = np.diff(batch["segments"], axis=1)[batch["mask"]]
        np.testing.assert_array_equal(steps_BT, (batch["tokens"][:, :-1] == 0)[batch["mask"]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"context": 8}, "context=8"),
    ],
    ids=["seq_len", "batch_size", "context"],
)
def test_impossible_validation_batches_are_refused(numbered, change, reason):
    arguments = {"eos": 0, "seq_len": 8, "batch_size": 2} | change
    with pytest.raises(ValueError, match=reason):
        data.ValidationBatches(numbered(LENGTHS).validation, **arguments)


def test_validation_on_no_documents_is_refused():
    empty = data.TokenSplit((), np.zeros(0, np.int64), 0)
    with pytest.raises(ValueError, match="no validation documents"):
        data.ValidationBatches(empty, eos=0, seq_len=8, batch_size=2)


def test_prefetching_gives_the_values_in_order():
    assert list(data.prefetch(lambda number: number**2, range(20))) == [n**2 for n in range(20)]


def test_prefetching_works_ahead_by_no_more_than_its_depth():
    made = []
    values = data.prefetch(made.append, range(100), depth=3)
    next(values)
    time.sleep(0.05)
    # One taken, three waiting, one in the hand of the thread.
    assert len(made) == 5
    values.close()


def test_an_error_comes_where_its_value_would():
    def fail_at_two(number):
        if number == 2:
            raise OSError("no such batch")
        return number

    values = data.prefetch(fail_at_two, range(5))
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(OSError, match="no such batch"):
        next(values)


def test_the_thread_ends_with_the_iterator():
    values = data.prefetch(lambda number: number, range(10**9))
    next(values)
    values.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_a_depth_of_zero_is_refused():
    with pytest.raises(ValueError, match="depth=0"):
        data.prefetch(int, range(3), depth=0)
