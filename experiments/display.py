"""Training as one watches it: a live panel on a terminal, a plain line now and then elsewhere."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"[1:]
# How many of the last steps the estimate of the time left looks at.
RECENT = 50


class TrainingDisplay:
    """Shows a run while it trains: `start`, `update` after every step, `say`, `stop`.

    `update` takes the line that goes into metrics.jsonl; it copies a few numbers and draws at most
    four times a second. The time left comes from the clock between the last updates.
    """

    def __init__(
        self,
        steps: int,
        *,
        interval: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Of a run that ends at `steps`; without a terminal, a line each `interval` seconds."""
        self.steps, self.interval, self.clock = steps, interval, clock
        self.console = console or Console(highlight=False)
        self.metrics: dict[str, Any] = {}
        self.losses: deque[float] = deque(maxlen=400)
        self.recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self.started = self.printed = clock()
        self.live: Live | None = None

    def start(self, header: Sequence[tuple[str, Any]] = ()) -> None:
        """Print the header's rows of (label, value) and begin."""
        width = max((len(label) for label, _ in header), default=0) + 2
        for label, value in header:
            line = Text.assemble((f"{label:<{width}}", "dim"), str(value))
            self.console.print(line, soft_wrap=True)
        self.started = self.printed = self.clock()
        if self.console.is_terminal:
            self.live = Live(self, console=self.console, refresh_per_second=4)
            self.live.start()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of a finished step."""
        now, first = self.clock(), not self.metrics
        self.metrics = {name: metrics.get(name) for name in SHOWN}
        self.recent.append((now, metrics["step"]))
        if metrics.get("loss") is not None:
            self.losses.append(float(metrics["loss"]))
        due = first or metrics["step"] >= self.steps or now - self.printed >= self.interval
        if self.live is None and due:
            self.console.print(Text(self.line()), soft_wrap=True)
            self.printed = now

    def say(self, text: str) -> None:
        """Print a sentence above the panel, or on a line of its own."""
        self.console.print(Text(text), soft_wrap=True)

    def stop(self) -> None:
        """Leave the last state on the screen and give the terminal back; harmless when repeated."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __enter__(self) -> "TrainingDisplay":
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def time_left(self) -> float | None:
        """Seconds to the last step at the pace of the last updates, None before there is one."""
        if len(self.recent) < 2:
            return None
        (then, from_step), (now, step) = self.recent[0], self.recent[-1]
        if step <= from_step:
            return None
        return (now - then) / (step - from_step) * max(self.steps - step, 0)

    def line(self) -> str:
        """The state in one plain line."""
        parts = [f"step {self.metrics['step']}/{self.steps}"]
        parts += [f"{SHOWN[name]} {text}" for name, text in self.figures() if name != "step"]
        return "  ".join(parts + [f"left {duration(self.time_left())}"])

    def figures(self) -> list[tuple[str, str]]:
        """Names and texts of the metrics that are known now; skipped steps only if there are."""
        return [
            (name, FORMATS[name](value))
            for name, value in self.metrics.items()
            if value is not None and name in FORMATS and (value or name != "skipped")
        ]

    def __rich__(self) -> RenderableType:
        step = self.metrics.get("step", 0)
        elapsed, left = duration(self.clock() - self.started), duration(self.time_left())
        clock = f"{elapsed} elapsed, {left} left" if self.metrics else f"compiling, {elapsed}"
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right", style="dim")
        bar.add_row(
            Text.assemble(("step ", "dim"), f"{step:,}", (f" / {self.steps:,}", "dim")),
            ProgressBar(total=self.steps, completed=step, complete_style="cyan"),
            clock,
        )
        columns = 3 if self.console.width >= 72 else 2
        grid = Table.grid(padding=(0, 2), expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1, no_wrap=True)
        cells = [
            Text.assemble((f"{SHOWN[name]} ", "dim"), text)
            for name, text in self.figures()
            if name != "step"
        ]
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        # Two columns of border and two of padding on either side.
        curve = Text(
            sparkline(list(self.losses), self.console.width - 6), style="cyan", no_wrap=True
        )
        rows = [bar, grid, curve] if len(self.losses) > 1 else [bar, grid]
        return Panel(Group(*rows), title="training", border_style="dim", padding=(0, 1))


# The metrics shown, in order, with the words for them.
SHOWN = {
    "step": "step",
    "loss": "loss",
    "mtp_loss": "MTP loss",
    "bits_per_byte": "bits/byte",
    "tokens_per_second": "tokens/s",
    "mfu_causal": "MFU",
    "grad_norm": "gradient norm",
    "busiest_over_mean": "busiest expert",
    "learning_rate": "learning rate",
    "skipped": "skipped",
}
FORMATS: dict[str, Callable[[Any], str]] = {
    "loss": lambda x: f"{x:.3f}",
    "mtp_loss": lambda x: f"{x:.3f}",
    "bits_per_byte": lambda x: f"{x:.3f}",
    "tokens_per_second": lambda x: f"{x:,.0f}",
    "mfu_causal": lambda x: f"{100 * x:.1f}%",
    "grad_norm": lambda x: f"{x:.2f}",
    "busiest_over_mean": lambda x: f"{x:.2f}x",
    "learning_rate": lambda x: f"{x:.2e}",
    "skipped": lambda x: f"{int(x)}",
}


def duration(seconds: float | None) -> str:
    """A span of time as one says it.

    >>> duration(8), duration(200), duration(7500), duration(None)
    ('8s', '3m20s', '2h05m', '?')
    """
    if seconds is None:
        return "?"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as bars one row high, averaged to the width; gaps where a value is not finite."""
    if not values or width < 1:
        return ""
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    groups = [values[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if b > a]
    means = [sum(group) / len(group) for group in groups]
    finite = [m for m in means if math.isfinite(m)] or [0.0]
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((m - low) * scale)] if math.isfinite(m) else " " for m in means)
