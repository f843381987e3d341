"""Write golden.npz: logits, hidden states and MTP logits as transformers reads released weights.

Run `python -m tests.oracle.make_golden` in the root of the project, with the extra `parity`
(torch, transformers 5.24). The released code computes norms, softmax, rotary angles and gate in
FP32 whatever the model's type; here its source is loaded with FP32 replaced by float64, so that
the file holds the exact values of the formulas. The unchanged code is run as well, and must give
the same to FP32's accuracy.
"""

import importlib.util
import re
import sys
from importlib.machinery import SourceFileLoader

import numpy as np
import torch
from transformers import DeepseekV3Config, modeling_layers, modeling_rope_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from tests.oracle import golden, reference
from tests.oracle.weights import search


class Float64Loader(SourceFileLoader):
    """Loads a module as if it had been written with float64 for FP32."""

    def get_code(self, fullname):
        text = self.get_data(self.path).decode()
        text = re.sub(r"\btorch\.float(32)?\b", "torch.float64", text)
        return compile(text.replace(".float()", ".double()"), self.path, "exec")


def in_float64(module):
    """A second copy of `module`, in float64."""
    name = module.__name__ + "_float64"
    spec = importlib.util.spec_from_loader(name, Float64Loader(name, module.__file__))
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


def transformers_config(config):
    """Our sizes by transformers' names."""
    yarn = config.yarn
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.model_dim,
        intermediate_size=config.dense_ffn_dim,
        moe_intermediate_size=config.expert_ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        n_shared_experts=config.num_shared_experts,
        n_routed_experts=config.num_experts,
        routed_scaling_factor=config.route_scale,
        kv_lora_rank=config.kv_latent_dim,
        q_lora_rank=config.query_latent_dim,
        qk_rope_head_dim=config.rotary_head_dim,
        v_head_dim=config.value_head_dim,
        qk_nope_head_dim=config.content_head_dim,
        n_group=config.num_groups,
        topk_group=config.groups_per_token,
        num_experts_per_tok=config.experts_per_token,
        first_k_dense_replace=config.num_dense_layers,
        norm_topk_prob=config.normalize_weights,
        max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_eps,
        rope_interleave=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        },
        attn_implementation="eager",
        experts_implementation="eager",
    )


def layer_state(weights, index, bias_E=None):
    """One decoder layer's tensors by transformers' names."""
    attention, ffn = weights["attention"], weights["ffn"]

    def rows(name):
        w = attention[name][index]
        return w.reshape(-1, w.shape[-1])

    state = {
        "input_layernorm.weight": weights["attention_norm_D"][index],
        "post_attention_layernorm.weight": weights["ffn_norm_D"][index],
        "self_attn.q_a_proj.weight": rows("wq_a_QD"),
        "self_attn.q_a_layernorm.weight": attention["q_norm_Q"][index],
        "self_attn.q_b_proj.weight": rows("wq_b_NAQ"),
        "self_attn.kv_a_proj_with_mqa.weight": rows("wkv_a_YD"),
        "self_attn.kv_a_layernorm.weight": attention["kv_norm_C"][index],
        "self_attn.kv_b_proj.weight": rows("wkv_b_NXC"),
        "self_attn.o_proj.weight": attention["wo_DNU"][index].reshape(
            attention["wo_DNU"].shape[1], -1
        ),
    }
    plain, prefix = ffn, "mlp."
    if bias_E is not None:
        state["mlp.gate.weight"] = ffn["router_ED"][index]
        state["mlp.gate.e_score_correction_bias"] = bias_E[index]
        state["mlp.experts.gate_up_proj"] = np.concatenate(
            [ffn["w_gate_EFD"][index], ffn["w_up_EFD"][index]], axis=1
        )
        state["mlp.experts.down_proj"] = ffn["w_down_EDF"][index]
        plain, prefix = ffn["shared"], "mlp.shared_experts."
    for ours, theirs in [
        ("w_gate_FD", "gate_proj"),
        ("w_up_FD", "up_proj"),
        ("w_down_DF", "down_proj"),
    ]:
        state[f"{prefix}{theirs}.weight"] = plain[ours][index]
    return state


def prefixed(prefix, state):
    """`state` with longer names."""
    return {prefix + name: value for name, value in state.items()}


