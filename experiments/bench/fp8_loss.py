"""`bench fp8_loss`: the loss of one model trained in BF16 and in FP8 (V3 report, section 3.3).

Two more comparisons give the gap its scale: BF16 runs that differ in the seed alone, and BF16 runs
that differ in the implementation of attention alone.
"""

import dataclasses
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from deepseek_jax.config import ModelConfig, Precision, Run
from experiments.bench.pieces import (
    Curves,
    PieceArgs,
    curves_of,
    gap,
    gaps,
    loss_and_gap_axes,
    million_tokens,
    piece_row,
    short_run,
)
from experiments.recipes import recipe
from experiments.tables import print_table, write_json

MOST_GAP = 0.0025  # of the loss, as printed in the report
ATTENTION = "reference_attention"


class Piece(NamedTuple):
    """One run; with `attention` its attention is the reference instead of the kernel."""

    precision: str
    seed: int
    attention: str = ""

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self if part != "")

    def of(self, run: Run) -> Run:
        return dataclasses.replace(run, precision=Precision.of(self.precision), seed=self.seed)

    def batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.attention != ATTENTION:
            return batch
        # One document a sequence: the same attention, which only the reference takes.
        return {**batch, "segments": np.zeros_like(batch["tokens"])}


@dataclass(frozen=True)
class BenchFp8LossArgs(PieceArgs):
    """Train one model in BF16 and FP8 from the same seeds and data, and compare validation loss.

    Without --only all missing pieces are trained, one after the other; the comparison is made of
    the pieces that are there: bf16-0, fp8-0, bf16-0-reference_attention, ...
    """

    recipe: Annotated[str, tyro.conf.Positional] = "loss"
    """loss (60 M active parameters), or a recipe such as tiny."""
    out: Path = Path("runs/fp8_loss")
    """Folder of the curves, a file for each piece, and of fp8_loss.svg."""


def loss_config() -> ModelConfig:
    """The proportions of V3 at D = 768: one dense layer and five of 32 experts."""
    return ModelConfig(
        vocab_size=16384,
        model_dim=768,
        num_layers=6,
        num_dense_layers=1,
        num_heads=8,
        content_head_dim=64,
        rotary_head_dim=64,
        value_head_dim=128,
        query_latent_dim=384,
        kv_latent_dim=256,
        dense_ffn_dim=2048,
        expert_ffn_dim=512,
        num_experts=32,
        num_shared_experts=1,
        experts_per_token=4,
        route_scale=2.5,
        max_length=1024,
        init_std=0.02,
    )


def loss_run(steps: int | None = None) -> Run:
    """100 M tokens in steps of 64 K."""
    return short_run(loss_config(), steps or 1526, batch=64, warmup=0.03)


def bench_fp8_loss(args: BenchFp8LossArgs) -> None:
    """Trains missing pieces, prints a row for each piece and each comparison, and draws both."""
    base = loss_run(args.steps) if args.recipe == "loss" else recipe(args.recipe)(args.steps)
    base = dataclasses.replace(base, data=args.data or base.data)
    curves = curves_of(base, {piece.name: piece for piece in all_pieces(args.seeds)}, args)
    if curves is None:
        return
    rows = [piece_row(name, curve) for name, curve in curves.items()]
    comparisons = compare(curves)
    print_table(rows, title=f"{args.recipe}: pieces")
    if comparisons:
        print_table(comparisons, title="relative gap of the validation loss, last quarter")
    draw(curves, args.out / "fp8_loss.svg")
    print(f"plot     {args.out / 'fp8_loss.svg'}")
    if args.json is not None:
        write_json(args.json, {"recipe": args.recipe, "pieces": rows, "comparisons": comparisons,
                               "curves": curves})


def all_pieces(seeds: int) -> list[Piece]:
    """Pairs first: what has been trained can be compared at any time."""
    pairs = [Piece(precision, seed) for seed in range(seeds) for precision in ("bf16", "fp8")]
    return [*pairs, Piece("bf16", 0, ATTENTION)]


def compare(curves: Curves) -> list[dict[str, Any]]:
    """A row for each pair that is there, and the verdict over those of FP8 and BF16."""
    rows, formats = [], []
    seeds = sorted({c["seed"] for c in curves.values()})
    pair = lambda a, b: curves[a.name] if a.name in curves and b.name in curves else None

    def add(kind, a, b):
        if pair(a, b) is not None:
            rows.append({"what differs": kind, "pair": f"{a.name} - {b.name}",
                         "gap": f"{gap(curves[a.name], curves[b.name]):+.3%}", "holds": None})
            return gap(curves[a.name], curves[b.name])
        return None

    for seed in seeds:
        formats.append(add("precision", Piece("fp8", seed), Piece("bf16", seed)))
    for a, b in combinations(seeds, 2):
        add("seed", Piece("bf16", b), Piece("bf16", a))
    add("attention", Piece("bf16", 0, ATTENTION), Piece("bf16", 0))
    known = [value for value in formats if value is not None]
    if known:
        mean, error = float(np.mean(known)), ""
        if len(known) > 1:
            # How far such a mean lies from that of all seeds: the verdict is worth no more than it.
            error = f" +- {np.std(known, ddof=1) / len(known) ** 0.5:.3%}"
        rows.append({"what differs": "precision", "pair": f"mean of {len(known)}",
                     "gap": f"{mean:+.3%}{error}", "holds": abs(mean) < MOST_GAP})
    return rows


def draw(curves: Curves, path: Path) -> None:
    """Validation loss of every piece, and the smoothed gaps of pairs."""
    with loss_and_gap_axes(path) as (loss_axes, gap_axes):
        colours = {"bf16": "tab:blue", "fp8": "tab:orange"}
        for curve in curves.values():
            first = curve["seed"] == 0 and not curve["attention"]
            label = curve["precision"].upper() if first else None
            losses = [loss for _, loss in curve["validation"]]
            loss_axes.plot(million_tokens(curve), losses, label=label,
                           color=colours[curve["precision"]], linewidth=1.0)
        pairs = [
            *(("fp8 - bf16", "tab:orange", Piece("fp8", s), Piece("bf16", s)) for s in range(9)),
            *(("seeds", "tab:gray", Piece("bf16", b), Piece("bf16", a))
              for a, b in combinations(range(9), 2)),
            ("attention", "tab:green", Piece("bf16", 0, ATTENTION), Piece("bf16", 0)),
        ]
        drawn = set()
        for label, colour, a, b in pairs:
            if a.name in curves and b.name in curves:
                gap_axes.plot(million_tokens(curves[a.name]),
                              100 * gaps(curves[a.name], curves[b.name]), color=colour,
                              label=None if label in drawn else label, linewidth=1.2)
                drawn.add(label)
        for limit in (-100 * MOST_GAP, 100 * MOST_GAP):
            gap_axes.axhline(limit, color="gray", linewidth=0.8, linestyle="--")
