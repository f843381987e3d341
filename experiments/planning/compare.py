"""The collectives of a compiled step beside those that the formulas foresee, by purpose."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from experiments.planning.hlo import Collective
from experiments.planning.setup import Setup
from experiments.planning.traffic import step_transfers
from experiments.planning.weights import shards, weights
from sharding.cost import group_size, sent_bytes
from sharding.rules import BATCH_AXES

# What a transfer of the budget is for, by its part; the others are dispatch and combine.
PURPOSES = {"weights": "weights", "gradients": "gradients", "tensor sums": "tensor sums"}
EXPERTS = "dispatch and combine"


class Traffic(NamedTuple):
    """Bytes that a device sends in a step for one purpose."""

    purpose: str
    foreseen: float
    compiled: float
    calls: int


def foreseen(setup: Setup) -> dict[tuple[str, str], float]:
    """Bytes sent by purpose and axes, by formula."""
    sums: dict[tuple[str, str], float] = {}
    for t in step_transfers(setup):
        key = PURPOSES.get(t.part, EXPERTS), axes_name(t.axes, setup)
        sent = sent_bytes(t.kind, t.bytes, group_size(t, setup.mesh))
        sums[key] = sums.get(key, 0.0) + sent
    return sums


def axes_name(axes: Iterable[str], setup: Setup) -> str:
    """Axes above 1 in the order of the mesh: "fsdp expert"."""
    axes = set(axes)
    return " ".join(axis for axis, n in setup.mesh.items() if axis in axes and n > 1)


def purpose(collective: Collective, sizes: set[int]) -> str:
    """What a compiled collective is for; `sizes` are the elements of weights as products see them.

    A gather over axes that split the batch is one of weights when the model asked for it or all its
    arrays have the size of one; a sum over them is one of gradients when the backward pass makes it
    of something as large as a weight.
    """
    axes, kind = set(collective.axes), collective.kind
    asked = collective.scope.rpartition("/")[2].startswith("all_gather")
    if kind in ("all-to-all", "ragged-all-to-all") and axes == {"expert"}:
        return EXPERTS
    if kind == "all-gather" and axes & set(BATCH_AXES):
        return "weights" if asked or all(a.size in sizes for a in collective.arrays) else "other"
    if kind in ("all-reduce", "reduce-scatter") and axes & set(BATCH_AXES):
        backward = "transpose(" in collective.scope or any(
            a.size in sizes for a in collective.arrays
        )
        floats = all(a.dtype in ("f32", "bf16", "f16") for a in collective.arrays)
        large = max(a.size for a in collective.arrays) >= min(sizes)
        return "gradients" if backward and floats and large else "other"
    if axes == {"tensor"}:
        return "tensor sums"
    return "other"


def compared(setup: Setup, collectives: Iterable[Collective]) -> list[Traffic]:
    """Foreseen and compiled bytes by purpose."""
    sizes = local_sizes(setup)
    sums: dict[str, list[float]] = {}
    for (name, _), total in foreseen(setup).items():
        sums.setdefault(name, [0.0, 0.0, 0])[0] += total
    for c in collectives:
        row = sums.setdefault(purpose(c, sizes), [0.0, 0.0, 0])
        row[1] += sent_bytes(base_kind(c.kind), c.bytes, c.group)
        row[2] += c.times
    return [Traffic(name, *row) for name, row in sums.items()]


def by_axes(setup: Setup, collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Rows of the compiled collectives: purpose, axes, kind, element type, calls and bytes."""
    sizes, rows = local_sizes(setup), {}
    for c in collectives:
        key = (purpose(c, sizes), axes_name(c.axes, setup), c.kind, c.group, c.arrays[0].dtype)
        row = rows.setdefault(key, [0, 0.0])
        row[0] += c.times
        row[1] += sent_bytes(base_kind(c.kind), c.bytes, c.group)
    ordered = sorted(rows.items(), key=lambda item: -item[1][1])
    return [
        {"for": key[0], "axes": key[1], "collective": key[2], "devices": key[3], "type": key[4],
         "calls a step": row[0], "GB sent": row[1] / 1e9}
        for key, row in ordered
    ]  # fmt: skip


def others(setup: Setup, collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """The collectives that no formula foresees, one by one, largest first."""
    sizes = local_sizes(setup)
    found = [c for c in collectives if purpose(c, sizes) == "other"]
    found.sort(key=lambda c: -sent_bytes(base_kind(c.kind), c.bytes, c.group))
    return [
        {"collective": c.kind, "axes": axes_name(c.axes, setup),
         "arrays": " ".join(map(str, c.arrays[:3])) + (" ..." if len(c.arrays) > 3 else ""),
         "calls a step": c.times,
         "GB sent": sent_bytes(base_kind(c.kind), c.bytes, c.group) / 1e9, "from": c.scope[-60:]}
        for c in found
    ]  # fmt: skip


def low_precision_sums(setup: Setup, collectives: Iterable[Collective]) -> list[str]:
    """Sums over the batch of something as large as a weight that are not in FP32."""
    sizes = local_sizes(setup)
    return [
        f"{c.kind} of {a} over {axes_name(c.axes, setup)}"
        for c in collectives
        for a in c.arrays
        if c.kind in ("all-reduce", "reduce-scatter") and set(c.axes) & set(BATCH_AXES)
        and a.dtype not in ("f32", "s32", "u32", "pred") and a.size in sizes
    ]


def base_kind(kind: str) -> str:
    return kind.removeprefix("ragged-")


def local_sizes(setup: Setup) -> set[int]:
    """Elements of one layer of each matrix: as products see it, and as it is stored."""
    found = set()
    for w in weights(setup.run.config, setup.mesh):
        if len(w.letters) > 1:
            each = w.size // w.layers
            found |= {each // shards(axes, setup.mesh) for axes in (w.computed, w.stored)}
            # A gather over some of its axes only, or before a product that takes it whole.
            found |= {each // shards((axis,), setup.mesh) for axis in w.stored}
            found.add(each)
    return found

