"""Running a kernel benchmark: programs compiled side by side, then each case timed in turn."""

import dataclasses
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.kernel_data import for_jax, for_torch, random_array
from experiments.bench.kernel_report import figures, report, verdict
from experiments.bench.kernel_time import Call, Timer, import_torch, require_gpu
from experiments.tables import print_table, write_json

# An operand is random data of a spec, or the array itself.
Operand = jax.ShapeDtypeStruct | np.ndarray
CACHE = "DEEPSEEK_JAX_KERNEL_CACHE"
CHECK_SECONDS = 150
PACKAGE = "experiments.bench"
FAMILIES = ("gemm", "grouped", "quantize")


@dataclass(frozen=True)
class Program:
    """A jitted function of the operands; `carried` gets its own result as its last operand."""

    function: Callable
    operands: tuple[Operand, ...]
    carried: bool = False

    def compile(self) -> Any:
        donated = (len(self.operands) - 1,) if self.carried else ()
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.operands]
        return jax.jit(self.function, donate_argnums=donated).lower(*specs).compile()


@dataclass(frozen=True)
class Case:
    """One shape: programs of ours and JAX's, and torch's calls, on the same kind of data.

    A peer takes torch and its operands on the GPU, made from arrays of the given specs.
    """

    section: str
    shape: str
    flops: float
    bytes: float
    programs: Mapping[str, Program]
    peers: Mapping[str, tuple[Callable, tuple[Operand, ...]]] = field(default_factory=dict)


def cores() -> int:
    """SMs of the GPU, or of an H200 where there is none: cases can be listed anywhere."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def use_cache() -> None:
    """Compiled programs are kept where the processes of one benchmark find them."""
    folder = os.environ.setdefault(CACHE, tempfile.mkdtemp(prefix="kernels-"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_all(families: Sequence[str], jobs: int) -> None:
    """Fills the cache from several processes: a compilation takes seconds and one core."""
    if jobs < 2:
        return
    command = [sys.executable, "-m", f"{PACKAGE}.kernel_run", ",".join(families)]
    workers = [subprocess.Popen([*command, f"{i}/{jobs}"]) for i in range(jobs)]
    for worker in workers:
        worker.wait()


def compile_part(families: str, part: str) -> None:
    """Every so-many-th program of some benchmarks."""
    use_cache()
    first, step = map(int, part.split("/"))
    modules = [importlib.import_module(f"{PACKAGE}.{family}") for family in families.split(",")]
    cases = [case for module in modules for case in module.cases()]
    programs = [program for case in cases for program in case.programs.values()]
    for program in programs[first::step]:
        try:
            program.compile()
        except Exception as error:
            print(brief(error), file=sys.stderr)


def bench(args: "KernelArgs", *families: str) -> None:
    """Compiles and checks all side by side, then times, judges and reports one after the other.

    A family is a file beside this one, with `cases`, `judge` and whether it has PEERS.
    """
    modules = {family: importlib.import_module(f"{PACKAGE}.{family}") for family in families}
    peers = args.peers and any(module.PEERS for module in modules.values())
    require_gpu(f"bench {families[0] if len(families) == 1 else 'kernels'}", torch=peers)
    use_cache()
    checks = {family: start_checks(family) for family in families if args.checks}
    compile_all(families, args.jobs)
    verdicts = {family: finish_checks(family, check) for family, check in checks.items()}
    records: dict[str, dict[str, Any]] = {}
    for family, module in modules.items():
        if verdicts.get(family) and not verdicts[family][-1]["holds"]:
            print_table(
                verdicts[family], title=f"bench {family}: not timed, its checks did not end"
            )
            continue
        began = time.monotonic()
        rows, notes = time_cases(
            module.cases(), peers=peers and module.PEERS, until=began + args.limit
        )
        notes["seconds"] = round(time.monotonic() - began)
        judged = [*module.judge(rows), *verdicts.get(family, [])]
        records[family] = report(family, rows, judged, out=args.out, notes=notes)
    if args.json is not None:
        write_json(args.json, records)


def bench_kernels(args: "KernelArgs") -> None:
    """All three; about four minutes on an H200 with 16 cores."""
    bench(args, *FAMILIES)


def start_checks(command: str) -> subprocess.Popen:
    """The checks in a process of their own: a kernel that hangs must not take the times along."""
    return subprocess.Popen(
        [sys.executable, "-m", f"{PACKAGE}.kernel_checks", command],
        stdout=subprocess.PIPE,
        text=True,
    )


def finish_checks(command: str, checks: subprocess.Popen) -> list[dict[str, Any]]:
    """Verdicts of the checks, and whether they came to their end in time."""
    try:
        printed, _ = checks.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        checks.kill()
        printed, _ = checks.communicate()
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    bar = f"checks of {command} that ended"
    return [*rows, verdict(bar, len(rows) if checks.returncode == 0 else 0, 1)]


def time_cases(
    cases: Sequence[Case], *, peers: bool, until: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each kernel of each case, and how it was timed; begins none after `until`."""
    timer = Timer(torch=peers)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    skipped = 0
    for case in cases:
        if time.monotonic() > until:
            skipped += 1
            continue
        where = f"{case.section}, {case.shape}"
        times = {}
        try:
            times = timer.compare(calls_of(case, peers, failed))
        except Exception as error:
            failed.append(f"{where}: {brief(error)}")
        for name, microseconds in times.items():
            work = {"flops": case.flops, "bytes": case.bytes}
            if case.flops and name != next(iter(case.programs)):
                work["bytes"] = None  # others move other bytes for the same product
            row = {"section": case.section, "shape": case.shape, "kernel": name}
            row |= figures(work, microseconds)
            key = "FLOP/byte" if case.flops else "MB"
            row[key] = case.flops / case.bytes if case.flops else case.bytes / 1e6
            rows.append(row)
        gc.collect()
        if peers:
            import_torch().cuda.empty_cache()
    notes = {"clock": timer.method}
    if peers:
        notes |= {"torch": import_torch().__version__, "torch clock": timer.torch_method}
    if skipped:
        notes["cases left out"] = skipped
    if failed:
        notes["failed"] = "; ".join(failed)
    return rows, notes


