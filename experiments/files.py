"""Files that are whole or absent, and lines that are."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place in the end: whole, or not at all.

    Only a killed process leaves it behind, hidden and with its number.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def json_lines(path: Path, read: Callable, mend: str) -> Iterator[tuple[Any, int]]:
    """What `read` makes of the JSON value of each line, and where the line ends in the file.

    A last line that was cut off is left out: its process was killed while it wrote.

    Args:
      mend: what can be done about a line that is damaged otherwise.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                found = read(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} is damaged in line {number}: {mend}") from error
            yield found, file.tell()
