"""Collective operations on clusters: closed forms, planes against rails, and broken parts."""

import sys
import time

import numpy as np
import pytest

from sharding.network.cluster import Node, attached, multi_plane, multi_rail
from sharding.network.collectives import all_to_all, exchange, ring
from sharding.network.damage import damage, plane_switches
from sharding.network.dragonfly import dragonfly
from sharding.network.fat_tree import two_layer_fat_tree
from sharding.network.flows import Routes, finish_seconds, load, max_min_rates
from sharding.network.latency import INFINIBAND, NVLINK, ROCE
from sharding.network.slim_fly import slim_fly
from tests.peak_memory import run_measured


@pytest.mark.parametrize("policy", ["static", "adaptive"])
@pytest.mark.parametrize("nodes", [2, 4, 40])
def test_an_all_to_all_without_conflicts_runs_at_the_speed_of_the_nics(nodes, policy):
    timing = all_to_all(multi_plane(nodes), 1e6, policy=policy)
    # A NIC carries what the 8 GPUs of its node send to one GPU of every other node.
    assert timing.network == pytest.approx(8 * 1e6 * (nodes - 1) / 50e9)
    assert timing.nvlink == pytest.approx(7 * 1e6 * nodes / 160e9)
    switches = 1 if nodes <= 32 else 3
    assert timing.latency == pytest.approx(INFINIBAND.of(switches) + NVLINK.same_leaf)
    assert timing.rate == pytest.approx(timing.bytes_per_gpu / timing.seconds)


@pytest.mark.parametrize(
    ("nodes", "policy"),
    [(2, "adaptive"), (4, "static"), (16, "adaptive"), (64, "static"), (64, "adaptive"),
     (256, "static"), (256, "adaptive")],
)  # fmt: skip
@pytest.mark.parametrize("message", [8.0, 1e7])
def test_planes_are_as_fast_as_rails(nodes, policy, message):
    planes, rails = (
        all_to_all(build(nodes), message, policy=policy).seconds
        for build in (multi_plane, multi_rail)
    )
    assert planes == pytest.approx(rails, rel=0.015)


@pytest.mark.parametrize("seed", range(3))
def test_hashed_flows_lose_as_much_on_planes_as_on_rails(seed):
    planes, rails, ideal = (
        all_to_all(build(128), 1e6, policy=policy, seed=seed).network
        for build, policy in (
            (multi_plane, "ecmp"), (multi_rail, "ecmp"), (multi_plane, "adaptive")
        )
    )  # fmt: skip
    assert planes > 1.02 * ideal and planes == pytest.approx(rails, rel=0.04)


def test_an_all_to_all_over_2048_gpus_takes_seconds_to_simulate():
    cluster = multi_plane(256)
    begin = time.perf_counter()
    routes = exchange(cluster, np.full((256, 256, 8), 8.0 * 2**20), "ecmp")
    seconds = finish_seconds(routes, cluster.capacity_L)
    rate_R = max_min_rates(routes.link_PR, cluster.capacity_L)
    assert time.perf_counter() - begin < 60
    assert len(rate_R) == 256 * 255 * 8
    # Equal flows: the slowest rate alone decides.
    assert seconds == pytest.approx((routes.bytes_R / rate_R).max())
    assert seconds > 1.05 * 8 * 2**20 * 255 / 50e9
    # Fair rates fill no link beyond its capacity, and each route has one that they fill.
    used_L = load(routes._replace(bytes_R=rate_R), len(cluster.capacity_L)) / cluster.capacity_L
    assert used_L.max() < 1 + 1e-9
    full_L = np.append(used_L > 1 - 1e-9, False)
    assert full_L[routes.link_PR].any(0).all()


LARGE = """
import time
from sharding.network.cluster import multi_plane
from sharding.network.collectives import all_to_all

begin = time.perf_counter()
seconds = all_to_all(multi_plane(2048), 2**20, policy="adaptive").network
print(seconds, time.perf_counter() - begin)
"""


@pytest.mark.slow
def test_an_all_to_all_over_16384_gpus_fits_ten_minutes_and_8_gb(root, tmp_path):
    done, peak = run_measured([sys.executable, "-c", LARGE], tmp_path, cwd=root)
    assert done.returncode == 0, done.stderr
    network, wall = map(float, done.stdout.split())
    assert network == pytest.approx(8 * 2**20 * 2047 / 50e9)
    assert wall < 600 and peak < 8e9


def test_rings_pass_their_share_through_every_nic():
    timing = ring(multi_plane(4), 8e9)
    hop = 8e9 / 8 * 31 / 32
    assert timing.network == pytest.approx(hop / 50e9)
    assert timing.nvlink == pytest.approx(7 * hop / 160e9)
    # A piece leaves three nodes and is handed on 28 times inside nodes.
    assert timing.latency == pytest.approx(3 * INFINIBAND.of(1) + 28 * NVLINK.same_leaf)


def test_pxn_keeps_traffic_on_its_rail():
    with_pxn, without = (
        {policy: all_to_all(multi_rail(32), 1e6, policy=policy, pxn=pxn)
         for policy in ("adaptive", "ecmp")}
        for pxn in (True, False)
    )  # fmt: skip
    nic = 8 * 1e6 * 31 / 50e9
    # Every rail of 32 nodes is one leaf, where no hash can err.
    assert with_pxn["ecmp"].network == pytest.approx(nic) == with_pxn["adaptive"].network
    assert with_pxn["ecmp"].latency == pytest.approx(INFINIBAND.of(1) + NVLINK.same_leaf)
    # Straight from NIC to NIC, 7 of 8 messages cross the spines: three switches, and collisions.
    assert without["adaptive"].network == pytest.approx(nic, rel=0.02)
    assert without["ecmp"].network > 1.05 * nic
    assert without["ecmp"].latency == pytest.approx(INFINIBAND.of(3))
    assert without["ecmp"].nvlink == pytest.approx(7 * 1e6 / 160e9)


