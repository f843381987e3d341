"""The FP8 recipe emulated: values in float64, rounded to a format and back where the recipe says.

Written from section 3.3 of the V3 report around the oracle of the tests; it shares no code with the
package. Every product of a matrix rounds its operands, and backward the gradient and, along the
tokens, both operands of the weight gradient; sums are exact. An expert's tokens are its own tiles.
"""

import contextlib
import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes

from tests.oracle import reference

MATRICES = "QD NAQ NAD YD NXC DNU FD DF".split()
TILE = 128


def to_bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


@jax.custom_vjp
def bf16(x):
    """Rounds a value, and its gradient."""
    return to_bf16(x)


bf16.defvjp(lambda x: (to_bf16(x), None), lambda _, g: (to_bf16(g),))


def scale_of(amax, power_of_two):
    # In FP32, as is the ratio below: BF16 values lie at ties often, and their digits decide.
    scale = jnp.maximum(amax.astype(jnp.float32), jnp.float32(1e-30)) * jnp.float32(1 / 448)
    return jnp.exp2(jnp.ceil(jnp.log2(scale))) if power_of_two else scale


def rounded(x, shape, power_of_two=False, mantissa=3):
    """x [M, K] in tiles of a shape, each rounded to E4M3 (or E5M6) times its scale."""
    rows, columns = shape
    m, k = x.shape
    padded = jnp.pad(x, ((0, -m % rows), (0, -k % columns)))
    tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = scale_of(jnp.max(jnp.abs(tiles), axis=(1, 3), keepdims=True), power_of_two)
    lowest, highest = (-6, 448) if mantissa == 3 else (-14, 65024)
    ratio = (tiles.astype(jnp.float32) * (1 / scale)).astype(x.dtype)
    exponent = jnp.floor(jnp.log2(jnp.maximum(jnp.abs(ratio), 2.0**lowest)))
    step = 2.0 ** (exponent - mantissa)
    codes = jnp.clip(jnp.round(ratio / step) * step, -highest, highest)
    return (codes * scale).reshape(padded.shape)[:m, :k]


by_rows = functools.partial(rounded, shape=(1, TILE))
by_tokens = functools.partial(rounded, shape=(TILE, 1))
blocks = functools.partial(rounded, shape=(TILE, TILE))


def kept(x, kind):
    """What is kept of an input: E5M6 after attention, E4M3 elsewhere."""
    if kind == "attention":
        return by_rows(x, power_of_two=True, mantissa=6)
    return by_rows(x, power_of_two=kind == "moe")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(kind, x, w):
    """x [M, K] by w [N, K]; kind: "", "moe" (powers of two), "attention"."""
    x = kept(x, kind)
    x = by_rows(x, power_of_two=True) if kind == "attention" else x
    return to_bf16(x @ blocks(w).T)


def _product_fwd(kind, x, w):
    return product(kind, x, w), (kept(x, kind), w)


def _product_bwd(kind, saved, dy):
    x, w = saved
    dw = by_tokens(dy).T @ by_tokens(x, power_of_two=kind != "")
    return to_bf16(by_rows(dy) @ blocks(w)), dw


product.defvjp(_product_fwd, _product_bwd)


