"""Sizes of a model, precision of its arithmetic, and everything that defines a training run.

Frozen dataclasses, checked once when they are made; variants by `dataclasses.replace`.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Score = Literal["sigmoid", "softmax"]
Format = Literal["fp32", "bf16", "fp8"]
Remat = Literal["none", "paper", "attention", "full"]  # block.REMAT says what each keeps


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension of the rotary embedding (V3 report, section 4.3)."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0  # numerator of the factor on cos and sin
    mscale_all_dim: float = 1.0  # its denominator; squared, it multiplies the softmax scale


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a DeepSeek-V2 or V3 model; the letter is the dimension in array names."""

    vocab_size: int  # V
    model_dim: int  # D
    num_layers: int  # dense and MoE layers, without MTP modules
    num_dense_layers: int  # the first layers, with a dense feed-forward
    num_heads: int  # N
    content_head_dim: int  # H, d_h
    rotary_head_dim: int  # R, d_h^R
    value_head_dim: int  # U
    query_latent_dim: int | None  # Q, d_c'; None: queries are not compressed
    kv_latent_dim: int  # C, d_c
    dense_ffn_dim: int  # F of dense layers
    expert_ffn_dim: int  # F of one expert
    num_experts: int  # E, routed
    num_shared_experts: int
    experts_per_token: int  # K
    num_groups: int = 1  # G
    groups_per_token: int = 1  # the node limit M
    score: Score = "sigmoid"  # V3's router; softmax: V2's
    normalize_weights: bool = True  # routing weights of a token sum to route_scale
    route_scale: float = 1.0
    num_mtp: int = 0  # depth of multi-token prediction
    max_length: int = 4096
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6  # the norms of the two latents; released code fixes it
    init_std: float = 0.006

    def __post_init__(self):
        positive = (
            "vocab_size model_dim num_layers num_heads content_head_dim rotary_head_dim "
            "value_head_dim kv_latent_dim dense_ffn_dim expert_ffn_dim num_experts "
            "experts_per_token num_groups groups_per_token max_length"
        ).split()
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_dense_layers", "num_shared_experts", "num_mtp"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("route_scale", "rope_theta", "norm_eps", "latent_norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if self.query_latent_dim is not None and self.query_latent_dim < 1:
            raise ValueError(f"query_latent_dim={self.query_latent_dim} must be None or positive")
        if self.num_dense_layers > self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} must not exceed "
                f"num_layers={self.num_layers}"
            )
        if self.rotary_head_dim % 2:
            raise ValueError(f"rotary_head_dim={self.rotary_head_dim} must be even: pairs rotate")
        if self.score not in typing.get_args(Score):
            raise ValueError(f"score={self.score!r} must be one of {typing.get_args(Score)}")
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts={self.num_experts} must be divisible by num_groups={self.num_groups}"
            )
        if self.groups_per_token > self.num_groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} must not exceed "
                f"num_groups={self.num_groups}"
            )
        reachable = self.groups_per_token * self.experts_per_group
        if self.experts_per_token > reachable:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must not exceed the {reachable} "
                f"experts of groups_per_token={self.groups_per_token} groups"
            )
        grouped = self.num_groups > self.groups_per_token
        if grouped and self.experts_per_group < self.best_per_group:
            raise ValueError(
                f"num_groups={self.num_groups} leaves {self.experts_per_group} expert a group; "
                "groups are scored by their two best experts, so use fewer groups"
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts, those of MTP modules too: they are as the last main layer is."""
        return self.num_moe_layers + (self.num_mtp if self.num_moe_layers else 0)

    @property
    def query_key_dim(self) -> int:
        """A: content and rotary part of a head."""
        return self.content_head_dim + self.rotary_head_dim

    @property
    def cache_dim(self) -> int:
        """Y: cached elements per token and layer, the latent and the rotary key."""
        return self.kv_latent_dim + self.rotary_head_dim

    @property
    def experts_per_group(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def has_routing_bias(self) -> bool:
        """Whether experts have a bias that evens out their load: V3's do, V2's do not."""
        return self.score == "sigmoid"

    @property
    def best_per_group(self) -> int:
        """How many of its best experts score a group: two in V3, one in V2."""
        return 2 if self.score == "sigmoid" else 1

    @property
    def shared_ffn_dim(self) -> int:
        return self.num_shared_experts * self.expert_ffn_dim


Combine = Literal["bf16", "logfmt8", "logfmt10"]
Residual = Literal["bf16", "e4m3", "e5m2", "logfmt8", "logfmt10"]
COMBINE, RESIDUAL = typing.get_args(Combine), typing.get_args(Residual)


def logfmt_bits(format: Combine | Residual) -> int | None:
    """Bits of a value in LogFMT; None of another format."""
    return int(format.removeprefix("logfmt")) if format.startswith("logfmt") else None


@dataclass(frozen=True)
class Precision:
    """What weights are stored in, what flows between ops, what products multiply.

    Router, routing bias, norms, softmax and loss are FP32 in all of them (V3 report, section 3.3).
    """

    weights: Format = "fp32"  # fp8: blocks as released, dequantised where products read them
    activations: Literal["fp32", "bf16"] = "fp32"
    matmul: Format = "fp32"
    moments: Literal["fp32", "bf16"] = "fp32"
    # In which experts' results go back to other devices; bf16: as activations are.
    combine: Combine = "bf16"
    # To which every branch rounds what it adds to the residual stream; bf16: as activations are.
    residual: Residual = "bf16"
    # Of FP8 products: None for the kernels of the device, or what runs on any, slowly.
    implementation: Literal["reference"] | None = None

    def __post_init__(self):
        if self.combine not in COMBINE:
            raise ValueError(f"combine={self.combine!r} must be one of {', '.join(COMBINE)}")
        if self.residual not in RESIDUAL:
            raise ValueError(f"residual={self.residual!r} must be one of {', '.join(RESIDUAL)}")
        if self.weights == self.matmul == "fp8":
            raise ValueError(
                "weights='fp8' are dequantised for their products: use matmul='bf16' or 'fp32'"
            )
        if self.matmul == "fp32" and self.activations != "fp32":
            raise ValueError(f"{self.matmul=} needs activations='fp32', not {self.activations!r}")
        if self.matmul != "fp32" and self.activations == "fp32":
            raise ValueError(f"{self.matmul=} needs activations='bf16', not 'fp32'")

    @classmethod
    def of(cls, precision: "str | Precision") -> "Precision":
        """A named precision: "fp32", "bf16" (FP32 masters, BF16 moments) or "fp8"."""
        if isinstance(precision, Precision):
            return precision
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: use {', '.join(PRECISIONS)}")
        return PRECISIONS[precision]


PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(activations="bf16", matmul="bf16", moments="bf16"),
    "fp8": Precision(activations="bf16", matmul="fp8", moments="bf16"),
}


@dataclass(frozen=True)
class Phase:
    """A stretch of `tokens` tokens in which a value goes from `start` to `end`."""

    tokens: float
    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"


@dataclass(frozen=True)
class Schedule:
    """A value as a function of the tokens seen: phases one after another, the last value kept."""

    phases: tuple[Phase, ...]

    def __post_init__(self):
        if not self.phases:
            raise ValueError("a schedule needs at least one phase: use Schedule.constant(value)")
        for phase in self.phases:
            if phase.tokens < 0:
                raise ValueError(f"a phase of {phase.tokens} tokens must not be negative")

    @classmethod
    def constant(cls, value: float) -> "Schedule":
        return cls((Phase(0, value, value),))

    def at(self, tokens, xp=np):
        """The value after `tokens` tokens; `xp` is jax.numpy when they are traced."""
        value = xp.asarray(self.phases[0].start, xp.float32)
        begin = 0.0
        for phase in self.phases:
            done = xp.clip((tokens - begin) / max(float(phase.tokens), 1.0), 0.0, 1.0)
            if phase.shape == "cosine":
                done = (1.0 - xp.cos(np.pi * done)) / 2.0
            # Exact at both ends, and everywhere in a phase that stays as it is.
            here = phase.start + done * (phase.end - phase.start)
            here = xp.where(done >= 1.0, phase.end, here)
            if phase.tokens == 0:
                here = xp.asarray(phase.end, xp.float32)
            value = xp.where(tokens >= begin, here, value)
            begin += phase.tokens
        return value

    @property
    def length(self) -> float:
        return sum(phase.tokens for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW and the clip of the global gradient norm (V3 report, section 4.2)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norm weights are not decayed
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete training run: with the data it names, it determines every number of it."""

    config: ModelConfig
    steps: int
    seq_len: int  # T
    micro_batch: int  # B, sequences in one pass over all devices
    batch_size: Schedule  # sequences per step, in multiples of micro_batch
    learning_rate: Schedule
    gamma: Schedule = Schedule.constant(0.001)  # speed of the routing bias
    mtp_weight: Schedule = Schedule.constant(0.3)  # lambda
    sequence_loss_weight: float = 1e-4  # alpha
    precision: Precision = Precision()
    optimizer: AdamW = AdamW()
    remat: Remat = "none"
    ema_decay: float | None = None
    max_skipped: int = 10  # steps in a row with a non-finite loss or gradient before the run stops
    seed: int = 0
    data: tuple[str, ...] = ()  # files and folders; () is the standard library of this Python
    text_field: str = "text"  # of JSONL objects, and column of Parquet files
    tokenizer: str | None = None  # a tokenizer.json; None: trained on the data
    fim_rate: float = 0.1
    mask_documents: bool = False  # attention stays inside documents
    checkpoint_every: int = 500
    keep_checkpoints: int = 3

    def __post_init__(self):
        for name in ("steps", "seq_len", "micro_batch", "max_skipped", "checkpoint_every",
                     "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.remat not in typing.get_args(Remat):
            raise ValueError(f"remat={self.remat!r} must be one of {typing.get_args(Remat)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0, at most {2**32 - 1}")
        if not 0.0 <= self.fim_rate <= 1.0:
            raise ValueError(f"fim_rate={self.fim_rate} must be between 0 and 1")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay={self.ema_decay} must be None or in [0, 1)")
        if self.precision.weights == "fp8":
            raise ValueError("weights='fp8' leave no masters to train: use 'fp32'")
        if self.seq_len > self.config.max_length:
            raise ValueError(
                f"seq_len={self.seq_len} must not exceed max_length={self.config.max_length}"
            )
        if self.seq_len <= self.config.num_mtp:
            raise ValueError(
                f"seq_len={self.seq_len} must exceed num_mtp={self.config.num_mtp}"
            )
        for phase in self.batch_size.phases:
            for size in (phase.start, phase.end):
                if size < self.micro_batch or size % self.micro_batch:
                    raise ValueError(
                        f"batch_size {size} must be a positive multiple of "
                        f"micro_batch={self.micro_batch}"
                    )
        for name in ("learning_rate", "gamma", "mtp_weight", "batch_size"):
            for phase in getattr(self, name).phases:
                if not all(map(math.isfinite, (phase.tokens, phase.start, phase.end))):
                    raise ValueError(f"{name} must be finite, not {phase}")
                if min(phase.start, phase.end) < 0:
                    raise ValueError(f"{name}={min(phase.start, phase.end)} must not be negative")

    def accumulation_at(self, tokens: int) -> int:
        """Micro-batches in the step that begins after `tokens` tokens."""
        return int(self.batch_size.at(float(tokens))) // self.micro_batch

    def position_at(self, step: int) -> int:
        """Sequences consumed before `step`: the data order is a function of the step alone."""
        if len({size for p in self.batch_size.phases for size in (p.start, p.end)}) == 1:
            return step * int(self.batch_size.phases[0].start)
        sequences = 0
        for _ in range(step):
            sequences += self.accumulation_at(sequences * self.seq_len) * self.micro_batch
        return sequences


def to_json(value: Any) -> Any:
    """A dataclass of this file as nested dicts and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def from_json(cls: Any, value: Any, where: str = "") -> Any:
    """The inverse of `to_json`; unknown and missing fields are a ValueError that names them."""
    if value is None or cls is Any:
        return value
    if typing.get_origin(cls) in (types.UnionType, typing.Union):
        return from_json(next(t for t in typing.get_args(cls) if t is not type(None)), value, where)
    if typing.get_origin(cls) is tuple:
        return tuple(from_json(typing.get_args(cls)[0], item, where) for item in value)
    if not dataclasses.is_dataclass(cls):
        return value
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ValueError(f"unknown field {where}{unknown[0]}: {cls.__name__} has "
                         f"{', '.join(hints)}")
    made = {name: from_json(hints[name], item, f"{where}{name}.") for name, item in value.items()}
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING
                and f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in made]
    if missing:
        raise ValueError(f"missing field {where}{missing[0]} of {cls.__name__}")
    return cls(**made)


def differing_fields(a: Any, b: Any, where: str = "") -> list[str]:
    """Lines "field: a -> b" for the leaves in which two dataclasses differ."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return [
            line
            for f in dataclasses.fields(a)
            for line in differing_fields(getattr(a, f.name), getattr(b, f.name),
                                         f"{where}.{f.name}".lstrip("."))
        ]
    return [] if a == b else [f"{where}: {a} -> {b}"]
