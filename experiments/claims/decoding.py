"""Claims on decoding speed: the limit of expert parallelism, MTP, and running a model at home."""

import dataclasses

from deepseek_jax import configs
from deepseek_jax.counts import param_counts
from experiments.claims.claim import (
    BY_RULE,
    CUT,
    MODELLED,
    ROUNDED,
    WRONG,
    Claim,
    Tolerance,
    within,
)


def expert_limit(
    *, tokens: int, copies: int, hidden: int, bytes_per_element: int, layers: int, gigabytes: float
) -> dict[str, float]:
    """The time that dispatch and combine alone take, and what a token costs with nothing else.

    Two micro-batches take turns, so a layer lasts two transfers; all layers count.
    """
    transfer = bytes_per_element * tokens * copies * hidden / (gigabytes * 1e9)
    per_token = 2 * transfer * layers
    return {
        "transfer us": transfer * 1e6,
        "layer us": 2 * transfer * 1e6,
        "TPOT ms": per_token * 1e3,
        "tokens/s": 1 / per_token,
    }


def transfer_us(**sizes: float) -> float:
    """Microseconds of one dispatch and combine."""
    return expert_limit(**sizes)["transfer us"]


def experts_held(*, devices: int, experts_per_device: int) -> int:
    """Experts that fit on the devices."""
    return devices * experts_per_device


def mtp_speedup(*, accepted: float, overhead: float) -> float:
    """Tokens a step over its cost: 1 + p tokens for 1 + c of a step without MTP."""
    return (1 + accepted) / (1 + overhead)


def roofline(*, gigabytes: float, bits: float, v2: float, dense: float) -> dict[str, float]:
    """Tokens per second if reading the active weights once a token is all the work there is."""
    per_token = lambda billions: billions * bits / 8
    return {
        "V2 236B": gigabytes / per_token(v2),
        "dense 70B": gigabytes / per_token(dense),
    }


def server_roofline(*, gigabytes: float, bits: float, experts_per_token: int) -> float:
    """The same of V3 on one server's memory, active weights as counted on the model."""
    config = dataclasses.replace(configs.deepseek_v3(), experts_per_token=experts_per_token)
    return gigabytes / (param_counts(config).active / 1e9 * bits / 8)


IB = dict(tokens=32, copies=9, hidden=7000, bytes_per_element=3, layers=61, gigabytes=50)
NVL72 = IB | dict(gigabytes=900)
HOW = (
    "(1 byte to dispatch in FP8 + 2 to combine in BF16) x 32 tokens x 9 experts (8 routed, 1 "
    "shared) x hidden / bandwidth; two micro-batches in turn, 61 layers. "
)
ENOUGH = Tolerance(
    "limit at most 5 % below the claimed speed, at most 30 % above",
    lambda ours, printed: 0.95 * printed <= ours <= 1.3 * printed,
)

CLAIMS = (
    Claim(
        name="expert_limit_infiniband",
        section="2.3.2",
        says="decoding with expert parallelism over 400G InfiniBand",
        printed={"transfer us": 120.96, "layer us": 241.92, "TPOT ms": 14.76, "tokens/s": 67},
        compute=expert_limit,
        inputs=IB,
        tolerance=CUT,
        verdict=BY_RULE,
        how=HOW + "The printed 7K is 7000 here, and 67.76 tokens/s are cut to 67.",
        otherwise=dict(gigabytes=40),
    ),
    Claim(
        name="expert_limit_hidden",
        section="2.3.2",
        says="that transfer with the hidden size of V3, 7168, us",
        printed=120.96,
        correct=round(120.96 * 7168 / 7000, 2),
        compute=transfer_us,
        inputs=IB | dict(hidden=7168),
        tolerance=ROUNDED,
        verdict=WRONG,
        how=HOW + "The paper writes 7K and computes with 7000; with 7168 it is 123.86 us, 15.11 "
        "ms a token and 66.2 tokens/s.",
        otherwise=dict(hidden=7000),
    ),
    Claim(
        name="expert_limit_nvl72",
        section="2.3.2",
        says="the same over the NVLink of a GB200 NVL72",
        printed={"transfer us": 6.72, "layer us": 13.44, "TPOT ms": 0.82, "tokens/s": 1200},
        compute=expert_limit,
        inputs=NVL72,
        tolerance=within(0.02),
        how=HOW + "900 GB/s one way. 0.8198 ms are 1220 tokens/s, printed as about 1200.",
        otherwise=dict(gigabytes=450),
    ),
    Claim(
        name="expert_limit_nvl72_experts",
        section="2.3.2",
        says="experts on the 72 devices of an NVL72, one each as the formula assumes",
        printed=256,
        correct=72,
        compute=experts_held,
        inputs=dict(devices=72, experts_per_device=1),
        tolerance=ROUNDED,
        verdict=WRONG,
        how="One expert a device is what makes a token cost 9 transfers; 72 devices then hold 72 "
        "of V3's 256 experts, so this limit is no deployment of V3.",
        otherwise=dict(experts_per_device=4),
    ),
    Claim(
        name="mtp_speed",
        section="2.3.3",
        says="speed with one MTP module whose draft is accepted 80 % of the time",
        printed=1.8,
        compute=mtp_speedup,
        inputs=dict(accepted=0.8, overhead=0.0),
        tolerance=ROUNDED,
        verdict=BY_RULE,
        how="(1 + p) / (1 + c): p accepted, c the cost of drafting and of a wider check over a "
        "step. 1.8 is p = 0.8 without cost, or p = 0.9 with c = 5.5 %. The acceptance itself is "
        "that of the released model and is not measured here.",
        otherwise=dict(overhead=0.1),
    ),
    Claim(
        name="local_inference",
        section="2.2.2",
        says="tokens/s on the processor of a PC: V2 about 20, a dense 70B single digits",
        printed={"V2 236B": 20, "dense 70B": 7},
        compute=roofline,
        inputs=dict(gigabytes=256, bits=4, v2=21, dense=70),
        tolerance=ENOUGH,
        verdict=MODELLED,
        how="An upper bound: memory bandwidth / (active parameters x bits / 8), 256 GB/s (Ryzen "
        "AI Max+ 395) and 4 bits. 7 stands for the single digits that the paper names.",
        otherwise=dict(v2=236),
    ),
    Claim(
        name="local_inference_server",
        section="2.2.2",
        says="V3 on a server of about 10,000 $ with a consumer GPU, almost 20 tokens/s",
        printed=20,
        compute=server_roofline,
        inputs=dict(gigabytes=400, bits=4.5, experts_per_token=8),
        tolerance=ENOUGH,
        verdict=MODELLED,
        how="The same bound with 400 GB/s, 4.5 bits and V3's active parameters as counted on the "
        "model.",
        otherwise=dict(experts_per_token=16),
    ),
)
