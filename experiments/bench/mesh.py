"""`bench mesh`: one train step on every legal mesh of this host, beside one device and the plan."""

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.bench import mesh_report
from experiments.bench.children import Row, devices_of_host
from experiments.bench.kernel_run import brief
from experiments.bench.mesh_cases import Case, cases, cluster_of, legal_meshes
from experiments.bench.mesh_run import environment, run_all
from experiments.bench.train import benchmark_run
from experiments.planning import targets
from experiments.planning.compile import compile_setup
from experiments.planning.setup import mesh_of, refusal
from experiments.tables import write_json
from sharding.hardware import Cluster

# The model whose losses are compared in FP32, where rounding cannot hide a wrong sum.
SMALL = "tiny"


@dataclass(frozen=True)
class BenchMeshArgs:
    """Time a train step on one device, then on each mesh of all devices of this host.

    All steps see the same tokens from the same state, so losses and expert counts can be compared
    with those of one device. Each mesh runs in a process of its own: its peak of memory is its own,
    and if it fails or hangs its row says so.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "peer"
    """Name of the recipe."""
    mesh: tuple[str, ...] = ()
    """Meshes such as fsdp=2 or data=2,expert=4; all legal ones by default."""
    precision: tuple[Literal["fp32", "bf16", "fp8"], ...] = ("bf16", "fp8")
    """Of the recipe; several are run one after the other."""
    micro_batch: tuple[int, ...] = (1, 2, 4)
    """Sequences of a device in a micro-batch. The largest is its whole share of a step."""
    remat: str | None = "paper"
    """none, paper, attention or full."""
    steps: int = 20
    """Steps with the largest micro-batch, whose losses are compared."""
    small: bool = True
    """Also compare the losses of a small FP32 model."""
    processes: tuple[int, ...] = (1,)
    """1: one process has all devices. More: meshes are run by so many processes too."""
    plan: bool = True
    """In the time left, compile as `plan` does, for a device that is absent: the GiB planned."""
    jobs: int = dataclasses.field(default_factory=lambda: max(1, (os.cpu_count() or 2) // 2))
    """Processes that compile side by side."""
    case_limit: float = 100
    """Seconds that one row may take."""
    limit: float = 540
    """Seconds after which no further row is begun."""
    json: Path | None = None
    """Also write everything to this file."""
    picture: Path | None = None
    """Also draw predicted against measured times (SVG)."""


def bench_mesh(args: BenchMeshArgs) -> None:
    """Compiles all steps side by side, runs them one after the other, judges and reports."""
    began = time.monotonic()
    until = began + args.limit
    host = devices_of_host()
    where = cluster_of(host["kind"], check_devices(args, host))
    chosen = [case for case in chosen_cases(args, where) if runnable(case)]
    if not chosen:
        raise ValueError(
            f"no mesh of {where.name} has the memory for {args.recipe}: "
            f"{chosen_cases(args, where)[0].refusal}"
        )
    print(f"{len(chosen)} steps on {host['count']} x {host['kind']}", file=sys.stderr, flush=True)
    cards = cards_of(host) if host["platform"] == "gpu" else ("",)
    measured: dict[str, Row] = {}
    planned: dict[str, Row] = {}

    def report() -> dict[str, Any]:
        """What is known by now, in the files too."""
        rows = mesh_report.rows(chosen, measured, planned)
        made = {
            **mesh_report.origin(host), "recipe": args.recipe, "remat": args.remat,
            "seconds": round(time.monotonic() - began), "rows": rows,
            "exposed": mesh_report.exposed(chosen, measured),
            "verdicts": mesh_report.verdicts(rows), "measured": measured,
        }  # fmt: skip
        if args.json is not None:
            write_json(args.json, made)
        if args.picture is not None:
            args.picture.write_text(mesh_report.picture(rows) + "\n")
        return made

    def found(case: Case, row: Row) -> None:
        measured[case.key] = row
        say(case, row)
        report()

    with environment() as env:
        run_all(chosen, env, jobs=args.jobs, limit=args.case_limit, until=until, cards=cards,
                found=found)  # fmt: skip
    plan_all(args, [case for case in chosen if "seconds" in measured[case.key]], planned, until)
    mesh_report.show(report())


def check_devices(args: BenchMeshArgs, host: Mapping[str, Any]) -> int:
    """The number of devices, if what is asked of them can be done."""
    count = host["count"]
    if count < 2:
        raise ValueError(
            f"bench mesh compares meshes of several devices, and this machine has one "
            f"{host['kind']}: use bench train"
        )
    for number in args.processes:
        if number < 1 or count % number:
            raise ValueError(f"--processes {number} must divide the {count} devices of this host")
    if any(n < 1 or max(args.micro_batch) % n for n in args.micro_batch):
        raise ValueError(
            f"--micro-batch {' '.join(map(str, args.micro_batch))}: each must divide the largest"
        )
    return count


def chosen_cases(args: BenchMeshArgs, where: Cluster) -> list[Case]:
    """All steps to compare, in the order of their worth.

    Raises:
      ValueError: a mesh does not have the number of devices, or the model cannot lie on it.
    """
    found: list[Case] = []
    wanted = [mesh_of(words, where.devices) for words in args.mesh]
    for precision in args.precision:
        run = benchmark_run(args.recipe, precision=precision, remat=args.remat)
        legal = legal_meshes(run, where.devices)
        if wanted:
            reasons = [reason for reason in (refusal(run, mesh) for mesh in wanted) if reason]
            if reasons and precision == args.precision[0]:
                raise ValueError(f"--mesh {' '.join(args.mesh)}: {reasons[0]}")
            legal = [mesh for mesh in wanted if mesh in legal]
        # Of the times of the first precision the plan's order is judged.
        all_ = precision == args.precision[0]
        found += cases(
            run, args.recipe, where, legal, steps=args.steps,
            micro_batches=args.micro_batch if all_ else (max(args.micro_batch),),
            processes=args.processes if all_ else (1,),
        )  # fmt: skip
    if args.small and args.recipe != SMALL:
        run = benchmark_run(SMALL, precision="fp32")
        legal = legal_meshes(run, where.devices)
        found += cases(run, SMALL, where, [m for m in legal if not wanted or m in wanted],
                       micro_batches=(4,), steps=args.steps)  # fmt: skip
    found.sort(key=lambda case: case.processes)
    return found


def runnable(case: Case) -> bool:
    """Whether a case is tried; one that is not says why."""
    if case.refusal is not None:
        say(case, {"error": f"not run: {case.refusal}"})
    return case.refusal is None


def plan_all(
    args: BenchMeshArgs, cases: Sequence[Case], planned: dict[str, Row], until: float
) -> None:
    """Compiles steps once more, as `plan` does for a device that is absent, in the time left."""
    todo = [case for case in cases if case.recipe != SMALL and case.processes == 1]
    target = todo[0].setup.cluster.accelerator.platform if todo else "cpu"
    if not args.plan or not todo or targets.missing(target) is not None:
        return

    def plan(case: Case) -> None:
        try:
            compiled = compile_setup(case.setup, target, limit=max(until - time.monotonic(), 0.1))
            planned[case.key] = {"bytes": compiled.peak}
        except subprocess.TimeoutExpired:
            planned[case.key] = {"note": "not planned: out of time"}
        except Exception as error:
            planned[case.key] = {"note": f"not planned: {brief(error)}"}

    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        list(pool.map(plan, todo))


def cards_of(host: Mapping[str, Any]) -> Sequence[str]:
    """The names of the cards, as the environment may have chosen them."""
    chosen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return chosen or [str(index) for index in range(host["count"])]


def say(case: Case, row: Row) -> None:
    """A line of progress."""
    if "error" in row:
        what = row["error"]
    else:
        what = f"{1000 * statistics.median(row['seconds']):.1f} ms a step"
    print(f"  {case.key}: {what}", file=sys.stderr, flush=True)
