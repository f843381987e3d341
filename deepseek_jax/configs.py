"""Named configurations: the released models of the family, and a tiny one that trains on a laptop.

Sizes are those of the released config.json files (paper and V2/V3 reports for the first two).
"""

from deepseek_jax.config import ModelConfig, Yarn


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3, R1, V3-0324 and V3.1: 671 B parameters, 37 B active."""
    return ModelConfig(
        vocab_size=129280,
        model_dim=7168,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        content_head_dim=128,
        rotary_head_dim=64,
        value_head_dim=128,
        query_latent_dim=1536,
        kv_latent_dim=512,
        dense_ffn_dim=18432,
        expert_ffn_dim=2048,
        num_experts=256,
        num_shared_experts=1,
        experts_per_token=8,
        num_groups=8,
        groups_per_token=4,
        route_scale=2.5,
        num_mtp=1,
        max_length=163840,
        yarn=Yarn(factor=40.0, original_length=4096),
    )


def deepseek_v2() -> ModelConfig:
    """DeepSeek-V2: 236 B parameters, 21 B active."""
    return ModelConfig(
        vocab_size=102400,
        model_dim=5120,
        num_layers=60,
        num_dense_layers=1,
        num_heads=128,
        content_head_dim=128,
        rotary_head_dim=64,
        value_head_dim=128,
        query_latent_dim=1536,
        kv_latent_dim=512,
        dense_ffn_dim=12288,
        expert_ffn_dim=1536,
        num_experts=160,
        num_shared_experts=2,
        experts_per_token=6,
        num_groups=8,
        groups_per_token=3,
        score="softmax",
        normalize_weights=False,
        route_scale=16.0,
        max_length=163840,
        yarn=Yarn(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
    )


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite: 16 B parameters, 2.4 B active, no query compression."""
    return ModelConfig(
        vocab_size=102400,
        model_dim=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        content_head_dim=128,
        rotary_head_dim=64,
        value_head_dim=128,
        query_latent_dim=None,
        kv_latent_dim=512,
        dense_ffn_dim=10944,
        expert_ffn_dim=1408,
        num_experts=64,
        num_shared_experts=2,
        experts_per_token=6,
        score="softmax",
        normalize_weights=False,
        max_length=163840,
        yarn=Yarn(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
    )


def moonlight_16b_a3b() -> ModelConfig:
    """Moonlight-16B-A3B: V2-Lite's shape with V3's router."""
    return ModelConfig(
        vocab_size=163840,
        model_dim=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        content_head_dim=128,
        rotary_head_dim=64,
        value_head_dim=128,
        query_latent_dim=None,
        kv_latent_dim=512,
        dense_ffn_dim=11264,
        expert_ffn_dim=1408,
        num_experts=64,
        num_shared_experts=2,
        experts_per_token=6,
        route_scale=2.446,
        max_length=8192,
        rope_theta=50000.0,
        norm_eps=1e-5,
    )


def kimi_k2() -> ModelConfig:
    """Kimi K2: 1 T parameters, 32 B active, one expert group."""
    return ModelConfig(
        vocab_size=163840,
        model_dim=7168,
        num_layers=61,
        num_dense_layers=1,
        num_heads=64,
        content_head_dim=128,
        rotary_head_dim=64,
        value_head_dim=128,
        query_latent_dim=1536,
        kv_latent_dim=512,
        dense_ffn_dim=18432,
        expert_ffn_dim=2048,
        num_experts=384,
        num_shared_experts=1,
        experts_per_token=8,
        route_scale=2.827,
        max_length=131072,
        rope_theta=50000.0,
        yarn=Yarn(factor=32.0, original_length=4096, beta_fast=1.0, beta_slow=1.0),
    )


def glm_4_7_flash() -> ModelConfig:
    """GLM-4.7-Flash: 30 B parameters, heads of unequal widths, one MTP module."""
    return ModelConfig(
        vocab_size=154880,
        model_dim=2048,
        num_layers=47,
        num_dense_layers=1,
        num_heads=20,
        content_head_dim=192,
        rotary_head_dim=64,
        value_head_dim=256,
        query_latent_dim=768,
        kv_latent_dim=512,
        dense_ffn_dim=10240,
        expert_ffn_dim=1536,
        num_experts=64,
        num_shared_experts=1,
        experts_per_token=4,
        route_scale=1.8,
        num_mtp=1,
        max_length=202752,
        rope_theta=1000000.0,
        norm_eps=1e-5,
    )


def tiny() -> ModelConfig:
    """Everything V3 has, small enough to learn source code on two cores in minutes."""
    return ModelConfig(
        vocab_size=2048,
        model_dim=128,
        num_layers=3,
        num_dense_layers=1,
        num_heads=8,
        content_head_dim=16,
        rotary_head_dim=8,
        value_head_dim=16,
        query_latent_dim=96,
        kv_latent_dim=64,
        dense_ffn_dim=384,
        expert_ffn_dim=64,
        num_experts=16,
        num_shared_experts=1,
        experts_per_token=2,
        num_groups=4,
        groups_per_token=2,
        route_scale=1.0,
        num_mtp=1,
        max_length=512,
        init_std=0.03,
    )


NAMED = {
    fn.__name__: fn
    for fn in (deepseek_v3, deepseek_v2, deepseek_v2_lite, moonlight_16b_a3b, kimi_k2,
               glm_4_7_flash, tiny)
}
