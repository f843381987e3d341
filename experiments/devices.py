"""The devices that a command runs on: its mesh, and how the mesh is used."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import ModelConfig, Run
from experiments.planning.setup import ROOM, mesh_name, mesh_of, meshes, named_sizes, refusal
from sharding.expert_copies import check_placement
from sharding.mesh import expert_nodes, make_mesh
from sharding.placement import Scheme, scope
from sharding.rules import ACTIVATIONS, BATCH_AXES, spec

# The key of the table in a file that `place` writes.
TABLE = "expert of each place"
# An XLA flag that says how many devices the CPU stands for.
FORCED = "xla_force_host_platform_device_count"


@dataclass(frozen=True, kw_only=True)
class MeshArgs:
    """What the command line says of devices."""

    mesh: str | None = None
    """Sizes of axes: data=4,expert=8. An axis data that is not named takes the rest."""
    zero: Literal[1, 3] = 3
    """3: weights are gathered layer by layer; 1: over fsdp and expert once a step."""
    devices_per_node: int | None = None
    """Devices that fast links join; by default those of a host."""
    placement: Path | None = None
    """What `place --json` wrote: experts and copies of the busy ones on the expert axis."""


class Devices(NamedTuple):
    """A mesh, None for a single device, and how it is used."""

    mesh: Mesh | None
    scheme: Scheme

    @property
    def size(self) -> int:
        """How many devices."""
        return 1 if self.mesh is None else self.mesh.size

    def scope(self):
        """Programs traced inside run on the mesh."""
        return scope(self.mesh, self.scheme)

    def for_any_load(self) -> "Devices":
        """The same with buffers of dispatch that nothing overflows, for what is not run again."""
        return self._replace(scheme=replace(self.scheme, room=None))

    def __str__(self) -> str:
        first = jax.devices()[0]
        kind = f"{self.size} x {first.device_kind} ({first.platform})"
        if self.mesh is None:
            return f"{kind}, no mesh"
        nodes = f", expert over {self.scheme.expert_nodes} nodes"
        return (f"{kind}, {mesh_name(self.mesh.shape)}, zero {self.scheme.zero}"
                + nodes * (self.scheme.expert_nodes > 1))


ONE_DEVICE = Devices(None, Scheme())


def make_cpu_devices(mesh: str | None, *, processes: int = 1) -> None:
    """Has the CPU stand for as many devices as a mesh names, where nobody has said how many.

    Possible only before JAX looks for devices; those of an accelerator it does not change.
    """
    if mesh is None or FORCED in os.environ.get("XLA_FLAGS", ""):
        return
    count = math.prod(named_sizes(mesh).values())
    if jax.config.jax_num_cpu_devices < 0 and count % processes == 0:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count // processes)


def devices_of(args: MeshArgs, run: Run, *, batch: int | None = None) -> Devices:
    """The devices that the command line asks for, checked against the run.

    Without --mesh all accelerators are used, and of a CPU, whose devices share its cores, one in
    each process.

    Args:
      batch: sequences of a micro-batch to train on; only forward passes run without one.
    """
    if args.devices_per_node is not None and args.devices_per_node < 1:
        raise ValueError(f"--devices-per-node {args.devices_per_node} must be at least 1")
    make_cpu_devices(args.mesh)
    count = jax.device_count()
    if args.mesh is None:
        if count == 1 or (jax.default_backend() == "cpu" and jax.process_count() == 1):
            if args.placement is not None:
                raise ValueError("--placement needs --mesh with an expert axis above 1")
            return ONE_DEVICE
        sizes = default_sizes(run, count, batch, args.devices_per_node or jax.local_device_count())
    else:
        sizes = mesh_of(args.mesh, count)
    check_mesh(run, sizes, batch)
    nodes = expert_nodes(sizes, args.devices_per_node or jax.local_device_count())
    room = ROOM if batch is not None and sizes["expert"] > 1 else None
    placed = None
    if args.placement is not None:
        placed = read_placement(args.placement, run.config, devices=sizes["expert"])
    scheme = Scheme(zero=args.zero, expert_nodes=nodes, room=room, placement=placed)
    return Devices(make_mesh(**sizes), scheme)


def check_mesh(run: Run, sizes: Mapping[str, int], batch: int | None) -> None:
    """Refuses a mesh on which the model, or a micro-batch of so many sequences, cannot lie."""
    reason = refusal(run, sizes)
    if reason is not None:
        raise ValueError(f"mesh {mesh_name(sizes)}: {reason}")
    ways = math.prod(sizes[axis] for axis in BATCH_AXES)
    if batch is not None and batch % ways:
        raise ValueError(
            f"mesh {mesh_name(sizes)} splits a batch over {ways} devices, which must divide "
            f"micro_batch={batch}"
        )


def read_placement(path: Path, config: ModelConfig, *, devices: int) -> tuple[tuple[int, ...], ...]:
    """The table of a file that `place` wrote, if it is one of the model on so many devices."""
    try:
        table_LP = np.array(json.loads(path.read_text())[TABLE])
        if table_LP.dtype.kind != "i":
            raise ValueError(f"experts are whole numbers, not {table_LP.dtype}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must be a placement: `place RUN --devices {devices} --json {path}` writes one"
        ) from error
    layers, experts = config.num_expert_layers, config.num_experts
    try:
        check_placement(table_LP, layers=layers, experts=experts, devices=devices)
    except ValueError as error:
        raise ValueError(f"--placement {path}: {error}") from None
    return tuple(tuple(row) for row in table_LP.tolist())


def default_sizes(run: Run, count: int, batch: int | None, per_node: int) -> Mapping[str, int]:
    """The batch over as many devices as it allows, experts over those of a node, no replicas."""
    legal = [
        sizes for sizes in meshes(run, count)
        if (batch or 0) % math.prod(sizes[axis] for axis in BATCH_AXES) == 0
        and sizes["expert"] * sizes["tensor"] <= per_node
    ]
    if not legal:
        raise ValueError(
            f"no mesh of {count} devices divides micro_batch={batch} and the model: use "
            f"--set micro_batch={count}, or fewer devices"
        )
    return min(legal, key=lambda sizes: (sizes["tensor"], -sizes["expert"], sizes["data"]))


def place_batch(
    read: Callable[[int, int], dict[str, np.ndarray]],
    shape: tuple[int, int, int],
    mesh: Mesh | None,
) -> dict[str, np.ndarray | jax.Array]:
    """A batch [accumulation, B, S] whose sequences this process reads only as its devices ask.

    `read(first, count)` gives sequences of the batch, counted through its micro-batches.
    """
    accumulation, B, _ = shape
    if mesh is None:
        whole = read(0, accumulation * B)
        return {name: array.reshape(shape) for name, array in whole.items()}
    split = spec("BS", shape[1:], ACTIVATIONS, mesh.shape)
    where = NamedSharding(mesh, PartitionSpec(None, *split))
    wanted = where.addressable_devices_indices_map(shape)
    rows = {(index[1].start or 0, index[1].stop or B) for index in wanted.values()}
    pieces: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for begin, end in rows:
        parts = [read(a * B + begin, end - begin) for a in range(accumulation)]
        pieces[begin, end] = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    names = next(iter(pieces.values()))
    return {
        name: jax.make_array_from_callback(
            shape, where,
            lambda index, name=name: pieces[index[1].start or 0, index[1].stop or B][name],
        )
        for name in names
    }
