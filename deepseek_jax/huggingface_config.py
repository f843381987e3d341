"""config.json of the DeepSeek-V2 and V3 families as a ModelConfig, and back.

Families differ in little: V2 routes by softmax, all others by sigmoid and a bias. Where published
code and transformers disagree, transformers is followed.
"""

import math
from typing import Any

from deepseek_jax.config import ModelConfig, Yarn
from deepseek_jax.rope import yarn_mscale

# model_type -> how experts are scored.
FAMILIES = {
    "deepseek_v3": "sigmoid",  # V3, R1, V3.1, Moonlight
    "kimi_k2": "sigmoid",
    "glm4_moe_lite": "sigmoid",  # GLM-4.7-Flash
    "deepseek_v2": "softmax",  # V2, V2-Lite
}
# score -> how experts may be chosen by it: first the way where none is named, last that by groups.
METHODS = {"sigmoid": ("noaux_tc",), "softmax": ("greedy", "group_limited_greedy")}
# score -> model type and class of what is written.
WRITTEN = {
    "sigmoid": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "softmax": ("deepseek_v2", "DeepseekV2ForCausalLM"),
}
# Whose groups of experts a config.json must name: readers' defaults for it differ.
GROUPED = ("deepseek_v3",)
# Our field and theirs, where nothing has to be converted.
SIZES = {
    "vocab_size": "vocab_size",
    "model_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "content_head_dim": "qk_nope_head_dim",
    "rotary_head_dim": "qk_rope_head_dim",
    "value_head_dim": "v_head_dim",
    "query_latent_dim": "q_lora_rank",
    "kv_latent_dim": "kv_lora_rank",
    "dense_ffn_dim": "intermediate_size",
    "expert_ffn_dim": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "experts_per_token": "num_experts_per_tok",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "route_scale": "routed_scaling_factor",
}
# What published files must say if they say it: our model has nothing else.
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
    "layer_types": (None,),
    "sliding_window": (None,),
}
# Of the norms of both latents, whatever rms_norm_eps is.
LATENT_NORM_EPS = 1e-6
# What does not change what a forward pass computes.
IGNORED = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path add_cross_attention architectures
    attention_dropout attn_implementation auto_map aux_loss_alpha bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype embd_pdrop
    eos_token_id ep_size experts_implementation head_dim id2label initializer_range is_decoder
    is_encoder_decoder label2id model_type num_nextn_predict_layers num_mtp_layers output_attentions
    output_hidden_states output_router_logits pad_token_id prefix pretraining_tp problem_type
    qk_head_dim quantization_config return_dict router_aux_loss_coef sep_token_id seq_aux
    task_specific_params tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed
    use_bfloat16 use_cache
    """.split()
)
# Read by name below.
READ = frozenset(
    """
    first_k_dense_replace mlp_layer_types n_group num_experts num_key_value_heads
    num_local_experts norm_topk_prob original_max_position_embeddings rope_interleave
    rope_parameters rope_scaling rope_theta scoring_func tie_word_embeddings topk_group topk_method
    """.split()
)
# What config.json says of FP8 blocks.
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
YARN_FIELDS = frozenset(
    """
    attention_factor beta_fast beta_slow factor mscale mscale_all_dim
    original_max_position_embeddings partial_rotary_factor rope_theta rope_type truncate type
    """.split()
)


def model_config(record: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that a config.json describes; MTP modules as many as it announces.

    Raises:
      ValueError: an unknown model type or field, or a value that this model cannot follow.
    """
    family = record.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"config.json: {family=} is not known: use one of {', '.join(FAMILIES)}")
    known = {*SIZES.values(), *FIXED, *IGNORED, *READ}
    unknown = sorted(set(record) - known)
    if unknown:
        raise ValueError(
            f"config.json: unknown field {unknown[0]}={record[unknown[0]]!r}: remove it if it does "
            "not change the model"
        )
    for field, allowed in FIXED.items():
        if record.get(field) not in allowed and field in record:
            raise ValueError(f"config.json: {field}={record[field]!r} must be {allowed[0]!r}")
    values = {ours: _size(record, ours, theirs) for ours, theirs in SIZES.items()}
    heads = record.get("num_key_value_heads")
    if heads not in (None, values["num_heads"]):
        raise ValueError(f"config.json: num_key_value_heads={heads} must be num_attention_heads")
    try:
        theta, yarn = _rope(record)
        return ModelConfig(
            **values,
            **_router(record, FAMILIES[family]),
            latent_norm_eps=LATENT_NORM_EPS,
            num_dense_layers=_dense_layers(record, values["num_layers"]),
            num_mtp=_mtp_layers(record),
            rope_theta=theta,
            yarn=yarn,
        )
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"config.json: a field has a value of another type: {error}") from error


