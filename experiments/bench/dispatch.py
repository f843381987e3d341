"""`bench dispatch`: tokens to their experts' devices and back, beside NCCL's own all-to-all."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.bench.children import Row, devices_of_host, run_cases
from experiments.bench.kernel_report import verdict
from experiments.bench.mesh_report import origin
from experiments.hosts import free_port
from experiments.planning.setup import ROOM
from experiments.plots import logarithmic, new_figure, svg
from experiments.tables import print_table, write_json

COMMAND = ("experiments.bench.dispatch_case",)
# Experts and how many a token chooses, by the width of the model: V3's and the peers' of its size.
MODELS = {7168: (256, 8), 2048: (64, 6)}
FORWARD = ("dispatch", "combine")
ALL = (*FORWARD, "to experts", "from experts", "dispatch backward", "combine backward")
# The sizes that are judged, and that all directions are timed for.
JUDGED = 8192


@dataclass(frozen=True)
class BenchDispatchArgs:
    """Time dispatch and combine alone on all devices of this host, which are one expert axis.

    `dispatch` and `combine` go between devices, a row for each token and device that it has experts
    on; `to experts` and `from experts` also sort the rows by expert and add them up. GB/s are the
    bytes of the buffers that leave a device; of ragged ones, of the rows that travel. NCCL's
    all-to-all by torch is of as many bytes, in the same call.
    """

    tokens: tuple[int, ...] = (8192, 32768, 1024)
    """Of each device."""
    width: tuple[int, ...] = (7168, 2048)
    """Of the model: 7168 with 8 of 256 experts, 2048 with 6 of 64."""
    path: tuple[Literal["padded", "ragged", "two-hop"], ...] = ("padded", "ragged", "two-hop")
    """Buffers with room for all, only the rows that hold tokens, or node by node."""
    wire: tuple[Literal["bf16", "fp8"], ...] = ("bf16", "fp8")
    """What tokens are sent in; results come back in BF16."""
    all_directions: bool = False
    """All six directions for every case; otherwise for 8192 padded tokens."""
    devices_per_node: int | None = None
    """Devices of the nodes that two-hop splits the host into; half of them by default."""
    processes: int = 1
    """One process has all devices, or so many share them."""
    peers: bool = True
    """Time torch's NCCL beside them."""
    case_limit: float = 60
    """Seconds that one case may take."""
    limit: float = 200
    """Seconds after which no further case is begun."""
    json: Path | None = None
    """Also write everything to this file."""
    picture: Path | None = None
    """Also draw GB/s over tokens (SVG)."""


@dataclass(frozen=True)
class Case:
    """One size and way of dispatch."""

    width: int
    tokens: int
    path: str
    wire: str
    directions: tuple[str, ...]
    nodes: int
    processes: int

    @property
    def key(self) -> str:
        return f"D {self.width}, {self.tokens} tokens, {self.path}, {self.wire}"

    @property
    def words(self) -> Row:
        experts, chosen = MODELS[self.width]
        return {"key": self.key, "tokens": self.tokens, "width": self.width, "experts": experts,
                "chosen": chosen, "nodes": self.nodes, "ragged": self.path == "ragged",
                "wire": self.wire, "room": ROOM,
                "directions": list(self.directions)}  # fmt: skip


