"""Compiles the cases of `bench mesh` side by side, and runs them one mesh after the other."""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.children import Child, Row
from experiments.bench.mesh_case import NO_TURN
from experiments.bench.mesh_cases import Case

COMMAND = "experiments.bench.mesh_case"
# Of the time that is left, what the programs of a mesh may still take to compile.
COMPILING = 0.7
# Of a device's memory: NCCL and the driver take theirs beside it.
MEMORY_FRACTION = "0.95"


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Of processes that compile and measure: programs and choices of kernels are kept."""
    with tempfile.TemporaryDirectory() as cache:
        yield {
            "JAX_COMPILATION_CACHE_DIR": cache,
            **os.environ,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            # Those that wait hold no memory that others need.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION,
        }


def in_groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that share a process: of one mesh and precision, and all of one device."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        role = "one device" if case.devices == 1 else case.role
        where = (case.recipe, case.precision, role, case.processes, *case.setup.mesh.values())
        groups.setdefault(where, []).append(case)
    return list(groups.values())


@dataclass
class Ahead:
    """A group whose process compiles and then waits until `turn` exists."""

    cases: list[Case]
    child: Child
    turn: Path
    release: Path | None  # what others wait for until this one's programs are compiled


def run_all(
    cases: Sequence[Case],
    env: Mapping[str, str],
    *,
    jobs: int,
    limit: float,
    until: float,
    cards: Sequence[str],
    found: Callable[[Case, Row], None],
) -> None:
    """Hands over each row as soon as there is one. While one mesh runs, no other compiles.

    In BF16 one device's programs are compiled before the others, which then find its choices of
    kernels: losses are compared, and should not differ by those.

    Args:
      jobs: processes that compile side by side.
      limit: seconds that one case may take when it is compiled.
      until: the time of `time.monotonic` at which nothing further is begun.
      cards: names of the host's devices.
    """
    groups = in_groups(cases)
    first = next((g for g in groups if g[0].devices == 1 and g[0].precision == "bf16"), None)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        chosen = Path(folder) / "chosen"

        def started(index: int, left: Sequence[Case]) -> Ahead:
            group, turn = groups[index], Path(folder) / f"{index}"
            waits = first is not None and group is not first and group[0].precision == "bf16"
            words = (COMMAND, str(chosen) if waits else NO_TURN, str(turn))
            card = {"CUDA_VISIBLE_DEVICES": cards[index % len(cards)]}
            child = Child(words, left, {**env, **(card if group[0].devices == 1 else {})})
            stack.callback(child.end)
            return Ahead(list(left), child, turn, chosen if group is first else None)

        ahead: dict[int, Ahead] = {}
        for index, left in enumerate(groups):
            for later in range(index, len(groups)):
                # Several processes that hear nothing of each other for a while would give up.
                early = groups[later][0].processes == 1 and later not in ahead
                if early and len(ahead) < jobs and time.monotonic() < until:
                    ahead[later] = started(later, groups[later])
            this = ahead.pop(index, None)
            while left:
                if time.monotonic() >= until:
                    for case in left:
                        found(case, {"error": "not run: out of time"})
                    break
                this = this or started(index, left)
                others = [other.child for other in ahead.values()]
                left = run_group(this, others, limit, until, found)
                this.child.end()
                this = None


def run_group(
    this: Ahead,
    others: Sequence[Child],
    limit: float,
    until: float,
    found: Callable[[Case, Row], None],
) -> list[Case]:
    """The rows of a group; returns the cases that are left when its process hangs or dies."""
    now, sizes = time.monotonic(), {}
    compiled_by = now + COMPILING * (until - now)
    while len(sizes) < len(this.cases):
        row = this.child.next(compiled_by - time.monotonic())
        if row.pop("ended", False):
            for case in this.cases:
                found(case, {"error": f"while it compiled: {row['error']}"})
            break
        sizes[row["key"]] = row["compiled"]
    if this.release is not None:
        this.release.touch()
    if len(sizes) < len(this.cases):
        return []
    left = sorted(this.cases, key=lambda case: sizes[case.key])
    with stopped(others):
        this.turn.touch()
        while left:
            case = left.pop(0)
            row = this.child.next(min(limit, until - time.monotonic()))
            ended = row.pop("ended", False)
            found(case, row)
            if ended:
                break
    return left


@contextlib.contextmanager
def stopped(children: Sequence[Child]) -> Iterator[None]:
    """Meanwhile the processes do nothing."""
    for child in children:
        child.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for child in children:
            child.process.send_signal(signal.SIGCONT)