def _size(record: dict[str, Any], ours: str, theirs: str) -> Any:
    if theirs == "n_routed_experts":
        theirs = next((n for n in (theirs, "num_local_experts", "num_experts") if n in record),
                      theirs)
    if theirs not in record:
        raise ValueError(f"config.json: field {theirs} ({ours}) is missing")
    value = record[theirs]
    absent = {"q_lora_rank": None, "n_shared_experts": 0}
    if value is None and theirs in absent:
        return absent[theirs]
    real = theirs in ("rms_norm_eps", "routed_scaling_factor")
    if not real:
        return _whole(theirs, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"config.json: {theirs}={value!r} must be a finite number")
    return float(value)


def _whole(field: str, value: Any, *, least: int | None = None) -> int:
    """A count of config.json."""
    # JSON's true is an int to Python.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json: {field}={value!r} must be a whole number")
    if least is not None and value < least:
        raise ValueError(f"config.json: {field}={value} must be at least {least}")
    return value


def _router(record: dict[str, Any], score: str) -> dict[str, Any]:
    """The fields that say how experts are chosen and weighted."""
    named = record.get("scoring_func") or score
    if named != score:
        raise ValueError(
            f"config.json: scoring_func={named!r} must be {score!r} in {record['model_type']}"
        )
    method = record.get("topk_method") or METHODS[score][0]
    if method not in METHODS[score]:
        raise ValueError(f"config.json: {method=} is no way to choose experts by {score}")
    if record["model_type"] in GROUPED:
        for field in ("n_group", "topk_group"):
            if field not in record:
                raise ValueError(f"config.json: field {field} is missing")
    normalize = record.get("norm_topk_prob", True)
    if not isinstance(normalize, bool):
        raise ValueError(f"config.json: norm_topk_prob={normalize!r} must be true or false")
    groups = record.get("n_group") or 1
    kept = record.get("topk_group") or groups
    return {
        "score": score,
        "num_groups": 1 if method == "greedy" else groups,
        "groups_per_token": 1 if method == "greedy" else kept,
        # The models of V2 leave the weights as they are whatever norm_topk_prob says.
        "normalize_weights": normalize and score != "softmax",
    }


def _dense_layers(record: dict[str, Any], num_layers: int) -> int:
    kinds = record.get("mlp_layer_types")
    if kinds is not None:
        count = kinds.index("sparse") if "sparse" in kinds else len(kinds)
        if kinds != ["dense"] * count + ["sparse"] * (num_layers - count):
            raise ValueError("config.json: mlp_layer_types must be dense layers, then sparse ones")
        return count
    default = {"deepseek_v2": 0, "glm4_moe_lite": 1}.get(record["model_type"])
    count = record.get("first_k_dense_replace", default)
    if count is None:
        raise ValueError("config.json: field first_k_dense_replace (num_dense_layers) is missing")
    return min(_whole("first_k_dense_replace", count), num_layers)


def _mtp_layers(record: dict[str, Any]) -> int:
    count = record.get("num_nextn_predict_layers", record.get("num_mtp_layers")) or 0
    return _whole("num_nextn_predict_layers", count)


