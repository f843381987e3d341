"""`bench fp8_loss`: the loss of one model trained in BF16 and in FP8 (V3 report, section 3.3).

A piece is one run: a precision and a seed of weights and data order. Its curves are a small file;
pieces whose file is there are not run again, so they can come from several machines and days. Two
more comparisons give the gap its scale: BF16 runs that differ in the seed alone, and BF16 runs that
differ in the implementation of attention alone.
"""

import dataclasses
import json
import logging
import tempfile
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from deepseek_jax.config import ModelConfig, Precision, Run, Schedule
from deepseek_jax.counts import param_counts
from deepseek_jax.training import init_state
from experiments.data import TokenShards, is_shards, open_shards, prefetch, prepare
from experiments.data.batches import ValidationBatches
from experiments.display import TrainingDisplay
from experiments.eval import summed_loss, trained_model
from experiments.recipes import recipe, warmup_and_decay
from experiments.tables import print_table, write_json
from experiments.train import CompiledSteps, batch_source, make_batch, plan_batches

MOST_GAP = 0.0025  # of the loss, as printed in the report
EMA = 0.9  # of the validation curve, as in the report
LAST = 0.25  # the part of the run over which the gap is averaged
ATTENTION = "reference_attention"


class Piece(NamedTuple):
    """One run; with `attention` its attention is the reference instead of the kernel."""

    precision: str
    seed: int
    attention: str = ""

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self if part != "")


@dataclass(frozen=True)
class BenchFp8LossArgs:
    """Train one model in BF16 and FP8 from the same seeds and data, and compare validation loss.

    Without --only all missing pieces are trained, one after the other; the comparison is made of
    the pieces that are there.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "loss"
    """loss (60 M active parameters), or a recipe such as tiny."""
    data: tuple[str, ...] = ()
    """Token shards, or files or folders to train on; the recipe's by default."""
    out: Path = Path("runs/fp8_loss")
    """Folder of the curves, a file for each piece, and of fp8_loss.svg."""
    only: tuple[str, ...] = ()
    """Train these pieces alone: bf16-0, fp8-0, bf16-0-reference_attention, ..."""
    seeds: int = 3
    """Seeds of weights and data order."""
    steps: int | None = None
    """Steps of a run; the recipe's by default."""
    evaluations: int = 48
    """Points of the validation curve."""
    validation_batches: int = 4
    """Batches of validation text at each of them."""
    json: Path | None = None
    """Also write figures and curves to this file."""


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
    steps, seq_len, batch = steps or 1526, 1024, 64
    tokens = steps * seq_len * batch
    return Run(
        config=loss_config(),
        steps=steps,
        seq_len=seq_len,
        micro_batch=batch,
        batch_size=Schedule.constant(batch),
        learning_rate=warmup_and_decay(1e-3, tokens=tokens, warmup=0.03 * tokens, final=1e-4),
        precision=Precision.of("bf16"),
        remat="paper",
        fim_rate=0.0,
    )


def bench_fp8_loss(args: BenchFp8LossArgs) -> None:
    """Trains missing pieces, prints a row for each piece and each comparison, and draws both."""
    for name in ("seeds", "evaluations", "validation_batches"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    base = loss_run(args.steps) if args.recipe == "loss" else recipe(args.recipe)(args.steps)
    base = dataclasses.replace(base, data=args.data or base.data)
    pieces = {piece.name: piece for piece in all_pieces(args.seeds)}
    for name in args.only:
        if name not in pieces:
            raise ValueError(f"--only {name}: the pieces are {', '.join(pieces)}")
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in args.only or pieces if not curve_file(args.out, name).is_file()]
    if missing:
        train_missing(base, [pieces[name] for name in missing], args)
    curves = {name: json.loads(curve_file(args.out, name).read_text())
              for name in pieces if curve_file(args.out, name).is_file()}
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


def curve_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def train_missing(base: Run, pieces: list[Piece], args: BenchFp8LossArgs) -> None:
    """Each piece from its start to its curve on disk."""
    with tempfile.TemporaryDirectory() as folder:
        if base.data and all(is_shards(path) for path in base.data):
            shards = open_shards(base.data)
        else:
            shards, _ = prepare(
                base.data,
                directory=Path(folder) / "data",
                vocab_size=base.config.vocab_size,
                tokenizer_file=base.tokenizer,
            )
        config = dataclasses.replace(base.config, vocab_size=shards.vocab_size)
        for piece in pieces:
            run = dataclasses.replace(
                base, config=config, precision=Precision.of(piece.precision), seed=piece.seed
            )
            curve = train_piece(run, piece, shards, args)
            write_json(curve_file(args.out, piece.name), curve)


