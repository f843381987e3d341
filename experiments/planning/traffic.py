"""What one train step sends between devices, by formula: weights, gradients, tokens, sums."""

import math

from deepseek_jax.config import ModelConfig, Run, logfmt_bits
from deepseek_jax.fp8 import TILE, falls_on_blocks, is_in_fp8
from experiments.planning.setup import Setup, itemsize
from experiments.planning.weights import TABLES, Weight, code_axes, shards, weights
from sharding.cost import Transfer
from sharding.exchange import axis_hops
from sharding.rules import is_router


def step_transfers(setup: Setup) -> list[Transfer]:
    """The collectives of a step: weights, gradients, dispatch and combine, tensor sums."""
    return [*weight_transfers(setup), *expert_transfers(setup), *tensor_transfers(setup)]


def weight_transfers(setup: Setup) -> list[Transfer]:
    """Gathers of weights and sums of gradients, for every micro-batch, axis by axis."""
    run, mesh, found = setup.run, setup.mesh, []
    for w in weights(run.config, mesh):
        size = w.size / shards(w.computed, mesh)
        # Embedding and head are used once more by each MTP module.
        uses = 1 + run.config.num_mtp if w.leaf in TABLES else 1
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


def gathers(weight: Weight, setup: Setup) -> list[tuple[float, int, tuple[str, ...]]]:
    """(bytes of an element, how often a step, mesh axes first to last) of a weight's gathers.

    Masters are FP32; compilers move the cast to what products multiply in front of the gather in
    scanned layers, but not backward where a product is computed again. Embedding, head and MTP
    modules stand alone and are gathered once, as they are. In FP8 masters are quantised where they
    lie if that falls on blocks and otherwise gathered for it, once a step; codes are gathered
    forward, and for products that are computed again, and transposed codes backward.
    """
    often, own = setup.accumulation if setup.scheme.zero == 3 else 1, weight.gathered
    if weight.leaf in TABLES:
        return [(4, often, own)]
    if setup.is_fp8 and is_in_fp8(weight.leaf):
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
    cast = 4 if is_router(weight.leaf) else setup.itemsize
    again = is_computed_again(weight, setup.run.remat)
    return [(cast, often, own), (4 if again else cast, often, own)]


def is_computed_again(weight: Weight, remat: str) -> bool:
    """Whether the backward pass repeats a weight's product before it makes its gradients."""
    if remat in ("none", "paper"):
        return remat == "paper" and "N" in weight.letters
    return not weight.leaf.startswith("w_down")


def expert_transfers(setup: Setup) -> list[Transfer]:
    """Dispatch and combine, forward and backward; work that does not need them is not at hand."""
    config, size, remat = setup.run.config, setup.itemsize, setup.run.remat
    moe = config.num_expert_layers
    times = setup.accumulation * moe
    # What is combined in an MTP module is computed again for the norm behind it.
    again = setup.accumulation * (moe - config.num_moe_layers) if remat != "none" else 0
    D, K = config.model_dim, config.experts_per_token
    codes = token_bytes(config) if setup.is_fp8 else D * size
    # Forward, the gradient that goes back through combine, and once more where it is not kept.
    sends = 3 if remat in ("attention", "full") else 2
    # Ids and routing weights go out, the weights again where remat does not keep them and the ids
    # where it does not keep the path; the gradients of the routing weights come back.
    lists = {"none": 3, "paper": 4}.get(remat, 5)
    found = []
    for name, group, rows in hop_rows(setup):
        for part, size_of_one, count in (
            (f"dispatch {name}", rows * codes, sends * times),
            (f"combine {name}", rows * result_bytes(setup.run), 2 * times + again),
            (f"choices {name}", rows * K * 4, lists * times),
        ):
            found.append(Transfer(part, "all-to-all", ("expert",), size_of_one * count, count,
                                  False, group))
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


def plain_bytes(run: Run) -> int:
    """Of a token's activations as they are."""
    return run.config.model_dim * itemsize(run.precision.activations)


def result_bytes(run: Run) -> int:
    """Of a row of an expert's results, or of its gradients, on the way back to its token."""
    D, bits = run.config.model_dim, logfmt_bits(run.precision.combine)
    if bits is None:
        return plain_bytes(run)
    # Codes, and the lowest and the highest magnitude of a tile in BF16.
    return math.ceil(D / TILE) * (TILE * bits // 8 + 4)


def tensor_transfers(setup: Setup) -> list[Transfer]:
    """Sequences gathered over the tensor axis before products that split heads or channels there.

    Those products read latents and what feeds the feed-forward, as codes in FP8, forward and again
    backward; the gradients of the two results of a layer are gathered too. Partial sums are
    scattered: both results, and backward the latents and the inputs of feed-forward and experts.
    """
    config, size = setup.run.config, setup.itemsize
    if setup.mesh["tensor"] == 1:
        return []
    codes = 1 + 4 / 128 if setup.is_fp8 else size
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
