"""`bench balance`: what the routing bias does to expert load and to the loss (V3 report, 2.1.2)."""

import dataclasses
import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from deepseek_jax.config import Run, Schedule
from deepseek_jax.training import init_state
from experiments.data import TokenShards, prefetch, prepare
from experiments.display import TrainingDisplay
from experiments.eval import score
from experiments.plots import smooth
from experiments.recipes import recipe
from experiments.tables import print_table, write_json
from experiments.train import CompiledSteps, batch_source, make_batch, plan_batches

LAST = 100  # steps whose load is judged
MOST_LOAD = 1.4  # the busiest expert over the mean, with the bias
MOST_LOSS = 0.005  # how much worse validation loss may be with the bias
ARMS = {True: "with bias update", False: "without"}


@dataclass(frozen=True)
class BenchBalanceArgs:
    """Train a recipe with and without the routing-bias update; about fifteen minutes on two cores.

    Everything else, the sequence-wise loss and the group limit too, is the same in both.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "tiny"
    """Name of the recipe."""
    steps: int = 1000
    """Steps of each run. After a few hundred, runs without the bias are as good or better: few
    experts, each with much text, learn faster than many with little."""
    seeds: int = 3
    """Seeds of weights and data order, each trained twice."""
    data: tuple[str, ...] = ()
    """Files or folders to train on; the recipe's by default."""
    out: Path | None = None
    """Folder of balance.svg; that of --json by default, else runs."""
    json: Path | None = None
    """Also write runs, verdicts and the load of every step to this file."""


class Trained(NamedTuple):
    """What a run leaves behind."""

    bias: bool
    seed: int
    counts_SLE: np.ndarray  # tokens that chose each expert, S steps
    loss_S: np.ndarray
    validation_loss: float


def bench_balance(args: BenchBalanceArgs) -> None:
    """Trains, prints a row for each run and the verdicts, and draws both."""
    for name in ("steps", "seeds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    base = recipe(args.recipe)(args.steps)
    base = dataclasses.replace(base, data=args.data or base.data)
    folder = args.out or (args.json.parent if args.json else Path("runs"))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        shards, _ = prepare(
            base.data,
            directory=Path(data) / "data",
            vocab_size=base.config.vocab_size,
            tokenizer_file=base.tokenizer,
        )
        runs = train_all(base, args.seeds, shards)
    rows, verdicts = [figures(run) for run in runs], judge(runs)
    last = min(LAST, args.steps)
    print_table(rows, title=f"{args.recipe}, {args.steps} steps; load in the last {last}")
    print_table(verdicts, title="verdicts")
    plot = folder / "balance.svg"
    draw(runs, plot)
    print(f"plot     {plot}")
    if args.json is not None:
        write_json(args.json, {"recipe": args.recipe, "steps": args.steps, "runs": rows,
                               "verdicts": verdicts, "curves": curves_of(runs)})


def train_all(base: Run, seeds: int, shards: TokenShards) -> list[Trained]:
    """Every seed with and without the bias update; two programs are compiled in all."""
    runs = []
    display = TrainingDisplay(2 * seeds * base.steps)
    display.start([("runs", f"{seeds} seeds with and without the bias update"),
                   ("steps", f"{base.steps} each, {display.steps} in all")])
    try:
        # Made once a seed: compiling it takes longer than many steps.
        starts = [jax.device_get(init_state(dataclasses.replace(base, seed=i)))
                  for i in range(seeds)]
        for bias in ARMS:
            arm = base if bias else dataclasses.replace(base, gamma=Schedule.constant(0.0))
            # The seed is not part of the step's program.
            step_of = CompiledSteps(arm, starts[0])
            for seed, start in enumerate(starts):
                run = dataclasses.replace(arm, seed=seed)
                before = len(runs) * base.steps
                runs.append(train_one(run, shards, start, step_of, display, before, bias))
                figure = figures(runs[-1])
                display.say(
                    f"{figure['run']}, seed {seed}: busiest expert {figure['busiest/mean']:.2f}x, "
                    f"validation loss {figure['validation loss']:.4f}"
                )
    finally:
        display.stop()
    return runs


def train_one(
    run: Run, shards: TokenShards, start, step_of: CompiledSteps, display, before: int, bias: bool
) -> Trained:
    """One run from its start to its validation loss; `before` steps were made by earlier ones."""
    source = batch_source(run, shards)
    # A copy: the step takes the memory of the state it is given.
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), start)
    counts, losses = [], []
    batches = prefetch(lambda plan: make_batch(run, source, *plan), plan_batches(run, 0))
    try:
        for step, batch in enumerate(batches, start=before + 1):
            state, metrics = step_of(state, batch)
            counts.append(np.asarray(metrics["expert_counts_LE"]))
            losses.append(float(metrics["loss"]))
            load = load_over_mean(counts[-1])
            display.update(
                {"step": step, "loss": losses[-1], "busiest_over_mean": float(load.max())}
            )
    finally:
        batches.close()
    figure = score(run, state, shards, shards.validation, batch_size=run.micro_batch)
    return Trained(bias, run.seed, np.stack(counts), np.asarray(losses), figure["loss"])


