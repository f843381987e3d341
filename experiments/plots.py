"""Figures of a run as SVG that takes its colours from the page around it, light or dark.

matplotlib is imported where it is used. Figures are drawn in stand-in colours, which become CSS
variables, and text stays text, so one figure serves both colour schemes and any font.
"""

import io
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Stand-ins, told apart by matplotlib and replaced in its SVG.
INK, MUTED, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second"}
# Inches; at this width the text of a figure is as large as the page's when a card is 30 em wide.
WIDTH, HEIGHT = 5.2, 2.7
# A curve is drawn through at most this many points, a heat map has at most this many columns.
POINTS, COLUMNS = 1000, 240
# Load below the mean of a layer is blue, above it orange, at the mean nothing.
BELOW, ABOVE = (64, 120, 184), (214, 118, 44)


class Curve(NamedTuple):
    """A quantity over the steps of a run; values that are not finite are left out."""

    label: str
    values: ArrayLike
    colour: str = FIRST


def curves(
    steps: Sequence[int],
    lines: Sequence[Curve],
    *,
    log: bool = False,
    smoothed: bool = True,
    zero: bool = False,
) -> str:
    """Lines over the steps: as measured in pale, smoothed in full colour."""
    figure, axes = new_figure()
    for line in lines:
        values = np.asarray(line.values, np.float64)
        if not np.isfinite(values).any():
            continue
        x, y = thinned(steps, values)
        if smoothed:
            axes.plot(x, y, color=line.colour, alpha=0.25, linewidth=0.8)
            x, y = thinned(steps, smooth(values))
        axes.plot(x, y, color=line.colour, linewidth=1.6, label=line.label)
    if len(lines) > 1 and axes.lines:
        axes.legend(frameon=False, labelcolor="linecolor", loc="upper right", handlelength=1.2)
    if log:
        logarithmic(axes)
    elif zero:
        axes.set_ylim(bottom=0)
    return svg(figure)


def heat_map(load_ET: np.ndarray, steps: Sequence[int], label: str) -> str:
    """Load over mean load, one row an expert and one column a span of steps."""
    rows, columns = load_ET.shape
    cuts = np.unique(np.linspace(0, columns, min(columns, COLUMNS) + 1).round().astype(int))
    means = np.stack(
        [load_ET[:, a:b].mean(1) for a, b in zip(cuts, cuts[1:], strict=False)], axis=1
    )
    figure, axes = new_figure(height=1.1 + 0.7 * math.log2(max(rows, 4)) / 2)
    extent = (steps[0], max(steps[-1], steps[0] + 1), rows - 0.5, -0.5)
    axes.imshow(colours(means), aspect="auto", interpolation="none", extent=extent)
    axes.grid(False)
    axes.set_ylabel(label, color=MUTED)
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    return svg(figure)


def colours(load: np.ndarray) -> np.ndarray:
    """RGBA of a load over its mean: deeper with the distance from 1, full at 0 and from 2 on."""
    distance = np.clip(np.nan_to_num(load, nan=1.0) - 1, -1, 1)
    rgba = np.empty((*load.shape, 4), np.uint8)
    rgba[..., :3] = np.where(distance[..., None] < 0, BELOW, ABOVE)
    rgba[..., 3] = np.round(255 * np.abs(distance))
    return rgba


def smooth(values: ArrayLike, half: int | None = None) -> np.ndarray:
    """The mean over `half` steps to either side (a sixtieth of all), finite values only.

    Near the first step the window shrinks, so that the fall of the loss begins where it began.
    """
    values = np.asarray(values, np.float64)
    half = max(len(values) // 60, 1) if half is None else half
    finite = np.isfinite(values)
    sums = np.cumsum([0.0, *np.where(finite, values, 0.0)])
    counts = np.cumsum([0, *finite])
    step = np.arange(len(values))
    low, high = step - np.minimum(step, half), step + np.minimum(step, half) + 1
    high = np.minimum(high, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def thinned(steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points of a curve, each the mean of its finite neighbours."""
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= POINTS:
        return x, y
    starts = np.linspace(0, len(y), POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, len(y)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def new_figure(height: float = HEIGHT) -> tuple[Any, Any]:
    """An empty figure with quiet axes: a horizontal grid, no frame, steps along x."""
    # On a new machine it would warn that it reads the fonts, in the midst of a run.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with matplotlib.rc_context({"font.size": 10.5, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(color=GRID, labelcolor=MUTED, length=0, pad=5, which="both")
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.set_xlabel("step", color=MUTED)
    return figure, axes


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with a few plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))


def short(number: float) -> str:
    """A number in few characters.

    >>> short(800), short(12_500), short(1.63e6), short(671e9)
    ('800', '12.5 k', '1.63 M', '671 B')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{number:,.4g}" if abs(number) < 1000 else f"{number:,.0f}"


def svg(figure: Any) -> str:
    """The figure as an SVG element for an HTML page: scalable, in the page's colours and font."""
    import matplotlib

    file = io.StringIO()
    # A fixed salt makes equal figures equal text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deepseek_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z.]+[0-9a-z.]*_\d+"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.strip()
