"""Claims on the network: table 3, planes, latencies, and the measurements of figures 5 to 8."""

import dataclasses

import numpy as np

from deepseek_jax import configs
from experiments.claims.claim import (
    MODELLED,
    NONE,
    NOT_HERE,
    Claim,
    Tolerance,
    apart,
    within,
)
from experiments.claims.routing import routed_experts
from sharding.network.cluster import Node, attached, multi_plane, multi_rail
from sharding.network.collectives import Timing, all_to_all
from sharding.network.expert_traffic import combine, dispatch, grouped
from sharding.network.fat_tree import two_layer_fat_tree
from sharding.network.flows import load
from sharding.network.latency import INFINIBAND, NVLINK, ROCE
from sharding.network.routing import route

# One job's GPUs in figures 5 and 6, and the sizes of what a GPU sends in all.
GPUS = (32, 64, 128)
SIZES = tuple(128 * 2**20 * 2**i for i in range(8))
SMALL_SIZES = tuple(64.0 * 4**i for i in range(15))


def latencies(*, infiniband_switch: float, roce_switch: float) -> dict[str, float]:
    """Microseconds of 64 bytes: within a leaf, and across leaves over two switches more."""
    found = {}
    for name, link, switch in (
        ("RoCE", ROCE, roce_switch),
        ("InfiniBand", INFINIBAND, infiniband_switch),
    ):
        link = link._replace(per_switch=switch * 1e-6)
        found |= {f"{name} same leaf": 1e6 * link.of(1), f"{name} cross leaf": 1e6 * link.of(3)}
    return found | {"NVLink": 1e6 * NVLINK.of(1)}


