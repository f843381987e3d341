"""Communication in a profile of a GPU: how long collectives run, and how long nothing else does.

A collective is exposed while it runs on a device and no other kernel does. Its mesh axes are those
of the groups in the compiled program, found by the name of the operation.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.bench.kernels import of_gpus
from experiments.planning.hlo import KINDS, axes_of, first_group

Span = tuple[float, float]
# NCCL's kernels by their names, where an event does not say which operation it is of.
KERNELS = (
    ("AllGather", ("all-gather",)),
    ("ReduceScatter", ("reduce-scatter",)),
    ("AllReduce", ("all-reduce",)),
    ("SendRecv", ("all-to-all", "ragged-all-to-all", "collective-permute")),
    ("AlltoAll", ("all-to-all",)),
    ("RaggedAllToAll", ("ragged-all-to-all",)),
)
_COLLECTIVE = re.compile(
    rf"^\s+(?:ROOT )?%?([\w.\-]+) = .*?\s({'|'.join(KINDS)})(?:-start)?\("
)
_CALLING = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*\s[\w\-]+-start\(.*calls=%?([\w.\-]+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")


class Collective(NamedTuple):
    """What a collective operation of a program is, and the mesh axes that it crosses."""

    kind: str
    axes: str


class Waits(NamedTuple):
    """Milliseconds of one device, or the mean of several."""

    window: float  # from the first kernel to the end of the last
    running: float  # while any collective runs
    exposed: float  # while one runs and nothing else does
    rows: tuple[dict[str, Any], ...]  # the same by kind and axes


def collectives(text: str, mesh: Mapping[str, int]) -> dict[str, Collective]:
    """The collectives of a compiled program by the names of their operations."""
    devices, found, current = 1, {}, ""
    for size in mesh.values():
        devices *= size
    inside: dict[str, Collective] = {}
    calls: dict[str, str] = {}
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            current = begins[1]
            continue
        operation = _COLLECTIVE.match(line)
        if operation:
            axes = axes_of(first_group(line, devices), mesh)
            found[operation[1]] = Collective(operation[2], " ".join(axes) or "none")
            inside[current] = found[operation[1]]
        calling = _CALLING.match(line)
        if calling:
            calls[calling[1]] = calling[2]
    # What runs asynchronously is a computation of its own, called by what the profile names.
    return found | {name: inside[called] for name, called in calls.items() if called in inside}


def waits(events: Sequence[Mapping[str, Any]], known: Mapping[str, Collective]) -> Waits | None:
    """Where the devices of a trace wait for communication; None where it shows no GPU."""
    per_device = [_of_device(kernels, known) for kernels in of_gpus(events).values()]
    if not per_device:
        return None
    mean = lambda values: sum(values) / len(per_device)
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for device in per_device:
        for row in device.rows:
            sums = rows[row["collective"], row["axis"]]
            for i, name in enumerate(("calls", "ms", "ms exposed")):
                sums[i] += row[name] / len(per_device)
    return Waits(
        mean(d.window for d in per_device),
        mean(d.running for d in per_device),
        mean(d.exposed for d in per_device),
        tuple(
            {"collective": kind, "axis": axes, "calls": round(calls), "ms": ms, "ms exposed": alone}
            for (kind, axes), (calls, ms, alone) in sorted(rows.items(), key=lambda r: -r[1][2])
        ),
    )


def _of_device(kernels: Iterable[Mapping[str, Any]], known: Mapping[str, Collective]) -> Waits:
    work: list[Span] = []
    sent: dict[Collective, list[Span]] = defaultdict(list)
    for event in kernels:
        span = (event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
        what = collective_of(event, known)
        if what is None:
            work.append(span)
        else:
            sent[what].append(span)
    busy = merged(work)
    every = merged([span for spans in sent.values() for span in spans])
    edges = [edge for span in (*busy, *every) for edge in span]
    return Waits(
        max(edges) - min(edges) if edges else 0.0,
        length(every),
        alone(every, busy),
        tuple(
            {"collective": what.kind, "axis": what.axes, "calls": len(spans),
             "ms": length(merged(spans)), "ms exposed": alone(merged(spans), busy)}
            for what, spans in sent.items()
        ),
    )  # fmt: skip


def collective_of(
    event: Mapping[str, Any], known: Mapping[str, Collective]
) -> Collective | None:
    """What collective a kernel is of: by the operation it names, or else by its own name."""
    operation = (event.get("args") or {}).get("hlo_op", "")
    if operation in known:
        return known[operation]
    name = event["name"]
    if not ("nccl" in name.lower() or "RaggedAllToAll" in name):
        return None
    kinds = next((kinds for part, kinds in KERNELS if part in name), ("collective",))
    candidates = {c for c in known.values() if c.kind in kinds}
    return candidates.pop() if len(candidates) == 1 else Collective(kinds[0], "?")


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time as disjoint spans in order."""
    found: list[list[float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([begin, end])
    return [(begin, end) for begin, end in found]


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def alone(spans: Sequence[Span], others: Sequence[Span]) -> float:
    """How much of disjoint spans lies outside other disjoint spans; both in order.

    >>> alone([(0, 4), (6, 8)], [(1, 2), (3, 7)])
    3
    """
    total, first = 0, 0
    for begin, end in spans:
        total += end - begin
        while first < len(others) and others[first][1] <= begin:
            first += 1
        for low, high in others[first:]:
            if low >= end:
                break
            total -= min(end, high) - max(begin, low)
    return total
