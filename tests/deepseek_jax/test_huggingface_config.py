"""config.json: every released configuration of the family, both notations, and what is refused."""

import dataclasses

import pytest

import deepseek_jax as ds
from deepseek_jax.huggingface_config import config_record, model_config
from deepseek_jax.rope import _amplitude, softmax_scale
from tests.parity.cases import CASES, V2, V3, yarn

V3_RECORD = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {}, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def as_read(config):
    """What config.json does not hold: it is not needed to compute."""
    return dataclasses.replace(config, init_std=0.006)


def test_the_released_v3_record_is_our_v3():
    assert as_read(model_config(V3_RECORD)) == ds.configs.deepseek_v3()


@pytest.mark.parametrize("name", ds.configs.NAMED)
def test_every_named_configuration_survives_being_written_and_read(name):
    config = ds.configs.NAMED[name]()
    assert as_read(model_config(config_record(config, format="bf16"))) == as_read(config)


def test_old_and_new_notation_of_the_rotary_embedding_say_the_same():
    old = V3 | {"rope_theta": 300.0, "rope_scaling": yarn()}
    new = {k: v for k, v in V3.items() if k not in ("rope_theta", "rope_scaling")}
    parameters = {k: v for k, v in yarn().items() if k != "type"}
    new |= {"rope_parameters": {**parameters, "rope_type": "yarn", "rope_theta": 300.0}}
    assert model_config(old) == model_config(new)


@pytest.mark.parametrize("name", [n for n, (r, _) in CASES.items() if r.get("rope_scaling")])
def test_written_yarn_turns_and_scales_as_the_one_read(name):
    config = model_config(CASES[name][0])
    again = model_config(config_record(config, format="fp32"))
    assert softmax_scale(again) == pytest.approx(softmax_scale(config), rel=1e-12)
    assert _amplitude(again.yarn) == pytest.approx(_amplitude(config.yarn), rel=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "family='llama' is not known: use one of deepseek_v3"),
        ({"model_type": None}, "is not known"),
        ({"index_topk": 64}, "unknown field index_topk=64"),
        ({"attention_bias": True}, "attention_bias=True must be False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ({"hidden_size": "22"}, "hidden_size='22' must be a whole number"),
        ({"hidden_size": None}, "hidden_size=None must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "must be a finite number"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' must be 'sigmoid'"),
        ({"topk_method": "greedy"}, "method='greedy' is no way"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not"),
        ({"rope_scaling": yarn(truncate=False)}, "truncate=False"),
        ({"rope_scaling": yarn(high=1)}, "unknown field high of the rotary"),
        ({"rope_scaling": yarn(mscale=float("inf"))}, "mscale=inf of YaRN must be finite"),
        ({"rope_theta": 0}, "rope_theta=0.0 must be positive"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob='no' must be true or false"),
        ({"first_k_dense_replace": 1.5}, "first_k_dense_replace=1.5 must be a whole number"),
        ({"rope_scaling": [1]}, "a value of another type"),
        ({"rope_theta": [1]}, "a value of another type"),
        ({"rope_scaling": yarn(factor=float("nan"))}, "factor=nan of YaRN must be at least 1"),
        ({"rope_scaling": yarn(factor=None, original_max_position_embeddings=0)},
         "original_max_position_embeddings=0 must be at least 1"),
        ({"num_nextn_predict_layers": 1.0}, "num_nextn_predict_layers=1.0 must be a whole"),
        ({"model_type": ["deepseek_v3"]}, "is not known"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"num_experts_per_tok": 100}, "experts_per_token=100 must not exceed"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1"),
    ],
    ids=lambda v: None if isinstance(v, str) else next(iter(v)),
)
def test_what_the_model_cannot_follow_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model_config(V3 | change)


@pytest.mark.parametrize("field", ["hidden_size", "q_lora_rank", "first_k_dense_replace"])
def test_a_missing_size_is_named(field):
    with pytest.raises(ValueError, match=f"field {field} .* is missing"):
        model_config({k: v for k, v in V3.items() if k != field})


@pytest.mark.parametrize("field", ["n_group", "topk_group"])
def test_v3_must_say_its_groups_of_experts(field):
    with pytest.raises(ValueError, match=f"field {field} is missing"):
        model_config({k: v for k, v in V3.items() if k != field})


def test_v2_leaves_routing_weights_as_they_are():
    assert not model_config(V2 | {"norm_topk_prob": True}).normalize_weights


def test_what_config_json_has_no_field_for_is_not_written():
    softmax = dataclasses.replace(ds.configs.deepseek_v2(), normalize_weights=True)
    with pytest.raises(ValueError, match="no model type in transformers"):
        config_record(softmax, format="bf16")
    with pytest.raises(ValueError, match="latent_norm_eps=0.001"):
        config_record(dataclasses.replace(ds.configs.tiny(), latent_norm_eps=1e-3), format="bf16")
