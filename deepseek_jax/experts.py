"""The feed-forward networks of the routed experts: rows sorted by expert in, tokens out."""

import dataclasses
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from deepseek_jax import fp8
from deepseek_jax.config import COMBINE, logfmt_bits
from deepseek_jax.fp8 import Quantized, QuantizedWeight
from deepseek_jax.swiglu import gated_ffn_fp8, swiglu
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.logfmt import decode_logfmt, encode_logfmt
from sharding.exchange import Results, as_they_are
from sharding.expert_parallel import Path, combine, dispatch, send

Weight = jax.Array | QuantizedWeight


def expert_ffn(
    x_MD: jax.Array | Quantized,
    weight_M: Float[Array, " M"],
    weights: tuple[Weight, Weight, Weight],
    path: Path,
    alignment: int,
) -> Float[Array, "T D"]:
    """The sum over a token's rows of weight_m W_down (SiLU(W_gate x_m) * W_up x_m).

    The routing weight is multiplied into the SwiGLU output, so combine is a plain sum. In FP8 the
    gradients of tokens go to the rows as codes and scales.

    Args:
      weights: w_gate_EFD, w_up_EFD, w_down_EDF; of each row those of its expert.
      path: on which the rows came; groups of rows start at multiples of `alignment`.
    """
    w_gate_EFD, w_up_EFD, w_down_EDF = weights
    sizes_E = path.rows.group_sizes_E
    if fp8.is_quantized(w_down_EDF):
        return gated_ffn_fp8(x_MD, weights, weight_M, sizes_E, path)
    matmul = functools.partial(grouped_matmul, group_sizes_G=sizes_E, alignment=alignment)
    gate_MF = checkpoint_name(matmul(x_MD, w_gate_EFD), "ffn_hidden")
    up_MF = checkpoint_name(matmul(x_MD, w_up_EFD), "ffn_hidden")
    return combine(matmul(swiglu(gate_MF, up_MF, weight_M[:, None]), w_down_EDF), path)


def to_rows(x_TD: jax.Array | Quantized, path: Path) -> jax.Array | Quantized:
    """Tokens to the rows of their experts; quantised ones travel as codes and scales."""
    if isinstance(x_TD, Quantized):
        assert x_TD.power_of_two, "of scales only exponents travel"
        x_MD, *codes = _send_codes(path.hops, x_TD.x, x_TD.codes, x_TD.scale, path.layouts)
        codes, scale = fp8.kept_as("expert_input", *codes)
        return dataclasses.replace(x_TD, x=x_MD, codes=codes, scale=scale)
    return checkpoint_name(dispatch(x_TD, path), "expert_input")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send_codes(hops, x_TD, codes, scale, layouts):
    codes, scale = fp8.from_wire(*send(fp8.to_wire(codes, scale), Path(layouts, hops)))
    # No product reads the values; the gradient of the rows belongs to them.
    return fp8.decode_tiles(codes, scale, x_TD.shape[-1]), codes, scale


def _send_codes_fwd(hops, x_TD, codes, scale, layouts):
    return _send_codes(hops, x_TD, codes, scale, layouts), layouts


def _send_codes_bwd(hops, layouts, gradients):
    return combine(gradients[0], Path(layouts, hops)), None, None, None


_send_codes.defvjp(_send_codes_fwd, _send_codes_bwd)


@functools.cache
def results_format(combine: str) -> Results:
    """How results go back: as they are, or in LogFMT of so many bits, rounded at every hop."""
    if combine not in COMBINE:
        raise ValueError(f"{combine=} must be one of {', '.join(COMBINE)}")
    bits = logfmt_bits(combine)
    if bits is None:
        return as_they_are

    def in_logfmt(y_MD, exchange):
        sent = jax.tree.map(exchange, encode_logfmt(y_MD, bits))
        return decode_logfmt(sent, bits, y_MD.shape[-1], dtype=y_MD.dtype)

    return in_logfmt
