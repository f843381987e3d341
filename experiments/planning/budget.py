"""What one train step holds, computes and sends on each device, by formula.

Written from the model's sizes, the letter tables, the mesh and the recipe; nothing is compiled.
A plan sets the compiler's figures beside these.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.fp8 import TILE, falls_on_blocks
from deepseek_jax.linear import DTYPES
from deepseek_jax.loss import CHUNK_ELEMENTS
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
# Elements read and written outside of products, forward and backward together. All counts of passes
# here and below are read off the peer-sized step as compiled for an H200 (jax 0.11.2), whose bytes
# they give within 10 % in BF16 and FP8, with micro-batches of 1 and 4 (test_budget.py).
NORM_PASSES = 20  # over the widths of the norms: they, residual sums, casts, copies
FFN_PASSES = 9  # over hidden channels, and over the width of experts' rows
CODES = 1.2  # in FP8 these are more: values are read to be quantised and codes written beside them
# Over what a layer of a stack keeps: zeros first, then its slice is written, then read backward.
STACK_PASSES = 3
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
    run, mesh, config = setup.run, setup.mesh, setup.run.config
    stored = parameter_bytes(run, mesh)
    # While micro-batches are added up there is a sum beside the gradient of the next.
    gradients = stored * (2 if setup.accumulation > 1 else 1)
    stacked, layers = stacked_layers(config), config.num_layers + config.num_mtp
    kept = stacked * kept_bytes(setup, run.remat)
    alone = values_bytes(setup) if run.remat == "none" else kept_bytes(setup, run.remat)
    kept = setup.tokens * (kept + (layers - stacked) * alone)
    held = weights(config, mesh)
    layer = [w for w in held if w.name.startswith("moe.")]
    whole = sorted(w.size / w.layers / shards(w.computed, mesh) for w in layer)
    at_work = sum(whole) * itemsize(setup)
    if any(w.gathered for w in layer):
        # A second layer is on its way, and FP32 gradients of the largest two weights.
        at_work += at_work + 4 * sum(whole[-2:])
    elif is_fp8(setup):
        at_work = 0.0
    # Embedding or head whole in FP32, and two of their gradients; not at the same time as a layer.
    table = 3 * 4 * max(w.size for w in held if w.leaf in WHOLE)
    if is_fp8(setup):
        # Codes of all quantised matrices, as they are and transposed.
        at_work += 2 * stored / 4
    # Values and gradients of a layer, and where experts lie on other devices what is exchanged.
    largest = values_bytes(setup) * (1.5 + (mesh["expert"] > 1)) * setup.tokens
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


def stacked_layers(config: ModelConfig) -> int:
    """Layers that lie in a loop with others; what a loop of one keeps never lies in a stack."""
    return sum(n for n in (config.num_dense_layers, config.num_moe_layers) if n > 1)


def block_rows(setup: Setup) -> int:
    """Rows of which all belong to one expert."""
    rows = setup.tokens * setup.run.config.experts_per_token
    if setup.cluster.accelerator.platform == "cpu" and not is_fp8(setup):
        return row_alignment(rows, setup.run.config.num_experts)
    return TILE


def expert_rows(setup: Setup) -> float:
    """Rows of the buffer in front of a device's experts, for each of its tokens.

    Beside the room for an uneven load, each expert may leave almost a block without tokens.
    """
    config = setup.run.config
    held = config.num_experts // setup.mesh["expert"]
    blocks = held * (block_rows(setup) - 1) / setup.tokens
    return config.experts_per_token * (setup.scheme.room or 1.0) + blocks


def values_bytes(setup: Setup) -> float:
    """Bytes of a token's values in a MoE layer as products read and write them."""
    config, size = setup.run.config, itemsize(setup)
    codes = 1 + 4 / 128 if is_fp8(setup) else size
    N, D, A = config.num_heads, config.model_dim, config.query_key_dim
    U, Q, Y = config.value_head_dim, config.query_latent_dim or 0, config.cache_dim
    rows = expert_rows(setup)
    hidden = codes * 2 * config.expert_ffn_dim * (rows + config.num_shared_experts)
    shared = size * (3 * D + N * (2 * A + 3 * U) + Q + Y) + 2 * hidden
    return shared / setup.mesh["tensor"] + (size + codes) * rows * D


