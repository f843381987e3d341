"""The whole DeepSeek-V3 training computation in float64, written from the reports' formulas.

This file is the yardstick, so it shares no code with the package, prefers the printed formula to
a fast one (a loop over layers, every expert on every token times a weight that is mostly zero, an
explicit T x S mask, rotary pairs as complex numbers) and takes its gradients from
`jax.grad` of the plain sums. It reads sizes off any object with the fields of `ModelConfig`.

Letters: B batch, T query position, S key position, D model, V vocabulary, F ffn hidden, L layers,
N heads, H content head, R rotary head, A = H + R, U value head, X = H + U, Q query latent,
C kv latent, Y = C + R, E experts, G groups, K experts per token, Z = 2 D.
"""

import contextlib
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

# Compiling is nearly all the time that such small programs take; this leaves a quarter of it.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # later ones do not know it

# The sum of a row is then the same to the last bit whatever the number of rows: the library that
# XLA otherwise gives such sums to adds them up in an order that depends on it.
ROW_BY_ROW = {**QUICK, "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

# The score of experts in rejected groups; a test sets it to 0, a known mistake.
REJECTED = -math.inf


@contextlib.contextmanager
def float64():
    """Trace and run in float64 whatever the surrounding process has set."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def tree_map(function, tree):
    """`function` on every leaf of nested dicts."""
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    return function(tree)


# V3 report, section 2.1; V2 report, section 2.1.


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    """x sigmoid(x)."""
    return x / (1 + jnp.exp(-x))


def feed_forward(x_BTD, weights):
    """W2 (SiLU(W1 x) * (W3 x))."""
    gate_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, weights["w_gate_FD"])
    up_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, weights["w_up_FD"])
    return jnp.einsum("BTF,DF->BTD", silu(gate_BTF) * up_BTF, weights["w_down_DF"])


def magnitude(factor, mscale):
    """YaRN's sqrt(t) = 0.1 mscale ln(factor) + 1, and 1 for a context that is not stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_frequencies(config):
    """theta_i = base^(-2i/R); YaRN divides the slow ones by `factor` along a linear ramp.

    d(r) = R ln(original / (2 pi r)) / (2 ln base) is the pair that turns r times in the original
    length: pairs below floor(d(beta_fast)) stay, pairs above ceil(d(beta_slow)) are stretched.
    """
    R, base = config.rotary_head_dim, config.rope_theta
    frequencies = [base ** (-2 * i / R) for i in range(R // 2)]
    yarn = config.yarn
    if yarn is None:
        return np.array(frequencies)

    def pair_turning(turns):
        return R * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), R - 1)
    if low == high:
        high += 0.001
    stretched = []
    for i, frequency in enumerate(frequencies):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        stretched.append(ramp * frequency / yarn.factor + (1 - ramp) * frequency)
    return np.array(stretched)


def rotate(x_BTnR, config):
    """Turn the pair (2i, 2i + 1) at position t, read as a complex number, by t theta_i."""
    T = x_BTnR.shape[1]
    angle_Tr = np.arange(T)[:, None] * rotary_frequencies(config)[None, :]
    turn_Tr = np.exp(1j * angle_Tr)
    if config.yarn is not None:
        yarn = config.yarn
        turn_Tr = turn_Tr * (
            magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
        )
    pairs_BTnr = x_BTnR[..., 0::2] + 1j * x_BTnR[..., 1::2]
    turned_BTnr = pairs_BTnr * turn_Tr[None, :, None, :]
    return jnp.stack([turned_BTnr.real, turned_BTnr.imag], axis=-1).reshape(x_BTnR.shape)


def attention(x_BTD, weights, config, segments_BT):
    """MLA in its expanded form: every head has its own keys and values, the rotary key is shared.

    q_i = [q_C,i ; RoPE(q_R,i)], k_i = [k_C,i ; RoPE(k_R)],
    o_t,i = sum_{s <= t} softmax_s(q_t,i . k_s,i * scale) v_s,i, u_t = W_O [o_t,1 ; ... ; o_t,N].
    """
    H, R, C = config.content_head_dim, config.rotary_head_dim, config.kv_latent_dim
    eps = config.latent_norm_eps
    T = x_BTD.shape[1]

    if config.query_latent_dim is None:
        q_BTNA = jnp.einsum("BTD,NAD->BTNA", x_BTD, weights["wq_NAD"])
    else:
        latent_BTQ = jnp.einsum("BTD,QD->BTQ", x_BTD, weights["wq_a_QD"])
        latent_BTQ = rms_norm(latent_BTQ, weights["q_norm_Q"], eps)
        q_BTNA = jnp.einsum("BTQ,NAQ->BTNA", latent_BTQ, weights["wq_b_NAQ"])
    q_BTNH, q_BTNR = q_BTNA[..., :H], rotate(q_BTNA[..., H:], config)

    down_BTY = jnp.einsum("BTD,YD->BTY", x_BTD, weights["wkv_a_YD"])
    latent_BTC = rms_norm(down_BTY[..., :C], weights["kv_norm_C"], eps)
    k_BSR = rotate(down_BTY[..., None, C:], config)[:, :, 0]
    up_BSNX = jnp.einsum("BSC,NXC->BSNX", latent_BTC, weights["wkv_b_NXC"])
    k_BSNH, v_BSNU = up_BSNX[..., :H], up_BSNX[..., H:]

    scale = (H + R) ** -0.5
    if config.yarn is not None:
        scale *= magnitude(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    score_BNTS = scale * (
        jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) + jnp.einsum("BTNR,BSR->BNTS", q_BTNR, k_BSR)
    )
    seen_BTS = np.tril(np.ones((T, T), bool))[None]
    if segments_BT is not None:
        seen_BTS = seen_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    score_BNTS = jnp.where(seen_BTS[:, None], score_BNTS, -jnp.inf)
    weight_BNTS = jnp.exp(score_BNTS - jnp.max(score_BNTS, axis=-1, keepdims=True))
    weight_BNTS = weight_BNTS / jnp.sum(weight_BNTS, axis=-1, keepdims=True)
    out_BTNU = jnp.einsum("BNTS,BSNU->BTNU", weight_BNTS, v_BSNU)
    return jnp.einsum("BTNU,DNU->BTD", out_BTNU, weights["wo_DNU"])


# V3 report, equations 12 to 20; V2 report, section 2.2.


def largest(values, count):
    """A mask of the `count` largest along the last dimension, and how clear that choice is."""
    descending = -jnp.sort(-values, axis=-1)
    mask = values >= descending[..., count - 1 : count]
    if count == values.shape[-1]:
        return mask, jnp.inf
    return mask, jnp.min(descending[..., count - 1] - descending[..., count])


def route(x_BTD, router_ED, bias_E, config):
    """Expert weights g (0 where not chosen), the choice, and the terms of the sequence loss.

    s = sigmoid(u . e) or softmax(u . e). Chosen: the top K of s + b within the best groups, a
    group's score being the sum of its two largest s + b (sigmoid) or its largest s (softmax).
    g = s of the chosen, divided by their sum + 1e-20 if normalised, times the route scale.
    """
    E, K, G = config.num_experts, config.experts_per_token, config.num_groups
    logit_BTE = jnp.einsum("BTD,ED->BTE", x_BTD, router_ED)
    if config.score == "sigmoid":
        score_BTE = 1 / (1 + jnp.exp(-logit_BTE))
        choice_BTE = score_BTE + bias_E
    else:
        score_BTE = jnp.exp(logit_BTE - jnp.max(logit_BTE, axis=-1, keepdims=True))
        score_BTE = score_BTE / jnp.sum(score_BTE, axis=-1, keepdims=True)
        choice_BTE = score_BTE

    group_margin = jnp.inf
    allowed_BTE = choice_BTE
    if G > 1:
        group_BTGe = choice_BTE.reshape(*choice_BTE.shape[:-1], G, E // G)
        best_BTGe = -jnp.sort(-group_BTGe, axis=-1)
        if config.score == "sigmoid":
            group_score_BTG = best_BTGe[..., 0] + best_BTGe[..., 1]
        else:
            group_score_BTG = best_BTGe[..., 0]
        kept_BTG, group_margin = largest(group_score_BTG, config.groups_per_token)
        kept_BTE = jnp.repeat(kept_BTG, E // G, axis=-1)
        allowed_BTE = jnp.where(kept_BTE, choice_BTE, REJECTED)
    chosen_BTE, expert_margin = largest(allowed_BTE, K)

    weight_BTE = jnp.where(chosen_BTE, score_BTE, 0.0)
    if config.normalize_weights:
        weight_BTE = weight_BTE / (jnp.sum(weight_BTE, axis=-1, keepdims=True) + 1e-20)
    weight_BTE = weight_BTE * config.route_scale

    # Sequence-wise balance, per sequence of its T tokens: sum_i f_i P_i with
    # f_i = E / (K T) #{t : s_i among the top K of s} (no bias, no groups, as printed) and
    # P_i = mean_t s_i / sum_j s_j.
    T = x_BTD.shape[1]
    printed_BTE, printed_margin = largest(score_BTE, K)
    f_BE = E / (K * T) * jnp.sum(printed_BTE, axis=1)
    p_BE = jnp.mean(score_BTE / jnp.sum(score_BTE, axis=-1, keepdims=True), axis=1)
    record = SimpleNamespace(
        counts_E=jnp.sum(chosen_BTE, axis=(0, 1)),
        sequence_loss=jnp.mean(jnp.sum(f_BE * p_BE, axis=-1)),
        group_margin=group_margin,
        expert_margin=expert_margin,
        printed_margin=printed_margin,
    )
    return weight_BTE, record


def mixture(x_BTD, weights, bias_E, config):
    """sum of shared FFN(u) + sum_i g_i FFN_i(u): all experts on all tokens, g mostly zero."""
    weight_BTE, record = route(x_BTD, weights["router_ED"], bias_E, config)
    gate_BTEF = jnp.einsum("BTD,EFD->BTEF", x_BTD, weights["w_gate_EFD"])
    up_BTEF = jnp.einsum("BTD,EFD->BTEF", x_BTD, weights["w_up_EFD"])
    expert_BTED = jnp.einsum("BTEF,EDF->BTED", silu(gate_BTEF) * up_BTEF, weights["w_down_EDF"])
    out_BTD = jnp.sum(weight_BTE[..., None] * expert_BTED, axis=2)
    F = config.expert_ffn_dim
    for s in range(config.num_shared_experts):
        # Several shared experts are stored as one, side by side in F.
        rows = slice(s * F, (s + 1) * F)
        expert = {
            "w_gate_FD": weights["shared"]["w_gate_FD"][rows],
            "w_up_FD": weights["shared"]["w_up_FD"][rows],
            "w_down_DF": weights["shared"]["w_down_DF"][:, rows],
        }
        out_BTD = out_BTD + feed_forward(x_BTD, expert)
    return out_BTD, record


def block(x_BTD, weights, bias_E, config, segments_BT, *, dense):
    """x + MLA(RMSNorm(x)), then x + FFN(RMSNorm(x)); the record of the router if there is one."""
    normed_BTD = rms_norm(x_BTD, weights["attention_norm_D"], config.norm_eps)
    x_BTD = x_BTD + attention(normed_BTD, weights["attention"], config, segments_BT)
    normed_BTD = rms_norm(x_BTD, weights["ffn_norm_D"], config.norm_eps)
    if dense:
        return x_BTD + feed_forward(normed_BTD, weights["ffn"]), None
    out_BTD, record = mixture(normed_BTD, weights["ffn"], bias_E, config)
    return x_BTD + out_BTD, record


# The model, and V3 report, equations 21 to 25.


def model(weights, biases, tokens_BT, config, segments_BT=None):
    """Logits, hidden states, MTP logits and what the routers saw, all as traced arrays.

    `mtp_logits[k - 1]` has the T - k positions i whose token i + k exists; it predicts i + k + 1.
    MTP reads [norm(embedding of i + k); norm(hidden of depth k - 1)], the hidden state being taken
    after the final norm (the main model's for k = 1, depth k - 1's own for k > 1), as released
    weights are read; depth k's router therefore sees T - k tokens of each sequence.
    """
    T = tokens_BT.shape[1]
    x_BTD = weights["embed_VD"][tokens_BT]
    states, records = [x_BTD], []
    for layer in range(config.num_layers):
        dense = layer < config.num_dense_layers
        index = layer if dense else layer - config.num_dense_layers
        layer_weights = tree_map(lambda w, i=index: w[i], weights["dense" if dense else "moe"])
        bias_E = None if dense else bias_of(biases, "moe", index)
        x_BTD, record = block(x_BTD, layer_weights, bias_E, config, segments_BT, dense=dense)
        states.append(x_BTD)
        if record is not None:
            records.append(record)
    states[-1] = rms_norm(x_BTD, weights["final_norm_D"], config.norm_eps)
    logits_BTV = jnp.einsum("BTD,VD->BTV", states[-1], weights["head_VD"])

    previous_BTD, mtp_logits = states[-1], []
    for k in range(1, config.num_mtp + 1):
        depth = tree_map(lambda w, i=k - 1: w[i], weights["mtp"])
        # h_{1:T-k}, beside Emb(t_{1+k:T}).
        previous_BTD = previous_BTD[:, : T - k]
        next_BTD = weights["embed_VD"][tokens_BT[:, k:]]
        joined_BTZ = jnp.concatenate(
            [
                rms_norm(next_BTD, depth["embed_norm_D"], config.norm_eps),
                rms_norm(previous_BTD, depth["hidden_norm_D"], config.norm_eps),
            ],
            axis=-1,
        )
        x_BTD = jnp.einsum("BTZ,DZ->BTD", joined_BTZ, depth["w_join_DZ"])
        depth_segments_BT = None if segments_BT is None else segments_BT[:, : T - k]
        x_BTD, record = block(
            x_BTD,
            depth["block"],
            bias_of(biases, "mtp", k - 1),
            config,
            depth_segments_BT,
            dense=False,
        )
        records.append(record)
        previous_BTD = rms_norm(x_BTD, depth["final_norm_D"], config.norm_eps)
        mtp_logits.append(jnp.einsum("BTD,VD->BTV", previous_BTD, weights["head_VD"]))

    zero = jnp.zeros((0, config.num_experts or 0), jnp.int64)
    return SimpleNamespace(
        logits_BTV=logits_BTV,
        hidden_LBTD=jnp.stack(states),
        mtp_logits=tuple(mtp_logits),
        expert_counts_LE=jnp.stack([r.counts_E for r in records]) if records else zero,
        sequence_loss=sum((r.sequence_loss for r in records), jnp.zeros(())),
        group_margin=lowest([r.group_margin for r in records]),
        expert_margin=lowest([r.expert_margin for r in records]),
        printed_margin=lowest([r.printed_margin for r in records]),
    )


def bias_of(biases, part, index):
    """The routing bias of one layer; softmax routers have none."""
    if not biases:
        return None
    tree = biases["moe"]["ffn"] if part == "moe" else biases["mtp"]["block"]["ffn"]
    return tree["bias_E"][index]


def lowest(margins):
    """The smallest of the layers' margins."""
    return jnp.min(jnp.stack([jnp.asarray(m, jnp.float64) for m in [jnp.inf, *margins]]))


def negative_log_likelihood(logits_BTV, target_BT):
    """-log softmax(logits)[target]."""
    highest_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    log_total_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV - highest_BT1), axis=-1))
    right_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return log_total_BT + highest_BT1[..., 0] - right_BT


