"""Checks of products and quantisation on the card: errors, poison, odd shapes, repetition."""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import logfmt
from experiments.bench.kernel_data import BF16, F32
from experiments.bench.kernel_report import verdict
from experiments.bench.kernel_run import cores, use_cache
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul_fp8 import by_contraction, by_rows
from pallas_kernels.grouped_matmul_fp8 import tuned as grouped_tiles
from pallas_kernels.grouped_matmul_fp8.api import rows_of_blocks
from pallas_kernels.matmul_fp8 import hopper as dense_fp8
from pallas_kernels.matmul_fp8 import matmul, weight_gradient
from pallas_kernels.matmul_fp8 import tuned as dense_tiles
from pallas_kernels.quantize_fp8 import (
    Blocks,
    Tiles,
    quantize_blocks,
    quantize_tiles,
    retile,
    rms_norm_tiles,
    swiglu_gradient_tiles,
    swiglu_tiles,
)

# Root mean square of one rounding to BF16 is 1.7e-3.
ROUNDED = 3e-3
REPEATS = 10
# M, N, K: few rows, rows that no tile divides, short last blocks as N and as K, N of one piece.
ODD = [(1, 576, 2048), (64, 2112, 512), (70, 2112, 512), (128, 320, 10944), (1001, 592, 2112),
       (512, 32, 512)]
SIZES = {"mixed": (130, 0, 70, 1, 1000, 0), "one has all": (0, 0, 1500, 0), "none": (0, 0, 0)}
# In BF16 two row tiles are a pair: of two groups the second here, and a last one alone.
PAIRED = SIZES | {"odd": (300, 70, 0, 513)}
QUANTIZED = [(1001, 2112), (384, 576), (70, 208), (2048, 1536)]
Verdict = dict[str, Any]


def main(command: str) -> None:
    """Prints a verdict a line, as JSON."""
    use_cache()
    checks = {"gemm": gemm, "grouped": grouped, "quantize": quantize, "logfmt": logfmt.checks}
    for row in checks[command]():
        print(json.dumps(row), flush=True)


def gemm() -> Iterator[Verdict]:
    """Bars of error on three kinds of data, then odd shapes and weight gradients."""
    for data, k in (("normal", 4096), ("outliers", 4096), ("uniform", 16384)):
        yield from errors(data, k)
    for m, n, k in ODD:
        a, b = quantize_tiles(normal(m, k)), quantize_blocks(normal(n, k, dtype=F32))
        right = values(a) @ block_values(b.codes, b.scale).T
        call = jax.jit(matmul)
        yield from error_and_repeats(
            f"product {m} x {n} x {k}", right, ROUNDED, call, a, b.codes, b.scale
        )
    for m, n, k in ((520, 2112, 592), (4096, 1536, 576), (512, 512, 32)):
        y, x = (quantize_tiles(normal(m, width), by="columns") for width in (n, k))
        total = normal(n, k, dtype=F32)
        call, right = jax.jit(weight_gradient), values(y) @ values(x).T
        name = f"weight gradient {n} x {k} of {m}"
        yield from error_and_repeats(name, right, 2e-4, call, y, x)
        right = right + float64(total)
        yield from error_and_repeats(f"{name}, accumulating", right, 2e-4, call, y, x, total)
    if jax.devices()[0].platform == "gpu":
        yield from measured_products()
        yield from measured_gradients()


def measured_products() -> Iterator[Verdict]:
    """Tiles in the tables are for shapes that they divide; here on one that they do not."""
    a, b = quantize_tiles(normal(1001, 2112)), quantize_blocks(normal(592, 2112, dtype=F32))
    right = values(a) @ block_values(b.codes, b.scale).T
    tables = (dense_tiles.TILES, grouped_tiles.TILES)
    call = functools.partial(dense_fp8.matmul, cores=cores(), out_dtype=BF16)
    yield from with_all_tiles("product", tables, right, ROUNDED, call, *a, b.codes, b.scale)


