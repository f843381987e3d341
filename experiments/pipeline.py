"""`pipeline`: schedules of pipeline parallelism side by side, and their timelines as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.command_line import unknown
from experiments.plots import new_figure
from experiments.tables import print_table
from sharding.pipeline import SCHEDULES, Timeline, Times, bubble, simulate

# Fill of each kind of part; a pair is drawn as a forward above a backward.
COLOURS = {"forward": "#3b82c4", "backward": "#4f9d69", "input": "#8cc3a0", "weight": "#d9a441"}
PARAMETERS = {"1f1b": 1, "zb1p": 1, "dualpipe": 2, "dualpipe_v": 2}


@dataclass(frozen=True)
class PipelineArgs:
    """Idle time and memory of pipeline schedules, simulated and by formula (V3 report, table 2).

    Times are those of a chunk, one micro-batch on one stage, in any unit.
    """

    schedules: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(SCHEDULES)
    """1f1b, zb1p, dualpipe, dualpipe_v; all by default."""
    ranks: int = 8
    """Stages of the model. DualPipeV holds them on half as many devices."""
    micro_batches: int = 20
    """Micro-batches of a step."""
    forward: float = 1.0
    """A chunk's forward."""
    backward: float = 2.0
    """Its backward, with the weights' part."""
    weight: float = 1.0
    """The weights' part alone."""
    pair: float = 3.0
    """A forward and a backward of DualPipe that overlap."""
    hop: float = 0.0
    """From a rank to the next."""
    picture: Path | None = None
    """Draw the timelines to this file: .svg, .png or .pdf."""
    json: Path | None = None
    """Also write the table to this file."""


def pipeline(args: PipelineArgs) -> None:
    """The command `pipeline`."""
    for name in args.schedules:
        if name not in SCHEDULES:
            raise ValueError(unknown("schedule", name, SCHEDULES))
    if args.picture and args.picture.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--picture {args.picture} must end in .svg, .png or .pdf")
    times = Times(args.forward, args.backward, args.weight, args.pair, args.hop)
    timelines = {name: timeline(name, args, times) for name in args.schedules}
    print_table([row(name, made, times) for name, made in timelines.items()], json_path=args.json)
    if args.picture:
        draw(timelines).savefig(args.picture, dpi=160)
        print(f"timelines: {args.picture}")


def timeline(name: str, args: PipelineArgs, times: Times) -> Timeline:
    """A schedule of as many stages and micro-batches as asked for."""
    ranks, micro_batches = args.ranks, args.micro_batches
    if name == "dualpipe_v":
        if ranks % 2:
            raise ValueError(f"DualPipeV folds an even number of stages, not {ranks=}")
        ranks //= 2
    return simulate(SCHEDULES[name](ranks, micro_batches), times)


def row(name: str, made: Timeline, times: Times) -> dict[str, Any]:
    """A line of the table; the share is that of the rank that idles most."""
    devices = len(made.spans)
    return {
        "schedule": name,
        "devices": devices,
        "time": made.seconds,
        "bubble": max(made.bubbles),
        "by formula": bubble(name, devices, times),
        "idle %": round(100 * max(made.bubbles) / made.seconds, 2),
        "chunks held": max(made.held),
        "parameters": f"{PARAMETERS[name]}x",
    }


def draw(timelines: dict[str, Timeline]) -> Any:
    """One band a schedule, one line a rank, on one axis of time."""
    ranks = sum(len(made.spans) for made in timelines.values())
    figure, axes = new_figure(height=1.2 + 0.16 * ranks + 0.25 * len(timelines))
    figure.set_size_inches(11, figure.get_size_inches()[1])
    bars: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in COLOURS}
    line, ticks = 0.0, []
    for name, made in timelines.items():
        ticks.append((line + len(made.spans) / 2 - 0.5, name))
        for spans in made.spans:
            for task, start, end in spans:
                height = 0.84 / len(task)
                for i, part in enumerate(task):
                    low = line - 0.42 + i * height
                    bars[part.what].append((start, end - start, low, height))
            line += 1
        line += 1
    for what, boxes in bars.items():
        if boxes:
            start, width, low, height = zip(*boxes, strict=True)
            axes.bar(start, height, width, low, align="edge", color=COLOURS[what], label=what,
                     edgecolor="white", linewidth=0.4)  # fmt: skip
    axes.set_ylim(line - 1.4, -0.8)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_xlabel("time")
    axes.grid(False)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.patch.set_alpha(1)
    return figure
