"""What a sweep has compiled and measured, on disk, so that a stopped one goes on."""

import json
import os
from pathlib import Path

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
        """What is there; a last line that was cut off is left out, and cut off in the file too."""
        if not self._path.exists():
            return
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.decode(errors="replace").splitlines(), start=1):
            try:
                kind, name, value = json.loads(line)
                self._found[kind, name] = dict(value)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self._path} is damaged in line {number}: delete that line, or name another "
                    "--out"
                ) from error

    def get(self, kind: str, setup: Setup) -> dict | None:
        return self._found.get((kind, key(setup)))

    def add(self, kind: str, setup: Setup, value: dict) -> None:
        self._found[kind, key(setup)] = value
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(json.dumps([kind, key(setup), value]) + "\n")


def key(setup: Setup) -> str:
    """A setup in one line that changes with anything that its program depends on."""
    return f"{setup.cluster.name} {setup.name} {setup.run} {setup.scheme}"
