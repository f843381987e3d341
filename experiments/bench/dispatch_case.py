"""What a process of `bench dispatch` does: times dispatch and combine on the devices of one host.

`python -m experiments.bench.dispatch_case FILE [PROCESSES]` writes one line of JSON for each case
of the file.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import fp8
from experiments.bench.children import Row, answer, attempt
from experiments.bench.kernel_run import brief
from pallas_kernels.quantize_fp8 import quantize_tiles
from sharding.exchange import AXIS, Hop, axis_hops
from sharding.expert_parallel import (
    PLAIN,
    Wire,
    combine,
    cross,
    dispatch,
    plan_path,
    send,
)
from sharding.expert_parallel import Path as Route
from sharding.mesh import make_mesh
from sharding.parts import on_parts, placing
from sharding.placement import Scheme
from sharding.row_layout import Layout

TILE, GROUPS, KEPT = 128, 8, 4
AHEAD = 8  # cases whose programs are compiled together
ROUNDS = 5
# A program repeats what it times for so many seconds, if it goes at so many bytes a second: what
# starts it is then too short to count.
LASTING, SPEED, STARTING = 0.03, 2e11, 5e-5

Words = Mapping[str, Any]


class Direction(NamedTuple):
    """A function of operands and layouts, how to make the operands, and bytes that it exchanges."""

    function: Callable[[Any, tuple[Layout, ...]], Any]
    operands: Callable[[], Any]
    bytes: float  # of the buffers of a device, or of their rows that travel
    leaving: float  # of these, what goes to other devices


class Begun(NamedTuple):
    """A case whose programs are compiled, or will be."""

    layouts: tuple[Layout, ...]
    filled: list[float]  # how full the buffers of hops are
    directions: Mapping[str, Direction]
    repeats: Mapping[str, int]
    programs: Mapping[str, Future]


def main() -> None:
    """The file's cases, one after the other; one that fails says so."""
    path, *count = sys.argv[1:]
    rest: list[Row] = []
    begun: dict[str, Begun | Exception] = {}

    def prepare(cases: list[Row]) -> list[Row]:
        rest.extend(cases)
        return cases

    def work(case: Row) -> Row:
        if case["key"] not in begun:
            # Several at once, and nothing compiles while one is timed.
            with ThreadPoolExecutor() as pool:
                for later in rest[:AHEAD]:
                    begun[later["key"]] = attempt(lambda case: begin(case, pool), later)
            del rest[:AHEAD]
        return timed(begun.pop(case["key"]))

    answer(__spec__.name, work, path, *count, prepare=prepare)


def begin(case: Words, pool: ThreadPoolExecutor) -> Begun:
    """Lays out random tokens, and has the pool compile what is to be timed."""
    mesh = make_mesh(expert=jax.device_count())
    scheme = Scheme(expert_nodes=case["nodes"], room=case["room"], ragged=case["ragged"])
    layouts, filled = planned(case, mesh, scheme)
    chosen = {name: direction for name, direction in
              directions(case, mesh, layouts, filled).items() if name in case["directions"]}
    repeats = {name: times(direction.bytes) for name, direction in chosen.items()}

    def compiled(name: str) -> Any:
        operands = jax.eval_shape(chosen[name].operands)
        operands = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placing(mesh, AXIS)), operands
        )
        program = repeated(chosen[name].function, repeats[name], mesh, scheme)
        return program.lower(operands, layouts).compile()

    # XLA compiles without Python's lock.
    programs = {name: pool.submit(compiled, name) for name in chosen}
    return Begun(layouts, filled, chosen, repeats, programs)


def timed(begun: Begun | Exception) -> Row:
    """Microseconds, bytes and errors of each direction."""
    if isinstance(begun, Exception):
        raise begun
    found: Row = {"filled": begun.filled, "us": {}, "bytes": {}, "leaving": {}, "errors": {}}
    for name, direction in begun.directions.items():
        try:
            run, operands = begun.programs[name].result(), direction.operands()
            taken = seconds(lambda run=run, operands=operands: run(operands, begun.layouts))
            found["us"][name] = 1e6 * taken / begun.repeats[name]
            found["bytes"][name] = direction.bytes
            found["leaving"][name] = direction.leaving
        except Exception as error:
            found["errors"][name] = brief(error)
    return found


def times(num_bytes: float) -> int:
    """How often a program repeats an exchange."""
    return max(4, min(400, round(LASTING / (num_bytes / SPEED + STARTING))))


def planned(case: Words, mesh, scheme: Scheme) -> tuple[tuple[Layout, ...], list[float]]:
    """The layouts of random choices, and the part of each hop's buffers that holds tokens."""
    n = mesh.shape[AXIS]
    choices = choices_of(case, n * case["tokens"])
    choices = jax.make_array_from_callback(
        choices.shape, placing(mesh, AXIS), lambda part: choices[part]
    )
    plan = lambda expert_TK: plan_path(
        expert_TK, case["experts"], TILE, held=case["experts"] // n
    ).layouts
    layouts = jax.jit(on_devices(plan, mesh, scheme))(choices)
    figures = jax.jit(lambda layouts: [(jnp.mean(x.slot_M >= 0), jnp.sum(x.lost)) for x in layouts])
    found = [(float(part), int(lost)) for part, lost in figures(layouts)]
    lost = sum(lost for _, lost in found)
    if lost:
        raise ValueError(f"dispatch had no room for {lost} choices")
    return layouts, [part for part, _ in found[:-1]]


