"""Parameters and operations of the named models against the numbers of the reports."""

import dataclasses

import jax
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.counts import abstract_model, train_flops_per_token

# Billions: total without MTP, active without the embedding lookup; half a unit of the last digit.
PRINTED = {
    "deepseek_v3": (671.03, 36.63),
    "deepseek_v2": (235.74, 20.85),
    "deepseek_v2_lite": (15.71, 2.45),
    "moonlight_16b_a3b": (15.96, 2.58),
    "kimi_k2": (1026.4, 31.69),
    "glm_4_7_flash": (29.94, 3.58),
}


@pytest.mark.parametrize("name", PRINTED)
def test_totals_are_the_printed_ones(name):
    counts = ds.param_counts(ds.configs.NAMED[name]())
    total, active = PRINTED[name]
    digits = len(str(total).split(".")[1])
    assert round(counts.total_without_mtp / 1e9, digits) == total
    assert round(counts.active / 1e9, 2) == active


def test_mtp_of_v3_is_11_61_billion_and_no_other_printed_total_holds_one():
    counts = ds.param_counts(ds.configs.deepseek_v3())
    assert round((counts.total - counts.total_without_mtp) / 1e9, 2) == 11.61
    for name in ("deepseek_v2", "deepseek_v2_lite", "moonlight_16b_a3b", "kimi_k2"):
        counts = ds.param_counts(ds.configs.NAMED[name]())
        assert counts.total == counts.total_without_mtp


def test_pieces_of_v3():
    params = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            nnx.to_pure_dict(nnx.state(abstract_model(ds.configs.deepseek_v3()), nnx.Param))
        )
    }
    matrices = [name for name in params if name.startswith("moe.attention.w")]
    assert sum(params[name] for name in matrices) == 58 * 187_105_280
    assert params["moe.ffn.router_ED"] == 58 * 1_835_008
    expert = sum(params[f"moe.ffn.{name}"] for name in ("w_gate_EFD", "w_up_EFD", "w_down_EDF"))
    assert expert == 58 * 256 * 44_040_192
    dense = sum(size for name, size in params.items() if name.startswith("dense.ffn.w_"))
    assert dense == 3 * 396_361_728
    assert params["embed_VD"] == params["head_VD"] == 926_679_040


def test_an_abstract_model_holds_no_array():
    leaves = jax.tree.leaves(abstract_model(ds.configs.deepseek_v3()))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


# GFLOP per trained token at length 4096, tables 2 and 4 of the paper.


def test_operations_of_v3_causal_and_not():
    config = ds.configs.deepseek_v3()
    causal = train_flops_per_token(config, 4096, causal=True, mtp=False)
    full = train_flops_per_token(config, 4096, causal=False, mtp=False)
    assert round(causal / 1e9, 2) == 249.81
    assert round(full / 1e9, 2) == 280.51


def test_mtp_adds_a_layer_a_join_and_a_head():
    config = ds.configs.deepseek_v3()
    without = train_flops_per_token(config, 4096, causal=True, mtp=False)
    deeper = dataclasses.replace(config, num_layers=62)
    layer = train_flops_per_token(deeper, 4096, causal=True, mtp=False) - without
    added = train_flops_per_token(config, 4096, causal=True, mtp=True) - without
    assert added == layer + 6 * (2 * 7168 * 7168 + 129280 * 7168)


def test_operations_follow_the_matrices_without_query_latent():
    config = ds.configs.deepseek_v2_lite()
    flops = train_flops_per_token(config, 0, causal=True, mtp=False)
    counts = ds.param_counts(config)
    D, layers = config.model_dim, config.num_layers
    norms = D + layers * (2 * D + config.kv_latent_dim)
    routers = config.num_moe_layers * config.num_experts * D
    assert flops == 6 * (counts.active - norms - routers)
