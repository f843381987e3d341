"""`network`: what a network of switches costs and carries, whole or with parts broken."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from deepseek_jax import configs
from experiments.claims.network import deepep_choices
from experiments.command_line import unknown
from experiments.tables import print_table, write_json
from sharding.network.cluster import Cluster, Node, attached, multi_plane, multi_rail
from sharding.network.collectives import Timing, all_to_all, ring
from sharding.network.damage import damage
from sharding.network.dragonfly import dragonfly
from sharding.network.expert_traffic import combine, dispatch, grouped
from sharding.network.fat_tree import three_layer_fat_tree, two_layer_fat_tree
from sharding.network.paths import bisection, diameter
from sharding.network.prices import Prices
from sharding.network.routing import Policy
from sharding.network.slim_fly import slim_fly
from sharding.network.topology import Topology, check_connected

V3 = configs.deepseek_v3()
KINDS = ("fat_tree_2", "fat_tree_3", "multi_plane", "multi_rail", "slim_fly", "dragonfly")
# Beyond this many switches the search for a narrow cut takes minutes.
MOST_SWITCHES = 3000
MIB = 2**20


@dataclass(frozen=True)
class NetworkArgs:
    """Size, cost and reach of a network; with --nodes also the time of collective operations.

    Prices are the two that give the costs of the paper's table 3. Flows share links max-min
    fairly; latencies are table 5's.
    """

    network: Annotated[str, tyro.conf.Positional]
    """fat_tree_2, fat_tree_3, multi_plane, multi_rail, slim_fly, dragonfly, or a JSON file with
    "ports" of a switch, "endpoints" (the switch of each) and "cables" (pairs of switches)."""
    nodes: int | None = None
    """Nodes to attach and to time; multi_plane and multi_rail need it."""
    gpus: int = 8
    """GPUs, and NICs, of a node; planes of multi_plane."""
    ports: int = 64
    """Ports of a switch."""
    q: int = 27
    """Size of a Slim Fly."""
    groups: int | None = None
    """Groups of a dragonfly; all that its switches can join by default."""
    pxn: bool = True
    """Messages of an all-to-all change GPU in the sender's node and leave by the target's NIC."""
    tokens: int = 4096
    """Tokens of a GPU that dispatch sends to experts, where V3's 256 divide among the GPUs and the
    nodes that a token may go to hold its eight."""
    mib: float = 1.0
    """MiB of the message between every two GPUs; a ring gathers as much from each."""
    routing: Policy = "adaptive"
    """ecmp, static or adaptive."""
    broken_switches: tuple[int, ...] = ()
    """Numbers of switches that fail; leaves come first."""
    broken_cables: tuple[int, ...] = ()
    """Numbers of cables that fail."""
    json: Path | None = None
    """Also write everything to this file."""


def network(args: NetworkArgs) -> None:
    """The command `network`."""
    if not 0 < args.mib < math.inf:
        raise ValueError(f"--mib {args.mib} must be positive")
    if args.tokens < 1:
        raise ValueError(f"--tokens {args.tokens} must be at least 1")
    broken = {"switches": args.broken_switches, "cables": args.broken_cables}
    if any(broken.values()) and args.nodes is None:
        raise ValueError("broken parts need --nodes: damage is what nodes lose")
    cluster, topology = build(args)
    lost = None
    if cluster is not None and any(broken.values()):
        lost = dataclasses.asdict(damage(cluster, policy=args.routing, **broken))
    flat = args.network.replace("-", "_") == "multi_plane"
    properties = measured(topology, planes=args.gpus if flat else 1)
    print_table([properties], title=topology.name)
    written: dict[str, Any] = {"network": topology.name, **properties}
    if cluster is not None:
        rows = timings(cluster, args)
        print_table(rows, title=f"{cluster.num_gpus} GPUs, {args.routing} routing")
        if experts_divide(cluster) and not experts_within_reach(cluster):
            print(f"no dispatch: too few experts on the {V3.groups_per_token} nodes that a token "
                  f"may go to, {V3.num_experts // cluster.num_nodes} on each")  # fmt: skip
        written["timings"] = rows
    if lost is not None:
        print_table([lost], title="with those parts broken")
        written["damage"] = lost
    if args.json is not None:
        write_json(args.json, written)


def build(args: NetworkArgs) -> tuple[Cluster | None, Topology]:
    """The network, and the nodes on it if there are any.

    Raises:
      ValueError: an unknown network, a malformed file, or sizes that do not go together.
    """
    kind = args.network.replace("-", "_")
    node = Node(gpus=args.gpus)
    if args.nodes is not None and args.nodes < 1:
        raise ValueError(f"--nodes {args.nodes} must be at least 1")
    if kind in ("multi_plane", "multi_rail"):
        if args.nodes is None:
            raise ValueError(f"{kind} needs --nodes: a NIC of each node is plugged in by number")
        make = multi_plane if kind == "multi_plane" else multi_rail
        cluster = make(args.nodes, node=node, ports=args.ports)
        return cluster, cluster.topology
    if kind == "fat_tree_2":
        topology = two_layer_fat_tree(args.ports)
    elif kind == "fat_tree_3":
        topology = three_layer_fat_tree(args.ports)
    elif kind == "slim_fly":
        topology = slim_fly(args.q, ports=args.ports)
    elif kind == "dragonfly":
        if args.ports < 4:
            raise ValueError(f"--ports {args.ports} must be at least 4: a quarter of a switch's go "
                             "to other groups")  # fmt: skip
        quarter = args.ports // 4
        topology = dragonfly(
            per_switch=quarter, group_size=2 * quarter, global_ports=quarter, groups=args.groups,
            ports=args.ports,
        )  # fmt: skip
    elif args.network.endswith(".json"):
        topology = read_topology(Path(args.network))
    else:
        raise ValueError(unknown("network", args.network, [*KINDS, "FILE.json"]))
    if args.nodes is None:
        return None, topology
    return attached(topology, args.nodes, node=node), topology


def read_topology(path: Path) -> Topology:
    """A network from a file."""
    malformed = (
        f'{path} must hold {{"ports": N, "endpoints": [switch, ...], "cables": [[a, b], ...]}}'
    )
    try:
        found = json.loads(path.read_text())
        ports, endpoints, cables = found["ports"], found["endpoints"], found["cables"]
        switch_E = np.array(endpoints, np.int32).reshape(-1)
        ends_C2 = np.array(cables, np.int32).reshape(-1, 2)
        numbers = np.concatenate((switch_E, ends_C2.ravel()))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(malformed) from error
    if not len(switch_E) or not isinstance(ports, int) or (numbers < 0).any():
        raise ValueError(f"{malformed}, switches numbered from 0")
    loops = np.flatnonzero(ends_C2[:, 0] == ends_C2[:, 1])
    if len(loops):
        raise ValueError(f"{path}: cable {cables[loops[0]]} joins a switch to itself")
    try:
        topology = Topology(path.stem, ports, int(numbers.max()) + 1, switch_E, ends_C2)
        return check_connected(topology)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def measured(topology: Topology, planes: int = 1) -> dict[str, Any]:
    """Counts, reach and cost; of equal planes, reach inside one."""
    used = np.bincount(topology.ends_C2.ravel(), minlength=topology.num_switches)
    used += np.bincount(topology.switch_E, minlength=topology.num_switches)
    cost = Prices().network(topology.num_switches, topology.num_cables)
    plane = topology if planes == 1 else _first(topology, planes)
    return {
        "endpoints": topology.num_endpoints,
        "switches": topology.num_switches,
        "links": topology.num_cables,
        "ports used": int(used.max()),
        "diameter": diameter(plane),
        "bisection": bisection(plane) * planes if plane.num_switches <= MOST_SWITCHES else None,
        "M$": cost / 1e6,
        "k$/endpoint": cost / topology.num_endpoints / 1e3,
    }


def _first(topology: Topology, planes: int) -> Topology:
    """The first of equal planes."""
    size = topology.num_switches // planes
    return Topology(
        topology.name, topology.ports, size,
        topology.switch_E[: topology.num_endpoints // planes],
        topology.ends_C2[: len(topology.ends_C2) // planes],
    )  # fmt: skip


def experts_divide(cluster: Cluster) -> bool:
    """Whether each GPU of several nodes can hold as many of V3's experts."""
    return V3.num_experts % cluster.num_gpus == 0 and cluster.num_nodes > 1