def measured_gradients() -> Iterator[Verdict]:
    """The same of weight gradients."""
    y, x = (quantize_tiles(normal(520, width), by="columns") for width in (2112, 592))
    total = normal(2112, 592, dtype=F32)
    right = values(y) @ values(x).T + float64(total)
    tables = (dense_tiles.GRADIENT_TILES, grouped_tiles.GRADIENT_TILES)
    call = functools.partial(dense_fp8.weight_gradient, cores=cores())
    yield from with_all_tiles("weight gradient", tables, right, 2e-4, call, *y, *x, total)


def with_all_tiles(
    name: str, tables: Iterable[Mapping], right: np.ndarray, limit: float, call: Callable,
    *operands: Any,
) -> Iterator[Verdict]:  # fmt: skip
    for tiles in {tiles for table in tables for tiles in table.values()}:
        found = poisoned(jax.jit(functools.partial(call, tiles=tiles)), *operands)
        yield verdict(f"{name}, {tiles}: error", error(found, right), limit, most=True)


def errors(data: str, k: int) -> Iterator[Verdict]:
    """Error of the product, and of exact arithmetic on the same codes."""
    x, w = normal(512, k, dtype=F32), normal(512, k, dtype=F32)
    if data == "uniform":
        x, w = (jnp.abs(jnp.tanh(array)) for array in (x, w))
    if data == "outliers":
        x = x.at[:, ::97].multiply(30)
    x = x.astype(BF16)
    a, b = quantize_tiles(x), quantize_blocks(w)
    right = values(a) @ block_values(b.codes, b.scale).T
    operands = (a, b.codes, b.scale)
    found = poisoned(jax.jit(functools.partial(matmul, out_dtype=F32)), *operands)
    if data != "outliers":
        limit = 2e-4 if data == "normal" else 1e-3
        bar = f"FP32 out, {data}, K = {k}: error against exact arithmetic on the codes"
        yield verdict(bar, error(found, right), limit, most=True)
    if data != "uniform":
        original = float64(x) @ float64(w).T
        over = error(found, original) / error(right, original)
        yield verdict(f"{data}: error over that of exact arithmetic", over, 1.05, most=True)
    bar = f"BF16 out, {data}: error against exact arithmetic on the codes"
    yield verdict(bar, error(jax.jit(matmul)(*operands), right), ROUNDED, most=True)


def grouped() -> Iterator[Verdict]:
    """Padding holds NaN and infinities; some groups are empty, or one has all rows."""
    n, k = 592, 1040
    for name, sizes in SIZES.items():
        sizes_G = np.array(sizes, np.int32)
        real, starts, padded = rows_of(sizes)
        rows, used = real.shape[0], int(padded.sum())
        counts = rows_of_blocks(jnp.asarray(sizes_G), rows)
        a = quantize_tiles(jnp.where(real, normal(rows, k), jnp.nan), counts_m=counts)
        dy = jnp.where(real, normal(rows, n), jnp.inf)
        y = quantize_tiles(dy, by="columns", counts_m=counts)
        x = retile(a, k, counts_m=counts)
        w = quantize_blocks(normal(len(sizes), n, k, dtype=F32))
        total, weights = normal(len(sizes), n, k, dtype=F32), block_values(w.codes, w.scale)
        products, gradients = np.zeros((rows, n)), np.zeros((len(sizes), n, k))
        for group, (start, size) in enumerate(zip(starts, padded, strict=True)):
            own = slice(start, start + size)
            products[own] = values(a)[own] @ weights[group].T
            gradients[group] = values(y)[:, own] @ values(x)[:, own].T
        # Rows of no group are not written.
        call = jax.jit(lambda *operands, used=used: by_rows(*operands)[:used])
        operands = (a, w.codes, w.scale, sizes_G)
        yield from error_and_repeats(f"by rows, {name}", products[:used], ROUNDED, call, *operands)
        call, bar = jax.jit(by_contraction), f"by contraction, {name}"
        yield from error_and_repeats(bar, gradients, 2e-4, call, y, x, sizes_G)
        right = gradients + float64(total)
        bar = f"{bar}, accumulating"
        yield from error_and_repeats(bar, right, 2e-4, call, y, x, sizes_G, total)
    yield from grouped_bf16()


