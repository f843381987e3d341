"""`place`: where to put experts and copies of the busy ones, from the loads that a run logged."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.devices import TABLE
from experiments.records import read_records
from experiments.report import layer_names
from experiments.tables import print_table, write_json
from sharding.expert_placement import (
    Placement,
    balance,
    busiest_over_mean,
    check,
    improve,
    in_order,
)


@dataclass(frozen=True)
class PlaceArgs:
    """Place experts on devices by the load they had, the busiest with copies (DeepSeek's EPLB).

    The load of the busiest device over the mean is printed without balancing, as published, and
    after exchanges that improve on it; of a run also for the later half of its steps when the
    placement knows the earlier half only, as it would in service.
    """

    loads: Annotated[Path, tyro.conf.Positional]
    """The folder of a run, or a JSON file: a list of layers, each a list of experts' loads."""
    devices: int = 8
    """Devices that share the experts of a layer."""
    copies: int | None = None
    """Redundant copies; by default an eighth of the experts, as for V3, and to fill the devices."""
    nodes: int = 1
    """Nodes of the devices."""
    groups: int = 1
    """Expert groups; where nodes divide them, a group and its copies stay on one node."""
    last: int = 100
    """Steps of a run to look at, its last ones."""
    json: Path | None = None
    """Also write the tables of places to this file, for --placement of launch, eval and sample."""


def place(args: PlaceArgs) -> None:
    """The command `place`."""
    if args.devices < 1:
        raise ValueError(f"--devices {args.devices} must be at least 1")
    load_TLE, names = read_loads(args.loads, args.last)
    load_LE = load_TLE.mean(0)
    E = load_LE.shape[1]
    copies = redundant(E, args.devices) if args.copies is None else args.copies
    if copies > (args.devices - 1) * E:
        raise ValueError(f"--copies {copies}: with more than {(args.devices - 1) * E} a device "
                         "would hold an expert twice")  # fmt: skip
    sizes = dict(places=E + copies, devices=args.devices, nodes=args.nodes, groups=args.groups)
    check(load_LE, **sizes)
    # Only ratios are printed; a power of two leaves them as they are, and no sum overflows.
    load_TLE = np.ldexp(load_TLE, -np.frexp(load_TLE.max())[1])
    load_LE = load_TLE.mean(0)
    placed, better = placements(load_LE, sizes)
    columns = {
        # Without copies, if that leaves all devices equally many experts.
        "in order": in_order(
            E, places=E + copies if E % args.devices else E, layers=len(load_LE)
        ),
        "placed": placed,
        "improved": better,
    }
    busiest = {
        name: busiest_over_mean(load_LE, found, args.devices) for name, found in columns.items()
    }
    if len(load_TLE) > 1:
        half = len(load_TLE) // 2
        known = placements(load_TLE[:half].mean(0), sizes)[1]
        busiest["later half"] = busiest_over_mean(load_TLE[half:].mean(0), known, args.devices)
    rows = [
        {"layer": name, **{column: float(values[i]) for column, values in busiest.items()}}
        for i, name in enumerate(names)
    ]
    what = f"{E} experts and {copies} copies on {args.devices} devices"
    print_table(rows, title=f"busiest device over mean: {what}")
    gain = float((busiest["in order"] / busiest["improved"]).mean())
    print(f"predicted gain {gain:.2f}x; at most {max(busiest['improved']):.3f} after placement")
    if args.json is not None:
        write_json(args.json, {**sizes, "busiest over mean": rows, **tables_of(better)})


def redundant(experts: int, devices: int) -> int:
    """Copies: an eighth of the experts, and as many more as fill the devices equally.

    >>> redundant(256, 32), redundant(16, 8)
    (32, 8)

    None of them twice on a device, so that a single one has no copies.
    """
    wanted = -(-(experts + experts // 8) // devices) * devices - experts
    return min(wanted, (devices - 1) * experts)


def placements(load_LE: np.ndarray, sizes: dict[str, int]) -> tuple[Placement, Placement]:
    """The published placement, and that after exchanges inside nodes that must stay apart."""
    placed = balance(load_LE, **sizes)
    apart = sizes["nodes"] if sizes["groups"] % sizes["nodes"] == 0 else 1
    return placed, improve(load_LE, placed, devices=sizes["devices"], nodes=apart)


def read_loads(path: Path, last: int) -> tuple[np.ndarray, list[str]]:
    """Loads [T, L, E] of a run's last steps or of a file (T = 1), and the names of the layers.

    Raises:
      ValueError: a run without loads, or a file that holds something else.
    """
    if last < 1:
        raise ValueError(f"--last {last} must be at least 1")
    if path.is_dir():
        records = read_records(path)
        if not records.load_LET.size:
            raise ValueError(f"{path} has logged no expert loads: train a model with experts")
        recent = [step > records.load_steps[-1] - last for step in records.load_steps]
        load_TLE = np.moveaxis(records.load_LET, -1, 0)[recent]
        return load_TLE, layer_names(records.config, load_TLE.shape[1])
    try:
        load_LE = np.array(json.loads(path.read_text(), parse_int=float))
        if load_LE.dtype != np.float64:
            raise TypeError(f"loads are numbers, not {load_LE.dtype}")
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must hold a JSON list of layers, each an equally long list of numbers"
        ) from error
    if load_LE.ndim != 2:
        raise ValueError(f"{path} must hold a list of lists, not an array of {load_LE.ndim} dims")
    return load_LE[None], [str(i) for i in range(len(load_LE))]


def tables_of(placed: Placement) -> dict[str, Any]:
    """The placement as JSON holds it."""
    return {
        TABLE: placed.expert_LP.tolist(),
        "places of each expert": [
            [[p for p in places if p >= 0] for places in layer]
            for layer in placed.place_LEJ.tolist()
        ],
    }