def planes_and_rails(gpus: int, size: float, rail_switches: float = 0.0) -> list[Timing]:
    """An all-to-all of `size` bytes a GPU on planes and on rails.

    The rails can be given a longer way, in switches.
    """
    longer = INFINIBAND._replace(same_leaf=INFINIBAND.of(1 + rail_switches))
    clusters = (multi_plane(gpus // 8), multi_rail(gpus // 8, node=Node(link=longer)))
    return [all_to_all(cluster, size / gpus) for cluster in clusters]


def largest_difference(*, gpus: tuple, sizes: tuple, rail_switches: float) -> float:
    """Percent between the times of planes and rails, the largest over all jobs and sizes."""
    differences = []
    for number in gpus:
        for size in sizes:
            plane, rail = planes_and_rails(number, size, rail_switches)
            differences.append(abs(plane.seconds / rail.seconds - 1))
    return 100 * max(differences)


def all_to_all_rates(*, gpus: tuple, size: float) -> dict[str, float]:
    """GB/s of the largest messages in the model."""
    return {f"{n} GPUs": planes_and_rails(n, size)[0].rate / 1e9 for n in gpus}


def all_to_all_times(*, gpus: int, sizes: tuple) -> dict[str, float]:
    """Microseconds of a few messages in the model."""
    return {
        f"{size:.0f} B": 1e6 * planes_and_rails(gpus, size)[0].seconds for size in sizes
    }


def expert_traffic(
    *, nodes: tuple, tokens: int, efficiency: float, nvlink: float, nic: float
) -> dict[str, float]:
    """GB/s of dispatch (FP8) and combine (BF16) as DeepEP counts them."""
    config = configs.deepseek_v3()
    node = Node(nic_rate=efficiency * nic * 1e9, nvlink_rate=efficiency * nvlink * 1e9)
    found = {}
    for num_nodes in nodes:
        gpus = 8 * num_nodes
        gpu_GTK = deepep_choices(num_nodes, tokens) // (config.num_experts // gpus)
        traffic = grouped(gpu_GTK, 8)
        cluster = multi_plane(num_nodes, node=node)
        width = config.model_dim
        found[f"EP{gpus} dispatch"] = dispatch(cluster, traffic, width + width / 32).rate / 1e9
        found[f"EP{gpus} combine"] = combine(cluster, traffic, 2 * width).rate / 1e9
    return found


def deepep_choices(num_nodes: int, tokens: int, gpus: int = 8) -> np.ndarray:
    """Experts [G, T, K] of every GPU's tokens in DeepEP's benchmark.

    Uniform scores, one expert group a node, the best 4 of them kept (all, if there are fewer).
    Every GPU takes its tokens from the same draws, turned by its own number of experts, which
    leaves their statistics as they are.

    Raises:
      ValueError: nodes that V3's experts do not divide among.
    """
    config = configs.deepseek_v3()
    E, G = config.num_experts, gpus * num_nodes
    config = dataclasses.replace(
        config, num_groups=num_nodes, groups_per_token=min(num_nodes, config.groups_per_token)
    )
    draws = 4
    drawn_TK = routed_experts(config, draws * tokens).reshape(draws, tokens, -1)
    group = E // num_nodes
    turned = []
    for g in range(G):
        node, inside = divmod(drawn_TK[g % draws], group)
        turned.append((node + g) % num_nodes * group + (inside + 37 * g) % group)
    return np.stack(turned)


def ring_rates(*, replicas: int, queue_pairs: int, seeds: int) -> dict[str, float]:
    """GB/s of all-gather and reduce-scatter among data-parallel ranks, by routing and TP.

    Eight nodes fill a leaf of a full network of 128-port switches and hold one replica; a node's
    ring leads to the same node of the next replica, NIC to NIC. With tensor parallelism t a
    node holds 8 / t ranks of each of t groups, whose rings use the 8 / t NICs of those ranks.
    All move equal bytes, so a group is as fast as the slowest queue pair of its rings.
    """
    topology = two_layer_fat_tree(128)
    cluster = attached(topology, 8 * replicas, node=Node(link=ROCE))
    source_RMI = cluster.endpoint_MI.reshape(replicas, 8, 8)
    target_RMI = np.roll(source_RMI, -1, axis=0)
    found = {}
    for policy in ("ecmp", "static", "adaptive"):
        rate_X = []
        for seed in range(seeds):
            routes = route(
                topology, source_RMI.ravel(), target_RMI.ravel(), np.ones(source_RMI.size),
                policy, parts=queue_pairs, seed=seed,
            )  # fmt: skip
            needs_L = np.append(load(routes, topology.num_links) / cluster.node.nic_rate, 0.0)
            seconds = needs_L[routes.link_PR].max(0).reshape(replicas, 8, 8, queue_pairs).max(3)
            rate_X.append(1 / seconds)
        for t in (8, 4, 2):
            # NICs i, i + t, ... of a node belong to group i.
            per_group = np.stack(rate_X).reshape(seeds, replicas, 8, 8 // t, t).min((1, 3))
            found[f"{policy} TP{t}"] = float(8 // t * per_group.mean() / 1e9)
    return found


def hashed_over_adaptive(**inputs) -> dict[str, float]:
    """The rate of ECMP, and of static routes, over that of adaptive routing."""
    rates = ring_rates(**inputs)
    return {
        f"{policy} TP{t}": rates[f"{policy} TP{t}"] / rates[f"adaptive TP{t}"]
        for policy in ("ecmp", "static")
        for t in (8, 4, 2)
    }


JOBS = dict(gpus=GPUS, sizes=SIZES, rail_switches=0.0)
DEEPEP = dict(nodes=(2, 4, 8, 16), tokens=4096, efficiency=0.84, nvlink=160, nic=50)
RINGS = dict(replicas=2, queue_pairs=8, seeds=8)
FIGURE_7 = {
    "EP16 dispatch": 43.05, "EP16 combine": 42.47, "EP32 dispatch": 58.02, "EP32 combine": 56.96,
    "EP64 dispatch": 50.58, "EP64 combine": 48.54, "EP128 dispatch": 45.34, "EP128 combine": 41.60,
}  # fmt: skip
# Read off the chart, so to two digits at best.
FIGURE_8 = {
    "ecmp TP8": 45, "ecmp TP4": 83, "ecmp TP2": 97, "static TP8": 57, "static TP4": 103,
    "static TP2": 190, "adaptive TP8": 57, "adaptive TP4": 103, "adaptive TP2": 190,
}  # fmt: skip
HARDWARE = "Needs the network that was measured; the model's values are shown, not judged. "

CLAIMS = (
    Claim(
        name="table_5",
        section="5.2, table 5",
        says="latency of 64 bytes, us",
        printed={"RoCE same leaf": 3.6, "RoCE cross leaf": 5.6, "InfiniBand same leaf": 2.8,
                 "InfiniBand cross leaf": 3.7, "NVLink": 3.33},
        compute=latencies,
        inputs=dict(infiniband_switch=0.45, roce_switch=1.0),
        tolerance=apart(0.005, " us"),
        verdict=MODELLED,
        how="Same-leaf and NVLink latencies are inputs of the model, measured by the paper; across "
        "leaves there are two switches more, of 0.45 us (InfiniBand) and 1.0 us (RoCE) each.",
        otherwise=dict(roce_switch=0.45),
    ),  # fmt: skip
    Claim(
        name="figure_5",
        section="5.1, figure 5",
        says="all-to-all on 32 to 128 GPUs is as fast on planes as on rails, difference in %",
        printed=0.0,
        compute=largest_difference,
        inputs=JOBS,
        tolerance=apart(1.5, " %"),
        verdict=MODELLED,
        how="Flows of every pair of nodes and every NIC with adaptive routing and max-min fair "
        "rates, 128 MiB to 16 GiB; messages change GPU inside the sender (PXN). The largest "
        "difference.",
        otherwise=dict(gpus=(32,), sizes=(2048.0,), rail_switches=4.0),
    ),
    Claim(
        name="figure_5_rate",
        section="5.1, figure 5",
        says="GB/s of those all-to-alls",
        printed="a chart, 0 to 70 GB/s, without values",
        compute=all_to_all_rates,
        inputs=dict(gpus=GPUS, size=float(SIZES[-1])),
        tolerance=NONE,
        verdict=NOT_HERE,
        how=HARDWARE + "A NIC of 50 GB/s carries (nodes - 1) / nodes of what its GPU sends.",
    ),
    Claim(
        name="figure_6",
        section="5.1, figure 6",
        says="all-to-all on 16 GPUs, 64 B to 16 GiB: difference of planes and rails in %",
        printed=0.0,
        compute=largest_difference,
        inputs=JOBS | dict(gpus=(16,), sizes=SMALL_SIZES),
        tolerance=apart(1.5, " %"),
        verdict=MODELLED,
        how="As figure 5, with the latency of table 5 for the longest path and for NVLink.",
        otherwise=dict(rail_switches=1.0),
    ),
    Claim(
        name="figure_6_latency",
        section="5.1, figure 6",
        says="time of those all-to-alls, us",
        printed="a chart, 1 us to 1 s, without values",
        compute=all_to_all_times,
        inputs=dict(gpus=16, sizes=SMALL_SIZES[::7]),
        tolerance=NONE,
        verdict=NOT_HERE,
        how=HARDWARE + "Latency of table 5 and bytes over the NIC's rate.",
    ),
    Claim(
        name="figure_7",
        section="5.1, figure 7",
        says="DeepEP on planes, 4096 tokens a GPU, GB/s",
        printed=FIGURE_7,
        compute=expert_traffic,
        inputs=DEEPEP,
        tolerance=within(0.1),
        verdict=MODELLED,
        how="The router's choices (256 experts, 8 a token, one group a node, at most 4 nodes) "
        "counted: a token goes once to each of its nodes over InfiniBand and from there to GPUs "
        "over NVLink. Rate as DeepEP counts it: tokens x nodes, the own one too, x bytes over "
        "time, hence more than a NIC's 50 GB/s. One number is fitted, to hundredths, so that the "
        "largest difference is least: kernels reach 0.84 of 50 GB/s and of 160 GB/s. With 16 GPUs "
        "NVLink is the limit, above that the NICs.",
        otherwise=dict(nic=40),
    ),
    Claim(
        name="figure_8",
        section="5.2.2, figure 8",
        says="ECMP loses to adaptive routing, static routes do not: rate over adaptive",
        printed={"ecmp TP8": 0.79, "ecmp TP4": 0.81, "ecmp TP2": 0.51,
                 "static TP8": 1.0, "static TP4": 1.0, "static TP2": 1.0},
        compute=hashed_over_adaptive,
        inputs=RINGS,
        tolerance=Tolerance(
            "ECMP 0.5 to 0.85, static 1",
            lambda ours, printed: 0.5 <= ours <= 0.85 if printed < 0.9 else abs(ours - 1) < 0.01,
        ),
        verdict=MODELLED,
        how="Rings between two replicas, a leaf of 64 NICs each, 8 queue pairs a connection, mean "
        "of 8 hash seeds; both numbers are ours, the paper names neither. Hashes put several "
        "queue pairs on one uplink; routes by target and adaptive ones use every uplink once. "
        "Printed values are read off a chart.",
        otherwise=dict(queue_pairs=1),
    ),  # fmt: skip
    Claim(
        name="figure_8_rate",
        section="5.2.2, figure 8",
        says="GB/s of those rings",
        printed=FIGURE_8,
        compute=ring_rates,
        inputs=RINGS,
        tolerance=NONE,
        verdict=NOT_HERE,
        how=HARDWARE + "With TP 8, 4 and 2 a group has 1, 2 and 4 NICs of 50 GB/s on every node.",
    ),
)