def all_losses(weights, biases, tokens, config, segments, mtp_weight, sequence_loss_weight):
    """Total loss and everything on the way, for tokens [B, T + 1].

    L = mean_t -log P(t_{i+1}) + lambda / depths * sum_k L^k + alpha * sequence loss, with
    L^k = 1/T sum over the T - k positions that have a target.
    """
    T = tokens.shape[1] - 1
    segments_BT = None if segments is None else segments[:, :T]
    out = model(weights, biases, tokens[:, :T], config, segments_BT)
    out.loss = jnp.mean(negative_log_likelihood(out.logits_BTV, tokens[:, 1:]))
    out.mtp_loss = jnp.zeros(())
    for k, logits_BTV in enumerate(out.mtp_logits, start=1):
        nll_BT = negative_log_likelihood(logits_BTV, tokens[:, k + 1 :])
        out.mtp_loss = out.mtp_loss + jnp.mean(jnp.sum(nll_BT, axis=1) / T) / config.num_mtp
    out.total_loss = out.loss + mtp_weight * out.mtp_loss + sequence_loss_weight * out.sequence_loss
    return out.total_loss, vars(out)


# What tests call: numpy in, numpy out.


def make_forward(config):
    """A function (weights, biases, tokens [B, T], segments=None) -> `logits_BTV`, `hidden_LBTD`,
    `mtp_logits`, `expert_counts_LE`, `sequence_loss` (without its weight), the margins of the
    choices and the smallest of them, `margin`; float64 numpy arrays. Compiled once for all seeds.

    weights is the nested dict of `TrainState.params`; biases that of the routing biases, None or
    {} for softmax.
    """
    compiled = jax.jit(lambda w, b, t, s: vars(model(w, b, t, config, s)), compiler_options=QUICK)

    def run(weights, biases, tokens_BT, segments_BT=None):
        with float64():
            return to_numpy(compiled(*from_numpy(weights, biases, tokens_BT, segments_BT)))

    return run


