"""Devices to compile for that need not be there: fake CPU devices, NVIDIA GPUs, TPUs."""

import importlib.util
import math
import os
from typing import Literal

from sharding.hardware import Cluster

Target = Literal["cpu", "gpu", "tpu"]
EXTRAS = {"gpu": "plan-cuda", "tpu": "plan-tpu"}
# Multiprocessors, architecture (a: with its own instructions), clock in GHz.
GPUS = {
    "h800": (132, 9, 1.98), "h100": (132, 9, 1.98), "h200": (132, 9, 1.98), "gb200": (152, 10, 2.0),
}  # fmt: skip


def environment(cluster: Cluster, target: Target) -> dict[str, str]:
    """The environment of a process that compiles for the target; jax is not imported yet in it."""
    flags = os.environ.get("XLA_FLAGS", "")
    kept = [f for f in flags.split() if "host_platform_device_count" not in f]
    if target == "cpu":
        kept.append(f"--xla_force_host_platform_device_count={cluster.devices}")
    # The TPU compiler would ask a metadata server which machine it is on.
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(kept),
            "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "1"}


def missing(target: Target) -> str | None:
    """What to install for a target's compiler, in one line; None when it is there."""
    found = {
        "cpu": lambda: True,
        "gpu": lambda: any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
        "tpu": lambda: importlib.util.find_spec("libtpu") is not None,
    }
    if found[target]():
        return None
    extra = EXTRAS[target]
    return f'no {target.upper()} compiler is installed: pip install "deepseek-jax[{extra}]"'


def devices(cluster: Cluster, target: Target) -> list:
    """The cluster's devices, as far as a compiler needs them, in the order of a mesh."""
    import jax

    if target == "cpu":
        return jax.devices()[: cluster.devices]
    from jax.experimental import topologies

    if target == "tpu":
        name = tpu_topology(cluster)
        sides = tuple(map(int, name.partition(":")[2].split("x")))
        # A host has four chips unless the whole slice has fewer.
        host = {"chips_per_host_bounds": (*sides, 1)[:3]} if math.prod(sides) < 4 else {}
        made = topologies.get_topology_desc(platform="tpu", topology_name=name, **host)
    else:
        inside = math.gcd(cluster.devices, cluster.accelerator.node)
        made = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=gpu_description(cluster),
            topology=f"1x{cluster.devices // inside}x{inside}",
        )
    return list(made.devices)


def tpu_topology(cluster: Cluster) -> str:
    """The name of a slice, its sides as equal as powers of two allow: v5p:8x16x16."""
    name = cluster.name.partition("x")[0] if cluster.accelerator.kind != "TPU7x" else "tpu7x"
    chips, dims = cluster.devices // cluster.accelerator.devices_per_chip, cluster.accelerator.torus
    sides = [1] * dims
    if chips & (chips - 1):
        raise ValueError(f"cluster {cluster.name}: a slice of {chips} chips is no power of two")
    while math.prod(sides) < chips:
        sides[sides.index(min(sides))] *= 2
    return f"{name}:{'x'.join(map(str, sorted(sides)))}"


def gpu_description(cluster: Cluster) -> str:
    """The GPU as XLA's CUDA compiler wants it described."""
    hardware = cluster.accelerator
    cores, major, clock = GPUS[cluster.name.partition("x")[0]]
    info = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472, "threads_per_core_limit": 2048, "core_count": cores,
        "fpus_per_core": 128, "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535, "memory_bandwidth": int(hardware.memory_bandwidth),
        "l2_cache_size": 52428800, "clock_rate_ghz": clock,
        "device_memory_size": hardware.memory, "shared_memory_per_block_optin": 232448,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    }  # fmt: skip
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    architecture = f"major: {major} feature_extension: ACCELERATED_FEATURES"
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ {architecture} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } '
        "runtime_version { major: 13 minor: 0 patch: 0 } "
        f'device_description_str: "{hardware.kind}"'
    )
