"""The planner's closed forms of collectives against flows on the network of an H800 cluster."""

import pytest

from sharding.cost import Transfer, transfer_terms
from sharding.hardware import ACCELERATORS
from sharding.network.cluster import Node, multi_plane, multi_rail
from sharding.network.collectives import all_to_all, ring

H800 = ACCELERATORS["h800"]
NODE = Node(nic_rate=H800.outer.bandwidth, nvlink_rate=H800.inner.bandwidth)


@pytest.mark.parametrize("build", [multi_plane, multi_rail])
@pytest.mark.parametrize("devices", [16, 64, 512])
def test_an_exchange_takes_as_long_as_the_planner_says(build, devices):
    size = 64e6 * devices
    transfer = Transfer("experts", "all-to-all", ("expert",), size, 1, False)
    planned = transfer_terms(transfer, {"expert": devices}, H800)
    timing = all_to_all(build(devices // 8, node=NODE), size / devices)
    assert planned.network == pytest.approx(max(timing.network, timing.nvlink), rel=1e-6)


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
@pytest.mark.parametrize("devices", [16, 64, 512])
def test_a_ring_takes_as_long_as_the_planner_says(kind, devices):
    size = 64e6 * devices
    transfer = Transfer("weights", kind, ("fsdp",), size, 1, False)
    planned = transfer_terms(transfer, {"fsdp": devices}, H800)
    timing = ring(multi_plane(devices // 8, node=NODE), size)
    # The planner sends all of a ring over NVLink; one hop in eight leaves the node instead.
    assert planned.network == pytest.approx(max(timing.network, timing.nvlink), rel=0.15)
