"""Claims on serving and hardware: the published day of service, SMs, lanes, ratios of links."""

from deepseek_jax import configs
from deepseek_jax.counts import param_counts, train_flops_per_token
from experiments.claims.claim import AT_MOST, EXACT, MODELLED, ROUNDED, Claim, apart, within
from experiments.claims.memory import latent_cache

# The published 24 hours: 10^9 tokens, and dollars for 10^6 tokens of each kind.
TOKENS = {"hit": 342.0, "miss": 608.0 - 342.0, "output": 168.0}
DOLLARS = {"hit": 0.14, "miss": 0.55, "output": 2.19}


def daily_cost(*, nodes: float, gpus: int, dollars: float) -> float:
    """Dollars of a day's GPUs."""
    return nodes * gpus * dollars * 24


def daily_revenue(*, output_price: float) -> float:
    """Dollars if every token were paid for at the listed prices."""
    prices = DOLLARS | {"output": output_price}
    return 1e3 * sum(tokens * prices[kind] for kind, tokens in TOKENS.items())


def profit(*, nodes: float) -> float:
    """Percent of the cost."""
    cost = daily_cost(nodes=nodes, gpus=8, dollars=2)
    return 100 * (daily_revenue(output_price=DOLLARS["output"]) / cost - 1)


def nodes_in_use(*, prefill_rate: float, decode_rate: float) -> float:
    """Nodes that the day's tokens keep busy at the published tokens per second of a node."""
    day = 86400
    tokens_in = (TOKENS["hit"] + TOKENS["miss"]) * 1e9
    return tokens_in / day / prefill_rate + TOKENS["output"] * 1e9 / day / decode_rate


def prefill_flops(*, node_rate: float, hit: float, length: int) -> float:
    """TFLOP/s of a prefill GPU: forward of the tokens that the cache does not have."""
    flops = train_flops_per_token(configs.deepseek_v3(), length, causal=True, mtp=False) / 3
    return node_rate * (1 - hit) / 8 * flops / 1e12


def decode_memory(
    *, node_rate: float, user_rate: float, context: float, gpus: int, places: int
) -> float:
    """GB of a decode GPU: its experts and everything else in FP8, and its users' caches."""
    config = configs.deepseek_v3()
    expert = 3 * config.model_dim * config.expert_ffn_dim * config.num_moe_layers
    rest = param_counts(config).total_without_mtp - config.num_experts * expert
    users = node_rate / 8 / user_rate
    return (rest + places / gpus * expert + users * context * latent_cache() * 1e3) / 1e9


def cache_hits(*, hit: float) -> float:
    """Percent of input tokens found in the cache on disk."""
    return 100 * hit / 608.0


def communication_share(*, sms: int, communication: int) -> dict[str, float]:
    """SMs left to compute, and the percentage taken away."""
    return {"left": sms - communication, "taken %": 100 * communication / sms}


def lanes(*, count: int, per_lane: float) -> float:
    """GB/s of a node's PCIe lanes."""
    return count * per_lane


def link_ratio(*, nvlink: float, nic: float) -> float:
    """How much faster NVLink is than a NIC."""
    return nvlink / nic


