"""What benchmarks of training loss share: one model trained in pieces, each a run with its curve.

A piece is a NamedTuple of what sets it apart, with a `name`, `of` (from a run to its own) and
`batch` (from a batch to its own). Its curves are a small file; pieces whose file is there are not
run again, so they can come from several machines and days.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig, Precision, Run, Schedule, to_json
from deepseek_jax.counts import param_counts
from deepseek_jax.training import TrainState, init_state
from experiments.data import TokenShards, prefetch, prepare
from experiments.data.batches import ValidationBatches
from experiments.display import TrainingDisplay
from experiments.eval import summed_loss, trained_model
from experiments.provenance import provenance
from experiments.recipes import warmup_and_decay
from experiments.tables import write_json
from experiments.train import CompiledSteps, batch_source, make_batch, plan_batches

EMA = 0.9  # of the validation curve, as in the V3 report
LAST = 0.25  # the part of the run over which gaps are averaged
Curves = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PieceArgs:
    """What such a benchmark is asked for."""

    data: tuple[str, ...] = ()
    """Token shards, or files or folders to train on; the recipe's by default."""
    out: Path = Path("runs/pieces")
    """Folder of the curves, a file for each piece, and of the plot."""
    only: tuple[str, ...] = ()
    """Train these pieces alone."""
    seeds: int = 3
    """Seeds of weights and data order."""
    steps: int | None = None
    """Steps of a run; the recipe's by default."""
    evaluations: int = 48
    """Points of the validation curve."""
    validation_batches: int = 4
    """Batches of validation text at each of them."""
    write_tokens: Path | None = None
    """Only write the text as token shards to this folder, for a machine that has no text."""
    json: Path | None = None
    """Also write figures and curves to this file."""


@dataclass(frozen=True)
class Trained:
    """A piece at its end, for what is measured there; programs are shared by its benchmark."""

    run: Run
    state: TrainState
    batch: dict[str, Any]  # the last one
    step_of: Callable[[Run], CompiledSteps]


def short_run(config: ModelConfig, steps: int, *, batch: int, warmup: float) -> Run:
    """BF16 on so many sequences of 1024 tokens a step.

    Args:
      warmup: the part of all tokens in which the learning rate rises.
    """
    seq_len = 1024
    tokens = steps * seq_len * batch
    return Run(
        config=config,
        steps=steps,
        seq_len=seq_len,
        micro_batch=batch,
        batch_size=Schedule.constant(batch),
        learning_rate=warmup_and_decay(1e-3, tokens=tokens, warmup=warmup * tokens, final=1e-4),
        precision=Precision.of("bf16"),
        remat="paper",
        fim_rate=0.0,
    )


def nothing_more(piece: Any, trained: Trained) -> dict[str, Any]:
    """Of a piece that is not measured at its end."""
    return {}