def train_piece(
    run: Run, piece: Piece, shards: TokenShards, args: BenchFp8LossArgs
) -> dict[str, Any]:
    """The training and validation loss of one run."""
    source, state = batch_source(run, shards), init_state(run)
    step_of = CompiledSteps(run, state)
    due = set(np.linspace(0, run.steps, args.evaluations + 1).round().astype(int)[1:].tolist())
    losses, validation = [], []
    display = TrainingDisplay(run.steps)
    display.start([("piece", piece.name), ("tokens a step", f"{tokens_of(run):,}")])
    batches = prefetch(lambda plan: make_batch(run, source, *plan), plan_batches(run, 0))
    began = time.perf_counter()
    try:
        for step, batch in enumerate(batches, start=1):
            if piece.attention == ATTENTION:
                # One document a sequence: the same attention, which only the reference takes.
                batch = {**batch, "segments": np.zeros_like(batch["tokens"])}
            state, metrics = step_of(state, batch)
            losses.append(metrics["loss"])
            if step in due:
                validation.append((step, validation_loss(run, state, shards, args)))
                display.update({"step": step, "loss": float(losses[-1])})
    finally:
        batches.close()
        display.stop()
    losses = np.asarray(jax.device_get(losses), np.float64)
    if not np.isfinite(losses).all():
        raise ValueError(f"{piece.name}: the loss of step {int(np.argmin(np.isfinite(losses))) + 1}"
                         " is not finite")
    return {
        **piece._asdict(),
        "steps": run.steps,
        "tokens": run.steps * tokens_of(run),
        "active": param_counts(run.config).active,
        "device": jax.devices()[0].device_kind,
        "seconds": time.perf_counter() - began,
        "skipped": int(state.skipped),
        "loss": losses.round(5).tolist(),
        "validation": validation,
    }


def tokens_of(run: Run) -> int:
    """Tokens of a step."""
    return run.accumulation_at(0) * run.micro_batch * run.seq_len


def validation_loss(run: Run, state, shards: TokenShards, args: BenchFp8LossArgs) -> float:
    """Nats per token of the first batches of validation text, in the run's own precision."""
    model = trained_model(run, state)
    batches = ValidationBatches(
        shards.validation, eos=shards.eos, seq_len=run.seq_len, batch_size=run.micro_batch,
        context=run.seq_len // 2, segments=False,
    )
    total, targets = 0.0, 0
    for number in range(min(len(batches), args.validation_batches)):
        batch = batches[number]
        total += float(summed_loss(model, batch["tokens"], batch["mask"]))
        targets += int(batch["mask"].sum())
    return total / targets


def piece_row(name: str, curve: dict[str, Any]) -> dict[str, Any]:
    """The row of a piece."""
    return {
        "piece": name,
        "device": curve["device"],
        "active": curve["active"],
        "tokens": curve["tokens"],
        "tokens/s": curve["tokens"] / curve["seconds"],
        "minutes": curve["seconds"] / 60,
        "skipped": curve["skipped"],
        "validation loss": curve["validation"][-1][1],
    }


def ema(values: Any) -> np.ndarray:
    """The moving average of a curve, without the weight of what lies before its start.

    >>> ema([2.0, 2.0, 4.0]).round(3).tolist()
    [2.0, 2.0, 2.738]
    """
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = EMA * total + (1 - EMA) * value, EMA * weight + (1 - EMA)
        out.append(total / weight)
    return np.asarray(out)


def gaps(curve: dict[str, Any], base: dict[str, Any]) -> np.ndarray:
    """(a - b) / b of two smoothed validation curves."""
    if [step for step, _ in curve["validation"]] != [step for step, _ in base["validation"]]:
        raise ValueError(
            "curves of different steps: train both pieces with the same --steps and --evaluations"
        )
    a, b = (ema([loss for _, loss in c["validation"]]) for c in (curve, base))
    return (a - b) / b


def gap(curve: dict[str, Any], base: dict[str, Any]) -> float:
    """Their mean over the last quarter."""
    each = gaps(curve, base)
    return float(each[-max(round(LAST * len(each)), 1) :].mean())


def compare(curves: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
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
        mean = float(np.mean(known))
        rows.append({"what differs": "precision", "pair": f"mean of {len(known)}",
                     "gap": f"{mean:+.3%}", "holds": abs(mean) < MOST_GAP})
    return rows


def draw(curves: dict[str, dict[str, Any]], path: Path) -> None:
    """Validation loss of every piece, and the smoothed gaps of pairs."""
    # On a new machine it would warn that it reads the fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss_axes, gap_axes = figure.subplots(1, 2)
    tokens_at = lambda curve: [
        step * curve["tokens"] / curve["steps"] / 1e6 for step, _ in curve["validation"]
    ]
    colours = {"bf16": "tab:blue", "fp8": "tab:orange"}
    for curve in curves.values():
        first = curve["seed"] == 0 and not curve["attention"]
        label = curve["precision"].upper() if first else None
        loss_axes.plot(tokens_at(curve), [loss for _, loss in curve["validation"]], label=label,
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
            gap_axes.plot(tokens_at(curves[a.name]),
                          100 * gaps(curves[a.name], curves[b.name]), color=colour,
                          label=None if label in drawn else label, linewidth=1.2)
            drawn.add(label)
    for limit in (-100 * MOST_GAP, 100 * MOST_GAP):
        gap_axes.axhline(limit, color="gray", linewidth=0.8, linestyle="--")
    loss_axes.set_ylabel("validation loss, nats per token")
    gap_axes.set_ylabel("relative gap, %")
    for axes in (loss_axes, gap_axes):
        axes.set_xlabel("million tokens")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
