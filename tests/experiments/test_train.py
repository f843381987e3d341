"""The training loop: batches, measures, and what it does when numbers stop being finite."""

import dataclasses
import json
import math

import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax.config import Phase, Schedule
from deepseek_jax.counts import train_flops_per_token
from experiments import recipes, train
from experiments.data import BatchSource, open_shards
from experiments.run_directory import RunDirectory
from tests.experiments import runs

TINY = recipes.tiny(10)


# Batches.


def ramped(**changes):
    """From 4 to 16 sequences over the first 2000 tokens, in micro-batches of 4."""
    fields = dict(steps=30, seq_len=20, micro_batch=4,
                  batch_size=Schedule((Phase(2000, 4, 16), Phase(0, 16, 16))))
    return dataclasses.replace(TINY, **fields | changes)


def test_a_batch_ramp_takes_every_sequence_once_in_whole_micro_batches():
    run = ramped()
    plans = list(train.plan_batches(run, 0))
    assert len(plans) == run.steps
    position = 0
    for begin, accumulation in plans:
        assert begin == position
        # As the schedule says, rounded down to whole micro-batches.
        planned = 4 + 12 * min(begin * run.seq_len / 2000, 1)
        assert accumulation == int(planned) // 4
        position += accumulation * run.micro_batch
    sizes = [accumulation for _, accumulation in plans]
    assert sizes == sorted(sizes) and set(sizes) == {1, 2, 3, 4}
    assert position == run.position_at(run.steps)


@pytest.mark.parametrize("begin", [0, 1, 7, 29, 30])
def test_a_batch_ramp_goes_on_where_it_was(begin):
    run = ramped()
    assert list(train.plan_batches(run, begin)) == list(train.plan_batches(run, 0))[begin:]


def test_a_batch_is_its_sequences_in_order(trained):
    run = ramped()
    source = BatchSource(open_shards(trained.run / "data"), seq_len=20, seed=3, segments=True)
    batch = train.make_batch(run, source, 12, 2)
    assert set(batch) == {"tokens", "segments"} and batch["tokens"].shape == (2, 4, 21)
    for name, array in source.sequences(12, 8).items():
        np.testing.assert_array_equal(batch[name].reshape(8, 21), array)


def test_the_memory_of_a_later_batch_is_asked_for_with_more_micro_batches(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "planned_bytes", seen.append)
    monkeypatch.setattr(train.CompiledSteps, "_for", lambda self, batch: batch)
    steps = train.CompiledSteps(ramped(), np.zeros(()))
    first = {"tokens": np.zeros((1, 4, 21), np.int32), "segments": np.zeros((1, 4, 21), np.uint8)}
    steps.memory(first, 4)
    (asked,) = seen
    assert {name: (x.shape, x.dtype) for name, x in asked.items()} == {
        "tokens": ((4, 4, 21), np.int32), "segments": ((4, 4, 21), np.uint8)
    }


@pytest.mark.slow
def test_a_ramp_trains_end_to_end(trained, monkeypatch, tmp_path):
    # The command line sets constant sizes only; a recipe may have a ramp.
    def ramp(steps):
        small = RunDirectory(trained.run).read_run()
        schedule = Schedule((Phase(160, 2, 4), Phase(0, 4, 4)))
        return dataclasses.replace(small, steps=steps, batch_size=schedule)

    monkeypatch.setitem(recipes.RECIPES, "ramp", ramp)
    monkeypatch.setattr("experiments.launch.finish", lambda *args, **kwargs: None)
    planned, bytes_of = [], train.planned_bytes
    keep = lambda compiled: planned.append(bytes_of(compiled)) or planned[-1]
    monkeypatch.setattr(train, "planned_bytes", keep)
    words = ["launch", "ramp", "--run", tmp_path / "run", "--data", trained.run / "data"]
    code, out, err = runs.call(*words, "--steps", 7)
    assert (code, err) == (0, "")
    assert "40 to 80 tokens" in out
    # The first step and the largest, which is compiled before training.
    assert len(planned) == 2 and planned[0] < planned[1]
    tokens = [entry["tokens"] for entry in runs.metrics(tmp_path / "run")]
    assert np.diff([0, *tokens]).tolist() == [40, 40, 40, 40, 80, 80, 80]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [((), (0.1, True, 0)), (("fim_rate=0.5", "mask_documents=False", "seed=4"), (0.5, False, 4))],
    ids=["defaults", "changed"],
)
def test_the_settings_of_the_data_reach_it(trained, monkeypatch, tmp_path, settings, wanted):
    class Seen(Exception):
        pass

    def source(shards, *, seq_len, seed, fim_rate, segments):
        raise Seen(seq_len, fim_rate, segments, seed)

    monkeypatch.setattr("experiments.train.BatchSource", source)
    words = runs.launch_words(tmp_path / "run", trained.run / "data", settings=settings)
    with pytest.raises(Seen) as seen:
        runs.call(*words)
    assert seen.value.args == (20, *wanted)


