"""The cost model against sums done by hand."""

import math

import pytest

from sharding.cost import (
    Reached,
    Transfer,
    Work,
    members_in_node,
    predict,
    sent_bytes,
    transfer_terms,
    work_terms,
)
from sharding.hardware import ACCELERATORS, Accelerator, Link
from sharding.mesh import AXES

# Round figures, all different.
MACHINE = Accelerator(
    kind="test", platform="gpu", flops_bf16=100.0, flops_fp8=200.0, memory=1000,
    memory_bandwidth=50.0, node=4, inner=Link(10.0, 0.001), outer=Link(2.0, 0.01),
)  # fmt: skip
PEAK = dict(products=1.0, fp8=1.0, core=1.0, memory=1.0, network=1.0)
ALL = Reached(**PEAK, message=1.0, overlap=1.0)
NONE = Reached(**PEAK, message=0.0, overlap=0.0)


def neighbours(axes, mesh, node):
    """By going through all devices: those that differ from device 0 in `axes` only, in its node."""
    count = 0
    for device in range(math.prod(mesh.values())):
        rest, place = device, {}
        for axis in reversed(AXES):
            rest, place[axis] = divmod(rest, mesh[axis])
        alone = all(place[axis] == 0 for axis in AXES if axis not in axes)
        count += alone and device < node
    return count


@pytest.mark.parametrize("node", [1, 2, 4, 8, 72])
@pytest.mark.parametrize("axes", [("tensor",), ("expert",), ("fsdp", "expert"), ("data",), AXES])
def test_members_in_a_node_are_those_that_counting_devices_finds(axes, node):
    mesh = {"data": 3, "fsdp": 4, "expert": 2, "tensor": 2}
    assert members_in_node(axes, mesh, node) == neighbours(axes, mesh, node)


def test_a_ring_sends_all_but_one_part_a_sum_for_all_twice_that_and_a_permute_everything():
    assert sent_bytes("all-gather", 80.0, 8) == 70.0
    assert sent_bytes("reduce-scatter", 80.0, 8) == 70.0
    assert sent_bytes("all-reduce", 80.0, 8) == 140.0
    assert sent_bytes("all-to-all", 80.0, 8) == 70.0
    assert sent_bytes("all-gather", 80.0, 1) == 0.0
    assert sent_bytes("collective-permute", 80.0, 2) == 80.0


def test_work_is_products_at_the_peak_of_their_format_and_bytes_at_the_bandwidth():
    work = Work("x", flops_bf16=300.0, flops_fp8=300.0, flops_core=50.0, bytes=25.0)
    terms = work_terms(work, MACHINE)
    assert (terms.products, terms.fp8, terms.core) == pytest.approx((3.0, 1.5, 0.5))
    assert terms.memory == pytest.approx(0.5)
    assert (terms.network, terms.messages) == (0.0, 0.0)


def test_inside_a_node_a_gather_takes_the_inner_link():
    mesh = {"tensor": 4}
    terms = transfer_terms(Transfer("x", "all-gather", ("tensor",), 40.0, 5, True), mesh, MACHINE)
    assert terms.network == pytest.approx(30.0 / 10.0)
    assert terms.messages == pytest.approx(5 * 2 * 0.001)


def test_between_nodes_a_ring_is_shared_by_the_devices_of_a_node():
    mesh = {"fsdp": 2, "tensor": 4}
    over_both = Transfer("x", "all-gather", ("fsdp", "tensor"), 80.0, 1, True)
    over_fsdp = Transfer("x", "all-gather", ("fsdp",), 80.0, 1, True)
    # 70 bytes leave each device, over a node's boundary by four NICs: 70 / 4 / 2 > 70 / 10.
    assert transfer_terms(over_both, mesh, MACHINE).network == pytest.approx(70 / 4 / 2)
    assert transfer_terms(over_fsdp, mesh, MACHINE).network == pytest.approx(40 / 2)


