"""Communication in a profile of a GPU: how long collectives run, and how long nothing else does.

A collective is exposed while it runs on a device and no other kernel does. Its mesh axes are those
of the groups in the compiled program, found by the name of the operation.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """The events that jax.profiler.trace(folder, create_perfetto_trace=True) left behind.

    Raises:
      ValueError: it left none.
    """
    traces = sorted(Path(folder).rglob("perfetto_trace.json.gz"))
    if not traces:
        raise ValueError("the profiler wrote no trace on this platform")
    events = json.loads(gzip.decompress(traces[-1].read_bytes()))
    return events["traceEvents"] if isinstance(events, dict) else events


def waits(events: Iterable[Mapping[str, Any]], known: Mapping[str, Collective]) -> Waits | None:
    """Where the devices of a trace wait for communication; None where it shows no GPU."""
    per_device = [_of_device(kernels, known) for kernels in _kernels(list(events)).values()]
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


def _kernels(events: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """What ran on the streams of each GPU."""
    named = lambda what, part: {
        (event["pid"], event.get("tid"))
        for event in events
        if event.get("name") == what and part in event["args"].get("name", "")
    }
    devices = {pid for pid, _ in named("process_name", "GPU")}
    streams = named("thread_name", "Stream")
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        pid = event.get("pid")
        if event.get("ph") == "X" and pid in devices and (pid, event.get("tid")) in streams:
            found[pid].append(event)
    return found


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
