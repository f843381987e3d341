"""Of which code, card and day figures are."""

import datetime
import subprocess
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """The commit of the code that runs, where it is a clone; "-dirty" where files were changed."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return found.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def code_and_day() -> dict[str, Any]:
    """Of figures that no device was needed for."""
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
    }


def provenance() -> dict[str, Any]:
    """Of figures measured on the first device of this process."""
    return {"card": jax.devices()[0].device_kind, **code_and_day()}