# Measures.


def test_operations_of_a_token_by_hand():
    config = ds.ModelConfig(
        vocab_size=1000, model_dim=8, num_layers=3, num_dense_layers=1, num_heads=2,
        content_head_dim=5, rotary_head_dim=4, value_head_dim=3, query_latent_dim=6,
        kv_latent_dim=7, dense_ffn_dim=11, expert_ffn_dim=10, num_experts=16,
        num_shared_experts=2, experts_per_token=3, num_mtp=2,
    )  # fmt: skip
    attention = 6 * 8 + 2 * 9 * 6 + 11 * 8 + 2 * (5 + 3) * 7 + 8 * 2 * 3
    matrices = 3 * attention + 3 * 8 * 11 + 2 * (3 + 2) * 3 * 8 * 10 + 1000 * 8
    scores = 3 * 2 * 2 * 64 * (9 + 3)  # three layers, all pairs
    counted = lambda causal, mtp: train_flops_per_token(config, 64, causal=causal, mtp=mtp)
    assert counted(False, False) == 6 * matrices + 3 * scores
    assert counted(True, False) == 6 * matrices + 3 * scores / 2
    module = 2 * 8 * 8 + attention + (3 + 2) * 3 * 8 * 10 + 1000 * 8
    assert counted(True, True) - counted(True, False) == 2 * (6 * module + 3 * scores / 3 / 2)


def test_utilisation_is_operations_done_over_operations_possible(monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(train, "peak_flops", lambda kind: 1e12)
    measure = train.Measure(TINY, bytes_per_token=4.0, num_devices=4)
    counts_LE = np.array([[1, 1, 1, 1], [3, 1, 0, 0]], np.int32)
    metrics = {"loss": np.float32(2.0), "expert_counts_LE": counts_LE,
               "bad_tensor": np.int32(-1), "grad_norm": np.float32(1.5)}
    entry = measure.entry(7, (3, 5, TINY.seq_len + 1), metrics)
    rate = 3 * 5 * TINY.seq_len / 2.0
    assert entry["seconds"] == 2.0 and entry["tokens_per_second"] == rate
    for name, causal in (("mfu_causal", True), ("mfu_full", False)):
        flops = train_flops_per_token(TINY.config, TINY.seq_len, causal=causal, mtp=True)
        assert entry[name] == pytest.approx(rate * flops / 4e12)
    assert entry["mfu_causal"] < entry["mfu_full"]
    assert entry["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 4)
    assert entry["busiest_over_mean"] == 3.0
    assert entry["expert_load_LE"] == [[1, 1, 1, 1], [3, 1, 0, 0]]
    assert "bad_tensor" not in entry and "expert_counts_LE" not in entry


def test_large_expert_loads_are_written_now_and_then():
    measure = train.Measure(TINY, bytes_per_token=4.0)
    counts_LE = np.ones((58, 256), np.int32)  # V3's: 14848 elements
    entry = lambda step: measure.entry(
        step, (1, 1, 3), {"loss": np.float32(1), "expert_counts_LE": counts_LE}
    )
    assert ["expert_load_LE" in entry(step) for step in (1, 2, 3, 4, 5, 6)] == [
        False, False, True, False, False, True,
    ]  # fmt: skip


# Numbers that are not finite.


def test_a_run_whose_numbers_are_not_finite_stops_and_names_the_tensor(trained, tmp_path):
    run = tmp_path / "run"
    words = runs.launch_words(
        run, trained.run / "data", settings=("learning_rate=1e30", "max_skipped=3")
    )
    code, _, err = runs.call(*words)
    assert code == 2 and err.count("\n") == 1, err
    for part in ("3 steps in a row were not finite", "the gradient of ", "lower the learning rate"):
        assert part in err
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The step before the streak was finite; its update was not survivable.
    assert [entry["skipped_in_row"] for entry in entries][-4:] == [0, 1, 2, 3]
    assert entries[-1]["grad_norm"] is None and entries[-1]["skipped"] == 3
    assert not (run / "summary.json").exists()