def kept_bytes(setup: Setup, remat: str) -> float:
    """Bytes that a MoE layer of a stack keeps of each token for the backward pass: block.REMAT.

    Devices of the tensor axis share the sequence, heads and hidden channels, but experts read whole
    rows on each. In FP8 what experts read is kept as codes, and what follows attention in 12 bits.
    Without remat every step of a formula is kept, in FP32 beside the operands of products: two for
    a norm, one for the router, and for SwiGLU, which has a gradient of its own in FP8 alone, five
    and one more with routing weights.
    """
    config, size = setup.run.config, itemsize(setup)
    fp8 = is_fp8(setup)
    codes, twelve = (1 + 4 / 128, 1.5 + 4 / 128) if fp8 else (size, size)
    N, D, A = config.num_heads, config.model_dim, config.query_key_dim
    U, Q, Y = config.value_head_dim, config.query_latent_dim or 0, config.cache_dim
    E, F, S = config.num_experts, config.expert_ffn_dim, config.num_shared_experts
    rows = expert_rows(setup)
    latent, attention = size * (Q + Y), N * U
    hidden = codes * 2 * F * (rows + S)
    normed = 2 * D + Q + config.kv_latent_dim
    operands = codes * normed + size * N * (2 * A + U) + twelve * attention
    swiglu = hidden if fp8 else (size + 4 * 5) * F * (rows + S) + 4 * F * rows
    # Of each policy: what is shared, what is whole.
    kept = {
        "full": (size * D, 0.0),
        "attention": (size * D + twelve * attention, 0.0),
        "paper": (size * D + twelve * attention + latent + hidden, codes * rows * D),
        "none": (operands + swiglu + 4 * (2 * normed + D + N + 2 * E), codes * rows * D),
    }  # fmt: skip
    shared, whole = kept[remat]
    return shared / setup.mesh["tensor"] + whole


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
    run, config = setup.run, setup.run.config
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
        if part == "attention core":
            found.append(Work(part, flops_core=total))
        elif fp8 and part not in ("router", "head and loss"):
            found.append(Work(part, flops_fp8=total))
        else:
            found.append(Work(part, flops_bf16=total))
        if part == "routed experts" and not on_cpu:
            # But kernels multiply whole blocks of rows, of each expert's last one half for nothing.
            held = config.num_experts // setup.mesh["expert"]
            empty = held * (block_rows(setup) - 1) / 2
            share = empty / (setup.tokens * config.experts_per_token)
            done = found[-1]
            found.append(Work("rows that fill blocks", flops_bf16=done.flops_bf16 * share,
                              flops_fp8=done.flops_fp8 * share))  # fmt: skip
    found.append(Work("norms, casts, copies", bytes=elementwise_bytes(setup)))
    stacked = stacked_layers(config) * kept_bytes(setup, run.remat)
    stacked *= setup.accumulation * setup.tokens
    found.append(Work("kept activations", bytes=STACK_PASSES * stacked))
    if on_cpu and config.num_expert_layers:
        found.append(Work("blocks of experts", bytes=block_bytes(setup) * config.num_expert_layers))
    found.append(Work("logits", bytes=loss_bytes(setup)))
    return [*found, *state_work(setup)]


def elementwise_bytes(setup: Setup) -> float:
    """What a step reads and writes in memory between products, without what layers keep."""
    config, tensor = setup.run.config, setup.mesh["tensor"]
    N, D, A = config.num_heads, config.model_dim, config.query_key_dim
    H, U, C = config.content_head_dim, config.value_head_dim, config.kv_latent_dim
    layers, moe = config.num_layers + config.num_mtp, config.num_expert_layers
    # Queries, keys and values are put together out of parts: forward, backward, and again.
    times = 2 + AGAIN[setup.run.remat].get("attention core", 0.0)
    heads = times * N * (3 * A + H + 2 * U)
    norms = NORM_PASSES * (D + (config.query_latent_dim or 0) + C)
    hidden = (layers - moe) * config.dense_ffn_dim + moe * config.shared_ffn_dim
    rows = FFN_PASSES * moe * expert_rows(setup)
    # Devices of the tensor axis share the sequence and hidden channels, but each has all rows.
    shared = layers * (heads + norms) + FFN_PASSES * hidden + rows * config.expert_ffn_dim
    elements = setup.accumulation * setup.tokens * (shared / tensor + rows * D)
    return elements * itemsize(setup) * (CODES if is_fp8(setup) else 1.0)


