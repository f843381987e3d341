"""The train steps that `bench mesh` compares: every legal mesh of a host, and one device alone."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_jax.config import Run, Schedule
from experiments.planning.choose import prediction
from experiments.planning.compile import words_of
from experiments.planning.memory import memory
from experiments.planning.setup import Setup, mesh_name, meshes, setup
from sharding.hardware import ACCELERATORS, Cluster
from sharding.mesh import AXES

GIB = 2**30
ALONE = dict.fromkeys(AXES, 1)
# The formula of memory is an estimate: only what is this far beyond a device is not tried.
BEYOND = 1.25
# Steps of a case that is only timed.
TIMED_STEPS = 7


@dataclass(frozen=True)
class Case:
    """One train step of the same tokens as all others of its recipe and precision."""

    setup: Setup
    recipe: str
    steps: int
    sequences: int  # of a device in a micro-batch
    role: str = "mesh"  # or: alone, one device's share; reference, all tokens on one device
    inspected: bool = False  # its replicas are compared, and a step is profiled
    processes: int = 1

    @property
    def precision(self) -> str:
        return self.setup.run.precision.matmul

    @property
    def devices(self) -> int:
        return self.setup.cluster.devices

    @property
    def key(self) -> str:
        each = f"{self.processes} processes, " if self.processes > 1 else ""
        what = {"alone": "one device", "reference": "one device, all tokens"}
        where = what.get(self.role) or mesh_name(self.setup.mesh)
        return (f"{self.recipe} {self.precision}, {where}, {each}micro-batch {self.sequences}")

    @property
    def words(self) -> dict[str, Any]:
        """What a process that runs it is told."""
        target = self.setup.cluster.accelerator.platform
        return {"key": self.key, "setup": words_of(self.setup, target), "steps": self.steps,
                "inspected": self.inspected}  # fmt: skip

    @property
    def seconds(self) -> float:
        """Of a step, predicted by the cost model."""
        return prediction(self.setup).seconds

    @property
    def refusal(self) -> str | None:
        """Why it is not even tried: far more memory than a device has, by formula."""
        needed, has = memory(self.setup).total, self.setup.cluster.accelerator.memory
        if needed <= BEYOND * has:
            return None
        return f"needs about {needed / GIB:.0f} GiB by formula, a device has {has / GIB:.0f}"


def cluster_of(kind: str, count: int) -> Cluster:
    """The cluster that a host's devices make.

    Raises:
      ValueError: the device has no figures.
    """
    for name, accelerator in ACCELERATORS.items():
        if kind.startswith(accelerator.kind):
            return Cluster(f"{name}x{count}", accelerator, count)
    raise ValueError(
        f"bench mesh predicts times and has no figures for {kind!r}: add it to "
        "sharding/hardware.py"
    )


def setup_of_tokens(
    run: Run, cluster: Cluster, mesh: Mapping[str, int], *, sequences: int, total: int
) -> Setup:
    """A run on a mesh with `sequences` of each device in a micro-batch and `total` in a step."""
    run = dataclasses.replace(run, micro_batch=1, batch_size=Schedule.constant(total))
    # Devices of the tensor axis share sequences, and have so many times as many.
    return setup(run, cluster, mesh, sequences=sequences * mesh["tensor"])


def cases(
    run: Run,
    name: str,
    cluster: Cluster,
    chosen: Sequence[Mapping[str, int]],
    *,
    micro_batches: Sequence[int],
    steps: int,
    processes: Sequence[int] = (1,),
) -> Iterator[Case]:
    """One device alone with each micro-batch, the reference of the losses, then mesh by mesh.

    The largest micro-batch is a device's whole share of a step, and it alone runs all `steps`;
    smaller ones are accumulated to as many tokens and only timed.
    """
    share, total = max(micro_batches), max(micro_batches) * cluster.devices
    one = dataclasses.replace(cluster, name=cluster.name.partition("x")[0] + "x1", devices=1)
    make = lambda where, mesh, n, all_: setup_of_tokens(run, where, mesh, sequences=n, total=all_)
    for n in sorted(micro_batches):
        yield Case(make(one, ALONE, n, share), name, TIMED_STEPS, n, "alone")
    yield Case(make(one, ALONE, share, total), name, steps, share, "reference")
    for mesh in chosen:
        for n in sorted(micro_batches):
            whole = n == share
            often = steps if whole else TIMED_STEPS
            yield Case(make(cluster, mesh, n, total), name, often, n, inspected=whole)
    for count in processes:
        for mesh in chosen if count > 1 else ():
            yield Case(make(cluster, mesh, share, total), name, steps, share, inspected=True,
                       processes=count)  # fmt: skip


def legal_meshes(run: Run, devices: int) -> list[dict[str, int]]:
    """Every legal mesh of so many devices: of one axis before those of two, tensor last."""
    found = list(meshes(run, devices))
    return sorted(found, key=lambda mesh: (sum(n > 1 for n in mesh.values()), mesh["tensor"]))
