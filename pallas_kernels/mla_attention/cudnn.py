"""Causal attention by cuDNN through JAX's private primitives, the one place that names them.

`jax.nn.dot_product_attention` refuses d_v != d_qk, and the private entry point asks the GPU of this
process for its capability, which a program made for an absent GPU cannot. So the two primitives are
bound here directly (jax 0.10 to 0.12 differ in one argument). cuDNN >= 9.10 takes 192 / 128 on
Hopper.
"""

import functools

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float


def _statics(scale):
    later = {"score_mod": None} if jax.__version_info__ >= (0, 12) else {}
    return later | dict(
        scale=scale,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=fused.MaskType.CAUSAL,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )


def _no_bias_lengths_offsets_pages(dtype):
    return (jnp.zeros(0, dtype),) * 7


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q_BTNA, k_BSNA, v_BSNU, scale):
    unused = _no_bias_lengths_offsets_pages(q_BTNA.dtype)
    (o_BTNU,) = fused._dot_product_attention_fwd_p_wrapper.bind(
        q_BTNA, k_BSNA, v_BSNU, *unused, is_training=False, **_statics(scale)
    )
    return o_BTNU


def forward(q_BTNA, k_BSNA, v_BSNU, *, scale: float):
    """The output, and the log of the sum of exponentials that backward wants."""
    unused = _no_bias_lengths_offsets_pages(q_BTNA.dtype)
    o_BTNU, log_sum_exp = fused._dot_product_attention_fwd_p_wrapper.bind(
        q_BTNA, k_BSNA, v_BSNU, *unused, is_training=True, **_statics(scale)
    )
    return o_BTNU, log_sum_exp


def backward(q_BTNA, k_BSNA, v_BSNU, o_BTNU, log_sum_exp, do_BTNU, *, scale: float):
    """Gradients of q, k and v."""
    unused = _no_bias_lengths_offsets_pages(q_BTNA.dtype)
    return tuple(
        fused._dot_product_attention_bwd_p_wrapper.bind(
            q_BTNA, k_BSNA, v_BSNU, *unused, log_sum_exp, o_BTNU, do_BTNU, **_statics(scale)
        )
    )


def _forward(q_BTNA, k_BSNA, v_BSNU, scale):
    o_BTNU, log_sum_exp = forward(q_BTNA, k_BSNA, v_BSNU, scale=scale)
    return o_BTNU, (q_BTNA, k_BSNA, v_BSNU, o_BTNU, log_sum_exp)


def _backward(scale, saved, do_BTNU):
    return backward(*saved, do_BTNU, scale=scale)


_attention.defvjp(_forward, _backward)


def mla_attention(
    q_BTNA: Float[Array, "B T N A"],
    k_BSNA: Float[Array, "B S N A"],
    v_BSNU: Float[Array, "B S N U"],
    *,
    scale: float,
) -> Float[Array, "B T N U"]:
    """Causal attention in BF16; cuDNN aligns the causal mask to the top left, so T == S."""
    if q_BTNA.shape[1] != k_BSNA.shape[1]:
        raise NotImplementedError(
            f"cuDNN attention needs T == S, not {q_BTNA.shape[1]} and {k_BSNA.shape[1]}: "
            "use implementation='reference'"
        )
    return _attention(q_BTNA, k_BSNA, v_BSNU, scale)