def hidden(gate, up, weight):
    return to_bf16(reference.silu(gate) * up * weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def down(kind, gate, up, weight, w):
    """W_down (SiLU(gate) * up * weight), gate and up kept in FP8."""
    return to_bf16(by_rows(hidden(gate, up, weight)) @ blocks(w).T)


def _down_fwd(kind, gate, up, weight, w):
    return down(kind, gate, up, weight, w), (by_rows(gate), by_rows(up), weight, w)


def _down_bwd(kind, saved, dy):
    gate, up, weight, w = saved
    exact = kind == "experts"
    dy = by_rows(dy, power_of_two=True) if exact else dy
    dhidden = to_bf16(by_rows(dy, power_of_two=exact) @ blocks(w))
    formula = lambda gate, up, weight: reference.silu(gate) * up * weight
    dgate, dup, dweight = jax.vjp(formula, gate, up, weight)[1](dhidden)
    dw = by_tokens(dy, power_of_two=exact).T @ by_tokens(hidden(gate, up, weight))
    return to_bf16(dgate), to_bf16(dup), dweight, dw


down.defvjp(_down_fwd, _down_bwd)


def einsum(signature, a, b, **options):
    """jnp.einsum, but for products of the recipe's matrices."""
    operands, out = signature.split("->")
    left, right = operands.split(",")
    if right == "VD":
        return head(a, b)
    if right == "BSNU":
        return bf16(jnp.einsum(signature, bf16(a), b, **options))
    if right in ("BSNH", "BSR"):
        return jnp.einsum(signature, bf16(a), bf16(b), **options)
    if right not in MATRICES:
        return jnp.einsum(signature, a, b, **options)
    shared = [letter for letter in right if letter in left]
    k = 1
    for letter in shared:
        k *= b.shape[right.index(letter)]
    y = product("attention" if right == "DNU" else "", a.reshape(-1, k), b.reshape(-1, k))
    sizes = {**dict(zip(left, a.shape, strict=True)), **dict(zip(right, b.shape, strict=True))}
    return y.reshape([sizes[letter] for letter in out])


@jax.custom_vjp
def head(x_BTD, w_VD):
    """Logits of a product in BF16."""
    return jnp.einsum("BTD,VD->BTV", x_BTD, to_bf16(w_VD))


def _head_bwd(saved, g):
    x_BTD, w_VD = saved
    g = to_bf16(g)
    return (
        to_bf16(jnp.einsum("BTV,VD->BTD", g, to_bf16(w_VD))),
        jnp.einsum("BTV,BTD->VD", g, x_BTD),
    )


head.defvjp(lambda x, w: (head(x, w), (x, w)), _head_bwd)


def block(x_BTD, weights, bias_E, config, segments_BT, *, dense):
    """The oracle's, with the residual stream in BF16."""
    x_BTD, eps = bf16(x_BTD), config.norm_eps
    normed = reference.rms_norm(x_BTD, weights["attention_norm_D"], eps)
    attended = reference.attention(normed, weights["attention"], config, segments_BT)
    x_BTD = bf16(x_BTD + attended)
    normed = reference.rms_norm(x_BTD, weights["ffn_norm_D"], eps)
    if dense:
        return bf16(x_BTD + feed_forward(normed, weights["ffn"])), None
    out_BTD, record = mixture(normed, weights["ffn"], bias_E, config)
    return bf16(x_BTD + out_BTD), record


def feed_forward(x_BTD, weights, kind=""):
    x = x_BTD.reshape(-1, x_BTD.shape[-1])
    gate, up = product(kind, x, weights["w_gate_FD"]), product(kind, x, weights["w_up_FD"])
    return down("", gate, up, jnp.ones((x.shape[0], 1)), weights["w_down_DF"]).reshape(x_BTD.shape)


def mixture(x_BTD, weights, bias_E, config):
    weight_BTE, record = reference.route(x_BTD, weights["router_ED"], bias_E, config)
    x, weight_TE = x_BTD.reshape(-1, x_BTD.shape[-1]), weight_BTE.reshape(-1, config.num_experts)
    out = feed_forward(x_BTD, weights["shared"], "moe")
    total = jnp.zeros_like(x)
    for e in range(config.num_experts):
        weight = weight_TE[:, e : e + 1]
        own = weight > 0
        # Its tokens one after another, in their order.
        first = jnp.argsort(~own[:, 0], stable=True)
        mine = jnp.where(own, x, 0)[first]
        gate = product("moe", mine, weights["w_gate_EFD"][e])
        up = product("moe", mine, weights["w_up_EFD"][e])
        y = down("experts", gate, up, weight[first], weights["w_down_EDF"][e])
        total = total + jnp.where(own, jnp.zeros_like(y).at[first].set(y), 0)
    return bf16(out + bf16(total).reshape(x_BTD.shape)), record


@contextlib.contextmanager
def recipe():
    """The oracle computes in the FP8 recipe."""
    plain_norm = reference.rms_norm
    norm = lambda x, weight, eps: bf16(plain_norm(x, weight, eps))
    patched = SimpleNamespace(**{**vars(jnp), "einsum": einsum})
    with mock.patch.multiple(
        reference,
        jnp=patched,
        rms_norm=norm,
        block=block,
    ):
        yield