def curves_of(
    base: Run,
    pieces: Mapping[str, Any],
    args: PieceArgs,
    measure: Callable[[Any, Trained], dict[str, Any]] = nothing_more,
) -> Curves | None:
    """The curves of all pieces that are there, those that were missing trained first.

    None where only tokens were to be written.
    """
    for name in ("seeds", "evaluations", "validation_batches"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for name in args.only:
        if name not in pieces:
            raise ValueError(f"--only {name}: the pieces are {', '.join(pieces)}")
    if args.write_tokens is not None:
        shards = prepared(base, args.write_tokens)
        print(f"tokens   {shards.train.num_tokens:,} in {args.write_tokens}")
        return None
    args.out.mkdir(parents=True, exist_ok=True)
    curves = curves_there(base, pieces, args)
    missing = {name: pieces[name] for name in args.only or pieces if name not in curves}
    if not missing:
        return curves
    train_missing(base, missing, curves, args, measure)
    return curves_there(base, pieces, args)


def curves_there(base: Run, pieces: Mapping[str, Any], args: PieceArgs) -> Curves:
    """The curves of the pieces that have been trained, all of one recipe and text."""
    curves: Curves = {}
    for name in pieces:
        path = curve_file(args.out, name)
        if path.is_file():
            curves[name] = json.loads(path.read_text())
            if curves[name].get("of") != identity(base):
                raise ValueError(f"{path} is the curve of another recipe, data or number of steps: "
                                 "name another --out")  # fmt: skip
            check_text(name, curves[name], next(iter(curves.values()))["text"], args.out)
    return curves


def text_of(shards: TokenShards, args: PieceArgs) -> dict[str, Any]:
    """Which text a piece is trained and validated on; other text has other losses."""
    return {"corpus": shards.corpus_hash[:16], "tokenizer": shards.tokenizer_hash[:16],
            "validation_batches": args.validation_batches}  # fmt: skip


def check_text(name: str, curve: dict[str, Any], text: dict[str, Any], folder: Path) -> None:
    if curve["text"] != text:
        raise ValueError(f"{curve_file(folder, name)} is of other text ({curve['text']}, not "
                         f"{text}): name another --out")  # fmt: skip


def identity(run: Run) -> str:
    """What all pieces of a benchmark have in common, in short: other curves are not theirs."""
    alike = dataclasses.replace(
        run, seed=0, precision=Precision(), config=dataclasses.replace(run.config, vocab_size=1)
    )
    return hashlib.sha256(json.dumps(to_json(alike)).encode()).hexdigest()[:16]


def curve_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def prepared(base: Run, folder: Path) -> TokenShards:
    """The tokens of a run's data, written to the folder unless they are shards already."""
    shards, _ = prepare(base.data, directory=folder, vocab_size=base.config.vocab_size,
                        tokenizer_file=base.tokenizer)
    return shards


def train_missing(
    base: Run, pieces: Mapping[str, Any], there: Curves, args: PieceArgs, measure=nothing_more
) -> None:
    """Each piece from its start to its curve on disk; those that are there are of the same text."""
    programs: dict[Run, CompiledSteps] = {}
    starts: dict[int, TrainState] = {}

    def step_of(run: Run) -> CompiledSteps:
        # The seed is not part of the step's program.
        key = dataclasses.replace(run, seed=0)
        if key not in programs:
            programs[key] = CompiledSteps(run, starts[run.seed])
        return programs[key]

    with tempfile.TemporaryDirectory() as folder:
        shards = prepared(base, Path(folder) / "data")
        for name, curve in there.items():
            check_text(name, curve, text_of(shards, args), args.out)
        config = dataclasses.replace(base.config, vocab_size=shards.vocab_size)
        for piece in pieces.values():
            run = piece.of(dataclasses.replace(base, config=config))
            if run.seed not in starts:
                # The same for all pieces of a seed, which therefore come one after another.
                starts.clear()
                starts[run.seed] = init_state(run)
            state = jax.tree.map(jnp.copy, starts[run.seed])
            curve = train_piece(run, state, piece, shards, args, step_of, measure)
            write_json(curve_file(args.out, piece.name), curve)


def train_piece(
    run: Run, state: TrainState, piece, shards: TokenShards, args: PieceArgs, step_of, measure
) -> dict[str, Any]:
    """The training and validation loss of one run."""
    source, step = batch_source(run, shards), step_of(run)
    due = set(np.linspace(0, run.steps, args.evaluations + 1).round().astype(int)[1:].tolist())
    losses, validation, aside = [], [], 0.0
    with display_of(run, piece.name) as display:
        batches = prefetch(lambda plan: make_batch(run, source, *plan), plan_batches(run, 0))
        try:
            for number, batch in enumerate(map(piece.batch, batches), start=1):
                state, metrics = step(state, batch)
                losses.append(metrics["loss"])
                if number == 1:
                    # The first step includes its compilation.
                    jax.block_until_ready(state)
                    began = time.perf_counter()
                if number in due:
                    jax.block_until_ready(state)
                    paused = time.perf_counter()
                    validation.append((number, validation_loss(run, state, shards, args)))
                    aside += time.perf_counter() - paused
                    display.update({"step": number, "loss": float(losses[-1])})
        finally:
            batches.close()
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began - aside
    losses = np.asarray(jax.device_get(losses), np.float64)
    if not np.isfinite(losses).all():
        raise ValueError(f"{piece.name}: the loss of step {int(np.argmin(np.isfinite(losses))) + 1}"
                         " is not finite")
    counts = param_counts(run.config)
    return {
        **piece._asdict(),
        "steps": run.steps,
        "tokens": run.steps * tokens_of(run),
        "parameters": counts.total,
        "active": counts.active,
        **provenance(),
        "seconds": seconds,  # of all steps but the first, without validation
        "of": identity(run),
        "text": text_of(shards, args),
        "skipped": int(state.skipped),
        **measure(piece, Trained(run, state, batch, step_of)),
        "loss": losses.round(5).tolist(),
        "validation": validation,
    }


@contextlib.contextmanager
def display_of(run: Run, name: str) -> Iterator[TrainingDisplay]:
    display = TrainingDisplay(run.steps)
    display.start([("piece", name), ("tokens a step", f"{tokens_of(run):,}")])
    try:
        yield display
    finally:
        display.stop()


def tokens_of(run: Run) -> int:
    """Tokens of a step."""
    return run.accumulation_at(0) * run.micro_batch * run.seq_len


def validation_loss(run: Run, state, shards: TokenShards, args: PieceArgs) -> float:
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
        "card": curve["card"],
        "active": curve["active"],
        "tokens": curve["tokens"],
        "tokens/s": curve["tokens"] * (1 - 1 / curve["steps"]) / curve["seconds"],
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


def million_tokens(curve: dict[str, Any]) -> list[float]:
    """Where the points of a validation curve lie."""
    return [step * curve["tokens"] / curve["steps"] / 1e6 for step, _ in curve["validation"]]


@contextlib.contextmanager
def loss_and_gap_axes(path: Path) -> Iterator[tuple[Any, Any]]:
    """Axes side by side, for validation losses and their gaps in percent, saved at the end."""
    # On a new machine it would warn that it reads the fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss_axes, gap_axes = figure.subplots(1, 2)
    yield loss_axes, gap_axes
    loss_axes.set_ylabel("validation loss, nats per token")
    gap_axes.set_ylabel("relative gap, %")
    for axes in (loss_axes, gap_axes):
        axes.set_xlabel("million tokens")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
