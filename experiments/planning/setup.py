"""A run on a mesh of a cluster: which meshes are legal, and how the recipe's batch is cut."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from deepseek_jax.block import REMAT
from deepseek_jax.config import Run, Schedule
from deepseek_jax.linear import DTYPES
from sharding.hardware import Cluster
from sharding.mesh import AXES, all_axes, expert_nodes
from sharding.placement import Scheme
from sharding.rules import BATCH_AXES

# FP8 weights are scaled in blocks of this many rows and columns, which no cut may divide.
BLOCK = 128
# Rows in the buffers of dispatch at first, over those of an even load.
ROOM = 2.0
# Of one device in one micro-batch: what a search tries.
SEQUENCES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Setup:
    """A run, with its batch as the cluster takes it, on a mesh given by the sizes of its axes."""

    run: Run
    cluster: Cluster
    mesh: Mapping[str, int]
    scheme: Scheme

    @property
    def batch_ways(self) -> int:
        """Devices that have different tokens."""
        return math.prod(self.mesh[axis] for axis in BATCH_AXES)

    @property
    def accumulation(self) -> int:
        return self.run.accumulation_at(0)

    @property
    def sequences(self) -> int:
        """Of one device in one micro-batch."""
        return self.run.micro_batch // self.batch_ways

    @property
    def tokens(self) -> int:
        """Of one device in one micro-batch."""
        return self.sequences * self.run.seq_len

    @property
    def step_tokens(self) -> int:
        return self.accumulation * self.run.micro_batch * self.run.seq_len

    @property
    def itemsize(self) -> int:
        """Bytes of an activation's element."""
        return itemsize(self.run.precision.activations)

    @property
    def is_fp8(self) -> bool:
        return self.run.precision.matmul == "fp8"

    @property
    def name(self) -> str:
        shape = mesh_name(self.mesh)
        return f"{shape} zero={self.scheme.zero} micro-batch={self.sequences} {self.run.remat}"


def itemsize(format: str) -> int:
    """Bytes of an element in "fp32" or "bf16"."""
    return jnp.dtype(DTYPES[format]).itemsize


def mesh_name(mesh: Mapping[str, int]) -> str:
    """The axes above 1: "fsdp=32,expert=64"."""
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or "one device"


def named_sizes(words: str) -> dict[str, int]:
    """Sizes of the axes that "fsdp=32,expert=64" names."""
    sizes: dict[str, int] = {}
    for word in words.replace(" ", ",").split(","):
        axis, _, size = word.partition("=")
        if axis not in AXES:
            known = ", ".join(AXES)
            raise ValueError(f"unknown mesh axis {axis!r}: the axes are {known} (in {word})")
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh {word!r} must be AXIS=SIZE with a size of at least 1")
        if axis in sizes:
            raise ValueError(f"--mesh {words} names {axis} twice")
        sizes[axis] = int(size)
    return sizes


def mesh_of(words: str, devices: int) -> dict[str, int]:
    """Sizes of all axes; an axis data that is not named takes the rest."""
    sizes = named_sizes(words)
    named = math.prod(sizes.values())
    sizes.setdefault("data", max(devices // named, 1))
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh {words} makes {math.prod(sizes.values())} devices, and there are {devices}"
        )
    return all_axes(sizes)


def refusal(run: Run, mesh: Mapping[str, int]) -> str | None:
    """Why a model cannot lie on a mesh, naming both values; None when it can."""
    config, tensor, expert = run.config, mesh["tensor"], mesh["expert"]
    if config.num_experts % expert:
        return f"expert={expert} must divide num_experts={config.num_experts}"
    if run.seq_len % tensor:
        return f"tensor={tensor} must divide seq_len={run.seq_len}"
    cut = {
        "num_heads": config.num_heads,
        "dense_ffn_dim": config.dense_ffn_dim,
        "expert_ffn_dim": config.expert_ffn_dim,
        "shared ffn dim": config.shared_ffn_dim,
    }
    for name, size in cut.items():
        if size % tensor:
            return f"tensor={tensor} must divide {name}={size}"
        whole = name == "num_heads" or run.precision.matmul != "fp8"
        if tensor > 1 and not whole and size // tensor % BLOCK:
            widths = [width for other, width in cut.items() if other != "num_heads"]
            legal = [n for n in divisors(config.num_heads)
                     if all(width % (n * BLOCK) == 0 for width in widths)]
            near = min(legal, key=lambda n: abs(n - tensor), default=1)
            return (
                f"tensor={tensor} cuts {name}={size} into parts of {size // tensor}, inside a "
                f"block of {BLOCK}: the nearest that does not is tensor={near}"
            )
    return None


def cut_nodes(mesh: Mapping[str, int], node: int) -> bool:
    """Whether nodes begin and end inside the expert and tensor axes, which launch refuses."""
    try:
        expert_nodes(mesh, node)
    except ValueError:
        return True
    return False


def check_sequences(sequences: int | None) -> None:
    """Refuses a micro-batch with nothing in it."""
    if sequences is not None and sequences < 1:
        raise ValueError(f"{sequences} sequences in a micro-batch must be at least 1")


def setup(
    run: Run,
    cluster: Cluster,
    mesh: Mapping[str, int],
    *,
    sequences: int | None = None,
    remat: str | None = None,
    zero: int = 3,
) -> Setup:
    """The run on a mesh, its last batch size rounded up to what the mesh divides.

    Args:
      sequences: of one device in one micro-batch; 1 by default, the recipe's whole on one device.

    Raises:
      ValueError: the model cannot lie on the mesh.
    """
    reason = refusal(run, mesh)
    if reason is not None:
        raise ValueError(f"mesh {mesh_name(mesh)}: {reason}")
    check_sequences(sequences)
    ways = math.prod(mesh[axis] for axis in BATCH_AXES)
    wanted = int(run.batch_size.phases[-1].end)
    if sequences is None:
        sequences = max(run.micro_batch // ways, 1) if cluster.devices <= 8 else 1
    micro = ways * sequences
    batch = rounded_up(wanted, micro)
    run = dataclasses.replace(
        run, micro_batch=micro, batch_size=Schedule.constant(batch), remat=remat or run.remat
    )
    nodes = expert_nodes(mesh, cluster.accelerator.node)
    room = ROOM if mesh["expert"] > 1 else None
    scheme = Scheme(zero=3 if zero == 3 else 1, expert_nodes=nodes, room=room)
    return Setup(run, cluster, dict(mesh), scheme)


def meshes(run: Run, devices: int) -> Iterator[dict[str, int]]:
    """Every legal mesh of so many devices."""
    for fsdp in divisors(devices):
        for expert in divisors(devices // fsdp):
            for tensor in divisors(devices // fsdp // expert):
                data = devices // fsdp // expert // tensor
                mesh = dict(zip(AXES, (data, fsdp, expert, tensor), strict=True))
                if refusal(run, mesh) is None:
                    yield mesh


def setups(run: Run, cluster: Cluster) -> Iterator[Setup]:
    """Every legal mesh with every micro-batch and remat policy that the batch leaves."""
    wanted = int(run.batch_size.phases[-1].end)
    for mesh in meshes(run, cluster.devices):
        if cut_nodes(mesh, cluster.accelerator.node):
            continue
        ways = math.prod(mesh[axis] for axis in BATCH_AXES)
        for sequences in SEQUENCES:
            # Only micro-batches whose step is no larger than with a sequence on every device.
            if rounded_up(wanted, ways * sequences) > rounded_up(wanted, cluster.devices):
                continue
            for remat in REMAT:
                yield setup(run, cluster, mesh, sequences=sequences, remat=remat)


def rounded_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
