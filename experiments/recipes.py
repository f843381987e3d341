"""Named runs: functions that return a complete Run. Copy one and change it."""

import dataclasses
from collections.abc import Callable

from deepseek_jax import configs
from deepseek_jax.config import ModelConfig, Phase, Precision, Run, Schedule
from experiments.command_line import unknown


def warmup_and_decay(
    peak: float, *, tokens: float, warmup: float, final: float = 0.0
) -> Schedule:
    """Linear from 0 over `warmup` tokens, then a cosine from `peak` to `final` at `tokens`."""
    return Schedule(
        (Phase(warmup, 0.0, peak), Phase(tokens - warmup, peak, final, "cosine"))
    )


def tiny(steps: int | None = None) -> Run:
    """All of V3 in 2.3 M parameters: learns Python source on two cores in about two minutes."""
    steps = steps or 1500
    seq_len, batch = 128, 8
    tokens = steps * seq_len * batch
    return Run(
        config=configs.tiny(),
        steps=steps,
        seq_len=seq_len,
        micro_batch=batch,
        batch_size=Schedule.constant(batch),
        learning_rate=warmup_and_decay(5e-3, tokens=tokens, warmup=0.03 * tokens),
        # Fast at first, when experts crowd; 0 at the end, as in the paper, so that each expert's
        # share of the text stands still.
        gamma=Schedule((Phase(0.8 * tokens, 0.01, 0.001), Phase(0, 0.0, 0.0))),
        checkpoint_every=200,
    )


def hundred_million_config() -> ModelConfig:
    """About 100 M parameters, a third of them active: for comparisons of decoding."""
    return ModelConfig(
        vocab_size=8192,
        model_dim=512,
        num_layers=8,
        num_dense_layers=1,
        num_heads=8,
        content_head_dim=64,
        rotary_head_dim=32,
        value_head_dim=64,
        query_latent_dim=384,
        kv_latent_dim=256,
        dense_ffn_dim=1408,
        expert_ffn_dim=256,
        num_experts=32,
        num_shared_experts=1,
        experts_per_token=4,
        num_groups=4,
        groups_per_token=2,
        route_scale=2.5,
        num_mtp=1,
        max_length=2048,
        init_std=0.02,
    )


def hundred_million(steps: int | None = None) -> Run:
    """About 100 M parameters and an MTP module that learns to draft, on one GPU in minutes."""
    steps = steps or 1500
    seq_len, batch = 512, 32
    tokens = steps * seq_len * batch
    return Run(
        config=hundred_million_config(),
        steps=steps,
        seq_len=seq_len,
        micro_batch=batch,
        batch_size=Schedule.constant(batch),
        learning_rate=warmup_and_decay(1.5e-3, tokens=tokens, warmup=0.05 * tokens),
        gamma=Schedule((Phase(tokens, 0.02, 0.001),)),
        precision=Precision.of("bf16"),
        checkpoint_every=steps,
        keep_checkpoints=1,
    )


def peer_config() -> ModelConfig:
    """The 3.15 B parameter model that other trainers were measured with, 0.64 B active."""
    return ModelConfig(
        vocab_size=32768,
        model_dim=2048,
        num_layers=6,
        num_dense_layers=1,
        num_heads=16,
        content_head_dim=128,
        rotary_head_dim=64,
        value_head_dim=128,
        query_latent_dim=1536,
        kv_latent_dim=512,
        dense_ffn_dim=10944,
        expert_ffn_dim=1408,
        num_experts=64,
        num_shared_experts=2,
        experts_per_token=6,
        num_groups=8,
        groups_per_token=4,
        route_scale=2.446,
        max_length=4096,
    )


def peer(steps: int | None = None) -> Run:
    """The peer-sized model, 4 x 4096 tokens a step, BF16: the training benchmark on one GPU."""
    steps = steps or 100
    return Run(
        config=peer_config(),
        steps=steps,
        seq_len=4096,
        micro_batch=4,
        batch_size=Schedule.constant(4),
        learning_rate=Schedule.constant(2.2e-4),
        precision=Precision.of("bf16"),
        # Keeping everything takes 25 GiB more and, written and read back, is no faster (one H200).
        remat="paper",
    )


def deepseek_v3(steps: int | None = None) -> Run:
    """The pre-training of DeepSeek-V3: 14.8 T tokens at length 4096 (V3 report, section 4.2).

    The shape of the batch ramp is not published; it is linear in tokens here, and the 2 K steps
    of warm-up are the tokens that such a ramp takes in them. The number of steps is that of
    micro-batches of 3072 sequences, which the devices of `data`, `fsdp` and `expert` must divide;
    smaller ones follow the ramp more closely and need up to 1.6 % fewer steps (`--steps`).
    """
    trillion = 1e12
    seq_len, first, full, ramp = 4096, 3072, 15360, 469e9
    batch_size = Schedule((Phase(ramp, first, full),))
    warmup = tokens_after(2000, batch_size, seq_len=seq_len, multiple=first)
    return Run(
        config=dataclasses.replace(configs.deepseek_v3(), yarn=None, max_length=4096),
        steps=steps or 247_199,
        seq_len=seq_len,
        micro_batch=first,
        batch_size=batch_size,
        learning_rate=Schedule(
            (
                Phase(warmup, 0.0, 2.2e-4),
                Phase(10 * trillion - warmup, 2.2e-4, 2.2e-4),
                Phase(4.3 * trillion, 2.2e-4, 2.2e-5, "cosine"),
                Phase(333e9, 2.2e-5, 2.2e-5),
                Phase(167e9, 7.3e-6, 7.3e-6),
            )
        ),
        gamma=Schedule((Phase(14.3 * trillion, 0.001, 0.001), Phase(0, 0.0, 0.0))),
        mtp_weight=Schedule((Phase(10 * trillion, 0.3, 0.3), Phase(0, 0.1, 0.1))),
        sequence_loss_weight=1e-4,
        precision=Precision.of("bf16"),
        remat="paper",
        checkpoint_every=1000,
    )


def tokens_after(steps: int, batch_size: Schedule, *, seq_len: int, multiple: int) -> int:
    """Tokens seen in the first steps of a batch ramp in multiples of `multiple` sequences."""
    tokens = 0
    for _ in range(steps):
        tokens += int(batch_size.at(float(tokens))) // multiple * multiple * seq_len
    return tokens


RECIPES: dict[str, Callable[[int | None], Run]] = {
    fn.__name__: fn for fn in (tiny, hundred_million, peer, deepseek_v3)
}


def recipe(name: str) -> Callable[[int | None], Run]:
    """The function of a named recipe; hyphens may stand for underscores."""
    known = name.replace("-", "_")
    if known not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES))
    return RECIPES[known]
