"""Multi-head latent attention: expanded for training and prefill, absorbed on the latent cache.

Both forms read the same stored weights (ISCA section 2.1.1, V3 report eqs. 1-11). Cached per token
and layer: Y = C + R elements, the normalised latent and the rotated key that all heads share.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from deepseek_jax import few_rows, fp8
from deepseek_jax.config import ModelConfig
from deepseek_jax.e5m6 import E5M6, decode_e5m6, e5m6_letters, encode_e5m6, to_e5m6
from deepseek_jax.latent_cache import LatentCache
from deepseek_jax.layers import normal, norms_for, ones
from deepseek_jax.linear import Activation, linear, linears
from deepseek_jax.rope import rotate, softmax_scale
from pallas_kernels.mla_attention import (
    mla_attention,
    mla_attention_backward,
    mla_attention_forward,
)
from pallas_kernels.mosaic import target
from pallas_kernels.products import einsum
from sharding import local, shard
from sharding.placement import on_several_devices


class Attention(nnx.Module):
    """The matrices of MLA. kv_a and kv_b are one stored matrix each, as in released weights."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, N, A, Q = (config.model_dim, config.num_heads, config.query_key_dim,
                      config.query_latent_dim)
        C, H, U = config.kv_latent_dim, config.content_head_dim, config.value_head_dim
        if Q is None:
            self.wq_NAD = normal(rngs, (N, A, D), config)
        else:
            self.wq_a_QD = normal(rngs, (Q, D), config)
            self.q_norm_Q = ones(Q)
            self.wq_b_NAQ = normal(rngs, (N, A, Q), config)
        self.wkv_a_YD = normal(rngs, (config.cache_dim, D), config)
        self.kv_norm_C = ones(C)
        self.wkv_b_NXC = normal(rngs, (N, H + U, C), config)
        self.wo_DNU = normal(rngs, (D, N, U), config)

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: Activation,
        rotations_BTr,
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        cache: LatentCache | None = None,
        start_B: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], jax.Array | LatentCache]:
        """Returns the output and what is cached of these tokens: latent_BTY, or the new cache.

        With a cache the T tokens stand at positions start_B + t of it and see what lies before.
        """
        latent_BTQ, content_BTC, rotary_BTR = latents(self, x_BTD, rotations_BTr)
        q_BTNH, q_BTNR = queries(self, latent_BTQ, rotations_BTr)
        latent_BTY = jnp.concatenate((fp8.values(content_BTC), rotary_BTR), axis=-1)
        if cache is None:
            q_BTNA = jnp.concatenate((q_BTNH, q_BTNR), axis=-1)
            o_BTNU = expanded(self, q_BTNA, content_BTC, rotary_BTR, segments_BT)
            kept = latent_BTY
        else:
            kept = cache.append(few_rows.in_order(latent_BTY), start_B)
            o_BTNU = on_cache(self, q_BTNH, q_BTNR, kept, start_B)
        return shard(linear("BTNU,DNU->BTD", o_BTNU, self.wo_DNU[...]), "BTD"), kept


def latents(
    attention: Attention, x_BTD: Activation, rotations_BTr
) -> tuple[Activation, Activation, Float[Array, "B T R"]]:
    """What queries are made of, RMSNorm(W_DQ h) or h itself, and what MLA caches.

    That is RMSNorm(W_DKV h) and RoPE(W_KR h) (V3 eqs. 1, 3 and 6).
    """
    config = attention.config
    down = "BTD,YD->BTY", attention.wkv_a_YD[...]
    if config.query_latent_dim is None:
        down_BTY = checkpoint_name(linear(down[0], x_BTD, down[1]), "latent")
    else:
        pair = linears(x_BTD, ("BTD,QD->BTQ", attention.wq_a_QD[...]), down)
        latent_BTQ, down_BTY = checkpoint_name(pair, "latent")
    content, rotary = jnp.split(down_BTY, [config.kv_latent_dim], axis=-1)
    rotary_BTR = rotate(rotary[:, :, None, :], rotations_BTr)[:, :, 0, :]
    content_norm = attention.wkv_b_NXC[...], content, attention.kv_norm_C[...], "BTC"
    if config.query_latent_dim is None:
        (content,) = norms_for(content_norm, eps=config.latent_norm_eps)
        return x_BTD, content, rotary_BTR
    query_norm = attention.wq_b_NAQ[...], latent_BTQ, attention.q_norm_Q[...], "BTQ"
    return *norms_for(query_norm, content_norm, eps=config.latent_norm_eps), rotary_BTR