def bench_dispatch(args: BenchDispatchArgs) -> None:
    """Times ours case by case, then NCCL's exchange of each number of bytes, judges, reports."""
    began = time.monotonic()
    until = began + args.limit
    host = devices_of_host()
    todo = list(cases(args, check(args, host)))
    found: dict[str, Row] = {}
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    torch_here = importlib.util.find_spec("torch") is not None
    if args.peers and not torch_here:
        note("torch is not installed: no row has NCCL's own time beside it")
    for case, row in run_cases(COMMAND, todo, env, limit=args.case_limit, until=until):
        found[case.key] = row
        note(f"  {case.key}: {row.get('error') or short(row)}")
    peers = exchange_times(host["count"], found, seconds=90) if args.peers and torch_here else {}
    rows = list(table(todo, found, host["count"], peers.get("us", {})))
    verdicts = judged(rows)
    about = {**origin(host), "torch": peers.get("torch"), "peers": peers.get("error"),
             "seconds": round(time.monotonic() - began)}  # fmt: skip
    title = "bench dispatch, " + ", ".join(str(value) for value in about.values() if value)
    print_table(rows, title=title)
    if verdicts:
        print_table(verdicts, title="bench dispatch: bars")
    if args.json is not None:
        write_json(args.json, {**about, "rows": rows, "verdicts": verdicts, "measured": found})
    if args.picture is not None:
        args.picture.write_text(picture(rows) + "\n")


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def short(row: Row) -> str:
    taken = [f"{name} {us:.0f} us" for name, us in row["us"].items()]
    return ", ".join([*taken, *(f"{k}: {v}" for k, v in row["errors"].items())])


def check(args: BenchDispatchArgs, host: Mapping[str, Any]) -> int:
    """The number of devices, if what is asked of them can be done."""
    count = host["count"]
    if count < 2:
        raise ValueError(
            f"bench dispatch sends tokens to other devices, and this machine has one {host['kind']}"
        )
    unknown = [width for width in args.width if width not in MODELS]
    if unknown:
        raise ValueError(f"--width {unknown[0]} must be one of {', '.join(map(str, MODELS))}")
    for name, value in (("--processes", args.processes),
                        ("--devices-per-node", args.devices_per_node)):  # fmt: skip
        if value is not None and (value < 1 or count % value):
            raise ValueError(f"{name} {value} must divide the {count} devices of this host")
    if any(MODELS[width][0] % count for width in args.width):
        raise ValueError(f"{count} devices must divide the experts, 256 and 64")
    return count