def loss_bytes(setup: Setup) -> float:
    """What the cross-entropies of a step read and write between their products (loss.py).

    FP32 logits are written, read for their maximum, their sum, the target's and the gradient, which
    is written; each chunk of them adds to the gradient of the head, which begins as zeros and is
    scaled in the end; and the head is cast.
    """
    config, size = setup.run.config, itemsize(setup)
    logits = setup.tokens * config.vocab_size / setup.mesh["tensor"]
    chunks = math.ceil(logits / CHUNK_ELEMENTS)
    head = config.vocab_size * config.model_dim * (8 * chunks + 4 + 8 + 4 + size)
    return (1 + config.num_mtp) * setup.accumulation * (logits * (5 * 4 + size) + head)


def state_work(setup: Setup) -> list[Work]:
    """What a step reads and writes of weights, gradients and moments beside products.

    For every micro-batch masters are cast, forward and backward, where they lie; gathered ones are
    written once more. In FP8 they are quantised once, as they are and transposed. Gradients begin
    as stacks of zeros into which each layer writes; with more than one micro-batch they are then
    added to sums (in FP8 inside the product, and then the sums are copied into the next stack).
    """
    run, mesh, count = setup.run, setup.mesh, setup.accumulation
    size, moment = itemsize(setup), jnp.dtype(DTYPES[run.precision.moments]).itemsize
    cast = summed = optimized = 0.0
    for w in weights(run.config, mesh):
        held, used = w.size / shards(w.stored, mesh), w.size / shards(w.computed, mesh)
        gathered = used if w.gathered else 0.0
        if w.is_matrix and w.leaf not in WHOLE:
            if is_fp8(setup) and w.leaf != "router_ED":
                cast += held * (4 + 2) + gathered * 2 * (count if setup.scheme.zero == 3 else 1)
            elif setup.scheme.zero == 3:
                cast += 2 * count * (held * (4 + size) + gathered * size)
            else:
                cast += gathered * 4 + 2 * count * used * (4 + size)
        # Before devices add theirs up a gradient is as large as the weight in its product.
        summed += count * (held * (8 if count == 1 else 20) + gathered * 8)
        # Read: gradient, master, moments; written: master, moments; and the norm reads gradients.
        optimized += held * (4 + 2 * (4 + 2 * moment) + 4)
    return [
        Work("casts of weights", bytes=cast),
        Work("gradients", bytes=summed),
        Work("optimizer", bytes=optimized),
    ]


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
    scanned layers, but not backward where a product is computed again. Embedding, head and MTP
    modules stand alone and are gathered once, as they are. In FP8 masters are quantised where they
    lie if that falls on blocks and otherwise gathered for it, once a step; codes are gathered
    forward, and for products that are computed again, and transposed codes backward.
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
        times = (1 + is_computed_again(weight, setup.run.remat)) * often
        codes, turned = code_axes(weight, setup.mesh)
        return [*masters, (1, times, codes), (1, often, turned)]
    if setup.scheme.zero == 1 or not weight.name.startswith(("dense.", "moe.")):
        return [(4, often, own)]
    cast = itemsize(setup) if weight.leaf != "router_ED" else 4
    again = is_computed_again(weight, setup.run.remat)
    return [(cast, often, own), (4 if again else cast, often, own)]


def is_computed_again(weight: Weight, remat: str) -> bool:
    """Whether the backward pass repeats a weight's product before it makes its gradients."""
    if remat in ("none", "paper"):
        return remat == "paper" and "N" in weight.letters
    return not weight.leaf.startswith("w_down")


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


def token_bytes(config: ModelConfig) -> int:
    """Of a token on its way to experts in FP8: codes, and exponents of scales in words of four."""
    return config.model_dim + 16 * math.ceil(config.model_dim / TILE / 16)


def expert_transfers(setup: Setup) -> list[Transfer]:
    """Dispatch and combine, forward and backward; work that does not need them is not at hand."""
    config, size, remat = setup.run.config, itemsize(setup), setup.run.remat
    moe = config.num_expert_layers
    times = setup.accumulation * moe
    # What is combined in an MTP module is computed again for the norm behind it.
    again = setup.accumulation * (moe - config.num_moe_layers) if remat != "none" else 0
    D, K = config.model_dim, config.experts_per_token
    codes = token_bytes(config) if is_fp8(setup) else D * size
    # Forward, the gradient that goes back through combine, and once more where it is not kept.
    sends = 3 if remat in ("attention", "full") else 2
    # Ids and routing weights go out, the weights again where remat does not keep them and the ids
    # where it does not keep the path; the gradients of the routing weights come back.
    lists = {"none": 3, "paper": 4}.get(remat, 5)
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