def queries(
    attention: Attention, latent_BTQ: Activation, rotations_BTr
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N R"]]:
    """Content and rotated part of each head's query (V3 eqs. 7-9)."""
    config = attention.config
    if config.query_latent_dim is None:
        q_BTNA = linear("BTD,NAD->BTNA", latent_BTQ, attention.wq_NAD[...])
    else:
        q_BTNA = linear("BTQ,NAQ->BTNA", latent_BTQ, attention.wq_b_NAQ[...])
    q_BTNH, q_BTNR = jnp.split(q_BTNA, [config.content_head_dim], axis=-1)
    return q_BTNH, rotate(q_BTNR, rotations_BTr)


def expanded(
    attention: Attention, q_BTNA, content_BTC: Activation, rotary_BTR, segments_BT
) -> Activation:
    """Attention on keys and values expanded per head from the latent (V3 eqs. 2, 4, 5, 10)."""
    config = attention.config
    kv_BTNX = linear("BTC,NXC->BTNX", content_BTC, attention.wkv_b_NXC[...])
    k_BTNH, v_BTNU = jnp.split(kv_BTNX, [config.content_head_dim], axis=-1)
    shared = jnp.broadcast_to(
        rotary_BTR[:, :, None, :], (*k_BTNH.shape[:-1], config.rotary_head_dim)
    )
    k_BTNA = jnp.concatenate((k_BTNH, shared), axis=-1)
    inputs, operands = "BTNA,BTNA,BTNU", (q_BTNA, k_BTNA, v_BTNU)
    if segments_BT is not None:
        inputs, operands = f"{inputs},BT", (*operands, segments_BT)
    if fp8.is_quantized(attention.wo_DNU[...]):
        attend = functools.partial(attend_e5m6, softmax_scale(config))
        outputs = f"BTNU,{e5m6_letters('BTNU')}"
        return E5M6(*local(attend, f"{inputs}->{outputs}", whole="T")(*operands))
    attend = functools.partial(attend_plain, softmax_scale(config))
    o_BTNU = local(attend, f"{inputs}->BTNU", whole="T")(*operands)
    return checkpoint_name(shard(o_BTNU, "BTNU"), "attention")


def attend_plain(scale: float, q_BTNA, k_BTNA, v_BTNU, segments_BT=None) -> jax.Array:
    return mla_attention(q_BTNA, k_BTNA, v_BTNU, scale=scale, segments_BT=segments_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_e5m6(scale: float, q_BTNA, k_BTNA, v_BTNU, segments_BT=None):
    """Attention with its output rounded to E5M6, as values and codes: all that is kept of it."""
    return _attend_e5m6_fwd(scale, q_BTNA, k_BTNA, v_BTNU, segments_BT)[0]


def _attend_e5m6_fwd(scale, q_BTNA, k_BTNA, v_BTNU, segments_BT):
    o_BTNU, log_sum_exp = mla_attention_forward(
        q_BTNA, k_BTNA, v_BTNU, scale=scale, segments_BT=segments_BT
    )
    codes = encode_e5m6(o_BTNU.reshape(*o_BTNU.shape[:2], -1))
    codes, log_sum_exp = checkpoint_name((codes, log_sum_exp), "attention")
    kept = E5M6(None, *codes)
    o_BTNU = decode_e5m6(kept, o_BTNU.shape)
    return (o_BTNU, *codes), (q_BTNA, k_BTNA, v_BTNU, segments_BT, kept, log_sum_exp)


def _attend_e5m6_bwd(scale, saved, gradients):
    q_BTNA, k_BTNA, v_BTNU, segments_BT, kept, log_sum_exp = saved
    dq_BTNA, dk_BTNA, dv_BTNU = mla_attention_backward(
        q_BTNA,
        k_BTNA,
        v_BTNU,
        decode_e5m6(kept, v_BTNU.shape),
        log_sum_exp,
        gradients[0],
        scale=scale,
        segments_BT=segments_BT,
    )
    return dq_BTNA, dk_BTNA, dv_BTNU, None


attend_e5m6.defvjp(_attend_e5m6_fwd, _attend_e5m6_bwd)


def on_cache(attention: Attention, q_BTNH, q_BTNR, cache: LatentCache, start_B) -> Activation:
    """Attention on the cache; a CPU reads a quarter or half of it while that holds all texts."""
    S, T = cache.capacity, q_BTNH.shape[1]

    def on_first(s: int):
        return absorbed(attention, q_BTNH, q_BTNR, cache.read(q_BTNH.dtype, s), start_B)

    if target().platform != "cpu" or on_several_devices():
        return on_first(S)
    parts = [max(S // 4, 1), max(S // 2, 1), S]
    part = sum((jnp.max(start_B) + T > s).astype(jnp.int32) for s in parts[:-1])
    return jax.lax.switch(part, [functools.partial(on_first, s) for s in parts])


def absorbed(attention: Attention, q_BTNH, q_BTNR, cache_BSY, start_B) -> Activation:
    """The same attention with W_UK moved to the query and W_UV to the output.

    Every head reads the cached latents as they are: keys of C + R, values of C elements.
    """
    config = attention.config
    wkv_b_NXC = fp8.plain(attention.wkv_b_NXC[...], q_BTNH.dtype)
    w_k_NHC, w_v_NUC = jnp.split(wkv_b_NXC, [config.content_head_dim], axis=1)
    T, S = q_BTNH.shape[1], cache_BSY.shape[1]
    few = few_rows.is_little_attention(q_BTNH, cache_BSY)
    in_products = lambda signature, x, weight: einsum(signature, x, weight, x.dtype)
    product = few_rows.einsum_in_sums if few else in_products
    look = look_in_sums if few else look_in_products
    q_BTNC = product("BTNH,NHC->BTNC", q_BTNH, w_k_NHC)
    q_BTNY = jnp.concatenate((q_BTNC, q_BTNR), axis=-1)
    last_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    seen_BTS = jnp.arange(S, dtype=jnp.int32)[None, None, :] <= last_BT[:, :, None]
    z_BTNC = look(config, q_BTNY, cache_BSY, seen_BTS)
    o_BTNU = product("BTNC,NUC->BTNU", z_BTNC, w_v_NUC.astype(z_BTNC.dtype))
    return to_e5m6(o_BTNU) if fp8.is_quantized(attention.wo_DNU[...]) else o_BTNU


def look_in_products(config: ModelConfig, q_BTNY, cache_BSY, seen_BTS) -> jax.Array:
    """softmax(q c) c over the cached latents c, as two products."""
    score_BNTS = softmax_scale(config) * einsum("BTNY,BSY->BNTS", q_BTNY, cache_BSY)
    score_BNTS = jnp.where(seen_BTS[:, None], score_BNTS, -jnp.inf)
    # The softmax is divided by its sum after the values: two passes less over the scores.
    top_BNT1 = jnp.max(score_BNTS, axis=-1, keepdims=True)
    weight_BNTS = jnp.exp(score_BNTS - top_BNT1)
    total_BNT1 = jnp.sum(weight_BNTS, axis=-1, keepdims=True)
    # Rotated keys are among the values and dropped: a slice of the cache would be a copy.
    z_BNTY = einsum("BNTS,BSY->BNTY", weight_BNTS.astype(cache_BSY.dtype), cache_BSY)
    z_BNTC = (z_BNTY[..., : config.kv_latent_dim] / total_BNT1).astype(cache_BSY.dtype)
    return z_BNTC.swapaxes(1, 2)


def look_in_sums(config: ModelConfig, q_BTNY, cache_BSY, seen_BTS) -> jax.Array:
    """The same as sums: a GPU makes two kernels of it, where products take seven or eight."""
    B, T, N, Y = q_BTNY.shape
    S, C = cache_BSY.shape[1], config.kv_latent_dim
    q_BR1Y = q_BTNY.reshape(B, T * N, 1, Y).astype(jnp.float32)
    cache_B1SY = cache_BSY[:, None].astype(jnp.float32)
    score_BRS = softmax_scale(config) * jnp.sum(q_BR1Y * cache_B1SY, axis=-1)
    seen_BRS = jnp.broadcast_to(seen_BTS[:, :, None], (B, T, N, S)).reshape(B, T * N, S)
    weight_BRS = jax.nn.softmax(jnp.where(seen_BRS, score_BRS, -jnp.inf), axis=-1)
    z_BRC = jnp.sum(weight_BRS[..., None] * cache_B1SY[..., :C], axis=-2)
    # Or every row of the product that reads it would sum it again.
    z_BRC = jax.lax.optimization_barrier(z_BRC.astype(cache_BSY.dtype))
    return z_BRC.reshape(B, T, N, C)
