"""`bench logfmt`: LogFMT encoded and decoded, beside a copy of as many bytes."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernel_report import geometric_mean, verdict
from experiments.bench.kernel_run import Case, KernelArgs, Program, bench, cores, ratios
from pallas_kernels.logfmt import LogFMT, decode_logfmt, encode_logfmt, hopper
from pallas_kernels.logfmt.reference import unpack

SHAPES = [(4096, 7168), (16384, 7168)]
BITS = (8, 10)
COPY, MOVED = "copy", "copy of the BF16 rows"
PEERS = False


@dataclass(frozen=True)
class BenchLogfmtArgs(KernelArgs):
    """Check LogFMT's kernels against the reference, and time them beside copies.

    Encoding and decoding V3's rows in 8 and 10 bits, each beside a copy of the bytes that it must
    move, and both together beside a copy of the BF16 rows, which is what combine does without
    them: the overhead that the paper puts at 50 to 100 %.
    """


def bench_logfmt(args: BenchLogfmtArgs) -> None:
    """Checks, times and judges."""
    bench(args, "logfmt")


def cases() -> list[Case]:
    return [made(op, n, m, k) for m, k in SHAPES for n in BITS for op in ("encode", "decode")]


def made(op: str, n: int, m: int, k: int) -> Case:
    """One direction, a copy of its bytes, and a copy of the rows as they are."""
    rows = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    moved = m * k * 2 + m * k * n // 8 + m * (k // 128) * 4
    if op == "encode":
        call = functools.partial(
            hopper.encode, n=n, tiles=hopper.tiles_of(jnp.bfloat16), cores=cores()
        )
        ours = Program(call, (rows,))
    else:
        call = functools.partial(
            hopper.decode, n=n, width=k, dtype=jnp.dtype(jnp.bfloat16), tiles=hopper.Tiles(),
            cores=cores(),
        )  # fmt: skip
        words = np.random.default_rng(0).integers(0, 2**16, (m, k * n // 16), np.uint16)
        line = lambda value: np.full((m, k // 128), value, jnp.bfloat16)
        ours = Program(call, (words, line(2.0**-8), line(4.0)))
    copied = Program(
        lambda x: x + jnp.float32(1), (jax.ShapeDtypeStruct((moved // 8,), jnp.float32),)
    )
    # Not a negation: the timer leaves out kernels of the name of its own, which flushes the cache.
    plain = Program(lambda x: x + jnp.bfloat16(1), (rows,))
    return Case(
        f"{op} {n} bits", f"{m} x {k}", 0.0, moved, {"ours": ours, COPY: copied, MOVED: plain}
    )


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At least 0.7 of a copy's bandwidth; the overhead over moving BF16, at most the paper's."""
    verdicts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        found = list(ratios(rows, section, COPY).values())
        verdicts.append(verdict(f"{section}: bandwidth over a copy's", geometric_mean(found), 0.7))
    for n in BITS:
        over = over_copies(rows, n)
        if over:
            bar = f"{n} bits: % over copying the BF16 rows (paper: 50 to 100, fused)"
            verdicts.append(verdict(bar, 100 * (max(over) - 1), 100, most=True))
    return verdicts


def over_copies(rows: Sequence[Mapping[str, Any]], n: int) -> list[float]:
    """The time of encoding and decoding over that of copying the BF16 rows twice, by shape.

    Without the format they are read and written once for each direction too.
    """
    encode, decode = (ratios(rows, f"{op} {n} bits", MOVED) for op in ("encode", "decode"))
    return [(1 / encode[shape] + 1 / decode[shape]) / 2 for shape in encode if shape in decode]


def checks() -> Iterator[dict[str, Any]]:
    """Codes and values of the kernels against the reference, on this machine's CPU."""
    for n in range(4, 11):
        drawn = np.random.default_rng().standard_normal((4097, 1024), np.float32)
        x = jnp.asarray(drawn).astype(jnp.bfloat16)
        here = jax.devices("cpu")[0]
        found = jax.jit(functools.partial(encode_logfmt, n=n))(x)
        right = _reference(functools.partial(encode_logfmt, n=n), jax.device_put(x, here))
        codes = [
            np.asarray(_reference_codes(jax.device_put(out.words, here), n)).astype(np.int64)
            for out in (found, right)
        ]
        off = np.abs(codes[0] - codes[1])
        yield verdict(f"{n} bits: share of other codes", float((off > 0).mean()), 1e-5, most=True)
        yield verdict(f"{n} bits: how far off", float(off.max()), 1, most=True)
        for name, one, other in zip(LogFMT._fields[1:], found[1:], right[1:], strict=True):
            differ = float(np.mean(np.asarray(one) != np.asarray(other)))
            yield verdict(f"{n} bits: share of other {name}", differ, 0, most=True)
        decode = functools.partial(decode_logfmt, n=n, width=1024, dtype=jnp.float32)
        values = np.asarray(jax.jit(decode)(jax.device_put(right, jax.devices()[0])))
        exact = np.asarray(_reference(decode, right))
        ulps = np.abs(values - exact) / np.spacing(np.abs(exact))
        yield verdict(f"{n} bits: units in the last place", float(ulps.max()), 4, most=True)
        again = jax.jit(functools.partial(encode_logfmt, n=n))(jnp.asarray(values))
        same = np.mean(np.asarray(again.words) != np.asarray(right.words))
        yield verdict(f"{n} bits: words that a second pass changes", float(same), 0, most=True)


def _reference(call, operand):
    return jax.jit(functools.partial(call, implementation="reference"))(operand)


@functools.partial(jax.jit, static_argnums=1)
def _reference_codes(words, n: int):
    return unpack(words, n)
