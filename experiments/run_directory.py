"""What a run leaves on disk: the files of its directory and how they are read back."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.complete_folder import lock
from deepseek_jax.config import Run, differing_fields, from_json
from experiments.files import whole
from experiments.records import metrics_lines, read_object
from experiments.tables import plain, write_json

# May differ when a run goes on: they do not change the numbers of a step.
FREE_ON_RESUME = ("steps", "checkpoint_every", "keep_checkpoints", "max_skipped")

# What config.json must hold for a run to go on or to be used.
RECORD = {"recipe": str, "command": str, "run": dict, "run_hash": str, "corpus": dict,
          "tokenizer": str, "shards": list}  # fmt: skip
LOST = "copy it again, or start another --run"


class RunDirectory:
    """Paths of a run's files.

    All processes share data, tokenizer and checkpoints. What else is written once, those that are
    not the first write to `aside`, a folder of their own.
    """

    def __init__(self, path: str | os.PathLike, *, aside: Path | None = None):
        self.path = Path(path)
        own = self.path if aside is None else aside
        self.config = own / "config.json"
        self.metrics = own / "metrics.jsonl"
        self.summary = own / "summary.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.events = own / "events"
        self.checkpoints = self.path / "checkpoints"
        self.data = self.path / "data"

    def check_new(self) -> None:
        """Refuses a directory that holds a run already."""
        if self.config.exists():
            raise ValueError(
                f"{self.path} holds a run already: go on with --resume, or name another --run"
            )
        if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            raise ValueError(
                f"{self.path} holds checkpoints of a run without config.json: name another --run"
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the directory, and keeps other processes from training into it meanwhile.

        The system lets go of it however this process ends.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run path {self.path} is a file: name a directory")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            path = self.path / ".lock"
            file = path.open("a")
        except OSError as error:
            raise ValueError(
                f"run path {self.path} cannot be written ({error.strerror}): name another --run"
            ) from error
        with file:
            lock(file, f"another launch trains into {self.path} now: wait for it, or name another "
                       "--run")  # fmt: skip
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def write_config(self, record: dict[str, Any]) -> None:
        with writing(self.config):
            write_json(self.config, record)

    def write_summary(self, summary: dict[str, Any]) -> None:
        with writing(self.summary):
            write_json(self.summary, summary)

    def forget_summary(self) -> None:
        """A run that goes on has not ended."""
        self.summary.unlink(missing_ok=True)

    def check_resumable(self, step: int | None) -> None:
        """Raises where the checkpoints of a run, or the metrics of its steps, are gone.

        Args:
          step: of the last checkpoint; a run that was killed early may have none yet.
        """
        metrics = self.path / "metrics.jsonl"
        # The first checkpoint is whole at the latest when the second one has begun, which is after
        # its step is recorded.
        steps = max((line["step"] for line, _ in metrics_lines(metrics)), default=0)
        every = self.read_run().checkpoint_every
        saved = steps > 2 * every or (self.path / "summary.json").exists()
        if step is None and saved:
            raise ValueError(f"{self.checkpoints} holds no checkpoint of this run: {LOST}")
        if step and not metrics.exists():
            raise ValueError(f"{metrics} is missing, which a run goes on with: {LOST}")
        if step and steps < step:
            print(f"{metrics} ends at step {steps}: its curves will miss those up to {step}")

    def write_tokenizer(self, source: Path) -> None:
        """Keeps a copy of a tokenizer.json, whole or not at all."""
        with writing(self.tokenizer), whole(self.tokenizer) as partial:
            partial.write_bytes(source.read_bytes())

    def read_config(self) -> dict[str, Any]:
        """The record that the first process wrote at the start of the run."""
        record = self.path / "config.json"
        if not record.is_file():
            raise ValueError(
                f"{self.path} is not the directory of a run (it has no config.json): name one "
                "that launch has made"
            )
        found = read_object(record, LOST)
        missing = [field for field in RECORD if field not in found]
        if "model_type" in found and missing:
            raise ValueError(
                f"{self.path} is a checkpoint of released weights, not the directory of a run: "
                "launch --from trains on from it, sample and convert read it"
            )
        if missing:
            raise ValueError(f"{record} is damaged ({missing[0]} is missing): {LOST}")
        wrong = [field for field, kind in RECORD.items() if not isinstance(found[field], kind)]
        if wrong or "hash" not in found["corpus"]:
            raise ValueError(f"{record} is damaged ({(wrong or ['corpus'])[0]}): {LOST}")
        return found

    def read_run(self) -> Run:
        record = self.read_config()
        try:
            run = from_json(Run, record["run"])
        # Values of another type fail where they are first used.
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.config} is damaged ({error}): {LOST}") from error
        if record["run_hash"] != hash_of(record["run"]):
            raise ValueError(
                f"{self.path / 'config.json'} was edited, but a run stays what it began as: undo "
                "that, or start another --run and change fields with --set"
            )
        return run


def hash_of(run: dict[str, Any]) -> str:
    """Of a Run as it stands in config.json, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(plain(run), sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Gives an error of the system the name of the file, and says what can be done."""
    try:
        yield
    except OSError as error:
        begun = (path.parent / "config.json").exists()
        again = "go on with --resume" if begun else "start again"
        raise OSError(
            f"{path} could not be written ({error.strerror}): free space there, then {again}"
        ) from error


def check_unchanged(recorded: Run, run: Run, *, named: str | None = None) -> None:
    """Raises a ValueError that lists the fields in which a resumed run differs from its record.

    Args:
      named: the recipe that was named again, whose schedule depends on the number of steps.
    """
    changed = [
        line
        for line in differing_fields(recorded, run)
        if line.split(":")[0] not in FREE_ON_RESUME
    ]
    if changed:
        raise ValueError(
            "the configuration differs from the run to resume: " + "; ".join(changed)
            + "; resume with the same" + f" without naming {named}" * (named is not None)
            + ", or start another --run"
        )


class MetricsLog:
    """metrics.jsonl: one JSON object per step, cut back to the step that a run resumes from."""

    def __init__(self, path: Path, *, resume_step: int):
        kept = 0
        for entry, end in metrics_lines(path):
            if entry["step"] > resume_step:
                break
            kept = end
        self._path = path
        with writing(path):
            self._file = path.open("a")
            self._file.truncate(kept)

    def write(self, entry: dict[str, Any]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(plain(entry)) + "\n")
            self._file.flush()

    def close(self) -> None:
        # A line that could not be written is tried again here; it has been reported.
        with contextlib.suppress(OSError):
            self._file.close()
