"""How a study is shown: a table for each question, all of them in one picture or JSON file."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tables import print_table, write_json

COLOURS = ("#4078b8", "#d6762c", "#4f9d69", "#8a5fb0", "#5b6570")
# Where sums of figures are far from overflow.
MOST = 1e12
ENDINGS = (".svg", ".png", ".pdf")


class Section(NamedTuple):
    """A question and its answers; `x` and `ys` name the columns that are drawn."""

    title: str
    rows: list[dict[str, Any]]
    x: str
    ys: tuple[str, ...]
    log: bool = False


@dataclass(frozen=True)
class Output:
    """Where results go besides the screen: arguments of every study."""

    picture: Path | None = None
    """Draw the tables to this file: .svg, .png or .pdf."""
    json: Path | None = None
    """Also write the tables to this file."""

    def check(self) -> None:
        """Refuses a picture of a kind that cannot be drawn."""
        if self.picture and self.picture.suffix not in ENDINGS:
            raise ValueError(f"--picture {self.picture} must end in {', '.join(ENDINGS)}")


def check_figures(option: str, figures: Sequence[float]) -> None:
    """Refuses what is negative, endless or no number; nan compares as false."""
    for figure in figures:
        if not 0 <= figure <= MOST:
            raise ValueError(f"{option} {figure} must be from 0 to {MOST:.0e}")


def present(sections: Sequence[Section], output: Output) -> None:
    """Prints, writes and draws."""
    for section in sections:
        print_table(section.rows, title=section.title)
    if output.json:
        rows = [{"question": s.title, **row} for s in sections for row in s.rows]
        write_json(output.json, rows)
    if output.picture:
        draw(sections).savefig(output.picture, dpi=160)
        print(f"picture  {output.picture}")


def draw(sections: Sequence[Section]) -> Any:
    """A panel for each section: lines over numbers, bars over names."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

    from matplotlib.figure import Figure

    columns = 2 if len(sections) > 1 else 1
    lines = -(-len(sections) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.0 * lines), layout="constrained", facecolor="white")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, section in zip(panels, sections, strict=False):
        panel(axes, section)
    for axes in panels[len(sections) :]:
        axes.set_axis_off()
    return figure


def panel(axes: Any, section: Section) -> None:
    """One section."""
    places = [row[section.x] for row in section.rows]
    named = any(isinstance(place, str) for place in places)
    width = 0.8 / len(section.ys)
    for i, (y, colour) in enumerate(zip(section.ys, COLOURS, strict=False)):
        values = [row[y] for row in section.rows]
        if named:
            at = [n + (i - (len(section.ys) - 1) / 2) * width for n in range(len(places))]
            axes.barh(at, values, width, color=colour, label=y)
        else:
            axes.plot(places, values, color=colour, marker="o", markersize=3, label=y)
    if named:
        axes.set_yticks(range(len(places)), places, fontsize=8)
        axes.invert_yaxis()
    else:
        axes.set_xlabel(section.x, fontsize=9)
    if section.log:
        axes.set_xscale("log") if named else axes.set_yscale("log")
    axes.set_title(section.title, loc="left", fontsize=9.5)
    axes.grid(axis="x" if named else "y", color="#e6e8ea", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