def directions(
    case: Words, mesh, layouts: tuple[Layout, ...], filled: list[float]
) -> dict[str, Direction]:
    """What can be timed.

    `dispatch` and `combine` go between devices; `to experts` and `from experts` also sort rows by
    expert, and add them up. Backward each does what the other does, with cotangents. Codes and
    scales are there before: the layers that feed the experts quantise.
    """
    n, T, D = mesh.shape[AXIS], case["tokens"], case["width"]
    hops = tuple(hop._replace(ragged=case["ragged"]) for hop in axis_hops(n, case["nodes"]))
    slots = [layout.slot_M.shape[0] // n for layout in layouts]
    travelling = [
        rows * (part if case["ragged"] else 1.0) for rows, part in zip(slots, filled, strict=False)
    ]
    quantized = case["wire"] == "fp8"
    wire = fp8_wire(D) if quantized else PLAIN
    as_sent, received = (to_words, to_scales) if quantized else (same, same)
    values = lambda rows: lambda: random_values(rows, D, mesh)
    tokens = (lambda: codes_of(values(T)(), mesh)) if quantized else values(T)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: as_sent(tokens())))
    row = sum(leaf.dtype.itemsize * leaf.shape[1] for leaf in leaves)
    # Of a hop's buffer all but the part for the device itself leaves it.
    parts = [1 - 1 / len(hop.groups[0]) for hop in hops]
    outside = sum(rows * part for rows, part in zip(travelling, parts, strict=True))
    sent, plain = ((each * sum(travelling), each * outside) for each in (row, 2 * D))
    across = over(hops, lambda x, route: cross(as_sent(x), route))
    there = over(hops, lambda x, route: received(send(as_sent(x), route)))
    back = over(hops, lambda y, route: combine(y, route, wire))
    # The forward pass is not run: its results are not asked for.
    gradient = lambda function, rows: lambda g, layouts: jax.vjp(
        lambda x: function(x, layouts), jnp.zeros((rows, D), g.dtype)
    )[1](g)[0]
    return {
        "dispatch": Direction(across(False), tokens, *sent),
        "combine": Direction(back(False), values(slots[-2]), *plain),
        "to experts": Direction(there(True), tokens, *sent),
        "from experts": Direction(back(True), values(slots[-1]), *plain),
        "dispatch backward": Direction(
            gradient(over(hops, dispatch)(False), T), values(slots[-2]), *plain
        ),
        "combine backward": Direction(gradient(back(False), slots[-2]), values(T), *sent),
    }


def over(hops: tuple[Hop, ...], function: Callable) -> Callable:
    """A function of an array and a route as one of an array and layouts, with the sort or not."""
    return lambda sort: lambda x, layouts: function(
        x, Route(layouts if sort else layouts[:-1], hops)
    )


def codes_of(x_TD: jax.Array, mesh) -> Any:
    """Codes, and scales of a power of two for each 128 values."""
    return jax.jit(on_devices(tiles_of, mesh, Scheme()))(x_TD)


def tiles_of(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same of one device's tokens."""
    return fp8.per_token(quantize_tiles(x_TD, power_of_two=True), x_TD.shape[:1])


def same(x):
    return x


def to_words(tokens):
    """Codes and scales as they travel."""
    return fp8.to_wire(*tokens)


def to_scales(rows):
    """The inverse."""
    return fp8.from_wire(*rows)


def fp8_wire(width: int) -> Wire:
    """BF16 values that travel in FP8."""
    return Wire(
        lambda x_TD: to_words(tiles_of(x_TD)),
        lambda sent: fp8.decode_tiles(*to_scales(sent), width),
    )


def random_values(rows: int, width: int, mesh) -> jax.Array:
    """BF16 values, so many rows on each device."""
    shape = (rows * mesh.shape[AXIS], width)
    make = lambda: jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    return jax.jit(make, out_shardings=placing(mesh, AXIS))()


def choices_of(case: Words, tokens: int) -> np.ndarray:
    """K different experts of each token, in some of the groups, all alike."""
    E, K, draw = case["experts"], case["chosen"], np.random.default_rng(1)
    kept = np.argsort(draw.random((tokens, GROUPS), np.float32), axis=1)[:, :KEPT]
    each = E // GROUPS
    places = draw.random((tokens, KEPT * each), np.float32).argpartition(K, axis=1)[:, :K]
    experts = np.take_along_axis(kept, places // each, axis=1) * each + places % each
    return experts.astype(np.int32)


def on_devices(function: Callable, mesh, scheme: Scheme) -> Callable:
    return on_parts(function, mesh, AXIS, scheme)


def repeated(function: Callable, count: int, mesh, scheme: Scheme) -> Any:
    """A program that calls a function so often, each time on what depends on the time before."""

    def body(operands, layouts):
        layouts = tuple(layout._replace(lost=layout.lost[0]) for layout in layouts)
        made = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, operands, layouts)
        )

        def turn(_, carried):
            operands, made = carried
            leaves, structure = jax.tree.flatten(operands)
            last = jax.tree.leaves(made)[0].reshape(-1)[0].astype(leaves[0].dtype)
            leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(last)
            operands = jax.tree.unflatten(structure, leaves)
            return operands, function(operands, layouts)

        return jax.lax.fori_loop(0, count, turn, (operands, made))[1]

    return jax.jit(on_devices(body, mesh, scheme))


def seconds(run: Callable[[], Any]) -> float:
    """Median of some calls after another."""
    taken = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
