"""The pieces every block is made of: initialisation, RMSNorm, embedding, gated feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig
from deepseek_jax.linear import linear
from sharding import local, shard


class RoutingBias(nnx.Variable):
    """State of the router that no gradient reaches (section 2.1.2 of the V3 report)."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: ModelConfig) -> nnx.Param:
    """N(0, init_std^2), as all matrices of V2 and V3."""
    return nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32))


def ones(size: int) -> nnx.Param:
    return nnx.Param(jnp.ones((size,), jnp.float32))


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in FP32; x's dtype returned."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (x32 * scale * weight).astype(x.dtype)


@jax.named_scope("embed")
def embed(
    tokens_BT: Int[Array, "B T"], embed_VD: Float[Array, "V D"], dtype: jax.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Rows of the embedding in `dtype`; their gradients are added up in the table's own dtype."""
    rows = local(lambda tokens, table: table[tokens], "BT,VD->BTD", whole="V")
    return shard(rows(tokens_BT, embed_VD).astype(dtype), "BTD")


def swiglu(gate: jax.Array, up: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """SiLU(gate) * up, times the routing weight where there is one; computed in FP32."""
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return (hidden if weight is None else hidden * weight).astype(gate.dtype)


class FeedForward(nnx.Module):
    """W_down (SiLU(W_gate x) * W_up x)."""

    def __init__(self, config: ModelConfig, ffn_dim: int, *, rngs: nnx.Rngs):
        D, F = config.model_dim, ffn_dim
        self.w_gate_FD = normal(rngs, (F, D), config)
        self.w_up_FD = normal(rngs, (F, D), config)
        self.w_down_DF = normal(rngs, (D, F), config)

    @jax.named_scope("ffn")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_BTF = checkpoint_name(
            linear("BTD,FD->BTF", x_BTD, self.w_gate_FD[...]), "ffn_hidden"
        )
        up_BTF = checkpoint_name(
            linear("BTD,FD->BTF", x_BTD, self.w_up_FD[...]), "ffn_hidden"
        )
        hidden_BTF = shard(swiglu(gate_BTF, up_BTF), "BTF")
        return linear("BTF,DF->BTD", hidden_BTF, self.w_down_DF[...])
