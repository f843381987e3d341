"""What one train step holds on each device, by formula.

Written from the model's sizes, the letter tables, the mesh and the recipe; nothing is compiled.
What a step computes is in work.py, what it sends in traffic.py; a plan sets the compiler's figures
beside all three.
"""

import itertools
import math
from typing import NamedTuple

from deepseek_jax.config import ModelConfig
from deepseek_jax.fp8 import TILE, is_in_fp8
from deepseek_jax.moe import row_alignment
from experiments.planning.setup import Setup
from experiments.planning.weights import (
    TABLES,
    optimizer_bytes,
    optimizer_itemsizes,
    parameter_bytes,
    shards,
    weights,
)


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    gathered: float  # weights that are whole for as long as the step lasts: with zero=1
    kept: float  # activations that wait for the backward pass
    working: float  # the largest layer at work: its gathered weights, gradients, activations

    @property
    def total(self) -> float:
        return sum(self)


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
    layer = [w for w in held if w.name.startswith("moe." if config.num_moe_layers else "dense.")]
    whole = sorted(w.size / w.layers / shards(w.computed, mesh) for w in layer)
    at_work = sum(whole) * setup.itemsize
    gathered = gathered_bytes(setup)
    if setup.scheme.zero == 3 and any(w.gathered for w in layer):
        # A second layer is on its way, and FP32 gradients of the largest two weights.
        at_work += at_work + 4 * sum(whole[-2:])
    elif setup.is_fp8:
        at_work = 0.0
    # Embedding or head whole in FP32, and two of their gradients; not at the same time as a layer.
    table = 3 * 4 * max(w.size for w in held if w.leaf in TABLES)
    if setup.is_fp8:
        # Codes of all quantised matrices, as they are and transposed.
        at_work += 2 * stored / 4
    # Values and gradients of a layer, and where experts lie on other devices what is exchanged.
    largest = values_bytes(setup) * (1.5 + (mesh["expert"] > 1)) * setup.tokens
    working = max(at_work + largest, table)
    optimizer = optimizer_bytes(run, mesh)
    return Memory(stored, optimizer, gradients, gathered, kept, working)


def gathered_bytes(setup: Setup) -> float:
    """Bytes of weights that zero=1 gathers over the batch axes before the first micro-batch.

    They are FP32 as their masters, in FP8 codes and transposed codes.
    """
    if setup.scheme.zero == 3:
        return 0.0
    whole = lambda w: w.size / shards(w.computed, setup.mesh)
    itemsize = lambda w: 2 if setup.is_fp8 and is_in_fp8(w.leaf) else 4
    return sum(itemsize(w) * whole(w) for w in weights(setup.run.config, setup.mesh) if w.gathered)


def argument_bytes(setup: Setup) -> int:
    """What a step is handed, exactly: state in its shards, biases and counters whole, tokens."""
    run, config = setup.run, setup.run.config
    state = parameter_bytes(run, setup.mesh) + optimizer_bytes(run, setup.mesh)
    biases = 4 * config.num_experts * config.num_expert_layers * config.has_routing_bias
    counters = 4 * (1 + 2 + 1 + 1)  # step, tokens in two words, skipped, skipped in a row
    tokens = 4 * math.prod(batch_shape(setup)) * (1 + run.mask_documents)
    return state + biases + counters + tokens


def batch_shape(setup: Setup) -> tuple[int, int, int]:
    """Of a device's tokens, and of the documents that they belong to where those are told apart."""
    return setup.accumulation, setup.sequences, setup.run.seq_len + 1


def tile_bytes(setup: Setup) -> int:
    """Bytes by which a TPU fills up what a step is handed to whole tiles of memory."""
    run, config = setup.run, setup.run.config
    itemsizes = (4, *optimizer_itemsizes(run))
    arrays = [(w.shard, size) for w in weights(config, setup.mesh) for size in itemsizes]
    if config.has_routing_bias:
        stacks = config.num_moe_layers, config.num_expert_layers - config.num_moe_layers
        arrays += [((n, config.num_experts), 4) for n in stacks]
    arrays += [(batch_shape(setup), 4)] * (1 + run.mask_documents)
    return sum(size * (tiled(shape) - math.prod(shape)) for shape, size in arrays)


