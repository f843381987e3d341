"""What a sweep has compiled and measured, on disk, so that a stopped one goes on."""

import json
import os
from pathlib import Path
from typing import Any

from experiments.files import json_lines
from experiments.planning.setup import Setup


class Notes:
    """What was compiled and measured, kept in a folder so that a stopped sweep goes on."""

    def __init__(self, folder: Path | None):
        self._path = None if folder is None else folder / "notes.jsonl"
        self._found: dict[tuple[str, str], dict] = {}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._read()

    def _read(self) -> None:
        """What is there; a last line that was cut off is removed, for the next to begin anew."""
        kept, mend = 0, "delete that line, or name another --out"
        for (kind, name, value), end in json_lines(self._path, note, mend):
            self._found[kind, name] = value
            kept = end
        if self._path.exists() and kept < len(whole := self._path.read_bytes()):
            if not whole.endswith(b"\n"):
                os.truncate(self._path, kept)

    def get(self, kind: str, setup: Setup) -> dict | None:
        return self._found.get((kind, key(setup)))

    def add(self, kind: str, setup: Setup, value: dict) -> None:
        self._found[kind, key(setup)] = value
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(json.dumps([kind, key(setup), value]) + "\n")


def note(line: Any) -> tuple[str, str, dict]:
    """A line of the file: of what kind, of which setup, and the value."""
    kind, name, value = line
    return str(kind), str(name), dict(value)


def key(setup: Setup) -> str:
    """A setup in one line that changes with anything that its program depends on."""
    return f"{setup.cluster.name} {setup.name} {setup.run} {setup.scheme}"
