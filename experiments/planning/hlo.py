"""What a compiled program sends between devices and which kernels it calls, from its text.

Loops count as often as they run: by the trip count that the compiler notes, or else by the
constant in the loop's condition. Groups of devices become mesh axes again.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")  # fmt: skip
ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4,
            "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_OPCODE = re.compile(r"^((?:\([^=]*\)|[^\s(]+)) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


class Array(NamedTuple):
    """Shape and element type of a value on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * (1 if self.dtype.startswith("f8") else ITEMSIZE.get(self.dtype, 0))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Collective(NamedTuple):
    """A collective of the program; arrays are those gathered, summed or exchanged, whole."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which its groups lie
    group: int  # devices that take part
    arrays: tuple[Array, ...]
    times: int  # in one run of the program
    scope: str  # named scopes of the operation it came from

    @property
    def bytes(self) -> int:
        return self.times * sum(array.bytes for array in self.arrays)


class Program(NamedTuple):
    """What was read off a compiled program."""

    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]  # call sites of kernels and libraries, by name


class _Instruction(NamedTuple):
    result: str
    opcode: str
    line: str


def read(text: str, mesh: Mapping[str, int]) -> Program:
    """The program of a step on a mesh, given by the sizes of its axes in order."""
    computations, entry = _split(text)
    times = _run_counts(computations, entry)
    collectives, kernels = [], Counter()
    for name, instructions in computations.items():
        for item in instructions:
            if item.opcode == "custom-call":
                kernels[_kernel(item.line)] += 1
            kind = item.opcode.removesuffix("-start")
            if kind in KINDS and times.get(name, 0):
                collectives.append(_collective(item, kind, times[name], mesh))
    return Program(tuple(c for c in collectives if c.group > 1), dict(kernels))


def _split(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, and the name of the first one."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    # Comments and layouts, which hold brackets of their own, come off first.
    for line in re.sub(r"/\*[^*]*\*/|(?<=\])\{[\d,]*(?::[^}]*)?\}", "", text).splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            parts = _OPCODE.match(found[1])
            if parts:
                current.append(_Instruction(parts[1], parts[2], found[1]))
    return computations, entry


def _run_counts(computations, entry: str) -> dict[str, int]:
    """How often each computation runs; branches of a condition count as taken."""
    counts: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for item in computations.get(name, ()):
            if item.opcode == "fusion":
                continue
            for role, names in _CALLED.findall(item.line):
                if role in ("condition", "to_apply") and item.opcode != "call":
                    continue
                for called in re.findall(r"[\w.\-]+", names):
                    often = trip_count(item.line, computations) if role == "body" else 1
                    visit(called, times * often)

    visit(entry, 1)
    return counts


def trip_count(line: str, computations) -> int:
    """Turns of a while loop: what the compiler noted, or the bound that its condition tests."""
    noted = re.search(r'known_trip_count\D*(\d+)', line)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    bounds = [
        int(value)
        for item in computations.get(condition[1], ()) if condition
        for value in re.findall(r"\bconstant\((\d+)\)", item.line)
    ]
    return max(bounds, default=1)


def _collective(item: _Instruction, kind: str, times: int, mesh: Mapping[str, int]) -> Collective:
    members = first_group(item.line, math.prod(mesh.values()))
    axes, result = axes_of(members, mesh), item.result
    # What starts gives back its operands, results and more. A sum's operands, a tuple of their own,
    # are left out by some compilers.
    if item.opcode.endswith("-start") and result.startswith("("):
        elements = _elements(result)
        if kind != "all-reduce" and len(elements) > 1:
            result = elements[1]
        elif elements[0].startswith("("):
            result = " ".join(elements[1:])
    arrays = tuple(_arrays(result))
    if kind == "reduce-scatter":
        arrays = tuple(a._replace(shape=(len(members), *a.shape)) for a in arrays)
    scope = re.search(r'op_name="((?:[^"\\]|\\.)*)"', item.line)
    return Collective(kind, axes, len(members), arrays, times, scope[1] if scope else "")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(n) for n in dims.split(",") if n))


def _elements(text: str) -> list[str]:
    """The elements of a tuple type at its outermost level."""
    depth, parts, current = 0, [], ""
    for letter in text[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()]


def first_group(line: str, devices: int) -> list[int]:
    """The devices that exchange with the first one, in any of the notations for groups."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if named:
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        keep: list = [0] * len(sizes)
        for axis, before, size in used:
            place = list(sizes).index(axis)
            step = sizes[axis] // (int(before) * int(size)) if size else 1
            keep[place] = slice(0, step * (int(size) if size else sizes[axis]), step)
        return ids[tuple(keep)].reshape(-1).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        numbers = lambda words: tuple(int(n) for n in words.split(","))
        ids = np.arange(math.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
        ids = ids.transpose(numbers(iota[3])) if iota[3] else ids
        return ids.reshape(numbers(iota[1]))[0].tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed and listed[1]:
        return [int(n) for n in listed[1].split(",")]
    pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
    if pairs:
        return [int(n) for n in pairs[0]]
    return list(range(devices))


def axes_of(members: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which these devices differ."""
    places = np.unravel_index(np.asarray(members), tuple(mesh.values()))
    return tuple(a for a, where in zip(mesh, places, strict=True) if len(set(where)) > 1)


def _kernel(line: str) -> str:
    """The name of a called kernel: our own under their names, others under their target."""
    target = re.search(r'custom_call_target="([^"]*)"', line)
    name = target[1] if target else "unknown"
    scope = re.search(r'op_name="([^"]*)"', line)
    if name == "mosaic_gpu_v2" and scope:
        return scope[1].split("/")[-2]
    return name
