"""`bench balance`: its statistics on counts made by hand, and a few real steps."""

import dataclasses
import json

import numpy as np
import pytest

import deepseek_jax as ds
from experiments import recipes
from experiments.bench import balance
from experiments.bench.balance import BenchBalanceArgs, Trained
from tests.configs import TINY, compiled, make_state


def trained(bias, seed, busiest, validation_loss=3.0, steps=150):
    """A run of two layers and four experts whose worst layer has `busiest` in the last steps."""
    even, worst = [100] * 4, [100 * busiest, *[(400 - 100 * busiest) / 3] * 3]
    early, late = [[400, 0, 0, 0], even], [even, worst]
    counts = np.asarray([early] * (steps - balance.LAST) + [late] * balance.LAST)
    return Trained(bias, seed, counts, np.linspace(5, 3, steps), validation_loss)


def verdicts(with_bias, without, losses=(3.0, 3.0)):
    runs = [trained(True, i, x, losses[0]) for i, x in enumerate(with_bias)]
    runs += [trained(False, i, x, losses[1]) for i, x in enumerate(without)]
    return [row["holds"] for row in balance.judge(runs)]


def test_load_is_added_up_over_the_last_steps_only():
    row = balance.figures(trained(True, 0, 1.3))
    assert row["busiest/mean"] == pytest.approx(1.3)
    assert row["worst layer"] == 1
    assert row["idlest/mean"] == pytest.approx(0.9)
    assert row["busiest/mean of a step"] == pytest.approx(1.3)


def test_steps_that_differ_even_out_in_the_sum_but_not_in_the_mean_of_steps():
    counts = np.asarray([[[4, 0]], [[0, 4]]])
    row = balance.figures(Trained(True, 0, counts, np.ones(2), 1.0))
    assert row["busiest/mean"] == 1.0
    assert row["busiest/mean of a step"] == 2.0


@pytest.mark.parametrize(
    "with_bias, without, losses, expected",
    [
        ([1.1, 1.2, 1.15], [2.0, 2.2, 2.1], (3.0, 3.0), [True, True, True]),
        ([1.1, 1.2, 1.15], [2.0, 3.2, 2.1], (3.0, 3.0), [False, True, True]),  # the spread is 1.2
        ([1.1, 1.5, 1.15], [2.4, 2.2, 2.1], (3.0, 3.0), [True, False, True]),
        ([1.1, 1.2, 1.15], [1.1, 2.2, 2.1], (3.0, 3.0), [False, True, True]),
        ([1.1, 1.2, 1.15], [2.0, 2.2, 2.1], (3.014, 3.0), [True, True, True]),
        ([1.1, 1.2, 1.15], [2.0, 2.2, 2.1], (3.016, 3.0), [True, True, False]),
    ],
    ids=["good", "spread", "busy", "one-seed", "loss-within", "loss-worse"],
)
def test_verdicts(with_bias, without, losses, expected):
    assert verdicts(with_bias, without, losses) == expected


def small(steps=None):
    """Few, small layers: compiling is all the time that this takes."""
    config = dataclasses.replace(
        TINY, num_layers=1, num_dense_layers=0, num_mtp=0, vocab_size=320, num_experts=8,
        num_groups=1, groups_per_token=1, experts_per_token=2,
    )
    return ds.Run(
        config=config,
        steps=steps,
        seq_len=16,
        micro_batch=4,
        batch_size=ds.Schedule.constant(4),
        learning_rate=ds.Schedule.constant(1e-3),
        gamma=ds.Schedule.constant(0.05),
    )


class QuicklyCompiled:
    """The step of a run, compiled without most optimisations."""

    def __init__(self, run, state):
        self.run, self.state, self.program = run, state, None

    def __call__(self, state, batch):
        if self.program is None:
            self.program = compiled(ds.make_train_step(self.run), self.state, batch)
        return self.program(state, batch)


def test_a_few_steps_give_runs_a_plot_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipes.RECIPES, "small", small)
    monkeypatch.setattr(balance, "init_state", lambda run: make_state(run, run.seed))
    monkeypatch.setattr(balance, "CompiledSteps", QuicklyCompiled)
    for i in range(8):
        text = f"document {i}\n" + "".join(f"{j * j} is {j} squared\n" for j in range(i, i + 60))
        (tmp_path / f"{i}.txt").write_text(text)
    data = tuple(str(path) for path in sorted(tmp_path.glob("*.txt")))
    path = tmp_path / "balance.json"
    balance.bench_balance(BenchBalanceArgs("small", steps=3, seeds=2, data=data, json=path))
    written = json.loads(path.read_text())
    runs = [(row["run"], row["seed"]) for row in written["runs"]]
    assert runs == [(arm, seed) for arm in balance.ARMS.values() for seed in (0, 1)]
    assert len(written["verdicts"]) == 3
    for curve in written["curves"]:
        assert len(curve["loss"]) == 3 and np.isfinite(curve["loss"]).all()
    # The first step has no bias yet, later ones differ; seeds differ from the start.
    with_bias, without = written["curves"][0], written["curves"][2]
    assert with_bias["loss"][0] == without["loss"][0]
    assert with_bias["busiest_over_mean"] != without["busiest_over_mean"]
    assert written["curves"][0]["loss"][0] != written["curves"][1]["loss"][0]
    assert (tmp_path / "balance.svg").read_text().count("<svg") == 1
    printed = capsys.readouterr().out
    assert "step 12/12" in printed and "without, seed 1" in printed and "verdicts" in printed


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="--seeds 0"):
        balance.bench_balance(BenchBalanceArgs(seeds=0))
