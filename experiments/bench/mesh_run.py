"""Compiles and runs the cases of `bench mesh`: side by side where they can, and else in turn."""

import os
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.bench.children import Row, run_cases
from experiments.bench.mesh_cases import Case

COMPILE, MEASURE = (("experiments.bench.mesh_case", word) for word in ("compile", "measure"))
# Of a device's memory: NCCL and the driver take theirs beside it.
MEMORY_FRACTION = "0.95"


def environment(cache: Path) -> dict[str, str]:
    """Of processes that compile and measure: programs and choices of kernels are kept."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def in_groups(cases: Sequence[Case], sizes: Mapping[str, int]) -> list[list[Case]]:
    """Cases that share a process: of one mesh, precision and role.

    What they need grows from one to the next, so that the peak so far is that of the last.
    """
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        role = "one device" if case.devices == 1 else case.role
        where = (case.recipe, case.precision, role, case.processes, *case.setup.mesh.values())
        groups.setdefault(where, []).append(case)
    return [sorted(group, key=lambda case: sizes.get(case.key, 0)) for group in groups.values()]


def compile_all(
    cases: Sequence[Case],
    env: dict[str, str],
    *,
    jobs: int,
    limit: float,
    until: float,
    cards: Sequence[str],
) -> dict[str, Row]:
    """Compiles side by side for the processes that measure: takes minutes one after the other.

    Of each precision one device's whole share comes first, whose choices of kernels the others
    then find: losses are compared, and should not differ by those.
    """
    env = {**env, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    first = {c.precision: c for c in cases if c.role == "alone" and c.precision == "bf16"}
    found: dict[str, Row] = {}

    def one(case: Case) -> None:
        # A program is found again only where as many devices are seen.
        seen = {"CUDA_VISIBLE_DEVICES": cards[len(case.key) % len(cards)]}
        own = {**env, **(seen if case.devices == 1 else {})}
        for _, row in run_cases(COMPILE, [case], own, limit=limit, until=until):
            found[case.key] = row

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        begun = {precision: pool.submit(one, case) for precision, case in first.items()}
        rest = [c for c in cases if c not in first.values()]
        futures = [pool.submit(one, c) for c in rest if c.precision not in begun]
        for precision, future in begun.items():
            future.result()
            futures += [pool.submit(one, c) for c in rest if c.precision == precision]
        for future in futures:
            future.result()
    return found


def measure_all(
    cases: Sequence[Case],
    env: dict[str, str],
    sizes: Mapping[str, int],
    *,
    limit: float,
    until: float,
    cards: Sequence[str],
    say: Callable[[Case, Row], None],
) -> dict[str, Row]:
    """Rows by key: steps of one device side by side on different cards, then mesh by mesh.

    Args:
      sizes: bytes that the compiled steps need, by key.
    """
    found: dict[str, Row] = {}
    free: queue.Queue[str] = queue.Queue()
    for card in cards:
        free.put(card)
    env = {**env, "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION}

    def group(cases: Sequence[Case], env: dict[str, str]) -> None:
        for case, row in run_cases(MEASURE, cases, env, limit=limit, until=until):
            found[case.key] = row
            say(case, row)

    def alone(cases: Sequence[Case]) -> None:
        card = free.get()
        try:
            group(cases, {**env, "CUDA_VISIBLE_DEVICES": card})
        finally:
            free.put(card)

    groups = in_groups(cases, sizes)
    with ThreadPoolExecutor(max_workers=len(cards)) as pool:
        list(pool.map(alone, [g for g in groups if g[0].devices == 1]))
    for g in groups:
        if g[0].devices > 1:
            group(g, env)
    return found