def cases(args: BenchDispatchArgs, count: int) -> Iterator[Case]:
    """All cases in the order of their worth."""
    per_node = args.devices_per_node or max(count // 2, 1)
    nodes = count // per_node
    for tokens in args.tokens:
        for path in args.path:
            # With a device or with all of them in a node there is but one hop.
            if path == "two-hop" and (per_node == 1 or nodes == 1):
                continue
            for width in args.width:
                for wire in args.wire:
                    every = args.all_directions or (path == "padded" and tokens == JUDGED)
                    yield Case(width, tokens, path, wire, ALL if every else FORWARD,
                               nodes if path == "two-hop" else 1, args.processes)  # fmt: skip


def exchange_times(count: int, found: Mapping[str, Row], *, seconds: float) -> Row:
    """torch's microseconds by bytes, or why there are none."""
    sizes = sorted({exchanged(leaving, count) for row in found.values()
                    for leaving in row.get("leaving", {}).values()})  # fmt: skip
    if not sizes:
        return {}
    port = str(free_port())
    command = [sys.executable, "-m", "experiments.bench.nccl"]
    words = [str(count), port, *map(str, sizes)]
    running = [
        subprocess.Popen([*command, str(rank), *words], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
        for rank in range(count)
    ]  # fmt: skip
    try:
        printed, errors = running[0].communicate(timeout=seconds)
        return json.loads(printed.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"torch's exchange did not end within {seconds:g} s"}
    except (IndexError, json.JSONDecodeError):
        last = (errors.strip().splitlines() or ["no output"])[-1]
        return {"error": f"torch's exchange failed: {last[:200]}"}
    finally:
        for process in running:
            process.kill()
            process.wait()


def exchanged(leaving: float, count: int) -> int:
    """Bytes of one exchange among all devices by which as many leave each of them.

    Whole parts of a multiple of 128 bytes for each device.
    """
    return max(round(leaving / (count - 1) / 128), 1) * 128 * count


def table(
    todo: Sequence[Case], found: Mapping[str, Row], count: int, peers: Mapping[str, float]
) -> Iterator[Row]:
    """A row for each direction of each case."""
    for case in todo:
        row = found.get(case.key, {"error": "not run"})
        where = {"width": case.width, "tokens": case.tokens, "path": case.path, "wire": case.wire}
        if "error" in row:
            yield {**where, "direction": "all", "note": row["error"]}
            continue
        full = " x ".join(f"{100 * part:.0f} %" for part in row["filled"])
        for name in case.directions:
            if name not in row["us"]:
                yield {**where, "direction": name, "note": row["errors"].get(name)}
                continue
            us, num_bytes = row["us"][name], row["bytes"][name]
            leaving = row["leaving"][name]
            theirs = peers.get(str(exchanged(leaving, count)))
            yield {
                **where, "direction": name, "us": us, "MB": num_bytes / 1e6, "filled": full,
                "GB/s": leaving / us / 1e3, "NCCL us": theirs,
                "NCCL GB/s": leaving / theirs / 1e3 if theirs else None,
                "of NCCL": theirs / us if theirs else None,
            }  # fmt: skip


def judged(rows: Sequence[Row]) -> list[Row]:
    """Bandwidth beside NCCL's, and FP8 beside BF16, from 8,192 tokens on."""
    large = [r for r in rows if r["tokens"] >= JUDGED and r.get("us")]
    made: list[Row] = []
    for path in dict.fromkeys(r["path"] for r in large):
        for direction in FORWARD:
            beside = [r for r in large if r["path"] == path and r["direction"] == direction
                      and r["of NCCL"]]  # fmt: skip
            if beside:
                worst = min(beside, key=lambda r: r["of NCCL"])
                where = f"D {worst['width']}, {worst['tokens']} tokens, {worst['wire']}"
                made.append(verdict(f"{path} {direction} beside NCCL, worst {where}",
                                    worst["of NCCL"], 0.8))  # fmt: skip
        times = {(r["width"], r["tokens"], r["wire"]): r["us"] for r in large
                 if r["path"] == path and r["direction"] == "dispatch"}  # fmt: skip
        gains = {key[:2]: times[key] / times[(*key[:2], "fp8")] for key in times
                 if key[2] == "bf16" and (*key[:2], "fp8") in times}  # fmt: skip
        if gains:
            width, tokens = min(gains, key=gains.get)
            name = f"{path} dispatch, FP8 beside BF16, worst D {width}, {tokens} tokens"
            made.append(verdict(name, gains[width, tokens], 1.6))
    return made


def picture(rows: Sequence[Row]) -> str:
    """GB/s of dispatch over the tokens of a device, ours and NCCL's."""
    figure, axes = new_figure(height=3.8)
    shown = [r for r in rows if r.get("us") and r["direction"] == "dispatch"]
    for name in dict.fromkeys((r["width"], r["path"], r["wire"]) for r in shown):
        points = sorted((r["tokens"], r["GB/s"], r["NCCL GB/s"]) for r in shown
                        if (r["width"], r["path"], r["wire"]) == name)  # fmt: skip
        (line,) = axes.plot([p[0] for p in points], [p[1] for p in points], marker="o",
                            markersize=3, label=" ".join(map(str, name)))  # fmt: skip
        if name[1] == "padded" and all(p[2] for p in points):
            axes.plot([p[0] for p in points], [p[2] for p in points], linestyle=":",
                      color=line.get_color(), label=f"NCCL, {name[0]} {name[2]}")  # fmt: skip
    axes.set_xscale("log", base=2)
    if shown:
        logarithmic(axes)
        axes.legend(frameon=False, fontsize=7, ncols=2)
    axes.set_xlabel("tokens of a device")
    axes.set_title("GB/s that leave a device", loc="left", fontsize=10.5)
    axes.margins(x=0.03)
    return svg(figure)