def rows_of(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows [M, 1] hold data, the last 256 unused; starts and padded sizes of groups."""
    padded = -(-np.array(sizes, np.int32) // 128) * 128
    starts = np.cumsum(padded) - padded
    real = np.zeros((int(padded.sum()) + 256, 1), bool)
    for start, size in zip(starts, sizes, strict=True):
        real[start : start + size] = True
    return real, starts, padded


def grouped_bf16() -> Iterator[Verdict]:
    """The product by groups and its two gradients; N has a short last tile, and an odd number."""
    n, k = 576, 1088
    for name, sizes in PAIRED.items():
        sizes_G, (real, starts, _) = np.array(sizes, np.int32), rows_of(sizes)
        x = jnp.where(real, normal(len(real), k), jnp.nan)
        dy = jnp.where(real, normal(len(real), n), jnp.inf)
        w = normal(len(sizes), n, k, dtype=F32)
        products, inputs = np.zeros((len(real), n)), np.zeros((len(real), k))
        gradients = np.zeros((len(sizes), n, k))
        for group, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            own, weight = slice(start, start + size), float64(w[group].astype(BF16))
            products[own] = float64(x[own]) @ weight.T
            inputs[own] = float64(dy[own]) @ weight
            gradients[group] = float64(dy[own]).T @ float64(x[own])
        kept = np.flatnonzero(real)
        product = functools.partial(grouped_matmul, group_sizes_G=sizes_G, alignment=128)
        back = lambda x, w, dy, product=product: jax.vjp(product, x, w)[1](dy)
        found = {
            "by rows": (lambda x, w, dy, f=product, at=kept: f(x, w)[at], products[kept], ROUNDED),
            "input gradient": (lambda *a, f=back, at=kept: f(*a)[0][at], inputs[kept], ROUNDED),
            "by contraction": (lambda *a, f=back: f(*a)[1], gradients, 2e-4),
        }
        for what, (call, right, limit) in found.items():
            bar = f"BF16 {what}, {name}"
            yield from error_and_repeats(bar, right, limit, jax.jit(call), x, w, dy)


def quantize() -> Iterator[Verdict]:
    """Bits of the reference on the host, but for ties and what another order of sums rounds."""
    both = functools.partial(quantize_tiles, by="both")
    for m, k in QUANTIZED:
        x, up = normal(m, k), normal(m, k)
        bad = x.at[m // 2, 5].set(jnp.nan).at[0, k - 1].set(-jnp.inf).at[m // 3].set(0)
        counts = np.random.default_rng().integers(0, 129, -(-m // 128)).astype(np.int32)
        codes = quantize_tiles(x)
        weight, gain = jnp.linspace(0.1, 1, m), jnp.linspace(0.5, 2, k)
        again = lambda codes, counts, k=k, **options: retile(codes, k, counts_m=counts, **options)
        masked = lambda x, counts, **options: both(x, counts_m=counts, **options)
        gradients = lambda *x, **options: swiglu_gradient_tiles(*x, **options)[:5]
        norm = functools.partial(rms_norm_tiles, epsilon=1e-6, by="both")
        forms = {
            "both layouts": (both, (x,), 1e-5),
            "NaN, infinity and zeros": (both, (bad,), 1e-5),
            "powers of two": (functools.partial(quantize_tiles, power_of_two=True), (x,), 1e-5),
            "masked": (masked, (x, counts), 1e-5),
            "re-tiled": (again, (codes, counts), 1e-5),
            "RMSNorm": (norm, (x, gain), 2e-2),
            "SwiGLU": (functools.partial(swiglu_tiles, by="both"), (x, up, weight), 2e-2),
            "SwiGLU by rows": (swiglu_tiles, (x, up, weight), 2e-2),
            "SwiGLU, inputs kept": (
                functools.partial(swiglu_tiles, keep=True),
                (x, up, weight),
                2e-2,
            ),
            "SwiGLU backward": (gradients, (codes, codes, up, weight), 2e-2),
        }
        for name, (form, operands, limit) in forms.items():
            yield same_bits(f"{name}, {m} x {k}", form, operands, limit)
        differ = repeats(jax.jit(masked), x, counts)
        yield verdict(f"masked, {m} x {k}: runs that differ", differ, 0, most=True)
    blocks = lambda w, **options: cut(quantize_blocks(w, **options))
    # A tile for each block of threads, and several.
    for shape, dtype in itertools.product(((2, 592, 1040), (4096, 2048)), (F32, BF16)):
        w, name = normal(*shape, dtype=dtype), f"blocks, {shape} {jnp.dtype(dtype).name}"
        yield same_bits(name, blocks, (w,), 1e-5)
        yield verdict(f"{name}: runs that differ", repeats(jax.jit(blocks), w), 0, most=True)


def cut(blocks: Blocks) -> Blocks:
    """Without the ends of rows of scales, which mean nothing."""
    scale, other = blocks.scale, blocks.transposed_scale
    return blocks._replace(
        scale=scale[..., : other.shape[-2]], transposed_scale=other[..., : scale.shape[-2]]
    )


def same_bits(name: str, form: Callable, operands: tuple, limit: float) -> Verdict:
    """The largest share of elements that differ in an output; the bar names outputs beyond it."""
    found = jax.tree_util.tree_leaves_with_path(poisoned(jax.jit(form), *operands))
    host = jax.device_put(operands, jax.devices("cpu")[0])
    reference = jax.jit(functools.partial(form, implementation="reference"))
    right = jax.tree.leaves(reference(*host))
    shares = {
        jax.tree_util.keystr(path).lstrip("."): different(one, other)
        for (path, one), other in zip(found, right, strict=True)
    }
    beyond = "".join(f", {path} {share:.3g}" for path, share in shares.items() if share > limit)
    bar = f"{name}: share of other bits{beyond}"
    return verdict(bar, max(shares.values()), limit, most=True)


def error_and_repeats(
    name: str, right: np.ndarray, limit: float, call: Callable, *operands: Any
) -> Iterator[Verdict]:
    found = poisoned(call, *operands)
    yield verdict(f"{name}: error", error(found, right), limit, most=True)
    differ = repeats(call, *operands)
    yield verdict(f"{name}: runs that differ", differ, 0, most=True)


def poisoned(call: Callable, *operands: Any) -> Any:
    """The result, in memory that held NaN before: what is not written shows."""
    held = [jnp.full(1 << 24, jnp.nan) for _ in range(8)]
    jax.block_until_ready(held)
    del held
    return call(*operands)


def repeats(call: Callable, *operands: Any) -> float:
    """How many of ten runs differ from the first in any bit."""
    bits = lambda: [np.asarray(x).view(np.uint8) for x in jax.tree.leaves(call(*operands))]
    first = bits()
    same = lambda other: all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    return float(sum(not same(bits()) for _ in range(REPEATS)))


def error(found: Any, right: np.ndarray) -> float:
    """Relative error; infinite where it is not a number."""
    size = np.linalg.norm(right)
    value = np.linalg.norm(float64(found) - right) / (size if size else 1.0)
    return float(value) if np.isfinite(value) else float("inf")


def different(one: Any, other: Any) -> float:
    """Share of elements that differ; NaN equals NaN."""
    a, b = (np.asarray(x).astype(np.float32) for x in (one, other))
    if a.shape != b.shape:
        return 1.0
    return float(np.mean((a != b) & ~(np.isnan(a) & np.isnan(b))))


def normal(*shape: int, dtype: Any = BF16) -> jax.Array:
    """Fresh data each time."""
    drawn = np.random.default_rng().standard_normal(shape, np.float32)
    return jnp.asarray(drawn).astype(dtype)


def float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def values(x: Tiles) -> np.ndarray:
    """What tiles stand for."""
    scale = float64(x.scale)[:, : x.codes.shape[0]].T
    return float64(x.codes) * np.repeat(scale, 128, axis=1)


def block_values(codes: Any, scale: Any) -> np.ndarray:
    wide = np.repeat(float64(scale)[..., : codes.shape[-1] // 128], 128, axis=-1)
    return float64(codes) * np.repeat(wide, 128, axis=-2)[..., : codes.shape[-2], :]


if __name__ == "__main__":
    main(sys.argv[1])
