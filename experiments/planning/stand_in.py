"""A stand-in for cuDNN's attention where a program is compiled without the library or a card.

Its calls are kernels that do nothing, with the operands, results and saved tensors of cuDNN's, and
with what its backward pass needs as workspace: the query gradient in FP32, which it sums there.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mla_attention import cudnn
from pallas_kernels.mosaic import varying_like

NOTE = "cuDNN attention stood in for by an empty kernel of the same operands, results, workspace"


def install() -> None:
    """Puts the stand-in in cuDNN's place, in this process."""
    cudnn._attention = _attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q_BTNA, k_BSNA, v_BSNU, scale):
    return _forward(q_BTNA, k_BSNA, v_BSNU, scale)[0]


def _forward(q_BTNA, k_BSNA, v_BSNU, scale):
    B, T, N, _ = q_BTNA.shape
    o_BTNU = jax.ShapeDtypeStruct(v_BSNU.shape, q_BTNA.dtype)
    sums = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    o_BTNU, sums = _call("attention_forward", (o_BTNU, sums), q_BTNA, k_BSNA, v_BSNU)
    return o_BTNU, (q_BTNA, k_BSNA, v_BSNU, sums, o_BTNU)


def _backward(scale, saved, do_BTNU):
    q_BTNA, k_BSNA, v_BSNU = saved[:3]
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    results = (*(like(x, x.dtype) for x in (q_BTNA, k_BSNA, v_BSNU)), like(q_BTNA, jnp.float32))
    return tuple(_call("attention_backward", results, *saved, do_BTNU)[:3])


_attention.defvjp(_forward, _backward)


def _call(name, results, *operands):
    def body(*refs):
        pass

    body.__name__ = name
    call = jax.jit(plgpu.kernel(body, out_type=results))
    return [varying_like(operands[0], result) for result in call(*operands)]
