"""What one train step holds, computes and sends on each device, by formula.

Written from the model's sizes, the letter tables, the mesh and the recipe; nothing is compiled.
A plan sets the compiler's figures beside these.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from deepseek_jax.fp8 import falls_on_blocks
from deepseek_jax.linear import DTYPES
from deepseek_jax.moe import row_alignment
from experiments.planning.setup import Setup
from experiments.planning.weights import (
    WHOLE,
    Weight,
    code_axes,
    optimizer_bytes,
    parameter_bytes,
    shards,
    weights,
)
from sharding.cost import Transfer, Work
from sharding.expert_parallel import axis_hops

# Products that the backward pass does again under each policy of block.REMAT, as parts of
# `forward_flops`: what lies between two things that are kept. The last product of a block is not
# among them, its result is the block's.
AGAIN = {
    "none": {},
    "paper": {"attention": 0.85, "attention core": 1.0, "router": 1.0},
    "attention": {"attention": 1.0, "attention core": 1.0, "router": 1.0, "dense layers": 2 / 3,
                  "routed experts": 2 / 3, "shared experts": 2 / 3},
    "full": {"attention": 1.0, "attention core": 1.0, "router": 1.0, "dense layers": 2 / 3,
             "routed experts": 2 / 3, "shared experts": 2 / 3},
}  # fmt: skip
# Elements of the model's width that norms, residuals, casts and copies of a layer read and write
# for each token, forward and backward together.
PASSES = 60
BACKWARD_OVER_FORWARD = 2.0


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    kept: float  # activations that wait for the backward pass
    working: float  # the largest layer at work: its gathered weights, gradients, activations

    @property
    def total(self) -> float:
        return sum(self)


def itemsize(setup: Setup) -> int:
    """Bytes of an activation's element."""
    return jnp.dtype(DTYPES[setup.run.precision.activations]).itemsize


def memory(setup: Setup) -> Memory:
    """The state exactly; activations and what a layer needs while it runs as estimates."""
    run, mesh = setup.run, setup.mesh
    stored = parameter_bytes(run, mesh)
    # While micro-batches are added up there is a sum beside the gradient of the next.
    gradients = stored * (2 if setup.accumulation > 1 else 1)
    layers = run.config.num_layers + run.config.num_mtp
    kept = setup.tokens * layers * kept_bytes(setup, run.remat)
    held = weights(run.config, mesh)
    # Weights of two layers, one of them on its way, and the FP32 gradients of the largest two.
    layer = [w for w in held if w.name.startswith("moe.")]
    whole = sorted(w.size / w.layers / shards(w.computed, mesh) for w in layer)
    at_work = 2 * sum(whole) * itemsize(setup) + 4 * sum(whole[-2:])
    # Embedding or head whole in FP32, and two of their gradients; not at the same time as a layer.
    table = 3 * 4 * max(w.size for w in held if w.leaf in WHOLE)
    if is_fp8(setup):
        # Codes of all quantised matrices, as they are and transposed.
        at_work += 2 * stored / 4
    largest = kept_bytes(setup, "none") * 2.5 * setup.tokens
    working = max(at_work + largest, table)
    return Memory(stored, optimizer_bytes(run, mesh), gradients, kept, working)


def argument_bytes(setup: Setup) -> int:
    """What a step is handed, exactly: state in its shards, biases and counters whole, tokens."""
    run, config = setup.run, setup.run.config
    state = parameter_bytes(run, setup.mesh) + optimizer_bytes(run, setup.mesh)
    biases = 4 * config.num_experts * config.num_expert_layers * config.has_routing_bias
    counters = 4 * (1 + 2 + 1 + 1)  # step, tokens in two words, skipped, skipped in a row
    tokens = 4 * setup.accumulation * setup.sequences * (run.seq_len + 1)
    return state + biases + counters + tokens


def is_fp8(setup: Setup) -> bool:
    return setup.run.precision.matmul == "fp8"


