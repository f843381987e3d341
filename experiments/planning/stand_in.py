"""A stand-in for cuDNN's attention where a program is compiled without the library or a card.

Its calls are kernels that do nothing, with the operands, results and saved tensors of cuDNN's, and
with what its backward pass needs as workspace: the query gradient in FP32, which it sums there.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mla_attention import cudnn
from pallas_kernels.mosaic import once, varying_like

NOTE = "cuDNN attention stood in for by an empty kernel of the same operands, results, workspace"


def install() -> None:
    """Puts the stand-in in cuDNN's place, in this process."""
    cudnn.forward, cudnn.backward, cudnn._attention = forward, backward, _attention


def forward(q_BTNA, k_BSNA, v_BSNU, *, scale: float):
    """Results of the shapes of cuDNN's: the output and the log of the sum of exponentials."""
    B, T, N, _ = q_BTNA.shape
    o_BTNU = jax.ShapeDtypeStruct(v_BSNU.shape, q_BTNA.dtype)
    sums_BNT = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    return tuple(_call("attention_forward", (o_BTNU, sums_BNT), q_BTNA, k_BSNA, v_BSNU))


def backward(q_BTNA, k_BSNA, v_BSNU, o_BTNU, log_sum_exp, do_BTNU, *, scale: float):
    """Results of the shapes of the gradients of q, k and v."""
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    results = (*(like(x, x.dtype) for x in (q_BTNA, k_BSNA, v_BSNU)), like(q_BTNA, jnp.float32))
    operands = (q_BTNA, k_BSNA, v_BSNU, o_BTNU, log_sum_exp, do_BTNU)
    return tuple(_call("attention_backward", results, *operands)[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q_BTNA, k_BSNA, v_BSNU, scale):
    return forward(q_BTNA, k_BSNA, v_BSNU, scale=scale)[0]


def _forward(q_BTNA, k_BSNA, v_BSNU, scale):
    o_BTNU, log_sum_exp = forward(q_BTNA, k_BSNA, v_BSNU, scale=scale)
    return o_BTNU, (q_BTNA, k_BSNA, v_BSNU, o_BTNU, log_sum_exp)


def _backward(scale, saved, do_BTNU):
    return backward(*saved, do_BTNU, scale=scale)


_attention.defvjp(_forward, _backward)


def _call(name, results, *operands):
    called = _kernel(name, tuple((x.shape, jnp.dtype(x.dtype)) for x in results))(*operands)
    return [varying_like(operands[0], result) for result in called]


@functools.cache
def _kernel(name, results):
    """One kernel for each signature."""

    def body(*refs):
        pass

    body.__name__ = name
    return once(plgpu.kernel(body, out_type=[jax.ShapeDtypeStruct(*x) for x in results]))
