"""Copies of tokens, counted again one by one, and the closed forms of dispatch and combine."""

import numpy as np
import pytest

from sharding.network.cluster import Node, multi_plane
from sharding.network.expert_traffic import combine, direct, dispatch, grouped

NODES, GPUS = 3, 4
BIG = Node(gpus=GPUS, nic_rate=50e9, nvlink_rate=1e15)


@pytest.fixture(scope="module")
def choices():
    """GPUs of the five choices of seven tokens on each of twelve GPUs, some twice."""
    return np.random.default_rng(0).integers(0, NODES * GPUS, (NODES * GPUS, 7, 5))


def test_grouped_copies_are_those_counted_one_by_one(choices):
    copies = np.zeros((NODES, NODES, GPUS), int)
    handed_out, handed_in = np.zeros((2, NODES, GPUS), int)
    for gpu, tokens in enumerate(choices):
        a, i = divmod(gpu, GPUS)
        for token in tokens:
            for node in set(token // GPUS):
                copies[a, node, i] += 1
            for target in set(token.tolist()):
                b, j = divmod(target, GPUS)
                if i != j:
                    handed_out[b, i] += 1
                    handed_in[b, j] += 1
    traffic = grouped(choices, GPUS)
    assert (traffic.copies_MMI == copies).all()
    assert (traffic.copies_out_MI == handed_out).all()
    assert (traffic.copies_in_MI == handed_in).all()


def test_direct_copies_are_those_counted_one_by_one(choices):
    copies = np.zeros((NODES, NODES, GPUS), int)
    handed_out, handed_in = np.zeros((2, NODES, GPUS), int)
    for gpu, tokens in enumerate(choices):
        a, i = divmod(gpu, GPUS)
        for target in tokens.ravel():
            b, j = divmod(int(target), GPUS)
            copies[a, b, j] += 1
            if i != j:
                handed_out[a, i] += 1
                handed_in[a, j] += 1
    traffic = direct(choices, GPUS)
    assert (traffic.copies_MMI == copies).all()
    assert (traffic.copies_out_MI == handed_out).all()
    assert (traffic.copies_in_MI == handed_in).all()


def test_a_token_for_every_node_costs_one_copy_a_node():
    # All choices on the GPUs of the sender's number, one on each node.
    number = np.arange(NODES * GPUS)[:, None, None] % GPUS
    choices = np.broadcast_to(np.arange(NODES) * GPUS + number, (NODES * GPUS, 64, NODES))
    cluster = multi_plane(NODES, node=BIG)
    timing = dispatch(cluster, grouped(choices, GPUS), 1e5)
    assert timing.network == pytest.approx(64 * 1e5 * (NODES - 1) / 50e9)
    # They are where they should be and pass to no other GPU.
    assert timing.nvlink == 0
    # The own node counts in the rate, which therefore exceeds that of the NIC.
    assert timing.bytes_per_gpu / timing.network == pytest.approx(50e9 * NODES / (NODES - 1))


def test_combine_is_dispatch_backwards(choices):
    cluster, traffic = multi_plane(NODES, node=BIG), grouped(choices, GPUS)
    out, back = dispatch(cluster, traffic, 2e5), combine(cluster, traffic, 2e5)
    assert back.bytes_per_gpu == out.bytes_per_gpu
    mirrored = traffic._replace(copies_MMI=traffic.copies_MMI.transpose(1, 0, 2))
    assert dispatch(cluster, mirrored, 2e5).network == back.network


def test_grouping_saves_network_and_costs_nvlink(choices):
    few, many = grouped(choices, GPUS), direct(choices, GPUS)
    off = ~np.eye(NODES, dtype=bool)
    assert few.copies_MMI[off].sum() < many.copies_MMI[off].sum() == (
        choices // GPUS != (np.arange(NODES * GPUS) // GPUS)[:, None, None]
    ).sum()
    slow = Node(gpus=GPUS, nic_rate=1e15, nvlink_rate=1e9)
    timing = dispatch(multi_plane(NODES, node=slow), few, 1e5)
    assert timing.nvlink == pytest.approx(
        max(few.copies_in_MI.max(), few.copies_out_MI.max()) * 1e5 / 1e9
    )
    assert timing.seconds == pytest.approx(timing.nvlink + timing.latency)


@pytest.mark.parametrize("copies", [grouped, direct])
def test_nodes_of_one_gpu_use_no_nvlink(copies, choices):
    cluster = multi_plane(NODES * GPUS, node=Node(gpus=1))
    traffic = copies(choices, 1)
    assert dispatch(cluster, traffic, 1e5).nvlink == 0 == combine(cluster, traffic, 1e5).nvlink


def test_gpus_that_fill_no_node():
    with pytest.raises(ValueError, match="10 GPUs are no whole number of nodes of 4"):
        grouped(np.zeros((10, 1, 1), int), 4)