def kept_bytes(setup: Setup, remat: str) -> float:
    """Bytes that a MoE layer keeps of each token for the backward pass: block.REMAT.

    Devices of the tensor axis share the sequence, heads and hidden channels, but experts read whole
    rows on each. In FP8 what experts read is kept as codes, and what follows attention in 12 bits.
    """
    config, size = setup.run.config, itemsize(setup)
    codes, twelve = (1 + 4 / 128, 1.5 + 4 / 128) if is_fp8(setup) else (size, size)
    N, D, A = config.num_heads, config.model_dim, config.query_key_dim
    U, Q, Y = config.value_head_dim, config.query_latent_dim or 0, config.cache_dim
    rows = config.experts_per_token * (setup.scheme.room or 1.0)
    latent, attention = size * (Q + Y), N * U
    hidden = codes * 2 * config.expert_ffn_dim * (rows + config.num_shared_experts)
    # Of each policy: what is shared, what is whole.
    kept = {
        "full": (0.0, 0.0),
        "attention": (twelve * attention, 0.0),
        "paper": (twelve * attention + latent + hidden, codes * rows * D),
        "none": (size * (2 * D + N * (2 * A + U) + 2 * attention) + latent + 2 * hidden,
                 (size + codes) * rows * D),
    }  # fmt: skip
    shared, whole = kept[remat]
    return (size * D + shared) / setup.mesh["tensor"] + whole


def forward_flops(setup: Setup) -> dict[str, float]:
    """Operations of one micro-batch's forward pass on a device, by part."""
    config, mesh = setup.run.config, setup.mesh
    flops: dict[str, float] = {}
    for w in weights(config, mesh):
        if w.is_matrix:
            # Over the tensor axis lie heads and channels, or else the sequence; experts are
            # split, but each device's receive tokens from all: an even load.
            each = setup.tokens * w.flops(config) / mesh["tensor"]
            flops[w.part] = flops.get(w.part, 0.0) + each
    core = 2 * config.num_heads * setup.run.seq_len * (config.query_key_dim + config.value_head_dim)
    core = setup.tokens * core / 2 / mesh["tensor"]
    flops["attention core"] = core * config.num_layers
    if config.num_mtp:
        head = 2.0 * config.vocab_size * config.model_dim
        flops["MTP"] += config.num_mtp * (core + setup.tokens * head / mesh["tensor"])
    return flops


def step_work(setup: Setup) -> list[Work]:
    """The work of a step on a device."""
    run, mesh, config = setup.run, setup.mesh, setup.run.config
    again, fp8 = AGAIN[run.remat], is_fp8(setup)
    on_cpu = setup.cluster.accelerator.platform == "cpu"
    found = []
    for part, forward in forward_flops(setup).items():
        times = 1.0 + BACKWARD_OVER_FORWARD + again.get(part, 0.0)
        if part == "attention core" and fp8 and run.remat in ("paper", "attention"):
            # FP8 keeps the softmax's sums too, BF16 its output alone.
            times -= 1.0
        if part == "MTP":
            times += again.get("attention", 0.0)
        if part == "routed experts" and on_cpu:
            # Kernels pass over rows of buffers that hold no token, the reference does not.
            times *= setup.scheme.room or 1.0
        total = forward * times * setup.accumulation
        in_fp8 = fp8 and part not in ("attention core", "router", "head and loss")
        found.append(Work(part, 0.0 if in_fp8 else total, total if in_fp8 else 0.0))
    layers, moe = config.num_layers + config.num_mtp, config.num_expert_layers
    rows = config.experts_per_token * (setup.scheme.room or 1.0)
    # Devices of the tensor axis share the sequence and hidden channels, but each has all rows.
    elements = layers * config.model_dim * PASSES / mesh["tensor"]
    elements += moe * rows * (6 * config.model_dim + 12 * config.expert_ffn_dim / mesh["tensor"])
    elementwise = setup.accumulation * setup.tokens * elements * itemsize(setup)
    found.append(Work("norms, casts, copies", bytes=elementwise))
    if on_cpu and moe:
        found.append(Work("blocks of experts", bytes=block_bytes(setup) * moe))
    # Read: gradient, master, moments; written: master, moments; and the norm reads gradients.
    state = sum(w.size / shards(w.stored, mesh) for w in weights(config, mesh))
    each = 4 + 2 * (4 + 2 * jnp.dtype(DTYPES[run.precision.moments]).itemsize) + 4
    found.append(Work("optimizer", bytes=each * state))
    used = sum(w.size / shards(w.computed, mesh) for w in weights(config, mesh))
    # Each micro-batch casts its gathered weights twice, and adds its gradients to the sum.
    found.append(Work("weights and gradients",
                      bytes=setup.accumulation * (used * 3 * itemsize(setup) + state * 12)))
    return found


