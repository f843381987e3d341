"""What one train step computes, reads and writes on each device, by formula."""

import math

from deepseek_jax.fp8 import is_in_fp8
from deepseek_jax.loss import CHUNK_ELEMENTS
from deepseek_jax.moe import row_alignment
from experiments.planning.memory import block_rows, expert_rows, kept_bytes, stacked_layers
from experiments.planning.setup import Setup, itemsize
from experiments.planning.weights import TABLES, shards, weights
from sharding.cost import Work

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


def step_work(setup: Setup) -> list[Work]:
    """The work of a step on a device."""
    run, config = setup.run, setup.run.config
    again, fp8 = AGAIN[run.remat], setup.is_fp8
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
    return elements * setup.itemsize * (CODES if setup.is_fp8 else 1.0)


def loss_bytes(setup: Setup) -> float:
    """What the cross-entropies of a step read and write between their products (loss.py).

    FP32 logits are written, read for their maximum, their sum, the target's and the gradient, which
    is written; each chunk of them adds to the gradient of the head, which begins as zeros and is
    scaled in the end; and the head is cast.
    """
    config, size = setup.run.config, setup.itemsize
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
    size, moment = setup.itemsize, itemsize(run.precision.moments)
    cast = summed = optimized = 0.0
    for w in weights(run.config, mesh):
        held, used = w.size / shards(w.stored, mesh), w.size / shards(w.computed, mesh)
        gathered = used if w.gathered else 0.0
        if w.is_matrix and w.leaf not in TABLES:
            if setup.is_fp8 and is_in_fp8(w.leaf):
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
    forward = 2 * setup.itemsize
    again = AGAIN[run.remat].get("routed experts", 0.0) * forward
    return setup.accumulation * blocks * size * (2 * forward + again + 3 * 4)
