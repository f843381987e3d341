"""A plan of decoding: bytes of a device and the time of one output token (ISCA, section 2.3).

Requests are split over tensor groups: devices that differ in their place on the tensor axis only,
or a device alone where that axis is 1. A group decodes one token of each of its requests at a time.
Its devices share heads and hidden channels, also those of the experts of their place on the expert
axis, but each holds the latent cache of all the group's requests, for latents have no heads; what
they add to the residual stream is summed over the group. Tokens go straight to the devices of their
experts.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.config import Run
from deepseek_jax.fp8 import is_in_fp8
from experiments.planning.choose import REACHED
from experiments.planning.setup import divisors, itemsize, mesh_name, refusal
from experiments.planning.traffic import plain_bytes, result_bytes, token_bytes
from experiments.planning.weights import Weight, shards, weights
from sharding.cost import Transfer, members_in_node, transfer_terms
from sharding.hardware import Cluster
from sharding.mesh import all_axes
from sharding.rules import is_router

GIB = 2**30


def decode_mesh(run: Run, cluster: Cluster) -> dict[str, int]:
    """The experts spread as far as they go, the rest copies."""
    ways = [n for n in divisors(cluster.devices) if run.config.num_experts % n == 0]
    return all_axes({"expert": max(ways), "data": cluster.devices // max(ways)})


def weight_bytes(weight: Weight, run: Run) -> float:
    """Bytes of a weight's element: FP8 codes and scales of blocks where the recipe has them."""
    if run.precision.matmul == "fp8" and is_in_fp8(weight.leaf):
        return 1 + 4 / 128**2
    return 4 if is_router(weight.leaf) else itemsize(run.precision.activations)


def decode_rows(
    run: Run, cluster: Cluster, mesh: Mapping[str, int] | None, *, batch: int, context: int
) -> list[dict[str, Any]]:
    """Rows of the plan: bytes, and microseconds of one token.

    Args:
      batch: requests of a tensor group.
      context: tokens in the cache of each.
    """
    if batch < 1 or context < 1:
        raise ValueError(f"--batch {batch} and --context {context} must be at least 1")
    mesh = mesh or decode_mesh(run, cluster)
    reason = refusal(run, mesh)
    if reason is not None:
        raise ValueError(f"mesh {mesh_name(mesh)}: {reason}")
    config, hardware, tensor = run.config, cluster.accelerator, mesh["tensor"]
    reached = REACHED[hardware.platform]
    bandwidth = hardware.memory_bandwidth * reached.memory
    in_bf16 = hardware.flops_bf16 * reached.products
    is_fp8 = run.precision.matmul == "fp8"
    fastest = hardware.flops_fp8 * reached.fp8 if is_fp8 else in_bf16
    held: dict[str, float] = {}
    flops: dict[str, float] = {}
    for w in weights(config, mesh):
        if w.part == "MTP":
            continue
        # Nothing is cut over fsdp: a decoding device multiplies at once with what it holds.
        part = w.part if w.part != "norms" else "attention"
        ways = shards(w.computed, mesh)
        held[part] = held.get(part, 0.0) + w.size * weight_bytes(w, run) / ways
        # Experts are split, but each device's receive tokens from all: an even load.
        cut = shards(tuple(axis for axis in w.computed if axis != "expert"), mesh)
        flops[part] = flops.get(part, 0.0) + batch * w.flops(config) / cut
    cache = config.num_layers * batch * context * config.cache_dim * 2
    core = config.num_layers * batch * context * 2 * (config.num_heads / tensor)
    held["cache"] = cache
    flops["cache"] = core * (config.cache_dim + config.kv_latent_dim)

    def seconds_of(part: str, share: float) -> tuple[float, float]:
        """To read what a share of the batch needs, and to compute it."""
        read = held[part]
        if part == "embedding":
            read = 0.0  # lookups read a row of each token
        if part == "cache":
            read *= share
        if part == "routed experts":
            # Each device's experts receive tokens from all; those that none chose are not read.
            tokens = share * batch * mesh["expert"]
            read *= 1 - (1 - config.experts_per_token / config.num_experts) ** tokens
        rate = in_bf16 if part in ("cache", "head and loss", "router") else fastest
        return read / bandwidth, share * flops.get(part, 0.0) / rate

    rows, total, halves = [], 0.0, 0.0
    for part, size in held.items():
        reading, computing = seconds_of(part, 1.0)
        seconds = max(reading, computing)
        total += seconds
        # Each half reads the weights.
        halves += 2 * max(seconds_of(part, 0.5))
        rows.append({"what": part, "GiB a device": size / GIB, "us a token": 1e6 * seconds,
                     "limited by": "memory" if reading >= computing else "products"})
    exchanges, sums = sending(run, cluster, mesh, batch)
    rows.append({"what": "dispatch and combine", "us a token": 1e6 * exchanges,
                 "limited by": "network" if exchanges else None})
    if tensor > 1:
        rows.append({"what": "tensor sums", "us a token": 1e6 * sums, "limited by": "network"})
    needs = sum(held.values())
    fits = "fits" if needs <= hardware.memory else f"does not fit {hardware.memory / GIB:.0f} GiB"
    # Each half sends messages of its own.
    overlapped = max(halves, 2 * sum(sending(run, cluster, mesh, batch / 2)))
    for name, seconds in (("one after the other", total + exchanges + sums),
                          ("two half-batches, one computing while the other sends", overlapped)):
        rows.append({"what": name, "GiB a device": needs / GIB, "us a token": 1e6 * seconds,
                     "limited by": fits, "tokens/s of a request": 1 / seconds,
                     "tokens/s of a device": batch / tensor / seconds})
    return rows


def sending(
    run: Run, cluster: Cluster, mesh: Mapping[str, int], batch: float
) -> tuple[float, float]:
    """Of all layers: dispatch and combine, and the sums over the tensor axis.

    Two of these a layer, behind attention and behind the feed-forward.
    """
    config, hardware = run.config, cluster.accelerator
    exchanges = config.num_moe_layers * exchange_seconds(run, cluster, mesh, batch)
    times = 2 * config.num_layers
    moved = times * batch * plain_bytes(run)
    sums = Transfer("tensor sums", "all-reduce", ("tensor",), moved, times, False)
    return exchanges, transfer_terms(sums, mesh, hardware).at(REACHED[hardware.platform])


def exchange_seconds(run: Run, cluster: Cluster, mesh: Mapping[str, int], batch: float) -> float:
    """One layer's dispatch and combine: each token to the K devices of its experts and back.

    FP8 codes go out with their scales where the recipe is FP8; results come back in the format of
    combine.
    """
    config, hardware, ranks = run.config, cluster.accelerator, mesh["expert"]
    if ranks == 1 or config.num_moe_layers == 0:
        return 0.0
    out = token_bytes(config) if run.precision.matmul == "fp8" else plain_bytes(run)
    inside = members_in_node(("expert",), mesh, hardware.node)
    sent = batch * config.experts_per_token * (out + result_bytes(run))
    outer, inner = sent * (ranks - inside) / ranks, sent * (inside - 1) / ranks
    reached = REACHED[hardware.platform].network
    busy = max(outer / hardware.outer.bandwidth, inner / hardware.inner.bandwidth) / reached
    link = hardware.outer if ranks > inside else hardware.inner
    return busy + 2 * link.latency