def calls_of(case: Case, peers: bool, failed: list[str]) -> dict[str, Call]:
    """What to time, on the same arrays. What does not run once is left out.

    Operands of one call are different arrays even where their specs are equal: what is read twice
    would come from the cache the second time.
    """
    made: dict[Any, np.ndarray] = {}
    placed: dict[int, jax.Array] = {}

    def hosts(operands: Sequence[Operand]) -> list[np.ndarray]:
        found, seen = [], Counter()
        for operand in operands:
            if not isinstance(operand, np.ndarray):
                spec = operand.shape, str(operand.dtype)
                key = *spec, seen[spec]
                seen[spec] += 1
                if key not in made:
                    made[key] = random_array(operand)
                operand = made[key]
            found.append(operand)
        return found

    def ours(program: Program) -> Call:
        compiled = program.compile()
        arrays = hosts(program.operands)
        for array in arrays:
            if id(array) not in placed:
                placed[id(array)] = for_jax(array)
        operands = [placed[id(array)] for array in arrays]
        if not program.carried:
            return Call(lambda: compiled(*operands))
        # It is overwritten.
        operands[-1] = operands[-1].copy()

        def step():
            operands[-1] = compiled(*operands)
            return operands[-1]

        return Call(step)

    def theirs(prepare: Callable, operands: tuple[Operand, ...]) -> Call:
        torch = import_torch()
        run = prepare(torch, *(for_torch(torch, array) for array in hosts(operands)))
        return Call(run, torch=True)

    makers = {name: functools.partial(ours, program) for name, program in case.programs.items()}
    if peers:
        makers |= {name: functools.partial(theirs, *peer) for name, peer in case.peers.items()}
    calls = {}
    for name, make in makers.items():
        try:
            call = make()
            result = call.run()
            if not call.torch:
                jax.block_until_ready(result)
            calls[name] = call
        except Exception as error:
            failed.append(f"{case.section}, {case.shape}, {name}: {brief(error)}")
    return calls


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def ratios(rows: Iterable[Mapping[str, Any]], section: str, over: str) -> dict[str, float]:
    """Shape -> time of a peer over that of the first of ours in a section."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for row in rows:
        if row["section"] == section and row["kernel"].startswith("ours"):
            ours.setdefault(row["shape"], row["us"])
        if row["section"] == section and row["kernel"] == over:
            theirs[row["shape"]] = row["us"]
    return {shape: theirs[shape] / ours[shape] for shape in ours if shape in theirs}


def default_jobs() -> int:
    return max(1, (os.cpu_count() or 2) // 2)


@dataclass(frozen=True)
class KernelArgs:
    """Check and time all kernels of ours on this GPU, beside the vendor's where torch is installed.

    `bench gemm`, `bench grouped` and `bench quantize`, which say what each measures, in one run.
    """

    peers: bool = True
    """Time torch's kernels (cuBLASLt and its own) in the same run."""
    checks: bool = True
    """Check the kernels against float64 before they are timed."""
    jobs: int = dataclasses.field(default_factory=default_jobs)
    """Processes that compile side by side."""
    limit: float = 240
    """Seconds after which a benchmark begins no further shape."""
    out: Path = Path("runs/bench")
    """Folder of the JSON file and the picture of each benchmark."""
    json: Path | None = None
    """Also write the figures of all of them to this file."""


if __name__ == "__main__":
    compile_part(*sys.argv[1:])
