"""The FP8 recipe: weights and activations as codes and scales, and what is kept of each for later.

V3 report, section 3.3: E4M3 everywhere; activations and gradients in tiles of 1 x 128, weights in
blocks of 128 x 128; the input of the linear layer after attention in E5M6. Embedding, head, router,
norms and the attention core stay as they are. The products are in linear.py and, of gated networks
(the experts' among them), in swiglu.py.

What is quantised carries the array that its gradient belongs to and that no product reads: codes
have no gradient. XLA drops it where nothing else needs it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.e5m6 import E5M6, decode_e5m6, e5m6_letters
from pallas_kernels.quantize_fp8 import (
    Blocks,
    Tiles,
    quantize_blocks,
    quantize_tiles,
    retile,
    rms_norm_tiles,
)
from sharding import local
from sharding.placement import shard_weight, stored_shape
from sharding.rules import is_router, letters_of

TILE = 128
# Matrices that stay as they are, beside vectors and routers: see `is_in_fp8`.
KEPT = ("embed_VD", "head_VD")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix in blocks, quantised once for all products with it.

    target has the matrix's shape and is not read: its cotangent is the gradient of the matrix, in
    FP32. It is the master; or, to `accumulate`, the sum so far, and then the cotangent is that sum
    plus the gradient. `implementation` is that of its products: None for the device's kernels, or
    "reference".
    """

    target: jax.Array
    blocks: Blocks
    accumulate: bool = dataclasses.field(default=False, metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.shape

    def __getitem__(self, index) -> "QuantizedWeight":
        """The weight of a layer of a stack; all of it for an ellipsis, as nnx asks."""
        return jax.tree.map(lambda leaf: leaf[index], self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """An activation in tiles along its last dimension K; codes and scales are per token.

    x [..., K] is what was quantised; codes [..., 128 k] and scale [..., k].
    """

    x: jax.Array
    codes: jax.Array
    scale: jax.Array
    power_of_two: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


def values(x: jax.Array | Quantized | E5M6) -> jax.Array:
    """The activation as an array."""
    return x if isinstance(x, jax.Array) else x.x


def is_quantized(weight: Any) -> bool:
    return isinstance(weight, QuantizedWeight)


# Weights.


def sides(letters: str) -> tuple[str, str, str]:
    """Leading, output and contracted letters of a weight: "EFD" -> ("E", "F", "D")."""
    lead = "E" if letters[0] == "E" else ""
    rest = letters[len(lead) :]
    outputs = 1 if rest == "DNU" else len(rest) - 1
    return lead, rest[:outputs], rest[outputs:]


def quantize_weight(
    master: jax.Array, letters: str, *, axes: int = 0, implementation: str | None = None
) -> QuantizedWeight:
    """The weight, quantised; `axes` leading dimensions (stacked layers) come before the letters.

    Rows of zeros fill its outputs up to a multiple of 16, as kernels want. On a mesh each device
    quantises its stored piece where pieces fall on blocks; otherwise layers are gathered, one at a
    time. Codes lie as the weight does.
    """
    weight = jax.lax.stop_gradient(master)
    stack, dims = "L" * axes, _block_letters(letters)
    stacked = [stack + part for part in dims]
    if falls_on_blocks(letters, master.shape[axes:]):
        quantize = functools.partial(_quantize, letters, axes, implementation)
        made = local(quantize, f"{stack}{letters}->{','.join(stacked)}", stored=True)(weight)
    else:
        quantize = functools.partial(_quantize, letters, 0, implementation)
        layer = lambda w: _shard_codes(local(quantize, f"{letters}->{','.join(dims)}")(w), dims)
        made = jax.lax.map(layer, weight) if axes else layer(weight)
    codes, scale, turned, turned_scale = _shard_codes(made, stacked)
    # Products see whole scales, in whose last dimension a multiple of 32 is added up to.
    scales = f"{stacked[1]},{stacked[3]}"
    widen = lambda *scales: tuple(_pad_last(scale, 32) for scale in scales)
    scale, turned_scale = local(widen, f"{scales}->{scales}")(scale, turned_scale)
    blocks = Blocks(codes, scale, turned, turned_scale)
    return QuantizedWeight(master, blocks, implementation=implementation)


def falls_on_blocks(
    letters: str, shape: tuple[int, ...], axis_sizes: Mapping[str, int] | None = None
) -> bool:
    """Whether the pieces in which a weight is stored are cut between its blocks only."""
    lead, *groups = sides(letters)
    pieces, begin = stored_shape(letters, shape, axis_sizes), len(lead)
    for group in groups:
        whole, piece = (x[begin : begin + len(group)] for x in (shape, pieces))
        begin += len(group)
        if piece != whole and (piece[1:] != whole[1:] or math.prod(piece) % TILE):
            return False
    return True


def _quantize(
    letters: str, axes: int, implementation: str | None, w: jax.Array
) -> tuple[jax.Array, ...]:
    """Codes and scales of a piece, and of its transpose, without what is added to scales."""
    lead, outputs, _ = sides(letters)
    split = axes + len(lead)
    head, rows = w.shape[:split], w.shape[split : split + len(outputs)]
    flat = w.reshape(-1, math.prod(rows), math.prod(w.shape[split + len(outputs) :]))
    n, k = (-(-size // TILE) for size in flat.shape[1:])
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % 16), (0, 0)))
    codes, scale, turned, turned_scale = quantize_blocks(flat, implementation=implementation)
    made = codes, scale[..., :k], turned, turned_scale[..., :n]
    return tuple(array.reshape(*head, *array.shape[1:]) for array in made)


def _shard_codes(made: tuple[jax.Array, ...], dims: list[str]) -> tuple[jax.Array, ...]:
    codes, scale, turned, turned_scale = made
    return shard_weight(codes, dims[0]), scale, shard_weight(turned, dims[2]), turned_scale


def _pad_last(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def is_in_fp8(name: str) -> bool:
    """Whether the recipe multiplies with the parameter of this name in FP8."""
    return len(letters_of(name)) > 1 and name not in KEPT and not is_router(name)


def quantize_weights(params: Any, implementation: str | None = None) -> Any:
    """A tree of named parameters with every matrix of the recipe quantised."""

    def quantize(path, leaf):
        name = path[-1].key
        letters = letters_of(name)
        if not is_in_fp8(name):
            return leaf
        lead, outputs, _ = sides(letters)
        axes = leaf.ndim - len(letters)
        width = math.prod(leaf.shape[axes + len(lead) + len(outputs) :])
        if width % 16:
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"precision 'fp8' needs inputs of a multiple of 16 channels: {where} has {width}"
            )
        return quantize_weight(leaf, letters, axes=axes, implementation=implementation)

    return jax.tree_util.tree_map_with_path(quantize, params)


def with_targets(weights: Any, targets: Any, *, accumulate: bool) -> Any:
    """A tree of weights whose gradients are for other arrays: masters, or sums to add to."""
    swap = lambda weight, target: (
        dataclasses.replace(weight, target=target, accumulate=accumulate)
        if is_quantized(weight)
        else target
    )
    return jax.tree.map(swap, weights, targets, is_leaf=is_quantized)


def plain(weight: jax.Array | QuantizedWeight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A weight as an array: its codes times their scales, where it is quantised."""
    if not is_quantized(weight):
        return weight.astype(dtype)
    blocks, codes, scale = weight.blocks, weight.blocks.codes, weight.blocks.scale
    *_, n, k = codes.shape
    wide = jnp.repeat(jnp.repeat(scale[..., : k // TILE], TILE, axis=-1), TILE, axis=-2)
    decoded = (codes.astype(jnp.float32) * wide[..., :n, :])[..., : blocks.transposed.shape[-2]]
    real = weight.target.size // (decoded.size // n)
    return decoded[..., :real, :].reshape(weight.shape).astype(dtype)


# Activations.


def quantize(
    x: jax.Array, letters: str, *, power_of_two: bool = False, implementation: str | None = None
) -> Quantized:
    """Tiles of an activation whose last letter is contracted."""
    options = dict(power_of_two=power_of_two, implementation=implementation)

    def tiles(x):
        flat = x.reshape(-1, x.shape[-1])
        return per_token(quantize_tiles(flat, **options), x.shape[:-1])

    codes, scale = local(tiles, f"{letters}->{_tile_letters(letters)}")(jax.lax.stop_gradient(x))
    return Quantized(x, codes, scale, power_of_two)


def quantize_norm(
    x: jax.Array,
    normed: jax.Array,
    gain: jax.Array,
    letters: str,
    *,
    epsilon: float,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Quantized:
    """Tiles of RMSNorm(x) in one pass over x; `normed` is the same norm for its gradient."""
    options = dict(power_of_two=power_of_two, implementation=implementation)

    def tiles(x, gain):
        flat = x.reshape(-1, x.shape[-1])
        return per_token(rms_norm_tiles(flat, gain, epsilon=epsilon, **options), x.shape[:-1])

    signature = f"{letters},{letters[-1]}->{_tile_letters(letters)}"
    codes, scale = local(tiles, signature)(*jax.lax.stop_gradient((x, gain)))
    return Quantized(normed, codes, scale, power_of_two)


def per_token(tiles: Tiles, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Codes and scales with a token's first: [..., 128 k] and [..., k]."""
    codes, scale = tiles
    return codes.reshape(*shape, -1), scale[:, : codes.shape[0]].T.reshape(*shape, -1)


def as_bytes(tree: Any) -> Any:
    """A tree with codes as int8: how a gradient rule keeps them.

    What remat keeps of a float goes through reduce_precision, to which E4M3 has an infinity above
    240, and codes up to 448 would become NaN (seen).
    """
    return _bitcast(tree, jnp.float8_e4m3fn, jnp.int8)


def from_bytes(tree: Any) -> Any:
    return _bitcast(tree, jnp.int8, jnp.float8_e4m3fn)


def _bitcast(tree, old, new):
    return jax.tree.map(
        lambda x: jax.lax.bitcast_convert_type(x, new) if x.dtype == old else x, tree
    )


def kept_as(name: str, codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes and scales that remat keeps under a name."""
    return from_bytes(checkpoint_name(as_bytes((codes, scale)), name))


def by_rows(x: Quantized | E5M6, implementation: str | None) -> Tiles:
    """Flattened to [M, K], what a product with the weight reads."""
    if isinstance(x, E5M6):
        x_MK = decode_e5m6(x, (_rows(x.high), x.high.shape[-1]))
        return quantize_tiles(x_MK, power_of_two=True, implementation=implementation)
    return Tiles(x.codes.reshape(_rows(x.codes), -1), by_block(x.scale))


def by_columns(
    x: Quantized | E5M6, width: int, *, counts_m: jax.Array | None, implementation: str | None
) -> Tiles:
    """The other operand of the weight gradient: tiles of 128 tokens, again from what is kept."""
    options = dict(counts_m=counts_m, implementation=implementation)
    if isinstance(x, E5M6):
        x_MK = decode_e5m6(x, (_rows(x.high), width))
        return quantize_tiles(x_MK, by="columns", power_of_two=True, **options)
    return retile(by_rows(x, implementation), width, power_of_two=x.power_of_two, **options)


def decode_tiles(codes: jax.Array, scale: jax.Array, width: int) -> jax.Array:
    """BF16 values [..., width] of codes and scales of tokens; exact for scales of powers of two."""
    blocks = codes.reshape(*scale.shape, TILE).astype(jnp.float32)
    return (blocks * scale[..., None]).reshape(codes.shape)[..., :width].astype(jnp.bfloat16)


def to_wire(codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of tokens as they travel: of scales, which are powers of two, exponents."""
    return codes, scales_to_words(scale)


def from_wire(codes: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `to_wire`."""
    return codes, words_to_scales(words, codes.shape[-1] // TILE)


def scales_to_words(scale: jax.Array) -> jax.Array:
    """Scales [..., k] of powers of two as they travel: bytes of their exponents, 4 in a word.

    Zeros make the words of a token a multiple of 16 bytes.
    """
    exponents = jax.lax.bitcast_convert_type(scale, jnp.uint32) >> 23
    exponents = jnp.pad(exponents, [(0, 0)] * (scale.ndim - 1) + [(0, -scale.shape[-1] % 16)])
    first, second, third, fourth = (exponents[..., place::4] for place in range(4))
    return first | second << 8 | third << 16 | fourth << 24


def words_to_scales(words: jax.Array, count: int) -> jax.Array:
    """The inverse of `scales_to_words` for `count` scales; what was no number is NaN."""
    shifts = jnp.arange(0, 32, 8, dtype=jnp.uint32).reshape(*[1] * words.ndim, 4)
    exponents = (words[..., None] >> shifts & 255).reshape(*words.shape[:-1], -1)[..., :count]
    scale = jax.lax.bitcast_convert_type(exponents << 23, jnp.float32)
    return jnp.where(exponents == 255, jnp.nan, scale)


# Letters of the arrays inside, for functions that run on local shards.


def on_shards(fn: Callable, signature: str, *operands: Any) -> Any:
    """`local(fn, signature)(*operands)`, where operands may be quantised."""
    inputs, outputs = signature.split("->")
    dims = [
        part
        for letters, operand in zip(inputs.split(","), operands, strict=True)
        for part in letters_inside(operand, letters)
    ]
    leaves, structure = jax.tree.flatten(operands)
    body = lambda *leaves: fn(*jax.tree.unflatten(structure, leaves))
    return local(body, f"{','.join(dims)}->{outputs}")(*leaves)


def letters_inside(operand: Any, letters: str) -> list[str]:
    """The letters of each leaf of an operand; in lower case, dimensions counted in blocks."""
    if isinstance(operand, QuantizedWeight):
        return [letters, *_block_letters(letters)]
    if isinstance(operand, Quantized):
        return [letters, *_tile_letters(letters).split(",")]
    if isinstance(operand, E5M6):
        return [letters, *e5m6_letters(letters).split(",")]
    return [letters]


def _block_letters(letters: str) -> list[str]:
    lead, outputs, contracted = sides(letters)
    n, k = outputs[0], contracted[0]
    return [lead + pair for pair in (n + k, (n + k).lower(), k + n, (k + n).lower())]


def _tile_letters(letters: str) -> str:
    return f"{letters},{letters[:-1]}{letters[-1].lower()}"


def _rows(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])


def by_block(scale: jax.Array) -> jax.Array:
    """[..., k] as kernels want it: [k, M], M rounded up to a multiple of 4."""
    flat_Mk = scale.reshape(_rows(scale), -1)
    return jnp.pad(flat_Mk, ((0, -flat_Mk.shape[0] % 4), (0, 0))).T
