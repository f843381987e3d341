"""Folders that are whole or absent, and locks on files, which one process holds at a time."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO


def check_absent(path: Path) -> None:
    """Raises ValueError where a folder to be written is there already."""
    if path.exists():
        raise ValueError(f"{path} exists already: name another folder")


def lock(file: IO | int, taken: str) -> None:
    """Keeps other processes from locking an open file, until it is closed or this process ends.

    Args:
      taken: what the ValueError says where another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(taken) from error
    except OSError:
        pass  # a file system that knows no locks


class complete_folder:
    """A folder that gets its name when the block ends well, and is removed when it does not.

    With a plan (of JSON values) what a killed process left of the same plan is kept, to go on
    with; an error then leaves it, too.
    """

    def __init__(self, path: Path, *, plan: object = None):
        check_absent(path)
        self._path, self._plan = path, plan
        self._partial = path.with_name(f".{path.name}.partial")
        self._record = self._partial / "plan.json"

    def __enter__(self) -> Path:
        self._hold()
        if not self._begun():
            for left in self._partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            if self._plan is not None:
                write_json(self._record, self._plan)
        return self._partial

    def _hold(self) -> None:
        """Keeps other processes from writing the same folder as long as this one lives."""
        self._partial.mkdir(parents=True, exist_ok=True)
        self._held = os.open(self._partial, os.O_RDONLY)
        try:
            lock(self._held, f"another process writes {self._path} now: wait for it, or name "
                             "another folder")  # fmt: skip
            check_absent(self._path)  # another may just have ended
        except ValueError:
            os.close(self._held)
            raise

    def _begun(self) -> bool:
        if self._plan is None or not self._record.is_file():
            return False
        try:
            return json.loads(self._record.read_text()) == self._plan
        except ValueError:
            return False

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._record.unlink(missing_ok=True)
            os.replace(self._partial, self._path)
        elif self._plan is None:
            shutil.rmtree(self._partial, ignore_errors=True)
        os.close(self._held)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
