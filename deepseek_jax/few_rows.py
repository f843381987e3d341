"""Products of few rows, as decoding makes them: what counts is how the weights are read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import target
from sharding.placement import on_several_devices

MOST_ROWS = 64
MOST_SUMMED = 4  # rows that an accelerator reads weights for in sums
CACHED_BYTES = 2**24  # a weight that several rows read one after the other, from memory once
MOST_PRODUCTS = 2**24  # of attention: on an H200 3 microseconds of sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Few normalised rows as `rows * scale`: products of `rows` are scaled afterwards.

    So nothing waits for the sum of the norm but what comes after the products.
    """

    rows: jax.Array  # FP32 [..., K]
    scale: jax.Array  # FP32 [..., 1]
    dtype: jax.typing.DTypeLike = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    @property
    def x(self) -> jax.Array:
        """The normalised rows themselves."""
        return (self.rows * self.scale).astype(self.dtype)


def are_few(x: jax.Array) -> bool:
    """Whether x is few rows on one accelerator, where each small kernel costs time."""
    few = x.size // x.shape[-1] <= MOST_SUMMED
    return few and target().platform != "cpu" and not on_several_devices()


def in_order(x: jax.Array) -> jax.Array:
    """Few rows one after the other in memory, or a cache that they are added to is turned around.
    """
    return with_layout_constraint(x, Layout(range(x.ndim))) if are_few(x) else x


def normed(
    *rows_and_gains: tuple[Float[Array, "... D"], Float[Array, " D"]], eps: float
) -> list[Scaled]:
    """RMSNorm of few rows, several of any length at once: all sums are made by one kernel."""
    longest = max(x.shape[-1] for x, _ in rows_and_gains)
    squares, made = [], []
    for x, gain in rows_and_gains:
        x32, size = x.astype(jnp.float32), x.shape[-1]
        # Epsilon is part of the sum, so that the root of the sum is all that is left to do.
        square = (x32 * x32 + eps) * (1 / size)
        squares.append(jnp.pad(square, ((0, 0),) * (x.ndim - 1) + ((0, longest - size),)))
        made.append(x32 * gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + gain.shape))
    scales = jax.lax.rsqrt(jnp.sum(jnp.stack(squares), axis=-1, keepdims=True))
    return [
        Scaled(rows, scale, x.dtype)
        for rows, scale, (x, _) in zip(made, scales, rows_and_gains, strict=True)
    ]


def letters(signature: str) -> tuple[str, str, str]:
    """Of the two operands and the result of an einsum."""
    operands, out = signature.split("->")
    left, right = operands.split(",")
    return left, right, out


def packs_weights(left: str, out: str, x: jax.Array, weight: jax.Array) -> bool:
    """Whether the CPU's product of x [left] and a weight would copy the weight.

    To pack it or, for one row and several dimensions, to turn it around.
    """
    rows = math.prod(n for letter, n in zip(left, x.shape, strict=True) if letter in out)
    return (
        target().platform == "cpu"
        and x.dtype == weight.dtype == jnp.float32
        and rows <= MOST_ROWS < weight.size
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


def is_summed(signature: str, x: jax.Array, weight: jax.Array) -> bool:
    """Whether x has so few rows that sums read the weight fastest, not a product."""
    left, right, out = letters(signature)
    summed = "".join(letter for letter in right if letter not in out)
    rows = math.prod(n for letter, n in zip(left, x.shape, strict=True) if letter in out)
    whole = bool(summed) and right.endswith(summed) and left.endswith(summed)
    # Each row reads the weight: the rows after the first from a cache on the device.
    most = 1 if weight.nbytes > CACHED_BYTES else MOST_SUMMED
    return whole and 0 < rows <= most and target().platform != "cpu"


def sums(signature: str, x: jax.Array | Scaled, weight: jax.Array) -> jax.Array:
    """einsum(signature, x, weight) in FP32: a product of few rows would pad and split weights."""
    if isinstance(x, Scaled):
        y = sums(signature, x.rows, weight)
        return y * x.scale.reshape(x.scale.shape[:-1] + (1,) * (y.ndim - x.scale.ndim + 1))
    left, right, out = letters(signature)
    lead = tuple(n for letter, n in zip(left, x.shape, strict=True) if letter in out)
    made = tuple(n for letter, n in zip(right, weight.shape, strict=True) if letter in out)
    x_RK = x.reshape(math.prod(lead), -1).astype(jnp.float32)
    w_NK = weight.reshape(math.prod(made), -1).astype(jnp.float32)
    y_NR = jnp.sum(w_NK[:, None] * x_RK[None], axis=-1)
    return y_NR.T.reshape(lead + made)


def best(
    biased_RE: Float[Array, "... E"], score_RE: Float[Array, "... E"], k: int
) -> tuple[Int[Array, "... k"], Float[Array, "... k"]]:
    """Where the k largest of each row are, the first of equals first, and their scores.

    Places are counted: a GPU sorts a row in one slow kernel after a copy.
    """
    E, lead = biased_RE.shape[-1], (None,) * (biased_RE.ndim - 1)
    ids_E = jnp.arange(E, dtype=jnp.int32)
    mine, other = biased_RE[..., :, None], biased_RE[..., None, :]
    before = (ids_E[None, :] < ids_E[:, None])[lead]
    ahead_RE = jnp.sum((other > mine) | ((other == mine) & before), axis=-1, dtype=jnp.int32)
    is_at_RkE = ahead_RE[..., None, :] == jnp.arange(k, dtype=jnp.int32)[:, None][lead]
    at_Rk = jnp.sum(jnp.where(is_at_RkE, ids_E, 0), axis=-1)
    score_Rk = jnp.sum(jnp.where(is_at_RkE, score_RE[..., None, :], 0.0), axis=-1)
    # Several are first where scores are not numbers.
    return jnp.minimum(at_Rk, E - 1), score_Rk


def is_little_attention(q_BTNA: jax.Array, cache_BSY: jax.Array) -> bool:
    """Whether products would take an accelerator longer to start than sums to look at all."""
    B, T, N, _ = q_BTNA.shape
    products = B * T * N * math.prod(cache_BSY.shape[1:])
    return target().platform != "cpu" and products <= MOST_PRODUCTS


def einsum_in_sums(signature: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum(signature, x, weight) of a batch of small matrices, summed in FP32."""
    left, right, out = letters(signature)
    (summed,) = (letter for letter in right if letter not in out)
    order = "".join(letter for letter in left if letter in out)
    order += "".join(letter for letter in right if letter not in order)
    wide = lambda side, array: jnp.expand_dims(
        jnp.einsum(f"{side}->{''.join(i for i in order if i in side)}", array.astype(jnp.float32)),
        [at for at, i in enumerate(order) if i not in side],
    )
    y = jnp.sum(wide(left, x) * wide(right, weight), axis=order.index(summed))
    # Or what reads it would have each of its threads make a whole sum.
    return jax.lax.optimization_barrier(y.astype(x.dtype))


def row_by_row(x_JK: Float[Array, "J K"], w_JNK: Float[Array, "J N K"]) -> Float[Array, "J N"]:
    """Row j with matrix j, summed in FP32, in the dtype of x.

    An accelerator reads matrices that were picked out of many where they lie, if it makes no
    product of it but a sum.
    """
    if target().platform == "cpu":
        return jnp.einsum("JK,JNK->JN", x_JK, w_JNK, precision=jax.lax.Precision.HIGHEST)
    product_JNK = x_JK[:, None, :].astype(jnp.float32) * w_JNK.astype(jnp.float32)
    return jnp.sum(product_JNK, axis=-1).astype(x_JK.dtype)