def forward(config, weights, biases, tokens_BT, segments_BT=None):
    """One call of `make_forward`."""
    return make_forward(config)(weights, biases, tokens_BT, segments_BT)


def make_loss_and_gradients(config, *, mtp_weight, sequence_loss_weight):
    """A function (weights, biases, tokens [B, T + 1], segments=None) -> what `make_forward`
    gives, and `loss`, `mtp_loss`, `total_loss` and `gradients` (the weights' tree).
    """

    def total(weights, biases, tokens, segments):
        return all_losses(
            weights, biases, tokens, config, segments, mtp_weight, sequence_loss_weight
        )

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)

    def run(weights, biases, tokens, segments=None):
        with float64():
            (_, out), gradients = compiled(*from_numpy(weights, biases, tokens, segments))
            return to_numpy({**out, "gradients": gradients})

    return run


def loss_and_gradients(
    config, weights, biases, tokens, segments=None, *, mtp_weight, sequence_loss_weight
):
    """One call of `make_loss_and_gradients`."""
    run = make_loss_and_gradients(
        config, mtp_weight=mtp_weight, sequence_loss_weight=sequence_loss_weight
    )
    return run(weights, biases, tokens, segments)


def from_numpy(weights, biases, tokens, segments):
    """Float64 weights and biases, and whole tokens, as jax arrays."""
    return (
        tree_map(lambda w: jnp.asarray(np.asarray(w, np.float64)), weights),
        tree_map(lambda b: jnp.asarray(np.asarray(b, np.float64)), biases or {}),
        jnp.asarray(np.asarray(tokens, np.int64)),
        None if segments is None else jnp.asarray(np.asarray(segments, np.int64)),
    )


def to_numpy(out):
    """Results on the host, with the smallest margin of all as `margin`."""
    host = jax.tree.map(np.asarray, out)
    margins = [host["group_margin"], host["expert_margin"], host["printed_margin"]]
    return SimpleNamespace(**host, margin=float(min(margins)))