def main_state(config, weights, biases):
    """The main model's tensors by transformers' names."""
    state = {
        "model.embed_tokens.weight": weights["embed_VD"],
        "model.norm.weight": weights["final_norm_D"],
        "lm_head.weight": weights["head_VD"],
    }
    for layer in range(config.num_layers):
        if layer < config.num_dense_layers:
            part = layer_state(weights["dense"], layer)
        else:
            index = layer - config.num_dense_layers
            part = layer_state(weights["moe"], index, biases["moe"]["ffn"]["bias_E"])
        state |= prefixed(f"model.layers.{layer}.", part)
    return state


def mtp_state(weights, biases, index):
    """One MTP layer's tensors by transformers' names."""
    mtp = weights["mtp"]
    bias_E = biases["mtp"]["block"]["ffn"]["bias_E"]
    return {
        "enorm.weight": mtp["embed_norm_D"][index],
        "hnorm.weight": mtp["hidden_norm_D"][index],
        "eh_proj.weight": mtp["w_join_DZ"][index],
        "post_norm.weight": mtp["final_norm_D"][index],
    } | prefixed("mtp_block.", layer_state(mtp["block"], index, bias_E))


def load(module, state, dtype):
    """Fill every parameter and buffer that is stored, none missing and none left over."""
    module.to(dtype)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return module.eval()


@torch.no_grad()
def run_transformers(modeling, dtype, config, weights, biases, tokens_BT):
    """What golden.npz holds, computed in `dtype`."""
    their_config = transformers_config(config)
    model = modeling.DeepseekV3ForCausalLM(their_config)
    load(model, main_state(config, weights, biases), dtype)
    # Building the model computes the frequencies anew, in FP32.
    model.model.rotary_emb = modeling.DeepseekV3RotaryEmbedding(their_config)
    T = tokens_BT.shape[1]
    ids_BT = torch.from_numpy(tokens_BT.astype(np.int64))
    out = model(ids_BT, output_hidden_states=True, use_cache=False)
    arrays = {"logits_BTV": out.logits, "hidden_LBTD": torch.stack(out.hidden_states)}

    previous_BTD = out.hidden_states[-1]
    for k in range(1, config.num_mtp + 1):
        layer = modeling_layers.MtpLayer(
            their_config,
            modeling.DeepseekV3DecoderLayer,
            modeling.DeepseekV3RMSNorm,
            layer_idx=config.num_layers + k - 1,
        )
        load(layer, mtp_state(weights, biases, k - 1), dtype)
        next_BTD = model.model.embed_tokens(ids_BT[:, k:])
        position_ids = torch.arange(k, T)[None]
        mask_TT = torch.full((T - k, T - k), float("-inf"), dtype=dtype).triu(1)
        previous_BTD = layer(
            next_BTD,
            previous_BTD[:, : T - k],
            position_embeddings=model.model.rotary_emb(next_BTD, position_ids),
            attention_mask=mask_TT[None, None],
            position_ids=position_ids,
            cache=None,
        )
        arrays[f"mtp_logits_{k}"] = model.lm_head(previous_BTD)
    return {name: value.numpy() for name, value in arrays.items()}


def main():
    config = golden.golden_config()
    run = reference.make_forward(config)
    found = search(config, run, golden.SHAPE, bias=golden.BIAS)
    if found.seed != golden.SEED:
        raise SystemExit(f"golden.py has SEED = {golden.SEED}; the first to serve is {found.seed}")
    inputs = (config, found.weights, found.biases, found.tokens)

    modeling = in_float64(modeling_deepseek_v3)
    modeling.ROPE_INIT_FUNCTIONS = in_float64(modeling_rope_utils).ROPE_INIT_FUNCTIONS
    arrays = run_transformers(modeling, torch.float64, *inputs)
    plain = run_transformers(modeling_deepseek_v3, torch.float32, *inputs)
    for name, value in arrays.items():
        drift = np.abs(value - plain[name]).max() / np.abs(value).max()
        print(f"{name:14} {value.shape!s:18} {value.dtype} FP32 differs by {drift:.1e}")
        if drift > 1e-5:
            raise SystemExit(f"{name}: the float64 copy says something else than the FP32 code")
    np.savez_compressed(golden.FILE, **arrays)
    size, margin = golden.FILE.stat().st_size, found.expected.margin
    print(f"{golden.FILE.name}: {size} bytes, smallest margin of a choice {margin:.1e}")


if __name__ == "__main__":
    main()
