"""One table, printed for a person and written as JSON for a program."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from experiments.files import whole

Row = Mapping[str, Any]


def print_table(
    rows: Sequence[Row],
    *,
    title: str | None = None,
    json_path: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the rows as a table, columns in order of appearance; write them to a JSON file too."""
    rows = [{name: plain(value) for name, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(
        title=title and Text(title), title_justify="left", title_style="bold", header_style="bold"
    )
    for name in columns:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(show(row.get(name))) for name in columns))
    console = console or Console()
    if not console.is_terminal:
        # A pipe has no width to fit; cutting cells to 80 columns would lose what they say.
        measured = Measurement.get(console, console.options.update(width=10_000), table)
        console = Console(file=console.file, width=measured.maximum)
    console.print(table)
    if json_path is not None:
        write_json(json_path, rows)


def plain(value: Any) -> Any:
    """A value as JSON holds it: scalars of arrays as numbers, not-a-number as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value)


def show(value: Any) -> str:
    """A cell: counts in groups of three, four significant digits of a measurement.

    >>> show(1234567), show(0.123456), show(None)
    ('1,234,567', '0.1235', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write the value so that the file is whole or absent."""
    with whole(path) as partial:
        partial.write_text(json.dumps(plain(value), indent=2) + "\n")
