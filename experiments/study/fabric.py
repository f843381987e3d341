"""`study fabric`: latency of messages, who sends them, over which link, and how they are routed."""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from experiments.study.machine import H800, step_seconds, token_seconds
from experiments.study.show import Output, Section, check_figures, present
from sharding.network.cluster import attached
from sharding.network.collectives import exchange
from sharding.network.fat_tree import two_layer_fat_tree
from sharding.network.flows import finish_seconds
from sharding.network.latency import INFINIBAND, NVLINK, ROCE

# Over table 5's way across leaves, three switches.
SWITCHES = 3
PORTS = 64
MOST_NODES = PORTS**2 // 2 // 8
LINKS = {"RoCE": ROCE.of(SWITCHES), "InfiniBand": INFINIBAND.of(SWITCHES), "NVLink": NVLINK.of(1)}


@dataclass(frozen=True)
class FabricArgs(Output):
    """What latency, a CPU proxy and routing do to V3's time per token and training step.

    A layer of decoding waits for four messages, two for each micro-batch. Table 5 gives the links'
    latencies; the paper gives none of a CPU proxy, so that its default is an assumption.
    """

    latency: tuple[float, ...] = (0, 1, 2, 4, 8)
    """Microseconds of a message."""
    proxy: float = 3.0
    """Microseconds that a CPU proxy adds to a message; 0 where the GPU rings the NIC itself."""
    nodes: int = 16
    """Nodes of 8 GPUs that exchange tokens, for routing."""
    seeds: int = 8
    """Seeds of ECMP's hash that are averaged."""


def study_fabric(args: FabricArgs) -> None:
    """The command `study fabric`."""
    args.check()
    check_figures("--latency", args.latency)
    check_figures("--proxy", [args.proxy])
    if not 2 <= args.nodes <= MOST_NODES:
        raise ValueError(
            f"--nodes {args.nodes} must be from 2 to {MOST_NODES}, for two layers of switches"
        )
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds} must be at least 1")
    sections = [
        latencies(args.latency), links(args.proxy), routing(args.nodes, args.seeds)
    ]  # fmt: skip
    present(sections, args)


def latencies(microseconds: tuple[float, ...]) -> Section:
    """Over the latency of a message."""
    rows = []
    for us in microseconds:
        machine = dataclasses.replace(H800, latency=us * 1e-6)
        rows.append({
            "latency us": us,
            "TPOT ms": 1e3 * token_seconds(machine),
            "waiting ms": 1e3 * (token_seconds(machine) - token_seconds(H800)),
            "tokens/s": 1 / token_seconds(machine),
            "training step s": step_seconds(machine),
        })  # fmt: skip
    return Section("Latency of a message", rows, "latency us", ("TPOT ms",))


def links(proxy: float) -> Section:
    """Links at the NIC's bandwidth, their messages sent by the GPU or by a CPU proxy."""
    rows = []
    for name, latency in LINKS.items():
        for sender, extra in (("GPU", 0.0), ("CPU proxy", proxy * 1e-6)):
            machine = dataclasses.replace(H800, latency=latency + extra)
            rows.append({
                "link, sender": f"{name}, {sender}",
                "latency us": 1e6 * (latency + extra),
                "TPOT ms": 1e3 * token_seconds(machine),
                "of it waiting %": 100 * (1 - token_seconds(H800) / token_seconds(machine)),
            })  # fmt: skip
    return Section("Links across leaves, and who rings the NIC", rows, "link, sender", ("TPOT ms",))


def routing(nodes: int, seeds: int) -> Section:
    """An exchange of tokens between all nodes, by routing; both times at the rate it reaches."""
    best, rows = exchange_seconds(nodes, "adaptive", 0), []
    for policy in ("ecmp", "adaptive", "static"):
        taken = seeds if policy == "ecmp" else 1
        part = best / np.mean([exchange_seconds(nodes, policy, seed) for seed in range(taken)])
        machine = dataclasses.replace(H800, nic=H800.nic * float(part))
        rows.append({
            "routing": policy,
            "rate over adaptive": float(part),
            "TPOT ms": 1e3 * token_seconds(machine),
            "training step s": step_seconds(machine),
        })  # fmt: skip
    return Section("Routing of an exchange on a fat tree", rows, "routing", ("TPOT ms",))


@functools.cache
def exchange_seconds(nodes: int, policy: str, seed: int) -> float:
    """Seconds of one byte from each GPU to the GPU of its number on each node."""
    leaves = -(-nodes * 8 // (PORTS // 2))
    network = attached(two_layer_fat_tree(PORTS, leaves), nodes)
    routes = exchange(network, np.ones((nodes, nodes, 8)), policy, 1, seed)
    return finish_seconds(routes, network.capacity_L)
