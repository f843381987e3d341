"""Clusters by name, and figures that must agree with each other."""

import pytest

from experiments.planning.choose import REACHED
from experiments.study import machine
from sharding.hardware import ACCELERATORS, cluster, peak_flops


def test_a_cluster_is_an_accelerator_and_a_count():
    found = cluster("h200x2048")
    assert (found.accelerator.kind, found.devices) == ("NVIDIA H200", 2048)
    assert cluster("TPU-v5px256").name == "v5px256"
    assert cluster("cpux8").accelerator.platform == "cpu"


@pytest.mark.parametrize(
    "name, message",
    [
        ("h20x8", "unknown accelerator 'h20' in cluster 'h20x8': did you mean h200x8"),
        ("h200x-4", "cluster 'h200x-4' must be ACCELERATORxDEVICES"),
        ("a100", "cluster 'a100' must be ACCELERATORxDEVICES, such as h200x2048"),
        ("h200x0", "'h200x0' needs a multiple of 1 devices, not 0"),
        ("h200x32769", "cluster 'h200x32769' must have at most 32768 devices"),
        ("tpu7xx7", "'tpu7xx7' needs a multiple of 2 devices, not 7"),
    ],
)
def test_a_name_that_is_no_cluster_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        cluster(name)


@pytest.mark.parametrize("name", [n for n, a in ACCELERATORS.items() if a.platform != "cpu"])
def test_peaks_agree_with_those_by_device_kind(name):
    accelerator = ACCELERATORS[name]
    assert peak_flops(accelerator.kind) == accelerator.flops_bf16
    assert accelerator.flops_fp8 >= accelerator.flops_bf16


@pytest.mark.parametrize("name", ACCELERATORS)
def test_links_inside_a_node_are_the_faster_ones(name):
    accelerator = ACCELERATORS[name]
    assert accelerator.inner.bandwidth >= accelerator.outer.bandwidth
    assert accelerator.inner.bandwidth < accelerator.memory_bandwidth


def test_of_an_h800s_links_160_and_40_gb_a_second_are_usable():
    h800, reached = ACCELERATORS["h800"], REACHED["gpu"].network
    usable = (reached * h800.inner.bandwidth, reached * h800.outer.bandwidth)
    assert usable == pytest.approx((160e9, 40e9))
    studied = machine.H800
    assert (studied.nvlink, studied.nic) == (h800.inner.bandwidth, h800.outer.bandwidth)
    assert studied.reached == reached