def tiled(shape: tuple[int, ...]) -> int:
    """Elements that a TPU keeps for an array.

    Two of its dimensions, whichever pad least, lie in tiles of 8 x 128, of fewer rows where there
    are fewer: what the compiler was seen to do.
    """
    up = lambda n, multiple: -(-n // multiple) * multiple
    rows = lambda n: up(n, min(8, 1 << max(n - 1, 0).bit_length()))
    size = math.prod(shape)
    if len(shape) < 2 or not size:
        return up(size, 128)
    return min(size // (n * m) * rows(n) * up(m, 128) for n, m in itertools.permutations(shape, 2))


def stacked_layers(config: ModelConfig) -> int:
    """Layers that lie in a loop with others; what a loop of one keeps never lies in a stack."""
    return sum(n for n in (config.num_dense_layers, config.num_moe_layers) if n > 1)


def block_rows(setup: Setup) -> int:
    """Rows of which all belong to one expert."""
    rows = setup.tokens * setup.run.config.experts_per_token
    if setup.cluster.accelerator.platform == "cpu" and not setup.is_fp8:
        return row_alignment(rows, setup.run.config.num_experts)
    return TILE


def expert_rows(setup: Setup) -> float:
    """Rows of the buffer in front of a device's experts, for each of its tokens.

    Beside the room for an uneven load, each expert may leave almost a block without tokens.
    """
    config = setup.run.config
    if not config.num_moe_layers:
        return 0.0
    held = config.num_experts // setup.mesh["expert"]
    blocks = held * (block_rows(setup) - 1) / setup.tokens
    return config.experts_per_token * (setup.scheme.room or 1.0) + blocks


def hidden_channels(setup: Setup) -> float:
    """Hidden channels of a token in all experts of a layer, or in the FFN of a dense model."""
    config = setup.run.config
    if not config.num_moe_layers:
        return config.dense_ffn_dim
    return config.expert_ffn_dim * (expert_rows(setup) + config.num_shared_experts)


def values_bytes(setup: Setup) -> float:
    """Bytes of a token's values in a MoE layer as products read and write them."""
    config, size = setup.run.config, setup.itemsize
    codes = 1 + 4 / 128 if setup.is_fp8 else size
    N, D, A = config.num_heads, config.model_dim, config.query_key_dim
    U, Q, Y = config.value_head_dim, config.query_latent_dim or 0, config.cache_dim
    rows = expert_rows(setup)
    hidden = codes * 2 * hidden_channels(setup)
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
    config, size = setup.run.config, setup.itemsize
    fp8 = setup.is_fp8
    codes, twelve = (1 + 4 / 128, 1.5 + 4 / 128) if fp8 else (size, size)
    N, D, A = config.num_heads, config.model_dim, config.query_key_dim
    U, Q, Y = config.value_head_dim, config.query_latent_dim or 0, config.cache_dim
    E = config.num_experts if config.num_moe_layers else 0
    rows, channels = expert_rows(setup), hidden_channels(setup)
    latent, attention = size * (Q + Y), N * U
    hidden = codes * 2 * channels
    normed = 2 * D + Q + config.kv_latent_dim
    operands = codes * normed + size * N * (2 * A + U) + twelve * attention
    weighted = 4 * config.expert_ffn_dim * rows
    swiglu = hidden if fp8 else (size + 4 * 5) * channels + weighted
    # Of each policy: what is shared, what is whole.
    kept = {
        "full": (size * D, 0.0),
        "attention": (size * D + twelve * attention, 0.0),
        "paper": (size * D + twelve * attention + latent + hidden, codes * rows * D),
        "none": (operands + swiglu + 4 * (2 * normed + D + N + 2 * E), codes * rows * D),
    }  # fmt: skip
    shared, whole = kept[remat]
    return shared / setup.mesh["tensor"] + whole
