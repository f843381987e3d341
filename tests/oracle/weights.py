"""Random weights, biases and tokens for the reference, the same bits on every numpy.

A draw is the sum of twelve 16-bit whole numbers, centred and divided by 2^16: mean 0, variance 1
(to 2^-32), near to normal, and exact in FP32. The numbers are the raw 64-bit stream of
`PCG64([seed, crc32(path)])`, which numpy keeps fixed, low 16 bits first; no logarithm or
ziggurat that another version might round or draw differently. Products with a standard deviation
are rounded once, to FP32, so that FP32 and float64 computations start from equal weights.
"""

import zlib
from types import SimpleNamespace

import numpy as np


def normal(seed, path, shape):
    """Draws of mean 0 and variance 1, as float64 numbers that FP32 holds exactly."""
    count = int(np.prod(shape))
    raw = raw_bits(seed, path, 3 * count)
    halves = raw[:, None] >> np.arange(0, 64, 16, dtype=np.uint64)[None, :] & np.uint64(0xFFFF)
    total = halves.reshape(count, 12).astype(np.int64).sum(axis=1)
    return ((2 * total - 12 * 65535) / 2.0**17).reshape(shape)


def raw_bits(seed, path, count):
    """64-bit words that depend on the seed and on the path of the array."""
    return np.random.PCG64([seed, zlib.crc32(path.encode())]).random_raw(count).astype(np.uint64)


def make_tokens(seed, vocab_size, shape):
    """Token ids, int32."""
    words = raw_bits(seed, "tokens", int(np.prod(shape)))
    return (words % np.uint64(vocab_size)).astype(np.int32).reshape(shape)


def attention_shapes(config):
    """Shapes of one layer's MLA matrices, output first, contraction last."""
    D, N, C = config.model_dim, config.num_heads, config.kv_latent_dim
    H, R, U = config.content_head_dim, config.rotary_head_dim, config.value_head_dim
    Q = config.query_latent_dim
    if Q is None:
        query = {"wq_NAD": (N, H + R, D)}
    else:
        query = {"wq_a_QD": (Q, D), "q_norm_Q": (Q,), "wq_b_NAQ": (N, H + R, Q)}
    return query | {
        "wkv_a_YD": (C + R, D),
        "kv_norm_C": (C,),
        "wkv_b_NXC": (N, H + U, C),
        "wo_DNU": (D, N, U),
    }


def ffn_shapes(D, F):
    """Shapes of a gated feed-forward."""
    return {"w_gate_FD": (F, D), "w_up_FD": (F, D), "w_down_DF": (D, F)}


def block_shapes(config, *, dense):
    """Shapes of one layer."""
    D, F, E = config.model_dim, config.expert_ffn_dim, config.num_experts
    if dense:
        ffn = ffn_shapes(D, config.dense_ffn_dim)
    else:
        ffn = {
            "router_ED": (E, D),
            "w_gate_EFD": (E, F, D),
            "w_up_EFD": (E, F, D),
            "w_down_EDF": (E, D, F),
        }
        if config.num_shared_experts:
            ffn["shared"] = ffn_shapes(D, config.num_shared_experts * F)
    return {
        "attention_norm_D": (D,),
        "attention": attention_shapes(config),
        "ffn_norm_D": (D,),
        "ffn": ffn,
    }


def weight_shapes(config):
    """The tree of shapes; layers are stacked on a leading dimension."""
    D, V = config.model_dim, config.vocab_size
    shapes = {"embed_VD": (V, D), "head_VD": (V, D), "final_norm_D": (D,)}
    moe_layers = config.num_layers - config.num_dense_layers
    if config.num_dense_layers:
        shapes["dense"] = stack(config.num_dense_layers, block_shapes(config, dense=True))
    if moe_layers:
        shapes["moe"] = stack(moe_layers, block_shapes(config, dense=False))
    if config.num_mtp:
        depth = {
            "embed_norm_D": (D,),
            "hidden_norm_D": (D,),
            "w_join_DZ": (D, 2 * D),
            "block": block_shapes(config, dense=False),
            "final_norm_D": (D,),
        }
        shapes["mtp"] = stack(config.num_mtp, depth)
    return shapes


def stack(count, shapes):
    """The shapes of `count` layers in one array each."""
    return {
        name: stack(count, shape) if isinstance(shape, dict) else (count, *shape)
        for name, shape in shapes.items()
    }


def make_weights(config, seed):
    """The nested dict of FP32 weights: standard deviation 1 / sqrt(fan-in), norms around 1.

    The fan-in is the length of the contraction, which is last (wo_DNU: the last two); an
    embedding row is looked up, not summed, so its entries have standard deviation 1.
    """

    def draw(path, shape):
        name = path.rsplit("/", 1)[-1]
        noise = normal(seed, path, shape)
        if "norm" in name:
            return (1 + 0.2 * noise).astype(np.float32)
        if name == "embed_VD":
            return noise.astype(np.float32)
        fan_in = shape[-1] * shape[-2] if name == "wo_DNU" else shape[-1]
        return (noise / np.sqrt(float(fan_in))).astype(np.float32)

    return draw_tree(draw, weight_shapes(config))


def draw_tree(draw, shapes, prefix=""):
    """`draw(path, shape)` for every leaf."""
    return {
        name: draw_tree(draw, shape, f"{prefix}{name}/")
        if isinstance(shape, dict)
        else draw(prefix + name, shape)
        for name, shape in shapes.items()
    }


def make_biases(config, seed, scale=0.15, mean=0.0):
    """Routing biases of both signs for sigmoid routers, {} for softmax ones."""
    if config.score != "sigmoid":
        return {}
    E = config.num_experts

    def draw(path, layers):
        return (mean + scale * normal(seed, path, (layers, E))).astype(np.float32)

    biases = {}
    moe_layers = config.num_layers - config.num_dense_layers
    if moe_layers:
        biases["moe"] = {"ffn": {"bias_E": draw("moe/ffn/bias_E", moe_layers)}}
    if config.num_mtp:
        bias_E = draw("mtp/block/ffn/bias_E", config.num_mtp)
        biases["mtp"] = {"block": {"ffn": {"bias_E": bias_E}}}
    return biases


def search(config, run, shape, *, segments=None, bias=None, margin=1e-4, tries=300):
    """The first seed at which no choice is close and every expert of every layer is used.

    Args:
        run: function (weights, biases, tokens, segments) with `margin` and `expert_counts_LE`
            in its result, as `reference.make_forward` returns.
        shape: of the tokens.
        bias: keywords of `make_biases`.
    """
    for seed in range(tries):
        weights, biases = make_weights(config, seed), make_biases(config, seed, **(bias or {}))
        tokens = make_tokens(seed, config.vocab_size, shape)
        out = run(weights, biases, tokens, segments)
        if out.margin > margin and (out.expert_counts_LE > 0).all():
            return SimpleNamespace(
                seed=seed, weights=weights, biases=biases, tokens=tokens, expected=out
            )
    raise AssertionError(f"none of {tries=} seeds has margins above {margin=}")
