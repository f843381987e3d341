"""Collectives over mesh axes on the network between nodes, against sums by hand."""

import pytest

from sharding.network.groups import crossing

RATE = 50e9


@pytest.mark.parametrize(
    "dimensions, inside",
    [
        (((32, True), (64, False)), 1),
        (((8, False), (32, True), (8, False)), 1),
        (((256, True),), 8),
        (((16, False), (16, True), (2, False)), 4),
        (((4, True), (8, False), (8, True)), 8),
    ],
)
def test_rings_share_the_nics_of_their_devices_and_no_others_slow_them(dimensions, inside):
    # Each device passes a byte on; of its ring's copies of it one in `inside` takes a NIC.
    assert crossing(dimensions, 8, RATE, ring=True).seconds * RATE == pytest.approx(1 / inside)


def test_an_exchange_sends_over_nics_what_is_for_other_nodes():
    found = crossing(((4, False), (64, True)), 8, RATE, ring=False)
    assert found.seconds * RATE == pytest.approx((64 - 8) / 63)
    across = crossing(((4, False), (8, True), (8, False)), 8, RATE, ring=False)
    assert across.seconds * RATE == pytest.approx(1.0)


def test_messages_cross_three_switches_beyond_the_32_nodes_of_a_leaf():
    switches = lambda *dimensions: crossing(dimensions, 8, RATE, ring=True).switches
    assert switches((256, True)) == 1
    assert switches((512, True)) == 3
    assert switches((8, False), (4, True), (8, False)) == 1
    assert switches((4, True), (64, False), (8, False)) == 3


def test_groups_need_not_fill_nodes():
    # Rings over twelve devices: eight on one node, four on the next.
    found = crossing(((12, True),), 8, RATE, ring=True)
    assert found.seconds * RATE == pytest.approx(1 / 4)
