"""A sweep as a picture: time of a step against memory of a device, the Pareto front marked."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

INK, PALE, BLUE, ORANGE = "#303438", "#b9bfc6", "#4078b8", "#d6762c"


class Point(NamedTuple):
    """One setup."""

    gib: float
    seconds: float
    fits: bool
    front: bool
    compiled_gib: float | None
    measured: float | None  # seconds
    label: str


def draw(points: Sequence[Point], path: Path, *, title: str, memory_gib: float) -> None:
    """Writes the picture; its format is that of the path's ending."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    groups = (
        ([p for p in points if not p.fits], PALE, "does not fit"),
        ([p for p in points if p.fits], BLUE, "fits"),
    )
    for group, colour, label in groups:
        if group:
            label = f"{label}, {len(group)} setups"
            axes.scatter([p.gib for p in group], [p.seconds for p in group], s=9, alpha=0.6,
                         color=colour, linewidths=0, label=label)  # fmt: skip
    compiled = [p for p in points if p.compiled_gib is not None]
    if compiled:
        axes.scatter([p.compiled_gib for p in compiled], [p.seconds for p in compiled], s=26,
                     facecolors="none", edgecolors=INK, linewidths=0.9,
                     label="compiled: the compiler's peak")  # fmt: skip
    measured = [p for p in points if p.measured is not None]
    if measured:
        axes.scatter([p.gib for p in measured], [p.measured for p in measured], s=26, marker="x",
                     color=INK, linewidths=0.9, label="measured")  # fmt: skip
        axes.vlines([p.gib for p in measured], [p.seconds for p in measured],
                    [p.measured for p in measured], color=PALE, linewidth=0.6,
                    zorder=0)  # fmt: skip
    front = sorted((p for p in points if p.front), key=lambda p: p.gib)
    if front:
        axes.plot([p.gib for p in front], [p.seconds for p in front], color=ORANGE, marker="o",
                  markersize=4, linewidth=1.4, label="Pareto front")  # fmt: skip
        for point in {front[0], front[-1]}:
            axes.annotate(point.label, (point.gib, point.seconds), fontsize=8, color=INK,
                          xytext=(4, 8), textcoords="offset points",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    sizes = [p.gib for p in points]
    # Far beyond all points it would press them together.
    if shows_memory := memory_gib < 3 * max(sizes):
        axes.axvline(memory_gib, color=INK, linewidth=0.8, linestyle="--")
    times = [p.seconds for p in points] + [p.measured for p in measured]
    # Within a decade a logarithmic axis has next to no ticks.
    for values, set_scale in ((sizes, axes.set_xscale), (times, axes.set_yscale)):
        if max(values) > 10 * min(values):
            set_scale("log")
    has = "dashed: what it has" if shows_memory else f"it has {memory_gib:.3g}"
    axes.set_xlabel(f"GiB of a device, by formula ({has})", color=INK)
    axes.set_ylabel("seconds of a step, predicted" + (" and measured" if measured else ""),
                    color=INK)  # fmt: skip
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(color="#e6e8ea", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        if axis.get_scale() == "log":
            axis.set_minor_formatter(lambda value, _: "")
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    figure.savefig(path, dpi=150)
