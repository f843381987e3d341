"""Products of few rows, as decoding makes them: what counts is how the weights are read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mosaic import target
from sharding.placement import current_mesh

MOST_ROWS = 64
MOST_PRODUCTS = 2**24  # of attention: on an H200 3 microseconds of sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A normalised row as `row * scale`: products of `row` are scaled afterwards.

    So nothing waits for the sum of the norm but what comes after the products.
    """

    row: jax.Array  # FP32 [..., K]
    scale: jax.Array  # FP32 [..., 1]
    dtype: jax.typing.DTypeLike = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row.shape

    @property
    def x(self) -> jax.Array:
        """The normalised row itself."""
        return (self.row * self.scale).astype(self.dtype)


def is_scaled_after(x: jax.Array) -> bool:
    """Whether x is one row on one accelerator, where each small kernel costs time."""
    mesh = current_mesh()
    alone = mesh is None or mesh.size == 1
    return alone and x.size == x.shape[-1] and target().platform != "cpu"


def normed(x: Float[Array, "... D"], gain: Float[Array, " D"], eps: float) -> Scaled:
    """RMSNorm of one row."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return Scaled(x32 * gain.astype(jnp.float32).reshape(x.shape), scale, x.dtype)


def letters(signature: str) -> tuple[str, str, str]:
    """Of the two operands and the result of an einsum."""
    operands, out = signature.split("->")
    left, right = operands.split(",")
    return left, right, out


def packs_weights(left: str, out: str, x: jax.Array, weight: jax.Array) -> bool:
    """Whether the CPU's product of x [left] and a weight would copy the weight to pack it."""
    rows = math.prod(n for letter, n in zip(left, x.shape, strict=True) if letter in out)
    return (
        target().platform == "cpu"
        and x.dtype == weight.dtype == jnp.float32
        and 1 < rows <= MOST_ROWS < weight.size
    )


def weight_first(signature: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum(signature, x, weight), summed in FP32, with the weight as the left operand.

    The CPU's library packs right operands: half of the time where x has 16 rows.
    """
    left, right, out = letters(signature)
    made = "".join(letter for letter in right if letter in out)
    made += "".join(letter for letter in left if letter in out and letter not in made)
    y = jnp.einsum(
        f"{right},{left}->{made}",
        weight,
        x,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # Or the transposition would be made part of the product, and the operands changed back.
    y = jax.lax.optimization_barrier(y)
    return jnp.einsum(f"{made}->{out}", y).astype(x.dtype)


def is_one_row(signature: str, x: jax.Array, weight: jax.Array) -> bool:
    """Whether x is one row, on a device that reads weights fastest in a sum, not a product."""
    left, right, out = letters(signature)
    summed = "".join(letter for letter in right if letter not in out)
    rows = math.prod(n for letter, n in zip(left, x.shape, strict=True) if letter in out)
    whole = bool(summed) and right.endswith(summed) and left.endswith(summed)
    return whole and rows == 1 and target().platform != "cpu"


def one_row(signature: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum(signature, x, weight) of one row, in FP32: a product would pad and split weights."""
    left, right, out = letters(signature)
    made = tuple(n for letter, n in zip(right, weight.shape, strict=True) if letter in out)
    x_K = x.reshape(-1).astype(jnp.float32)
    w_NK = weight.reshape(-1, x_K.size).astype(jnp.float32)
    y_N = jnp.sum(x_K[None, :] * w_NK, axis=-1)
    return y_N.reshape((1,) * sum(letter in out for letter in left) + made)


def is_little_attention(q_BTNY: jax.Array, length: int) -> bool:
    """Whether products would take an accelerator longer to start than sums to look at all."""
    return target().platform != "cpu" and q_BTNY.size * length <= MOST_PRODUCTS


def row_by_row(x_JK: Float[Array, "J K"], w_JNK: Float[Array, "J N K"]) -> Float[Array, "J N"]:
    """Row j with matrix j, summed in FP32, in the dtype of x.

    An accelerator reads matrices that were picked out of many where they lie, if it makes no
    product of it but a sum.
    """
    if target().platform == "cpu":
        return jnp.einsum("JK,JNK->JN", x_JK, w_JNK, precision=jax.lax.Precision.HIGHEST)
    product_JNK = x_JK[:, None, :].astype(jnp.float32) * w_JNK.astype(jnp.float32)
    return jnp.sum(product_JNK, axis=-1).astype(x_JK.dtype)
