"""Claims on memory and size: the cache of table 1, and the parameters of the models."""

import dataclasses

import jax

from deepseek_jax import configs
from deepseek_jax.counts import param_counts
from deepseek_jax.generate import empty_cache
from experiments.claims.claim import ROUNDED, WRONG, Claim

# Grouped-query attention: what is cached are keys and values of every group.
GQA = {
    "Qwen-2.5 72B": dict(layers=80, groups=8, head_dim=128),
    "LLaMA-3.1 405B": dict(layers=126, groups=8, head_dim=128),
}


def latent_cache(**changes: int) -> float:
    """Kilobytes that DeepSeek-V3 caches for a token, read off its abstract cache in BF16."""
    config = dataclasses.replace(configs.deepseek_v3(), **changes)
    cache = jax.eval_shape(lambda: empty_cache(config, batch=1, length=1))
    return cache.num_bytes / 1000


def grouped_cache(*, layers: int, groups: int, head_dim: int) -> float:
    """Kilobytes of keys and values in BF16."""
    return 2 * groups * head_dim * layers * 2 / 1000


def kv_cache(**changes: int) -> dict[str, float]:
    """Kilobytes per token of the three models."""
    return {"DeepSeek-V3": latent_cache(**changes)} | {
        name: grouped_cache(**sizes) for name, sizes in GQA.items()
    }


def cache_ratio(other: str, **changes: int) -> float:
    """The cache of another model over DeepSeek-V3's."""
    return grouped_cache(**GQA[other]) / latent_cache(**changes)


def equal_groups(**changes: int) -> float:
    """Groups of grouped-query attention, heads as wide as V3's, that cache as much as MLA."""
    config = dataclasses.replace(configs.deepseek_v3(), **changes)
    return config.cache_dim / (2 * config.content_head_dim)


def parameters(**changes: int) -> dict[str, float]:
    """Billions of parameters, all and active, from the leaves of the abstract models."""
    found = {}
    for name, config in (("V2", configs.deepseek_v2()), ("V3", configs.deepseek_v3())):
        counts = param_counts(dataclasses.replace(config, **changes))
        found[f"{name} total"] = counts.total_without_mtp / 1e9
        found[f"{name} active"] = counts.active / 1e9
    return found


LATENT = dict(kv_latent_dim=512, rotary_head_dim=64, num_layers=61)
FEWER = dict(kv_latent_dim=448)

CLAIMS = (
    Claim(
        name="kv_cache",
        section="2.1.2, table 1",
        says="KV cache of a token in BF16, KB",
        printed={"DeepSeek-V3": 70.272, "Qwen-2.5 72B": 327.68, "LLaMA-3.1 405B": 516.096},
        compute=kv_cache,
        inputs=LATENT,
        tolerance=ROUNDED,
        how="DeepSeek-V3: the bytes of the cache that decoding allocates, (C + R) x layers x 2 = "
        "(512 + 64) x 61 x 2, read off its abstract shape. The others: keys and values of 8 groups "
        "of 128, 2 x 8 x 128 x layers x 2 bytes, with 80 and 126 layers. 1 KB is 1000 bytes.",
        otherwise=FEWER,
    ),
    Claim(
        name="kv_cache_qwen",
        section="2.1.2, table 1",
        says="Qwen-2.5 72B caches 4.66 times as much",
        printed=4.66,
        compute=cache_ratio,
        inputs=dict(other="Qwen-2.5 72B", **LATENT),
        tolerance=ROUNDED,
        how="327.680 / 70.272 = 4.663.",
        otherwise=FEWER,
    ),
    Claim(
        name="kv_cache_llama",
        section="2.1.2, table 1",
        says="LLaMA-3.1 405B caches 7.28 times as much",
        printed=7.28,
        correct=round(516.096 / 70.272, 2),
        compute=cache_ratio,
        inputs=dict(other="LLaMA-3.1 405B", **LATENT),
        tolerance=ROUNDED,
        verdict=WRONG,
        how="The kilobytes in the same table give 516.096 / 70.272 = 7.344, not 7.28.",
        otherwise=FEWER,
    ),
    Claim(
        name="kv_cache_groups",
        section="V2 report, 2.1.4",
        says="groups of grouped-query attention that cache as much as MLA",
        printed=2.25,
        compute=equal_groups,
        inputs=dict(kv_latent_dim=512, rotary_head_dim=64),
        tolerance=ROUNDED,
        how="C + R = 4.5 head widths against a key and a value of each group: 576 / (2 x 128).",
        otherwise=FEWER,
    ),
    Claim(
        name="parameters",
        section="2.2",
        says="parameters of V2 and V3, total and active, billions",
        printed={"V2 total": 236, "V2 active": 21, "V3 total": 671, "V3 active": 37},
        compute=parameters,
        inputs=dict(kv_latent_dim=512),
        tolerance=ROUNDED,
        how="Counted on the leaves of the abstract model, which needs no memory, without MTP. "
        "Active are the weights that one token uses: all of the attention, the dense layers, K "
        "routed and the shared experts, router and head, but not the embedding, which is looked "
        "up.",
        otherwise=dict(num_experts=240),
    ),
)
