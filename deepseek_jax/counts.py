"""How many parameters a model has, and how many operations a token costs."""

import math
from dataclasses import dataclass

import jax
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import Model


@dataclass(frozen=True)
class ParamCounts:
    """Parameters of a model, routing biases apart."""

    total: int
    total_without_mtp: int
    active: int  # used by one token of the main model: no embedding lookup, no MTP


def abstract_model(config: ModelConfig) -> Model:
    """The model with shapes in place of arrays: no memory, at any size."""
    return nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0)))


def param_counts(config: ModelConfig) -> ParamCounts:
    """Counts from the leaves of the abstract model."""
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="."): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param))
        )
    }
    total = sum(sizes.values())
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    routed = sum(
        size
        for name, size in sizes.items()
        if name.endswith(("_EFD", "_EDF")) and not name.startswith("mtp.")
    )
    idle = routed - routed * config.experts_per_token // config.num_experts
    return ParamCounts(
        total=total,
        total_without_mtp=total - mtp,
        active=total - mtp - idle - config.vocab_size * config.model_dim,
    )


def train_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool, mtp: bool) -> float:
    """Floating-point operations of one training token: 6 per active matrix element, and attention.

    Counted are the matrices a token is multiplied with (MLA, dense feed-forward, K + shared
    experts, head), not the embedding lookup nor the router; attention over T positions costs
    2 N T (A + U) forward, half of it when only the causal triangle counts, and three times that
    with the backward pass. This is the rule of table 2 and table 4 of the paper (ISCA).
    """
    N, D, U = config.num_heads, config.model_dim, config.value_head_dim
    A, C, Q = config.query_key_dim, config.kv_latent_dim, config.query_latent_dim
    query = N * A * D if Q is None else Q * D + N * A * Q
    attention = query + config.cache_dim * D + N * (config.content_head_dim + U) * C + D * N * U
    dense = 3 * D * config.dense_ffn_dim
    expert = 3 * D * config.expert_ffn_dim
    experts = (config.experts_per_token + config.num_shared_experts) * expert
    scores = 2 * N * seq_len * (A + U) / (2 if causal else 1)
    head = config.vocab_size * D

    dense_layer = 6 * (attention + dense) + 3 * scores
    moe_layer = 6 * (attention + experts) + 3 * scores
    flops = config.num_dense_layers * dense_layer + config.num_moe_layers * moe_layer + 6 * head
    if mtp:
        last_layer = moe_layer if config.num_moe_layers else dense_layer
        flops += config.num_mtp * (last_layer + 6 * (2 * D * D + head))
    return float(flops)
