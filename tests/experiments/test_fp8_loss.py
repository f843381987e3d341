"""`bench fp8_loss`: its statistics on curves made by hand, and two real pieces of a few steps."""

import dataclasses
import json

import numpy as np
import pytest

import deepseek_jax as ds
from experiments import recipes
from experiments.bench import fp8_loss, pieces
from experiments.bench.fp8_loss import BenchFp8LossArgs, Piece
from tests.configs import WIDE


def curve(piece, factor=1.0, points=8):
    """A validation curve that falls from 4 to 3, times a factor."""
    losses = factor * np.linspace(4, 3, points)
    return {**piece._asdict(), "validation": list(enumerate(losses.tolist(), start=1)),
            "steps": points, "tokens": 1000 * points, "active": 1, "card": "cpu",
            "seconds": 1.0, "skipped": 0, "loss": losses.tolist()}


def named(*curves):
    return {Piece(c["precision"], c["seed"], c["attention"]).name: c for c in curves}


def test_a_gap_is_relative_and_averaged_over_the_last_quarter():
    gap = pieces.gap(curve(Piece("fp8", 0), 1.01), curve(Piece("bf16", 0)))
    assert gap == pytest.approx(0.01)
    late = curve(Piece("fp8", 0))
    late["validation"][:4] = [[step, 9.0] for step, _ in late["validation"][:4]]
    assert pieces.gap(late, curve(Piece("bf16", 0))) > 0.1  # the average remembers


def test_the_average_forgets_a_tenth_a_point():
    assert pieces.ema([1.0, 1.0, 1.0]).tolist() == pytest.approx([1, 1, 1])
    assert pieces.ema([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)


@pytest.mark.parametrize("factors, holds", [((1.002, 0.999), True), ((1.002, 1.004), False)])
def test_the_verdict_is_on_the_mean_of_the_pairs(factors, holds):
    curves = named(*(curve(Piece("bf16", s)) for s in range(2)),
                   *(curve(Piece("fp8", s), f) for s, f in enumerate(factors)),
                   curve(Piece("bf16", 0, fp8_loss.ATTENTION), 1.0001))
    rows = fp8_loss.compare(curves)
    assert [row["what differs"] for row in rows] == [
        "precision", "precision", "seed", "attention", "precision"]
    assert rows[-1]["pair"] == "mean of 2" and rows[-1]["holds"] == holds
    # The standard error of a mean of two is half of their difference.
    error = 100 * abs(factors[0] - factors[1]) / 2
    assert rows[-1]["gap"].endswith(f"+- {error:.3f}%")


def test_what_is_missing_is_not_compared():
    assert fp8_loss.compare(named(curve(Piece("bf16", 0)), curve(Piece("fp8", 1)))) == []


def test_curves_of_other_steps_are_refused():
    with pytest.raises(ValueError, match="same --steps and --evaluations"):
        pieces.gap(curve(Piece("fp8", 0), points=9), curve(Piece("bf16", 0)))


def test_an_unknown_piece_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="the pieces are bf16-0, fp8-0, bf16-0-reference"):
        fp8_loss.bench_fp8_loss(BenchFp8LossArgs(only=("fp8",), seeds=1))


def test_the_model_of_the_comparison_is_large_enough():
    counts = ds.param_counts(fp8_loss.loss_config())
    assert counts.active >= 50e6 and fp8_loss.loss_config().model_dim >= 768
    run = fp8_loss.loss_run()
    assert run.steps * pieces.tokens_of(run) >= 100e6


@pytest.mark.slow
def test_pieces_are_trained_once_and_compared(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(
        WIDE, num_layers=1, num_dense_layers=0, num_mtp=0, model_dim=32, query_latent_dim=32,
        expert_ffn_dim=16, vocab_size=300,
    )
    small = lambda steps: dataclasses.replace(
        recipes.tiny(steps), config=config, seq_len=16, micro_batch=2,
        batch_size=ds.Schedule.constant(2),
    )
    monkeypatch.setitem(recipes.RECIPES, "small", small)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of the text is {i * i}" for i in range(400)))
    args = BenchFp8LossArgs(
        recipe="small", data=(str(text),), out=tmp_path / "out", seeds=1, steps=4, evaluations=2,
        validation_batches=1, json=tmp_path / "out.json", only=("bf16-0", "fp8-0"),
    )
    fp8_loss.bench_fp8_loss(args)
    first = json.loads((tmp_path / "out.json").read_text())
    assert [row["piece"] for row in first["pieces"]] == ["bf16-0", "fp8-0"]
    for one in first["curves"].values():
        assert len(one["loss"]) == 4 and [step for step, _ in one["validation"]] == [2, 4]
    losses = [one["loss"] for one in first["curves"].values()]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert (args.out / "fp8_loss.svg").read_text().startswith("<?xml")
    # All pieces are there: nothing is trained, and the same is found.
    monkeypatch.setattr(pieces, "train_missing", None)
    fp8_loss.bench_fp8_loss(args)
    assert json.loads((tmp_path / "out.json").read_text()) == first
    assert "relative gap" in capsys.readouterr().out
    # Curves of other text are not compared.
    file = args.out / "fp8-0.json"
    one = json.loads(file.read_text())
    one["text"]["corpus"] = "another"
    file.write_text(json.dumps(one))
    with pytest.raises(ValueError, match="fp8-0.json is of other text"):
        fp8_loss.bench_fp8_loss(args)