def block_bytes(setup: Setup) -> float:
    """What a layer's experts read and write in a step by the reference, which a CPU runs.

    It multiplies blocks of rows, each with its own copy of its expert's weights, written and read;
    backward again, and each block writes a weight gradient that is then read and added to a sum.
    """
    config, run = setup.run.config, setup.run
    rows = setup.tokens * config.experts_per_token
    block = row_alignment(rows, config.num_experts)
    held = config.num_experts // setup.mesh["expert"]
    blocks = rows * (setup.scheme.room or 1.0) / block + held * (1 - 1 / block)
    size = 3 * config.model_dim * config.expert_ffn_dim / setup.mesh["tensor"]
    forward = 2 * itemsize(setup)
    again = AGAIN[run.remat].get("routed experts", 0.0) * forward
    return setup.accumulation * blocks * size * (2 * forward + again + 3 * 4)


def gathers(weight: Weight, setup: Setup) -> list[tuple[float, int, tuple[str, ...]]]:
    """(bytes of an element, how often a step, mesh axes first to last) of a weight's gathers.

    Masters are FP32; compilers move the cast to what products multiply in front of the gather in
    scanned layers, but where attention is computed again backward. Embedding, head and MTP modules
    stand alone and are gathered once, as they are. In FP8 masters are quantised where they lie if
    that falls on blocks and otherwise gathered for it, once a step; codes are gathered forward, and
    again where attention is computed again, and transposed codes backward.
    """
    often, own = setup.accumulation if setup.scheme.zero == 3 else 1, weight.gathered
    if weight.leaf in WHOLE:
        return [(4, often, own)]
    if is_fp8(setup) and weight.is_matrix and weight.leaf != "router_ED":
        shape = weight.shape[-len(weight.letters) :]
        in_place = falls_on_blocks(weight.letters, shape, setup.mesh)
        masters = [] if in_place else [(4, 1, own)]
        if setup.scheme.zero == 1:
            return [(1, 2, own)] if in_place else masters
        again = "N" in weight.letters and setup.run.remat != "none"
        codes, turned = code_axes(weight, setup.mesh)
        return [*masters, (1, (1 + again) * often, codes), (1, often, turned)]
    if setup.scheme.zero == 1 or not weight.name.startswith(("dense.", "moe.")):
        return [(4, often, own)]
    cast = itemsize(setup) if weight.leaf != "router_ED" else 4
    return [(cast, often, own), (4 if "N" in weight.letters else cast, often, own)]


def step_transfers(setup: Setup) -> list[Transfer]:
    """The collectives of a step: weights, gradients, dispatch and combine, tensor sums."""
    return [*weight_transfers(setup), *expert_transfers(setup), *tensor_transfers(setup)]


