"""Where the time of a program goes on a GPU: its kernels from a profile, added up by name."""

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax


def traced(program: Callable[[], Any]) -> list[dict[str, Any]]:
    """The events of a profile of one run of `program`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            program()
        return read_trace(Path(folder))


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """The events that jax.profiler.trace(folder, create_perfetto_trace=True) left behind.

    Raises:
      ValueError: it left none.
    """
    traces = sorted(folder.rglob("perfetto_trace.json.gz"))
    if not traces:
        raise ValueError("the profiler wrote no trace on this platform")
    events = json.loads(gzip.decompress(traces[-1].read_bytes()))
    return events["traceEvents"] if isinstance(events, dict) else events


def of_gpus(events: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """What ran on the streams of each GPU, by the number of its process in the trace."""
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


def kernel_table(program: Callable[[], Any], *, most: int = 40) -> list[dict[str, Any]]:
    """Rows (kernel, calls, ms, share) of one run of `program`, the slowest first."""
    total: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in (event for kernels in of_gpus(traced(program)).values() for event in kernels):
        total[event["name"]] += event["dur"] / 1000
        calls[event["name"]] += 1
    everything = sum(total.values())
    names = sorted(total, key=total.__getitem__, reverse=True)
    rows = [
        {"kernel": name[:80], "calls": calls[name], "ms": total[name],
         "share": total[name] / everything}
        for name in names[:most]
    ]
    rest = sum(total[name] for name in names[most:])
    rows.append({"kernel": "other", "calls": sum(calls[n] for n in names[most:]), "ms": rest,
                 "share": rest / everything if everything else 0.0})
    rows.append({"kernel": "all", "calls": sum(calls.values()), "ms": everything, "share": 1.0})
    return rows
