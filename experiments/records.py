"""What a run has recorded about itself, read back: settings, metrics of every step, summary."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.files import json_lines

# Scalars read from every line of metrics.jsonl.
SCALARS = (
    "tokens loss mtp_loss bits_per_byte learning_rate grad_norm busiest_over_mean skipped seconds "
    "tokens_per_second mfu_causal mfu_full"
).split()
# Expert loads are kept of at most this many steps, evenly spread.
LOADS = 480


@dataclass(frozen=True)
class Records:
    """What a run has written about itself so far."""

    config: dict[str, Any]
    summary: dict[str, Any] | None  # None until the run has ended
    steps: list[int]
    scalars: dict[str, np.ndarray]
    load_steps: list[int]
    load_LET: np.ndarray  # load of each expert over the mean of its layer; T counts load_steps

    def last(self, name: str, count: int = 1) -> float | None:
        """The mean of a scalar over the last steps, None if it is unknown there."""
        values = self.scalars[name][-count:]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None


def read_records(run_dir: Path) -> Records:
    """Read config.json, metrics.jsonl and summary.json; only the first must exist."""
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir} holds no config.json: name the folder of a run")
    config = read_object(run_dir / "config.json", "name the folder of a run that is whole")
    # A step written twice, before a crash and after the resume, counts once.
    lines = {line["step"]: line for line, _ in metrics_lines(run_dir / "metrics.jsonl")}
    steps = sorted(lines)
    scalars = {name: floats(lines[step].get(name) for step in steps) for name in SCALARS}
    with_load = [step for step in steps if lines[step].get("expert_load_LE")]
    load_steps = with_load[:: math.ceil(len(with_load) / LOADS) or 1]
    loads = [np.asarray(lines[step]["expert_load_LE"], np.float64) for step in load_steps]
    return Records(
        config=config,
        summary=read_summary(run_dir / "summary.json"),
        steps=steps,
        scalars=scalars,
        load_steps=load_steps,
        load_LET=np.stack(loads, axis=-1) if loads else np.zeros((0, 0, 0)),
    )


def read_summary(path: Path) -> dict[str, Any] | None:
    """summary.json; None where there is none."""
    if not path.is_file():
        return None
    return read_object(path, "delete it")


def read_object(path: Path, mend: str) -> dict[str, Any]:
    """A JSON object of a file."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__}, no object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {mend}") from error
    return found


def metrics_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of metrics.jsonl, and where each ends."""

    def of_a_step(entry):
        if not isinstance(entry["step"], int):
            raise TypeError(f"step {entry['step']!r} is no number")
        return entry

    return json_lines(path, of_a_step, "delete that line, which is of one step")


def floats(values: Iterable[float | None]) -> np.ndarray:
    """An array with not-a-number where a value is unknown."""
    return np.asarray([math.nan if v is None else float(v) for v in values], np.float64)
