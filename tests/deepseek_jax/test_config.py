"""Checks of sizes and runs, schedules, and runs as JSON."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax.config import (
    AdamW,
    ModelConfig,
    Phase,
    Precision,
    Run,
    Schedule,
    Yarn,
    differing_fields,
    from_json,
    to_json,
)
from tests.configs import TINY, make_run

# Each error must name the value and what is asked for.
BAD_SIZES = {
    "vocab_size": ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    "max_length": ({"max_length": -4}, "max_length=-4 must be at least 1"),
    "num_mtp": ({"num_mtp": -1}, "num_mtp=-1 must not be negative"),
    "num_shared_experts": ({"num_shared_experts": -2}, "num_shared_experts=-2 must not be negat"),
    "query_latent_dim": ({"query_latent_dim": 0}, "query_latent_dim=0 must be None or positive"),
    "dense-layers": ({"num_dense_layers": 5}, "num_dense_layers=5 must not exceed num_layers=4"),
    "rotary": ({"rotary_head_dim": 7}, "rotary_head_dim=7 must be even"),
    "score": ({"score": "relu"}, r"score='relu' must be one of \('sigmoid', 'softmax'\)"),
    "init_std": ({"init_std": float("nan")}, "init_std=nan must be positive and finite"),
    "groups": ({"num_groups": 5}, "num_experts=28 must be divisible by num_groups=5"),
    "kept-groups": ({"groups_per_token": 8}, "groups_per_token=8 must not exceed num_groups=7"),
    "top-k": (
        {"groups_per_token": 1},
        "experts_per_token=6 must not exceed the 4 experts of groups_per_token=1",
    ),
    "lone-experts": (
        {"num_groups": 28, "groups_per_token": 6},
        "num_groups=28 leaves 1 expert a group.*use fewer groups",
    ),
}
BAD_RUNS = {
    "steps": ({"steps": 0}, "steps=0 must be at least 1"),
    "max_skipped": ({"max_skipped": 0}, "max_skipped=0 must be at least 1"),
    "seed": ({"seed": -1}, "seed=-1 must be at least 0"),
    "fim_rate": ({"fim_rate": 1.5}, "fim_rate=1.5 must be between 0 and 1"),
    "ema_decay": ({"ema_decay": 1.0}, r"ema_decay=1.0 must be None or in \[0, 1\)"),
    "too-long": ({"seq_len": 65}, "seq_len=65 must not exceed max_length=64"),
    "too-short": ({"seq_len": 2}, "seq_len=2 must exceed num_mtp=2"),
    "batch": (
        {"batch_size": Schedule.constant(6)},
        "batch_size 6 must be a positive multiple of micro_batch=4",
    ),
    "ramp": (
        {"batch_size": Schedule((Phase(10, 2, 8),))},
        "batch_size 2 must be a positive multiple of micro_batch=4",
    ),
}


@pytest.mark.parametrize("changes, message", BAD_SIZES.values(), ids=list(BAD_SIZES))
def test_sizes_that_cannot_be_are_refused_with_their_value(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("changes, message", BAD_RUNS.values(), ids=list(BAD_RUNS))
def test_runs_that_cannot_be_are_refused_with_their_value(changes, message):
    with pytest.raises(ValueError, match=message):
        make_run(**changes)


def test_derived_sizes():
    assert (TINY.num_moe_layers, TINY.query_key_dim, TINY.cache_dim) == (3, 32, 42)
    assert (TINY.experts_per_group, TINY.shared_ffn_dim) == (4, 48)


def test_configurations_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.num_layers = 3
    with pytest.raises(TypeError):
        ModelConfig(104)


def test_named_precisions():
    assert Precision.of("fp32") == Precision()
    bf16 = Precision.of("bf16")
    assert (bf16.weights, bf16.activations, bf16.moments) == ("fp32", "bf16", "bf16")
    assert Precision.of("fp8").matmul == "fp8"
    own = Precision(activations="bf16", matmul="bf16")
    assert Precision.of(own) is own


def test_unknown_and_contradictory_precisions_are_refused():
    with pytest.raises(ValueError, match="unknown precision 'fp16': use fp32, bf16, fp8"):
        Precision.of("fp16")
    with pytest.raises(ValueError, match="matmul='fp32' needs activations='fp32', not 'bf16'"):
        Precision(activations="bf16")
    with pytest.raises(ValueError, match="matmul='bf16' needs activations='bf16'"):
        Precision(matmul="bf16")


# Schedules.


def test_a_constant_schedule_is_constant():
    schedule = Schedule.constant(0.3)
    assert [schedule.at(tokens) for tokens in (0, 1, 1e13)] == [np.float32(0.3)] * 3


def test_a_schedule_hits_both_ends_of_its_phases_and_keeps_its_last_value():
    schedule = Schedule((Phase(10, 0.0, 1.0), Phase(20, 1.0, 0.5, "cosine"), Phase(5, 0.2, 0.2)))
    assert schedule.length == 35
    at = [float(schedule.at(tokens)) for tokens in (0, 5, 10, 15, 20, 30, 34, 35, 1000)]
    quarter = 0.5 + 0.5 * (1 + np.cos(np.pi / 4)) / 2
    expected = [0, 0.5, 1, quarter, 0.75, 0.2, 0.2, 0.2, 0.2]
    np.testing.assert_allclose(at, expected, rtol=1e-6)


def test_a_phase_that_stays_as_it_is_is_exact_all_along():
    # 12 (1 - x) + 12 x is 11.999... for many x, and a step of so many sequences one too short.
    schedule = Schedule((Phase(1e9, 12, 12), Phase(1e9, 12, 24)))
    for tokens in np.arange(0, 1_000_000_000, 393_216):
        assert schedule.at(float(tokens)) == 12
    run = make_run(TINY, batch=12)
    run = dataclasses.replace(run, batch_size=schedule)
    assert {run.accumulation_at(n * 1536) for n in range(60)} == {1}


def test_a_phase_without_tokens_is_a_jump():
    schedule = Schedule((Phase(100, 0.3, 0.3), Phase(0, 0.1, 0.1)))
    assert float(schedule.at(99)) == np.float32(0.3)
    assert float(schedule.at(100)) == float(schedule.at(10**9)) == np.float32(0.1)


def test_a_schedule_is_the_same_when_traced():
    schedule = Schedule((Phase(7e9, 0.0, 2.2e-4), Phase(4e12, 2.2e-4, 2.2e-5, "cosine")))
    for tokens in (0.0, 1e9, 7e9, 2e12, 4.007e12, 1e13):
        traced = schedule.at(jnp.float32(tokens), jnp)
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(float(traced), float(schedule.at(tokens)), rtol=1e-5)


def test_schedules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"at least one phase: use Schedule.constant"):
        Schedule(())
    with pytest.raises(ValueError, match="a phase of -1 tokens must not be negative"):
        Schedule((Phase(-1, 0.0, 1.0),))
    for name in ("learning_rate", "gamma", "mtp_weight"):
        with pytest.raises(ValueError, match=f"{name} must be finite, not .*end=inf"):
            make_run(**{name: Schedule((Phase(1, 0.0, float("inf")),))})


def test_the_batch_ramp_grows_in_whole_micro_batches():
    run = make_run(batch_size=Schedule((Phase(1000, 4, 16),)))
    # 4 + 12 * tokens / 1000 sequences, rounded down to multiples of 4.
    tokens = (0, 333, 334, 666, 667, 999, 1000, 5000)
    assert [run.accumulation_at(n) for n in tokens] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_position_is_the_sum_of_the_batches_before():
    run = make_run(seq_len=10, steps=40, batch_size=Schedule((Phase(1000, 4, 16),)))
    position = 0
    for step in range(run.steps):
        assert run.position_at(step) == position
        position += 4 * run.accumulation_at(position * 10)
    assert position > 40 * 4
    constant = make_run(batch=8)
    assert [constant.position_at(step) for step in (0, 1, 1000)] == [0, 8, 8000]


# JSON.


def full_run():
    """A run in which every optional field is set."""
    config = dataclasses.replace(TINY, yarn=Yarn(factor=8.0, original_length=16, mscale=0.7))
    return make_run(
        config,
        precision=Precision.of("bf16"),
        optimizer=AdamW(beta2=0.99),
        ema_decay=0.99,
        data=("a", "b"),
        tokenizer="tokenizer.json",
        learning_rate=Schedule((Phase(3, 0.0, 1e-3), Phase(4, 1e-3, 1e-4, "cosine"))),
    )


@pytest.mark.parametrize("run", [make_run(), full_run()], ids=["defaults", "everything"])
def test_a_run_survives_json(run):
    assert from_json(Run, json.loads(json.dumps(to_json(run)))) == run


def test_unknown_and_missing_fields_are_named():
    stored = to_json(full_run())
    stored["config"]["yarn"]["speed"] = 3
    with pytest.raises(ValueError, match="unknown field config.yarn.speed: Yarn has factor, orig"):
        from_json(Run, stored)
    stored = to_json(full_run())
    del stored["config"]["num_heads"]
    with pytest.raises(ValueError, match="missing field config.num_heads of ModelConfig"):
        from_json(Run, stored)


def test_differing_fields_lists_every_leaf_with_both_values():
    run = full_run()
    other = dataclasses.replace(
        run, seed=3, config=dataclasses.replace(run.config, route_scale=1.5)
    )
    assert differing_fields(run, run) == []
    assert differing_fields(run, other) == ["config.route_scale: 2.5 -> 1.5", "seed: 0 -> 3"]


def test_a_run_is_complete_without_the_experiments():
    assert {field.name for field in dataclasses.fields(ds.Run)} >= {
        "config", "precision", "optimizer", "learning_rate", "batch_size", "gamma", "mtp_weight",
    }  # fmt: skip