def weight_transfers(setup: Setup) -> list[Transfer]:
    """Gathers of weights and sums of gradients, for every micro-batch, axis by axis."""
    run, mesh, found = setup.run, setup.mesh, []
    for w in weights(run.config, mesh):
        size = w.size / shards(w.computed, mesh)
        # Embedding and head are used once more by each MTP module.
        uses = 1 + run.config.num_mtp if w.leaf in WHOLE else 1
        sums = uses * w.layers * setup.accumulation
        each = size / w.layers
        for item, often, axes in gathers(w, setup):
            for index, axis in enumerate(axes):
                moved = size * item * often / shards(axes[index + 1 :], mesh)
                found.append(Transfer("weights", "all-gather", (axis,), moved, w.layers * often,
                                      True))
        for index, axis in enumerate(w.gathered):
            part = each / shards(w.gathered[index + 1 :], mesh)
            found.append(Transfer("gradients", "reduce-scatter", (axis,), 4 * part * sums, sums,
                                  True))
        if w.summed:
            kept = each / shards(w.gathered, mesh)
            found.append(Transfer("gradients", "all-reduce", w.summed, 4 * kept * sums, sums, True))
    return found


def hop_rows(setup: Setup) -> list[tuple[str, tuple[int, int], int]]:
    """Name, group and rows of the buffer that a device exchanges in each hop of dispatch.

    A group is how many devices exchange, and how many of them share a node.
    """
    config, scheme, ranks = setup.run.config, setup.scheme, setup.mesh["expert"]
    tokens, even, found = setup.tokens, setup.tokens * config.experts_per_token, []
    hops = axis_hops(ranks, scheme.expert_nodes)
    for index, hop in enumerate(hops):
        group = len(hop.groups[0])
        bound = tokens
        if scheme.room is not None:
            bound = min(tokens, math.ceil(scheme.room * even / group))
        tokens = group * bound
        if len(hops) > 1 and index == 0:
            found.append((f"among {group} nodes", (group, 1), tokens))
        else:
            inside = group if len(hops) > 1 else ranks // scheme.expert_nodes
            found.append((f"among {group} devices", (group, inside), tokens))
    return found


def expert_transfers(setup: Setup) -> list[Transfer]:
    """Dispatch and combine, forward and backward; work that does not need them is not at hand."""
    config, size, remat = setup.run.config, itemsize(setup), setup.run.remat
    moe = config.num_expert_layers
    times = setup.accumulation * moe
    # What is combined in an MTP module is computed again for the norm behind it.
    again = setup.accumulation * (moe - config.num_moe_layers) if remat != "none" else 0
    D, K = config.model_dim, config.experts_per_token
    codes = D + 4 * (D // 128) if is_fp8(setup) else D * size
    # Forward, the gradient that goes back through combine, and once more where it is not kept.
    sends = 3 if remat in ("attention", "full") else 2
    # Ids and routing weights go out with the tokens, again if the path is not kept; the
    # gradients of the routing weights come back.
    lists = 3 if remat == "none" else 5
    found = []
    for name, group, rows in hop_rows(setup):
        for part, size_of_one, count in (
            (f"dispatch {name}", rows * codes, sends * times),
            (f"combine {name}", rows * D * size, 2 * times + again),
            (f"choices {name}", rows * K * 4, lists * times),
        ):
            found.append(Transfer(part, "all-to-all", ("expert",), size_of_one * count, count,
                                  False, group))
    return found


def tensor_transfers(setup: Setup) -> list[Transfer]:
    """Sequences gathered over the tensor axis before products that split heads or channels there.

    Those products read latents and what feeds the feed-forward, as codes in FP8, forward and again
    backward; the gradients of the two results of a layer are gathered too. Partial sums are
    scattered: both results, and backward the latents and the inputs of feed-forward and experts.
    """
    config, size = setup.run.config, itemsize(setup)
    if setup.mesh["tensor"] == 1:
        return []
    codes = 1 + 4 / 128 if is_fp8(setup) else size
    layers = config.num_layers + config.num_mtp
    D = config.model_dim
    latents = (config.query_latent_dim or D) + config.kv_latent_dim
    times = layers * setup.accumulation
    return [
        Transfer("tensor sums", "all-gather", ("tensor",),
                 times * setup.tokens * (codes * 2 * (latents + D) + size * 2 * D), 8 * times,
                 False),
        Transfer("tensor sums", "reduce-scatter", ("tensor",),
                 times * setup.tokens * size * (latents + 4 * D), 6 * times, False),
    ]  # fmt: skip