def _rope(record: dict[str, Any]) -> tuple[float, Yarn | None]:
    """theta and YaRN from rope_parameters, or from the older rope_theta and rope_scaling."""
    rope = record.get("rope_scaling") or record.get("rope_parameters") or {}
    theta = next((found for found in (rope.get("rope_theta"), record.get("rope_theta"))
                  if found is not None), 10000.0)  # fmt: skip
    theta = float(theta)
    if not 0.0 < theta < math.inf:
        raise ValueError(f"config.json: rope_theta={theta} must be positive and finite")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = sorted(set(rope) - YARN_FIELDS)
    if unknown:
        raise ValueError(f"config.json: unknown field {unknown[0]} of the rotary embedding")
    if kind not in ("default", "yarn"):
        raise ValueError(f"config.json: rope type {kind!r} is not supported: use default or yarn")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError("config.json: partial_rotary_factor must be 1")
    if kind == "default":
        return theta, None
    for field in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "attention_factor"):
        if not 0.0 <= float(rope.get(field) or 0.0) < math.inf:
            raise ValueError(f"config.json: {field}={rope[field]} of YaRN must be finite")
    if rope.get("truncate") is False:
        raise ValueError("config.json: truncate=False of YaRN is not supported")
    length = record["max_position_embeddings"]
    original = record.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", length
    )
    original = _whole("original_max_position_embeddings", original, least=1)
    factor = float(rope["factor"] if rope.get("factor") is not None else length / original)
    if not 1.0 <= factor < math.inf:
        raise ValueError(f"config.json: {factor=} of YaRN must be at least 1 and finite")
    mscale, all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    # Without both, cos and sin are multiplied by 0.1 ln(factor) + 1; the softmax knows one alone.
    amplitude = rope.get("attention_factor")
    if amplitude is None and not (mscale and all_dim):
        amplitude = yarn_mscale(factor, 1.0)
    if amplitude is not None and factor > 1.0:
        top = amplitude * yarn_mscale(factor, all_dim)
        mscale = (top - 1.0) / (0.1 * math.log(factor))
    return theta, Yarn(
        factor=factor,
        original_length=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(mscale),
        mscale_all_dim=float(all_dim),
    )


def interleaved(record: dict[str, Any]) -> bool:
    """Whether rotary pairs are stored side by side, as ours; else as two halves."""
    return record["model_type"] == "deepseek_v2" or record.get("rope_interleave") is not False


def tied(record: dict[str, Any]) -> bool:
    """Whether the output head is the embedding."""
    return bool(record.get("tie_word_embeddings"))


def check_quantization(record: dict[str, Any]) -> bool:
    """Whether config.json announces FP8 blocks; raises when it announces something else."""
    quantization = record.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        raise ValueError(f"config.json: quantization_config={quantization!r} must be an object")
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"config.json: quantization {method!r} is not supported: use fp8, e4m3")
    if block is None or list(block) != [128, 128]:
        raise ValueError(f"config.json: weight_block_size={block} must be [128, 128]")
    return True


def config_record(config: ModelConfig, *, format: str) -> dict[str, Any]:
    """config.json of a model, in the notation that all versions of transformers read."""
    model_type, architecture = WRITTEN[config.score]
    if config.score == "softmax" and config.normalize_weights:
        raise ValueError(
            "a softmax router with normalize_weights=True has no model type in transformers"
        )
    if config.latent_norm_eps != LATENT_NORM_EPS:
        raise ValueError(
            f"latent_norm_eps={config.latent_norm_eps} must be {LATENT_NORM_EPS}: config.json has "
            "no field for it"
        )
    record = {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "first_k_dense_replace": config.num_dense_layers,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "model_type": model_type,
        "moe_layer_freq": 1,
        "n_group": config.num_groups,
        "norm_topk_prob": config.normalize_weights,
        "num_key_value_heads": config.num_heads,
        "num_nextn_predict_layers": config.num_mtp,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "scoring_func": config.score,
        "tie_word_embeddings": False,
        "topk_group": config.groups_per_token,
        "topk_method": METHODS[config.score][-1],
        "torch_dtype": "float32" if format == "fp32" else "bfloat16",
    }
    record |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    if config.yarn is not None:
        yarn = config.yarn
        record["rope_scaling"] = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
        if not (yarn.mscale and yarn.mscale_all_dim):
            # Readers take such a pair for one that is not given.
            top = yarn_mscale(yarn.factor, yarn.mscale)
            bottom = yarn_mscale(yarn.factor, yarn.mscale_all_dim)
            record["rope_scaling"]["attention_factor"] = top / bottom
    if format == "fp8":
        record["quantization_config"] = QUANTIZATION
    return dict(sorted(record.items()))