def test_an_exchange_sends_to_each_node_what_is_for_it():
    mesh = {"expert": 8}
    whole = Transfer("x", "all-to-all", ("expert",), 80.0, 1, False)
    assert transfer_terms(whole, mesh, MACHINE).network == pytest.approx(max(40 / 2, 30 / 10))
    across = whole._replace(group=(2, 1))
    assert transfer_terms(across, mesh, MACHINE).network == pytest.approx(40 / 2)
    within = whole._replace(group=(4, 4))
    assert transfer_terms(within, mesh, MACHINE).network == pytest.approx(60 / 10)


def test_an_axis_of_one_costs_nothing():
    alone = Transfer("x", "all-reduce", ("data",), 1e9, 7, False)
    assert predict([], [alone], {"fsdp": 8}, MACHINE, ALL).seconds == 0.0


def test_what_nothing_waits_for_runs_behind_the_work():
    mesh, work = {"tensor": 4}, [Work("products", flops_bf16=200.0)]  # 2 s
    gather = Transfer("weights", "all-gather", ("tensor",), 40.0, 0, True)  # 3 s
    dispatch = Transfer("dispatch", "all-to-all", ("tensor",), 40.0, 0, False)  # 3 s
    behind = predict(work, [gather], mesh, MACHINE, ALL)
    assert (behind.seconds, behind.exposed) == pytest.approx((3.0, 1.0))
    assert predict(work, [gather], mesh, MACHINE, NONE).exposed == pytest.approx(3.0)
    waiting = predict(work, [gather, dispatch], mesh, MACHINE, ALL)
    assert (waiting.seconds, waiting.exposed) == pytest.approx((6.0, 4.0))
    assert waiting.communication_by_part == pytest.approx({"weights": 3.0, "dispatch": 3.0})


def test_less_of_a_figure_takes_longer():
    half = Reached(**{**PEAK, "products": 0.5, "core": 0.25}, overhead=0.25)
    work = [Work("products", flops_bf16=200.0), Work("core", flops_core=50.0)]
    assert predict(work, [], {}, MACHINE, half).seconds == pytest.approx(4.0 + 2.0 + 0.25)


def test_the_papers_speed_limit_of_decoding():
    # (1 + 2) bytes x 32 tokens x 9 experts x 7000 over 50 GB/s: 120.96 us (ISCA, section 2.3.2).
    sent = Transfer("dispatch and combine", "all-to-all", ("expert",), 3 * 32 * 9 * 7000.0, 0,
                    False, group=(40, 1))  # fmt: skip
    seconds = transfer_terms(sent, {"expert": 320}, ACCELERATORS["h200"]).network
    assert seconds == pytest.approx(120.96e-6 * 39 / 40, rel=1e-6)


def test_messages_between_nodes_below_one_switch_arrive_sooner():
    hardware = ACCELERATORS["h200"]
    gather = Transfer("weights", "all-gather", ("fsdp",), 1.0, 1, True)
    latency = lambda mesh: transfer_terms(gather, mesh, hardware).messages
    # Groups of four nodes: neighbours, which share a leaf of 32 nodes, or 64 nodes apart.
    assert latency({"data": 64, "fsdp": 4, "expert": 8}) == pytest.approx(2 * 2.8e-6)
    assert latency({"fsdp": 4, "expert": 512}) == pytest.approx(2 * 3.7e-6)


def test_devices_of_one_process_meet_once_and_sum_for_all():
    cpu = ACCELERATORS["cpu"]
    mesh = {"fsdp": 8}
    terms = lambda kind: transfer_terms(Transfer("x", kind, ("fsdp",), 80.0, 3, True), mesh, cpu)
    assert terms("reduce-scatter") == terms("all-reduce")
    assert terms("all-reduce").network == pytest.approx(140 / cpu.inner.bandwidth)
    assert terms("all-gather").messages == pytest.approx(3 * cpu.inner.latency)