def load_over_mean(counts_LE: np.ndarray) -> np.ndarray:
    """Each expert's tokens over the mean of its layer; leading dimensions are kept."""
    counts = counts_LE.astype(np.float64)
    return counts / np.maximum(counts.mean(axis=-1, keepdims=True), 1e-9)


def busiest(run: Trained) -> float:
    """Busiest expert over mean of the worst layer, tokens of the last steps added up."""
    return float(load_over_mean(run.counts_SLE[-LAST:].sum(axis=0)).max())


def figures(run: Trained) -> dict[str, Any]:
    """The row of a run."""
    last_SLE = run.counts_SLE[-LAST:]
    summed_LE = load_over_mean(last_SLE.sum(axis=0))
    return {
        "run": ARMS[run.bias],
        "seed": run.seed,
        "busiest/mean": busiest(run),
        "worst layer": int(summed_LE.max(axis=-1).argmax()),
        "idlest/mean": float(summed_LE.min()),
        "busiest/mean of a step": float(load_over_mean(last_SLE).max(axis=(1, 2)).mean()),
        "training loss": float(run.loss_S[-LAST:].mean()),
        "validation loss": run.validation_loss,
    }


def judge(runs: Iterable[Trained]) -> list[dict[str, Any]]:
    """The three verdicts on the bias update."""
    arms = {bias: [run for run in runs if run.bias == bias] for bias in ARMS}
    loads = {bias: [busiest(run) for run in arm] for bias, arm in arms.items()}
    drops = [without - with_ for with_, without in zip(loads[True], loads[False], strict=True)]
    spread = max(max(values) - min(values) for values in loads.values())
    losses = {bias: np.mean([run.validation_loss for run in arm]) for bias, arm in arms.items()}
    change = float(losses[True] / losses[False] - 1)
    return [
        {
            "with the bias update": "busiest/mean is lower in every seed, by more than the spread",
            "measured": f"lower by {min(drops):.3f} or more, spread {spread:.3f}",
            "holds": bool(min(drops) > spread),
        },
        {
            "with the bias update": f"busiest/mean is at most {MOST_LOAD}",
            "measured": f"{max(loads[True]):.3f} at most",
            "holds": max(loads[True]) <= MOST_LOAD,
        },
        {
            "with the bias update": f"validation loss is not worse by more than {MOST_LOSS:.1%}",
            "measured": f"{change:+.2%}",
            "holds": change <= MOST_LOSS,
        },
    ]


def curves_of(runs: Iterable[Trained]) -> list[dict[str, Any]]:
    """Load and loss of every step, for other plots."""
    return [
        {
            "run": ARMS[run.bias],
            "seed": run.seed,
            "busiest_over_mean": load_over_mean(run.counts_SLE).max(axis=(1, 2)).round(4).tolist(),
            "loss": run.loss_S.round(5).tolist(),
        }
        for run in runs
    ]


def draw(runs: Iterable[Trained], path: Path) -> None:
    """Busiest expert and loss over the steps, one line a run."""
    # On a new machine it would warn that it reads the fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    load_axes, loss_axes = figure.subplots(1, 2)
    for curve in curves_of(runs):
        colour = "tab:blue" if curve["run"] == ARMS[True] else "tab:orange"
        label = curve["run"] if curve["seed"] == 0 else None
        steps = np.arange(1, len(curve["loss"]) + 1)
        for axes, name in ((load_axes, "busiest_over_mean"), (loss_axes, "loss")):
            axes.plot(steps, smooth(curve[name]), color=colour, label=label, linewidth=1.2)
    load_axes.axhline(MOST_LOAD, color="gray", linewidth=0.8, linestyle="--")
    load_axes.set_ylabel("busiest expert over mean, worst layer")
    loss_axes.set_ylabel("training loss, nats per token")
    for axes in (load_axes, loss_axes):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
    loss_axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
