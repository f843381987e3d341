"""`bench residual`: its verdicts on curves made by hand, and real pieces of a few steps."""

import dataclasses
import json

import numpy as np
import pytest

import deepseek_jax as ds
from experiments import recipes
from experiments.bench import pieces, residual
from experiments.bench.residual import EXACT, ORDER, BenchResidualArgs, Piece

ERRORS = dict(zip(ORDER, (0.003, 0.013, 0.026, 0.052), strict=True))
GAPS = dict(zip((EXACT, *ORDER), (0.0, 1e-5, 1e-4, 1e-3, 4e-3), strict=True))


def curve(piece, factor=1.0):
    """A validation curve that falls from 4 to 3; seeds differ by a tenth of a percent."""
    losses = factor * (1 + 1e-3 * piece.seed) * np.linspace(4, 3, 8)
    found = {"branch errors": ERRORS} if piece.format == EXACT else {
        "gradient error": 2 * ERRORS[piece.format]}
    return {**piece._asdict(), "validation": list(enumerate(losses.tolist(), start=1)),
            "steps": 8, "tokens": 8000, "active": 1, "device": "cpu", "seconds": 1.0,
            "skipped": 0, "loss": losses.tolist(), **found}


def curves(**changed):
    noise = lambda seed: 1e-5 * (seed - 1)
    return {
        piece.name: curve(piece, 1 + (GAPS | changed)[piece.format] * (1 + noise(piece.seed)))
        for piece in residual.all_pieces(3)
    }


def test_gaps_and_errors_are_means_over_seeds():
    rows = {row["format"]: row for row in residual.compare(curves())}
    assert rows["e5m2"]["gap %"] == pytest.approx(0.4) and rows["e5m2"]["seeds"] == 3
    assert rows["e4m3"]["gradient %"] == pytest.approx(5.2)
    assert rows["logfmt8"]["branches %"] == pytest.approx(1.3)
    assert rows["bf16, other seeds"]["gap %"] == pytest.approx(0.1333, rel=0.01)


@pytest.mark.parametrize("changed, wrong", [
    ({}, None),
    ({"logfmt10": 0.005}, "loss of logfmt10: within the spread of BF16's seeds"),
    ({"logfmt8": 0.003}, "loss of logfmt8: above e4m3's by no more than the noise"),
])  # fmt: skip
def test_verdicts_follow_the_gaps(changed, wrong):
    verdicts = residual.judge(curves(**changed))
    assert len(verdicts) == 5
    assert [row["bar"] for row in verdicts if not row["holds"]] == ([wrong] if wrong else [])


def test_errors_out_of_order_are_seen():
    found = curves()
    found["logfmt8-1"]["gradient error"] = 1.0
    assert [row["holds"] for row in residual.judge(found)][:2] == [True, False]


def test_what_is_missing_is_not_judged():
    assert residual.judge({"bf16-0": curve(Piece(EXACT, 0))}) == [
        {"bar": "branches: errors of logfmt10, logfmt8, e4m3, e5m2 rise",
         "found": "0.3 % 1.3 % 2.6 % 5.2 %", "holds": True}]


def test_the_model_has_a_hundred_million_parameters_and_no_experts():
    config = residual.dense_config()
    assert ds.param_counts(config).total >= 100e6 and config.num_moe_layers == 0


def test_an_unknown_piece_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="the pieces are bf16-0, logfmt10-0"):
        residual.bench_residual(BenchResidualArgs(only=("fp4-0",), seeds=1))


def small(steps):
    config = dataclasses.replace(
        residual.dense_config(), vocab_size=300, model_dim=128, num_layers=2, num_dense_layers=2,
        num_heads=2, content_head_dim=8, rotary_head_dim=4, value_head_dim=8, query_latent_dim=None,
        kv_latent_dim=16, dense_ffn_dim=32, max_length=16,
    )  # fmt: skip
    return dataclasses.replace(
        residual.dense_run(steps), config=config, seq_len=16, micro_batch=2, remat="none",
        batch_size=ds.Schedule.constant(2),
    )  # fmt: skip


def test_pieces_are_trained_once_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipes.RECIPES, "small", small)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of the text is {i * i}" for i in range(300)))
    tokens = tmp_path / "tokens"
    args = BenchResidualArgs(
        recipe="small", data=(str(text),), out=tmp_path / "out", seeds=2, steps=3, evaluations=2,
        validation_batches=1, write_tokens=tokens,
    )  # fmt: skip
    residual.bench_residual(args)
    assert "tokens" in capsys.readouterr().out and not args.out.exists()
    args = dataclasses.replace(
        args, data=(str(tokens),), write_tokens=None, json=tmp_path / "out.json",
        only=("bf16-0", "e5m2-0", "e5m2-1"),
    )  # fmt: skip
    residual.bench_residual(args)
    first = json.loads((tmp_path / "out.json").read_text())
    assert [row["piece"] for row in first["pieces"]] == ["bf16-0", "e5m2-0", "e5m2-1"]
    exact, rounded, other = first["curves"].values()
    # The same weights and text, then steps with other gradients; another seed has other weights.
    assert exact["loss"][0] == pytest.approx(rounded["loss"][0], rel=1e-3)
    assert exact["loss"] != rounded["loss"] and rounded["loss"][0] != other["loss"][0]
    assert 0 < exact["branch errors"]["logfmt10"] < exact["branch errors"]["e5m2"] < 0.1
    assert 1e-3 < rounded["gradient error"] < 0.2
    assert (args.out / "residual.svg").read_text().startswith("<?xml")
    # All pieces are there: nothing is trained, and the same is found.
    monkeypatch.setattr(pieces, "train_missing", None)
    residual.bench_residual(args)
    assert json.loads((tmp_path / "out.json").read_text()) == first
    with pytest.raises(ValueError, match="bf16-0.json is the curve of another recipe, data or"):
        residual.bench_residual(dataclasses.replace(args, steps=4))
