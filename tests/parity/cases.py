"""Tiny checkpoints of the family: config.json as released ones write it, weights from a seed.

Made by numpy and the safetensors library alone; golden.npz holds what transformers computes.
"""

import json
from pathlib import Path

import numpy as np

from tests.oracle.weights import make_tokens, normal

FILE = Path(__file__).with_name("golden.npz")
B, PROMPT, NEW = 2, 24, 16

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 59,
    "hidden_size": 22, "intermediate_size": 26, "moe_intermediate_size": 9, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1,
    "n_routed_experts": 12, "routed_scaling_factor": 2.5, "kv_lora_rank": 10, "q_lora_rank": 14,
    "qk_rope_head_dim": 8, "v_head_dim": 7, "qk_nope_head_dim": 6, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_theta": 100.0, "rope_scaling": None,
    "torch_dtype": "float32",
}  # fmt: skip
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 1.0, "hidden_size": 24,
}  # fmt: skip


def yarn(**changes):
    """rope_scaling in the older notation; 40 tokens run past its original length."""
    return {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    } | changes  # fmt: skip


def without(record, *fields):
    return {k: v for k, v in record.items() if k not in fields}


NEW_ROPE = without(V3, "rope_theta", "rope_scaling")
# Name -> config.json, and of the routing biases their mean (they spread by 0.2 around it).
CASES = {
    "yarn-groups": (V3 | {"rope_scaling": yarn()}, 0.0),
    "no-query-latent": (
        V3 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
              "norm_topk_prob": False, "routed_scaling_factor": 1.7}, 0.0),
    "mscales-eps": (
        V3 | {"rope_scaling": yarn(mscale=0.707, mscale_all_dim=1.1), "rms_norm_eps": 1e-3}, 0.1),
    "halves-not-pairs": (
        NEW_ROPE | {"rope_interleave": False,
                    "rope_parameters": {**yarn(), "rope_type": "yarn", "rope_theta": 100.0}}, 0.0),
    "tied-no-dense": (V3 | {"tie_word_embeddings": True, "first_k_dense_replace": 0}, 0.0),
    "unequal-heads": (
        without(NEW_ROPE, "first_k_dense_replace", "scoring_func") | {
            "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite",
            "qk_nope_head_dim": 12, "v_head_dim": 16, "qk_rope_head_dim": 6, "n_group": 1,
            "topk_group": 1, "rms_norm_eps": 1e-5, "routed_scaling_factor": 1.8,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}, 0.0),
    "two-dense": (V3 | {"first_k_dense_replace": 2, "n_group": 3, "topk_group": 2}, 0.0),
    "negative-bias": (
        V3 | {"n_group": 6, "topk_group": 3, "num_experts_per_tok": 5}, -0.9),
    "one-mscale": (V3 | {"rope_scaling": without(yarn(mscale_all_dim=0.8), "mscale")}, 0.0),
    "no-mscale-no-shared": (
        V3 | {"n_shared_experts": 0,
              "rope_scaling": without(yarn(), "mscale", "mscale_all_dim")}, 0.0),
    "kimi": (
        V3 | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "rope_theta": 5e4,
              "routed_scaling_factor": 2.827, "rope_scaling": yarn(beta_fast=1.0)}, 0.0),
    "v2-greedy": (V2 | {"q_lora_rank": None}, 0.0),
    "v2-groups": (
        V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
              "routed_scaling_factor": 16.0,
              "rope_scaling": yarn(mscale=0.707, mscale_all_dim=0.707)}, 0.0),
    "v2-says-normalise": (V2 | {"norm_topk_prob": True, "first_k_dense_replace": 0,
                                "num_hidden_layers": 2}, 0.0),
}  # fmt: skip


def shapes(record):
    """The shapes of a checkpoint's tensors, written down from the released files' layout."""
    r = record
    D, N, C, R = (r["hidden_size"], r["num_attention_heads"], r["kv_lora_rank"],
                  r["qk_rope_head_dim"])
    A, Q, F = r["qk_nope_head_dim"] + R, r["q_lora_rank"], r["moe_intermediate_size"]
    dense = r.get("first_k_dense_replace", 1)
    found = {"model.embed_tokens.weight": (r["vocab_size"], D), "model.norm.weight": (D,)}
    if not r["tie_word_embeddings"]:
        found["lm_head.weight"] = (r["vocab_size"], D)

    def ffn(prefix, width):
        found[f"{prefix}.gate_proj.weight"] = (width, D)
        found[f"{prefix}.up_proj.weight"] = (width, D)
        found[f"{prefix}.down_proj.weight"] = (D, width)

    for layer in range(r["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found[f"{at}.input_layernorm.weight"] = (D,)
        found[f"{at}.post_attention_layernorm.weight"] = (D,)
        if Q is None:
            found[f"{at}.self_attn.q_proj.weight"] = (N * A, D)
        else:
            found[f"{at}.self_attn.q_a_proj.weight"] = (Q, D)
            found[f"{at}.self_attn.q_a_layernorm.weight"] = (Q,)
            found[f"{at}.self_attn.q_b_proj.weight"] = (N * A, Q)
        found[f"{at}.self_attn.kv_a_proj_with_mqa.weight"] = (C + R, D)
        found[f"{at}.self_attn.kv_a_layernorm.weight"] = (C,)
        X = r["qk_nope_head_dim"] + r["v_head_dim"]
        found[f"{at}.self_attn.kv_b_proj.weight"] = (N * X, C)
        found[f"{at}.self_attn.o_proj.weight"] = (D, N * r["v_head_dim"])
        if layer < dense:
            ffn(f"{at}.mlp", r["intermediate_size"])
            continue
        found[f"{at}.mlp.gate.weight"] = (r["n_routed_experts"], D)
        if r["model_type"] != "deepseek_v2":
            found[f"{at}.mlp.gate.e_score_correction_bias"] = (r["n_routed_experts"],)
        for expert in range(r["n_routed_experts"]):
            ffn(f"{at}.mlp.experts.{expert}", F)
        if r["n_shared_experts"]:
            ffn(f"{at}.mlp.shared_experts", r["n_shared_experts"] * F)
    return found


def tensors(name, seed):
    """The tensors of a case in FP32: fan-in scale, norms around 1, biases of both signs."""
    record, mean = CASES[name]

    def draw(tensor, shape):
        noise = normal(seed, f"{name}/{tensor}", shape)
        if tensor.endswith("e_score_correction_bias"):
            return mean + 0.2 * noise
        if len(shape) == 1:
            return 1 + 0.2 * noise
        return noise if "embed_tokens" in tensor else noise / np.sqrt(float(shape[-1]))

    return {t: draw(t, shape).astype(np.float32) for t, shape in shapes(record).items()}


def write_checkpoint(name, seed, folder):
    """The case as a checkpoint folder, in two shards with an index."""
    from safetensors.numpy import save_file

    record, _ = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(record))
    all_tensors = tensors(name, seed)
    names = list(all_tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({t: all_tensors[t] for t in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def prompt(name, seed):
    """Token ids [B, PROMPT]."""
    record, _ = CASES[name]
    return make_tokens(seed, record["vocab_size"], (B, PROMPT))
