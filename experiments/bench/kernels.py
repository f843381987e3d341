"""Where the time of a program goes on a GPU: its kernels from a profile, added up by name."""

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def kernel_table(program: Callable[[], Any], *, most: int = 40) -> list[dict[str, Any]]:
    """Rows (kernel, calls, ms, share) of one run of `program`, the slowest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            program()
        traces = sorted(Path(folder).rglob("perfetto_trace.json.gz"))
        if not traces:
            raise ValueError("the profiler wrote no trace on this platform")
        events = json.loads(gzip.decompress(traces[-1].read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "GPU" in event["args"].get("name", "")
    }
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and "Stream" in event["args"].get("name", "")
    }
    total: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        where = (event.get("pid"), event.get("tid"))
        if event.get("ph") == "X" and where[0] in devices and where in streams:
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
