"""What a run leaves on disk: the files of its directory and how they are read back."""

import json
import os
from pathlib import Path
from typing import Any

from deepseek_jax.config import Run, differing_fields, from_json
from experiments.tables import plain, write_json

# May differ when a run goes on: they do not change the numbers of a step.
FREE_ON_RESUME = ("steps", "checkpoint_every", "keep_checkpoints", "max_skipped")


class RunDirectory:
    """Paths of a run's files."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.events = self.path / "events"
        self.checkpoints = self.path / "checkpoints"
        self.data = self.path / "data"

    def create(self) -> None:
        """Makes the directory; refuses a file, or a directory that holds a run already."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run path {self.path} is a file: name a directory")
        if self.config.exists():
            raise ValueError(
                f"{self.path} holds a run already: go on with --resume, or name another --run"
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def write_config(self, record: dict[str, Any]) -> None:
        write_json(self.config, record)

    def read_config(self) -> dict[str, Any]:
        """The record written at the start of the run."""
        if not self.config.is_file():
            raise ValueError(f"{self.path} is not the directory of a run: it has no config.json")
        try:
            return json.loads(self.config.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.config} is damaged: {error}") from error

    def read_run(self) -> Run:
        return from_json(Run, self.read_config()["run"])


def check_unchanged(recorded: Run, run: Run) -> None:
    """Raises a ValueError that lists the fields in which a resumed run differs from its record."""
    changed = [
        line
        for line in differing_fields(recorded, run)
        if line.split(":")[0] not in FREE_ON_RESUME
    ]
    if changed:
        raise ValueError(
            "the configuration differs from the run to resume: " + "; ".join(changed)
            + "; resume with the same, or start another --run"
        )


class MetricsLog:
    """metrics.jsonl: one JSON object per step, cut back to the step that a run resumes from."""

    def __init__(self, path: Path, *, resume_step: int):
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the process was killed while it wrote this line
                if entry["step"] > resume_step:
                    break
                kept.append(line + b"\n")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(plain(entry)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