def experts_within_reach(cluster: Cluster) -> bool:
    """Whether the nodes that a token may go to hold as many of V3's experts as it goes to."""
    nodes = min(cluster.num_nodes, V3.groups_per_token)
    return nodes * (V3.num_experts // cluster.num_nodes) >= V3.experts_per_token


def timings(cluster: Cluster, args: NetworkArgs) -> list[dict[str, Any]]:
    """A row for each collective operation."""
    message = args.mib * MIB
    operations: dict[str, Timing] = {
        "all-to-all": all_to_all(cluster, message, policy=args.routing, pxn=args.pxn),
        "all-gather or reduce-scatter": ring(
            cluster, message * cluster.num_gpus, policy=args.routing
        ),
    }
    if experts_divide(cluster) and experts_within_reach(cluster):
        width, per_gpu = V3.model_dim, V3.num_experts // cluster.num_gpus
        expert_GTK = deepep_choices(cluster.num_nodes, args.tokens, args.gpus)
        traffic = grouped(expert_GTK // per_gpu, args.gpus)
        # FP8 with an FP32 scale for every 128, and BF16.
        for name, send, size in (
            ("dispatch FP8", dispatch, width + width / 32), ("combine BF16", combine, 2 * width)
        ):  # fmt: skip
            operations[name] = send(cluster, traffic, size, policy=args.routing)
    return [
        {
            "operation": name,
            "MiB of a GPU": timing.bytes_per_gpu / MIB,
            "ms": 1e3 * timing.seconds,
            "network ms": 1e3 * timing.network,
            "NVLink ms": 1e3 * timing.nvlink,
            "latency us": 1e6 * timing.latency,
            "GB/s": timing.rate / 1e9,
        }
        for name, timing in operations.items()
    ]
