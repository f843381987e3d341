"""Multi-token prediction: modules that predict the token after the next (V3 report eqs. 21-25)."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.block import Block
from deepseek_jax.config import ModelConfig
from deepseek_jax.layers import normal, ones, rms_norm
from deepseek_jax.linear import linear
from deepseek_jax.moe import Load


class MTP(nnx.Module):
    """One depth: a join of hidden state and next embedding, a block, a norm.

    Embedding and output head are those of the main model.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        D = config.model_dim
        self.embed_norm_D = ones(D)
        self.hidden_norm_D = ones(D)
        self.w_join_DZ = normal(rngs, (D, 2 * D), config)
        self.block = Block(config, dense=config.num_moe_layers == 0, rngs=rngs)
        self.final_norm_D = ones(D)

    @jax.named_scope("mtp")
    def __call__(
        self, hidden_BTD, embedded_BTD, rotations_BTr, *, segments_BT=None, valid_BT=None
    ) -> tuple[jax.Array, Load | None]:
        """The hidden state that the head reads, from the previous depth's and the embeddings.

        The join is [norm(embedding); norm(hidden)] with the hidden state taken after the final
        norm: the order of the released weights, not the one printed in eq. 21.
        """
        x_BTD = self.join(hidden_BTD, embedded_BTD)
        x_BTD, output = self.block(
            x_BTD, rotations_BTr, segments_BT=segments_BT, valid_BT=valid_BT
        )
        return rms_norm(x_BTD, self.final_norm_D[...], self.config.norm_eps), output.load

    def join(self, hidden_BTD, embedded_BTD) -> jax.Array:
        """M_k [norm(embedding); norm(hidden)] (V3 eq. 21)."""
        eps = self.config.norm_eps
        joined_BTZ = jnp.concatenate(
            (
                rms_norm(embedded_BTD, self.embed_norm_D[...], eps),
                rms_norm(hidden_BTD, self.hidden_norm_D[...], eps),
            ),
            axis=-1,
        )
        return linear("BTZ,DZ->BTD", joined_BTZ, self.w_join_DZ[...])


def modules(config: ModelConfig, *, rngs: nnx.Rngs) -> MTP | None:
    """The modules of all depths, stacked on a leading dimension; None for depth 0."""
    if config.num_mtp == 0:
        return None
    make = lambda key: MTP(config, rngs=nnx.Rngs(key))
    return jax.vmap(make)(jax.random.split(rngs.params(), config.num_mtp))


def ahead(tokens_BS: jax.Array, depth: int, length: int) -> jax.Array:
    """tokens[i + depth] for positions i < length, 0 past the end; tokens may be longer."""
    shifted = tokens_BS[:, depth : depth + length]
    return jnp.pad(shifted, ((0, 0), (0, length - shifted.shape[1])))


def valid_positions(tokens_BT: jax.Array, depth: int) -> jax.Array:
    """Positions i of T at which depth `depth` has a token to read and one to predict."""
    T = tokens_BT.shape[1]
    valid_T = jnp.arange(T, dtype=jnp.int32) < T - depth
    return jnp.broadcast_to(valid_T[None, :], tokens_BT.shape)