def test_planes_cannot_do_without_forwarding():
    timing = all_to_all(multi_plane(4), 1e6, pxn=False)
    # A message for another number arrives in its own plane and is handed on over there.
    assert timing.network == pytest.approx(8 * 1e6 * 3 / 50e9)
    assert timing.nvlink == pytest.approx(7 * 1e6 * 4 / 160e9)
    assert timing.latency == pytest.approx(INFINIBAND.of(1) + NVLINK.same_leaf)


def test_one_node_needs_no_network():
    cluster = multi_plane(1)
    assert all_to_all(cluster, 1e6).network == 0 == ring(cluster, 1e6).network
    assert ring(cluster, 1e6).latency == pytest.approx(7 * NVLINK.same_leaf)


def test_a_ring_on_one_node_closes_over_nvlink():
    # Every GPU passes on 7 / 8 of the whole; nothing leaves by a NIC.
    assert ring(multi_plane(1), 8e9).nvlink == pytest.approx(8e9 * 7 / 8 / 160e9)
    assert ring(multi_plane(1, node=Node(gpus=1)), 8e9).seconds == 0


@pytest.mark.parametrize(
    "topology",
    [slim_fly(5, per_switch=4), dragonfly(per_switch=4, group_size=8, global_ports=4, ports=15)],
    ids=["SF", "DF"],
)
def test_any_network_carries_collectives(topology):
    cluster = attached(topology, 20, node=Node(gpus=4))
    timing = all_to_all(cluster, 1e6, policy="ecmp")
    assert timing.network >= 4 * 1e6 * 19 / 50e9 * (1 - 1e-9)


@pytest.mark.parametrize("link", [INFINIBAND, ROCE])
def test_latency_grows_with_the_switches_on_the_way(link):
    near, far = (multi_rail(nodes, node=Node(link=link)).latency() for nodes in (8, 64))
    assert far - near == pytest.approx(2 * link.per_switch)
    # Beyond two layers of switches two more lie on the way; planes of their own stay flat.
    assert multi_rail(288, node=Node(link=link)).latency() - far == pytest.approx(
        2 * link.per_switch
    )
    assert multi_plane(288, node=Node(link=link)).latency() == pytest.approx(far)


@pytest.mark.parametrize(
    ("broken", "cut_off", "slowdown"),
    [
        (lambda t: dict(switches=plane_switches(t, 3, 8)), 128, 8 / 7),
        (lambda t: dict(switches=[0]), 32, 8 / 7),
        (lambda t: dict(endpoints=[0]), 1, 8 / 7),
        # Two spines: with one, half of the ways up are gone. Of 127 flows of a NIC, 96 go up.
        (lambda t: dict(switches=[4]), 0, 2 * 96 / 127),
        (lambda t: dict(cables=[0]), 0, 1.0),
    ],
    ids=["plane", "leaf", "nic", "spine", "cable"],
)
def test_what_breaks_is_what_is_lost(broken, cut_off, slowdown):
    cluster = multi_plane(128)
    lost = damage(cluster, **broken(cluster.topology))
    assert (lost.cut_off, lost.nodes_apart, lost.longer) == (cut_off, 0, 0)
    assert lost.slowdown == pytest.approx(slowdown, rel=1e-2)


def test_one_plane_has_no_other_to_turn_to():
    cluster = multi_plane(4, node=Node(gpus=1), ports=4)
    lost = damage(cluster, switches=[0])
    assert (lost.cut_off, lost.nodes_apart, lost.longer) == (2, 5, None)
    assert lost.slowdown == np.inf
    with pytest.raises(ValueError, match="cut off from each other"):
        all_to_all(cluster.without(switches=[0]), 1.0)


def test_what_a_broken_plane_carried_goes_over_the_others():
    cluster = multi_plane(4).without(switches=plane_switches(multi_plane(4).topology, 0, 8))
    routes = exchange(cluster, np.ones((4, 4, 8)), "static")
    assert isinstance(routes, Routes)
    assert routes.bytes_R.sum() == pytest.approx(4 * 3 * 8)
    out = load(routes, cluster.topology.num_links)[cluster.topology.link_in(cluster.endpoint_MI)]
    assert (out[:, 0] == 0).all()
    np.testing.assert_allclose(out[:, 1:], 3 * 8 / 7)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: multi_plane(2049), ["num_nodes=2049", "2048"]),
        (lambda: multi_plane(16, ports=1), ["ports=1", "at least 2"]),
        (lambda: multi_rail(16, ports=0), ["ports=0", "at least 2"]),
        (lambda: attached(two_layer_fat_tree(4), 3, node=Node(gpus=4)), ["12 endpoints", "has 8"]),
        (lambda: Node(gpus=0), ["gpus=0"]),
        (lambda: Node(nic_rate=0.0), ["nic_rate=0.0"]),
        (lambda: plane_switches(two_layer_fat_tree(4), 2, 2), ["plane=2", "0 to 1"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_clusters_that_cannot_be(make, parts):
    with pytest.raises(ValueError) as error:
        make()
    for part in parts:
        assert part in str(error.value)