OVERVIEW = "inference overview"
CLAIMS = (
    Claim(
        name="service_cost",
        section=OVERVIEW,
        says="cost of a day, $",
        printed=87072,
        compute=daily_cost,
        inputs=dict(nodes=226.75, gpus=8, dollars=2),
        tolerance=EXACT,
        how="226.75 nodes x 8 GPUs x 2 $ x 24 h.",
        otherwise=dict(nodes=278),
    ),
    Claim(
        name="service_revenue",
        section=OVERVIEW,
        says="revenue of a day at listed prices, $",
        printed=562027,
        compute=daily_revenue,
        inputs=dict(output_price=2.19),
        tolerance=within(0.0002),
        how="342 billion tokens from the cache at 0.14 $, 266 at 0.55 and 168 written at 2.19 for "
        "a million each; the token counts are rounded, which leaves 0.01 %.",
        otherwise=dict(output_price=2.2),
    ),
    Claim(
        name="service_profit",
        section=OVERVIEW,
        says="profit over cost, %",
        printed=545,
        compute=profit,
        inputs=dict(nodes=226.75),
        tolerance=apart(1),
        how="562,100 / 87,072 - 1; 545.6 from the rounded token counts.",
        otherwise=dict(nodes=278),
    ),
    Claim(
        name="service_nodes",
        section=OVERVIEW,
        says="nodes in use on average",
        printed=226.75,
        compute=nodes_in_use,
        inputs=dict(prefill_rate=73_700, decode_rate=14_800),
        tolerance=within(0.005),
        how="608 billion tokens in and 168 billion out a day, over 73.7 thousand tokens/s of a "
        "prefill node (with cache hits) and 14.8 thousand of a decode node: 95.5 + 131.4 nodes.",
        otherwise=dict(decode_rate=12_000),
    ),
    Claim(
        name="service_hits",
        section=OVERVIEW,
        says="input tokens found in the cache, %",
        printed=56.3,
        compute=cache_hits,
        inputs=dict(hit=342.0),
        tolerance=apart(0.06),
        how="342 / 608; 56.25 from the rounded counts.",
        otherwise=dict(hit=340.0),
    ),
    Claim(
        name="prefill_rate",
        section=OVERVIEW,
        says="73.7 thousand tokens/s of a prefill node: TFLOP/s of a GPU, below its BF16 peak",
        printed=989,
        compute=prefill_flops,
        inputs=dict(node_rate=73_700, hit=0.5625, length=4096),
        tolerance=AT_MOST,
        verdict=MODELLED,
        how="A third of a training token's operations (forward only) for the tokens not found in "
        "the cache. A rate that the GPUs cannot compute would show here.",
        otherwise=dict(node_rate=737_000),
    ),
    Claim(
        name="decode_memory",
        section=OVERVIEW,
        says="14.8 thousand tokens/s of a decode node, 21 for each user: GB of a GPU, of 80",
        printed=80,
        compute=decode_memory,
        inputs=dict(node_rate=14_800, user_rate=21, context=4989, gpus=144, places=288),
        tolerance=AT_MOST,
        verdict=MODELLED,
        how="88 users on each GPU, 4,989 tokens of 70,272 bytes for each; two experts of each "
        "layer and all that is no routed expert, counted on the model, a byte a parameter.",
        otherwise=dict(user_rate=10),
    ),
    Claim(
        name="communication_sms",
        section="4.4",
        says="SMs that training spends on communication: up to 20 of 132",
        printed={"left": 112, "taken %": 15},
        compute=communication_share,
        inputs=dict(sms=132, communication=20),
        tolerance=ROUNDED,
        how="20 / 132 = 15.2 %; the published trace shows communication kernels of 20 blocks and "
        "compute kernels of 112.",
        otherwise=dict(communication=24),
    ),
    Claim(
        name="pcie_lanes",
        section="6.2",
        says="GB/s of 160 lanes of PCIe 5",
        printed=640,
        compute=lanes,
        inputs=dict(count=160, per_lane=4.0),
        tolerance=EXACT,
        how="160 x 4 GB/s in each direction. Memory must deliver that and the CPU's own traffic, "
        "hence the paper's wish of about 1 TB/s.",
        otherwise=dict(count=128),
    ),
    Claim(
        name="link_ratio",
        section="4.3",
        says="NVLink is about 4 times as fast as a NIC",
        printed=4,
        compute=link_ratio,
        inputs=dict(nvlink=200, nic=50),
        tolerance=EXACT,
        how="200 over 50 GB/s nominal; 160 over 40 in practice. The V3 report takes 160 over 50.",
        otherwise=dict(nvlink=160),
    ),
)
