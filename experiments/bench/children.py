"""Cases of a benchmark in processes of their own, so that one that fails or hangs costs one row."""

import gc
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from experiments.bench.kernel_run import brief
from experiments.hosts import group, here
from experiments.processes import is_first, join
from experiments.supervision import supervise

GRACE = 15  # seconds that processes have to end by themselves

Row = dict[str, Any]


class Case(Protocol):
    """What a process is to do."""

    @property
    def key(self) -> str: ...

    @property
    def words(self) -> Row: ...  # of its file

    @property
    def processes(self) -> int: ...


def devices_of_host(limit: float = 60) -> Row:
    """Number, kind and platform of this host's devices, which this process must not take.

    Raises:
      ValueError: they cannot be asked.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the devices did not answer within {limit:g} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"no devices: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def devices_here() -> Row:
    """The same of this process."""
    first = jax.devices()[0]
    return {"count": jax.device_count(), "kind": first.device_kind, "platform": first.platform}


def several(processes: int, words: Sequence[str]) -> int:
    """Runs this program as so many processes, which share the host's devices; its exit code."""
    # CPU devices are made up by each process; GPUs are shared out with the places.
    flags = os.environ.get("XLA_FLAGS", "")
    share = lambda found: f"{found[1]}{int(found[2]) // processes}"
    os.environ["XLA_FLAGS"] = re.sub(r"(host_platform_device_count=)(\d+)", share, flags)
    return supervise(group(processes), ["-m", *words])


def answer(
    module: str,
    work: Callable[[Row], Row],
    path: str,
    processes: str = "1",
    *,
    prepare: Callable[[list[Row]], list[Row]] = lambda cases: cases,
) -> None:
    """What the program `module` does when called: a line of JSON for each case of a file.

    A case whose work fails says so. With more than one process it starts them, and they answer.

    Args:
      prepare: what is done with all cases before the first; gives them in the order of the work.
    """
    place = here()
    if int(processes) > 1 and place is None:
        raise SystemExit(several(int(processes), [module, *sys.argv[1:]]))
    if place is not None:
        join(place)
    for case in prepare(json.loads(Path(path).read_text())):
        try:
            found = work(case)
        except Exception as error:
            found = {"error": brief(error)}
        if is_first():
            print(json.dumps({"key": case["key"], **found}), flush=True)
        gc.collect()


def attempt(work: Callable[[Any], Any], operand: Any) -> Any:
    """A result, or the exception that came instead, of this or of what the operand was to be."""
    if isinstance(operand, Exception):
        return operand
    try:
        return work(operand)
    except Exception as error:
        return error


class Child:
    """A process that writes a line of JSON for each of its cases."""

    def __init__(self, command: Sequence[str], cases: Sequence[Case], env: Mapping[str, str]):
        file = tempfile.NamedTemporaryFile("w", suffix=".json", delete=False)
        with file:
            json.dump([case.words for case in cases], file)
        self.file = Path(file.name)
        count = cases[0].processes
        words = [*command, file.name, *([str(count)] if count > 1 else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words], env=env, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.errors: deque[str] = deque(maxlen=100)
        self.lines: queue.Queue[Row | None] = queue.Queue()
        self.readers = [threading.Thread(target=read, daemon=True)
                        for read in (self._read, self._read_errors)]  # fmt: skip
        for reader in self.readers:
            reader.start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith("{"):
                    self.lines.put(json.loads(line))
        self.readers[1].join(GRACE)
        self.process.wait()
        self.lines.put(None)

    def _read_errors(self) -> None:
        with self.process.stderr as lines:
            for line in lines:
                if line.strip():
                    self.errors.append(line.strip())

    def next(self, seconds: float) -> Row:
        """The next case's row, or one that says why there is none."""
        try:
            row = self.lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            return {"error": f"no answer within {seconds:.0f} s", "ended": True}
        if row is not None:
            return row
        said = [line for line in self.errors if "error" in line.lower()]
        last = (said or list(self.errors) or [f"exit code {self.process.returncode}"])[-1]
        return {"error": f"the process ended: {last[:200]}", "ended": True}

    def end(self) -> None:
        # The first signal is for processes that it started itself.
        for signal, seconds in ((self.process.terminate, GRACE), (self.process.kill, None)):
            if self.process.poll() is not None:
                break
            signal()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        for reader in self.readers:
            reader.join(GRACE)
        self.file.unlink(missing_ok=True)


def run_cases(
    command: Sequence[str],
    cases: Sequence[Case],
    env: Mapping[str, str],
    *,
    limit: float,
    until: float,
) -> Iterator[tuple[Case, Row]]:
    """The rows of cases that share a process; after one that hangs or dies comes a new process.

    Args:
      command: a module, and the words before the name of the file of cases. With more than one
        process it starts them itself, when their number follows the file.
      limit: seconds that one case may take.
      until: the time of `time.monotonic` at which nothing further is begun.
    """
    left = list(cases)
    while left:
        if time.monotonic() >= until:
            yield from ((case, {"error": "not run: out of time"}) for case in left)
            return
        child = Child(command, left, env)
        try:
            for case in list(left):
                row = child.next(min(limit, until - time.monotonic()))
                left.pop(0)
                yield case, row
                if row.pop("ended", False):
                    break
        finally:
            child.end()


if __name__ == "__main__":
    print(json.dumps(devices_here()))
