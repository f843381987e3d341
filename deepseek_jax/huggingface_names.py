"""The names of the family's released tensors beside ours: one table, read in both directions.

Our arrays stack layers (L) and experts (E); a released tensor is one layer's, one expert's matrix,
output first as ours. In it a head's width follows the number of heads: N and the letter after it
are one dimension (wq_b_NAQ is [N A, Q]). MTP module k is stored as layer num_layers + k, and the
MTP block is called as other MoE layers are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_jax.config import ModelConfig
from deepseek_jax.stored import may_be_stored
from sharding.rules import letters_of

# Ours, theirs. {l} counts layers, {e} experts; a line may hold for several stacks of layers.
OUTSIDE_LAYERS = (
    ("embed_VD", "model.embed_tokens.weight"),
    ("final_norm_D", "model.norm.weight"),
    ("head_VD", "lm_head.weight"),
)
BLOCK = (
    ("attention_norm_D", "input_layernorm.weight"),
    ("attention.wq_NAD", "self_attn.q_proj.weight"),
    ("attention.wq_a_QD", "self_attn.q_a_proj.weight"),
    ("attention.q_norm_Q", "self_attn.q_a_layernorm.weight"),
    ("attention.wq_b_NAQ", "self_attn.q_b_proj.weight"),
    ("attention.wkv_a_YD", "self_attn.kv_a_proj_with_mqa.weight"),
    ("attention.kv_norm_C", "self_attn.kv_a_layernorm.weight"),
    ("attention.wkv_b_NXC", "self_attn.kv_b_proj.weight"),
    ("attention.wo_DNU", "self_attn.o_proj.weight"),
    ("ffn_norm_D", "post_attention_layernorm.weight"),
)
DENSE = (
    ("ffn.w_gate_FD", "mlp.gate_proj.weight"),
    ("ffn.w_up_FD", "mlp.up_proj.weight"),
    ("ffn.w_down_DF", "mlp.down_proj.weight"),
)
MOE = (
    ("ffn.router_ED", "mlp.gate.weight"),
    ("ffn.bias_E", "mlp.gate.e_score_correction_bias"),
    ("ffn.w_gate_EFD", "mlp.experts.{e}.gate_proj.weight"),
    ("ffn.w_up_EFD", "mlp.experts.{e}.up_proj.weight"),
    ("ffn.w_down_EDF", "mlp.experts.{e}.down_proj.weight"),
    ("ffn.shared.w_gate_FD", "mlp.shared_experts.gate_proj.weight"),
    ("ffn.shared.w_up_FD", "mlp.shared_experts.up_proj.weight"),
    ("ffn.shared.w_down_DF", "mlp.shared_experts.down_proj.weight"),
)
MTP = (
    ("embed_norm_D", "enorm.weight"),
    ("hidden_norm_D", "hnorm.weight"),
    ("w_join_DZ", "eh_proj.weight"),
    ("final_norm_D", "shared_head.norm.weight"),
)
# Copies that a file may hold as well, of an array that the table has: MTP shares them.
COPIES = {"embed_tokens.weight": "embed_VD", "shared_head.head.weight": "head_VD"}
# What some files hold although it follows from config.json.
COMPUTED = "model.layers.{l}.self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class Entry:
    """A released tensor and its place in one of our arrays."""

    name: str  # theirs
    array: str  # our array's dotted path, "moe.ffn.w_gate_EFD"
    index: tuple[int, ...]  # its layer and expert there
    shape: tuple[int, ...]  # of the released tensor

    @property
    def may_be_fp8(self) -> bool:
        """Whether released FP8 checkpoints keep this tensor in FP8 blocks."""
        return may_be_stored(self.array.rpartition(".")[2])


def sizes(config: ModelConfig, path: str) -> dict[str, int]:
    """The length of each dimension letter in the array of a dotted path."""
    if ".shared." in path:
        F = config.shared_ffn_dim
    else:
        F = config.expert_ffn_dim if "_E" in path else config.dense_ffn_dim
    H, U, D = config.content_head_dim, config.value_head_dim, config.model_dim
    return {
        "V": config.vocab_size, "D": D, "N": config.num_heads, "A": config.query_key_dim,
        "Q": config.query_latent_dim or 0, "Y": config.cache_dim, "C": config.kv_latent_dim,
        "X": H + U, "U": U, "F": F, "E": config.num_experts, "Z": 2 * D,
    }  # fmt: skip


def released_shape(config: ModelConfig, path: str) -> tuple[int, ...]:
    """The shape of one released tensor of our array: N merged with what follows, no L and E."""
    letters, of = letters_of(path), sizes(config, path)
    if letters[0] == "E" and len(letters) == 3:
        letters = letters[1:]
    merged = letters.find("N")
    if merged < 0:
        return tuple(of[letter] for letter in letters)
    groups = [*letters[:merged], letters[merged : merged + 2], *letters[merged + 2 :]]
    return tuple(math.prod(of[letter] for letter in group) for group in groups)


def stacks(config: ModelConfig) -> Iterator[tuple[str, int, int, tuple]]:
    """The stacks of layers: path of ours, first released layer, number of layers, table."""
    dense, moe, mtp = config.num_dense_layers, config.num_moe_layers, config.num_mtp
    yield "dense", 0, dense, BLOCK + DENSE
    yield "moe", dense, moe, BLOCK + MOE
    block = tuple((f"block.{ours}", theirs) for ours, theirs in BLOCK + (MOE if moe else DENSE))
    yield "mtp", config.num_layers, mtp, block + MTP


def exists(config: ModelConfig, path: str) -> bool:
    """Whether models of these sizes have the array at all."""
    name = path.rsplit(".", 1)[-1]
    if name in ("wq_NAD", "wq_a_QD", "q_norm_Q", "wq_b_NAQ"):
        return (config.query_latent_dim is None) == (name == "wq_NAD")
    if ".shared." in path:
        return config.num_shared_experts > 0
    return name != "bias_E" or config.has_routing_bias


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a checkpoint, in the order of layers."""
    for ours, theirs in OUTSIDE_LAYERS:
        yield Entry(theirs, ours, (), released_shape(config, ours))
    for stack, first, count, table in stacks(config):
        known = [
            (f"{stack}.{ours}", theirs, released_shape(config, f"{stack}.{ours}"))
            for ours, theirs in table
            if exists(config, f"{stack}.{ours}")
        ]
        for layer in range(count):
            prefix = f"model.layers.{first + layer}."
            for path, theirs, shape in known:
                if "{e}" not in theirs:
                    yield Entry(prefix + theirs, path, (layer,), shape)
                    continue
                before, after = theirs.split("{e}")
                for expert in range(config.num_experts):
                    name = f"{prefix}{before}{expert}{after}"
                    yield Entry(name, path, (layer, expert), shape)


def copies(config: ModelConfig) -> dict[str, str]:
    """Names of the copies that MTP layers may hold, and the arrays that they are copies of."""
    return {
        f"model.layers.{config.num_layers + k}.{theirs}": ours
        for k in range(config.num_mtp)
        for theirs, ours in COPIES.items()
    }


def computed(config: ModelConfig) -> set[str]:
    """Names of tensors that are computed from config.json and need not be read."""
    return {COMPUTED.format(l=l) for l in range(config.num_layers + config.num_mtp)}
