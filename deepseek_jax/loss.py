"""Cross-entropy from hidden states, in chunks: logits of all tokens never exist at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.linear import einsum
from sharding import local

# Elements of one FP32 chunk of logits on a device: 256 MiB.
CHUNK_ELEMENTS = 64 * 2**20


@jax.named_scope("loss")
def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weight_BT: Float[Array, "B T"],
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Array, ""]:
    """sum over tokens of weight * -log softmax(head hidden)[target], FP32.

    Products multiply in the dtype of the hidden states; logits, softmax and the gradient of the
    head are FP32. The gradient is made together with the value, chunk by chunk, so that logits
    are computed once.
    """
    summed = functools.partial(_cross_entropy, chunk_elements)
    # The gradients are made with the value. A checkpoint would keep the sums of every chunk.
    loss = local(summed, "BTD,VD,BT,BT->", whole="V", again=False)
    return loss(hidden_BTD, head_VD, targets_BT, weight_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(chunk_elements, hidden_BTD, head_VD, targets_BT, weight_BT):
    head = head_VD.astype(hidden_BTD.dtype)

    def chunk(total, inputs):
        hidden_BtD, targets_Bt, weight_Bt = inputs
        loss, _ = _chunk_loss(hidden_BtD, head, targets_Bt, weight_Bt)
        return total + loss, None

    zero = _zero_like_varying(hidden_BTD)
    total, _ = jax.lax.scan(
        chunk, zero, _chunks(chunk_elements, head_VD, hidden_BTD, targets_BT, weight_BT)
    )
    return total


def _cross_entropy_fwd(chunk_elements, hidden_BTD, head_VD, targets_BT, weight_BT):
    head = head_VD.astype(hidden_BTD.dtype)

    def chunk(carry, inputs):
        total, dhead_VD = carry
        hidden_BtD, targets_Bt, weight_Bt = inputs
        loss, dlogits_BtV = _chunk_loss(hidden_BtD, head, targets_Bt, weight_Bt)
        dlogits_BtV = dlogits_BtV.astype(hidden_BtD.dtype)
        dhidden_BtD = einsum("BtV,VD->BtD", dlogits_BtV, head, hidden_BtD.dtype)
        dhead_VD = dhead_VD + einsum("BtV,BtD->VD", dlogits_BtV, hidden_BtD, jnp.float32)
        return (total + loss, dhead_VD), dhidden_BtD

    zero = _zero_like_varying(hidden_BTD)
    dhead_VD = jnp.zeros(head_VD.shape, jnp.float32) + zero
    (total, dhead_VD), dhidden = jax.lax.scan(
        chunk,
        (zero, dhead_VD),
        _chunks(chunk_elements, head_VD, hidden_BTD, targets_BT, weight_BT),
    )
    return total, (_unchunk(dhidden, hidden_BTD.shape), dhead_VD.astype(head_VD.dtype))


def _cross_entropy_bwd(chunk_elements, residuals, g):
    dhidden_BTD, dhead_VD = residuals
    # In FP32: a weight rounded to BF16 would scale the gradient by up to 0.4 % too much or little.
    scaled = lambda x: (x.astype(jnp.float32) * g).astype(x.dtype)
    return scaled(dhidden_BTD), scaled(dhead_VD), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _chunk_loss(hidden_BtD, head_VD, targets_Bt, weight_Bt):
    """The weighted sum of a chunk, and the FP32 gradient of its logits."""
    logits_BtV = einsum("BtD,VD->BtV", hidden_BtD, head_VD, jnp.float32)
    logits_BtV = logits_BtV - jnp.max(logits_BtV, axis=-1, keepdims=True)
    exp_BtV = jnp.exp(logits_BtV)
    sum_Bt1 = jnp.sum(exp_BtV, axis=-1, keepdims=True)
    picked_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
    loss = jnp.sum(weight_Bt * (jnp.log(sum_Bt1[..., 0]) - picked_Bt))
    ids = jnp.arange(logits_BtV.shape[-1], dtype=targets_Bt.dtype)
    target_BtV = (ids[None, None, :] == targets_Bt[..., None]).astype(jnp.float32)
    return loss, (exp_BtV / sum_Bt1 - target_BtV) * weight_Bt[..., None]


def _chunks(chunk_elements, head_VD, *arrays_BT):
    """Each array cut along T into equal chunks on a new leading dimension."""
    B, T = arrays_BT[0].shape[:2]
    smallest = -(-B * T * head_VD.shape[0] // chunk_elements)
    count = next(n for n in range(min(smallest, T), T + 1) if T % n == 0)
    return tuple(
        jnp.moveaxis(x.reshape(B, count, T // count, *x.shape[2:]), 1, 0) for x in arrays_BT
    )


def _unchunk(x_cBtD, shape):
    return jnp.moveaxis(x_cBtD, 0, 1).reshape(shape)


def _zero_like_varying(x):
    """A FP32 zero that varies over the mesh axes that `x` varies over."""
    return jnp.sum(x[:0].astype(jnp.float32))

