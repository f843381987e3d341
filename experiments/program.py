"""What a traced function computes: the operations of its jaxpr, those of scanned layers counted.

The walk goes through jit, scan, remat, custom gradients and shard_map, multiplies by the lengths
of scans, and follows named arguments (parameters) through changes of layout and dtype to the
operation that uses them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
# Calls whose arguments are those of the function inside, one to one, and where it is.
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "scan": "jaxpr",
    "shard_map": "jaxpr",
}
# The result holds the elements of an operand, or some of them, in another place or dtype; so does
# what moves data over a mesh that has one device, which is the only kind here.
LAYOUT = frozenset(
    "all_gather all_gather_invariant bitcast_convert_type broadcast_in_dim concatenate "
    "convert_element_type copy copy_p dynamic_slice dynamic_update_slice expand_dims iota name "
    "optimization_barrier pad psum_invariant pvary reduce_scatter reshape rev "
    "sharding_constraint slice split squeeze stack stop_gradient transpose".split()
)
# Of these, the ones after which an array is still the parameter it was.
SAME = LAYOUT - {"concatenate", "dynamic_update_slice", "iota", "stack"}
# Functions that are one operation however they are implemented, by the name in their jaxpr.
ONE_OPERATION = {
    "_grouped_matmul": "grouped_matmul",
    "_product_fp8": "linear",
    "_gated_ffn_fp8": "gated_ffn",
}
# Around and inside a call of one of our kernels; the label of such an operation.
KERNEL_CALLS, KERNEL = ("custom_vmap_call", "mpmd_map"), "kernel"
# cuDNN's attention, whose operands begin with queries, keys and values [B, T, N, width].
ATTENTION = "dot_product_attention_fwd_wrapper"
PRODUCTS = frozenset(
    ("dot_general", ATTENTION, *ONE_OPERATION.values(), "grouped_gated_ffn")
)


class Array(NamedTuple):
    """Shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Op(NamedTuple):
    """An operation, and how often one run of the program does it."""

    part: str  # named scopes around it, "moe/attention"
    name: str  # the primitive, or a name of ONE_OPERATION
    label: str  # the einsum of a product, the name of a kernel
    operands: tuple[Array, ...]
    result: Array
    computes: str  # dtype it computes in
    arguments: tuple[str, ...]  # named arguments of the program that it uses as they are
    contracted: int  # of a product: elements summed over
    times: int


def operations(fn: Callable, **arguments: Any) -> list[Op]:
    """The operations of fn(**arguments) on abstract values, equal ones added up.

    Named arguments in `Op.arguments` are dotted paths into `arguments`: "params.moe.ffn.router_ED".
    """
    paths = jax.tree_util.tree_leaves_with_path(arguments)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    leaves, structure = jax.tree.flatten(arguments)
    closed = jax.make_jaxpr(lambda *flat: fn(**jax.tree.unflatten(structure, flat)))(*leaves)
    found: dict[Op, int] = {}

    def add(op: Op) -> None:
        found[op] = found.get(op, 0) + op.times

    _walk(closed.jaxpr, names, "", 1, add)
    merged: dict[Op, int] = {}
    for op, times in found.items():
        key = op._replace(times=0)
        merged[key] = merged.get(key, 0) + times
    return [op._replace(times=times) for op, times in merged.items()]


def _walk(jaxpr, names: list[str | None], scopes: str, times: int, add) -> list[str | None]:
    """Adds the operations of a jaxpr; returns which of its results are still named arguments."""
    origin: dict[Any, str | None] = dict(zip(jaxpr.invars, names, strict=True))
    named = lambda atom: None if isinstance(atom, Literal) else origin.get(atom)
    for eqn in jaxpr.eqns:
        inside, uses = f"{scopes}/{eqn.source_info.name_stack}", [named(x) for x in eqn.invars]
        kind = eqn.primitive.name
        body = _open(eqn.params[CALLS[kind]]) if kind in CALLS else None
        whole = kind == "custom_vjp_call" and body.debug_info.func_name in ONE_OPERATION
        if kind == "while":
            _walk_while(eqn, uses, inside, times, add)
        elif kind == "cond":
            for branch in eqn.params["branches"]:
                _walk(_open(branch), uses[1:], inside, times, add)
        elif body is not None and not whole:
            often = times
            if kind == "scan":
                often *= eqn.params["length"]
                # What is carried is an argument in the first turn at most.
                uses = [None if i in _carried(eqn) else use for i, use in enumerate(uses)]
            results = _walk(body, uses, inside, often, add)
            origin |= dict(zip(eqn.outvars, results, strict=True))
        else:
            add(_op(eqn, body if whole else None, uses, inside, times))
            if kind in SAME:
                origin |= dict.fromkeys(eqn.outvars, uses[0])
    return [named(x) for x in jaxpr.outvars]


def _carried(eqn) -> range:
    """Places of the arguments that a scan carries from turn to turn."""
    if "ft_in" in eqn.params:  # jax 0.11 and later: constants, carried, scanned
        constants, carried, _ = (len(list(part)) for part in eqn.params["ft_in"].unpack())
    else:
        constants, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    return range(constants, constants + carried)


def _walk_while(eqn, uses, inside: str, times: int, add) -> None:
    """One turn of a loop whose number of turns is not known beforehand."""
    test, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carried = [None] * (len(uses) - test - body)
    _walk(_open(eqn.params["cond_jaxpr"]), [*uses[:test], *carried], inside, times, add)
    _walk(_open(eqn.params["body_jaxpr"]), [*uses[test : test + body], *carried], inside, times,
          add)


def _open(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


def _op(eqn, body, uses: list[str | None], inside: str, times: int) -> Op:
    scopes = [scope for scope in inside.split("/") if scope]
    name, contracted = eqn.primitive.name, 0
    operands = tuple(_array(x.aval) for x in eqn.invars)
    label = next((scope for scope in scopes if "->" in scope), "")
    if name == "dot_general":
        (left, _), _ = eqn.params["dimension_numbers"]
        contracted = math.prod(operands[0].shape[d] for d in left)
        if eqn.params["precision"] is not None:
            label = f"{label} {eqn.params['precision'][0]}".strip()
    elif body is not None:
        name = ONE_OPERATION[body.debug_info.func_name]
        contracted = next((x.shape[-1] for x in operands if x.shape), 0)
        if name in ("linear", "gated_ffn"):
            kernels = kernels_of(body)
            label = f"by {', '.join(kernels)}" if kernels else "by the reference"
            # Group sizes are the one operand of integers.
            name = f"grouped_{name}" if any(x.dtype == "int32" for x in operands) else name
        if name.endswith("gated_ffn"):
            # Three products of as many multiplications: over F once, over D twice.
            gate = next(x for x in operands if len(x.shape) > 1 and x.dtype == "fp32")
            contracted = 3 * gate.shape[-2]
    elif name in KERNEL_CALLS:
        name, label = kernel_name(eqn), KERNEL
    elif name == ATTENTION:
        # Two products for each query and key: over the width of a key, then over the keys.
        operands = operands[:3]
        contracted = operands[1].shape[1]
    elif "name" in eqn.params and name not in LAYOUT:
        label = str(eqn.params["name"])
    return Op(
        part="/".join(scope for scope in scopes if re.fullmatch(r"\w+", scope)),
        name=name,
        label=label,
        operands=operands,
        result=_array(eqn.outvars[0].aval),
        computes=_computes(eqn, body, operands),
        arguments=tuple(dict.fromkeys(use for use in uses if use)),
        contracted=contracted,
        times=times,
    )


def kernel_name(eqn) -> str:
    """The name that a call of a kernel has in profiles."""
    if "meshes" in eqn.params:
        return str(eqn.params["name"])
    bodies = (value for value in eqn.params.values() if _is_jaxpr(value))
    return next(kernel_name(call) for body in bodies for call, _ in kernel_calls(body))


def kernels_of(body) -> list[str]:
    """The kernels that a function calls."""
    return list(dict.fromkeys(kernel_name(eqn) for eqn, _ in kernel_calls(body)))


def kernel_calls(jaxpr, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every call of a kernel in a jaxpr, and how often it is made."""
    for eqn in _open(jaxpr).eqns:
        if eqn.primitive.name in KERNEL_CALLS:
            yield eqn, times
            continue
        often = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from kernel_calls(value, often)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(_open(value), "eqns")


class Kernel(NamedTuple):
    """A kernel of ours and all calls of it."""

    name: str
    calls: int
    takes: tuple[str, ...]  # dtypes
    returns: tuple[str, ...]


def kernels(fn: Callable, *arguments: Any) -> list[Kernel]:
    """The kernels that a function calls on abstract values."""
    found: dict[str, list[tuple[Any, int]]] = {}
    for eqn, times in kernel_calls(jax.make_jaxpr(fn)(*arguments)):
        found.setdefault(kernel_name(eqn), []).append((eqn, times))
    dtypes = lambda atoms: tuple(dict.fromkeys(_array(atom.aval).dtype for atom in atoms))
    return [
        Kernel(
            name,
            sum(times for _, times in same),
            dtypes(atom for eqn, _ in same for atom in eqn.invars),
            dtypes(atom for eqn, _ in same for atom in eqn.outvars),
        )
        for name, same in found.items()
    ]


def _computes(eqn, body, operands: tuple[Array, ...]) -> str:
    """The dtype an operation works in; of a product, what it multiplies."""
    if any(x.dtype.startswith("fp8") for x in operands):
        return "fp8"
    if body is not None:
        inner: list[Op] = []
        _walk(body, [None] * len(body.invars), "", 1, inner.append)
        dtypes = {op.computes for op in inner if op.name == "dot_general"}
        return " ".join(sorted(dtypes)) or operands[0].dtype
    dtypes = [x.dtype for x in operands] or [_array(eqn.outvars[0].aval).dtype]
    if eqn.primitive.name == "dot_general":
        return " x ".join(dict.fromkeys(dtypes))
    # An index beside floats, or a condition, does not say what is computed.
    floats = [d for d in dtypes if "f" in d] or [d for d in dtypes if d != "bool"] or dtypes
    return floats[0]


def _array(aval) -> Array:
    return Array(tuple(getattr(aval, "shape", ())), dtype_name(getattr(aval, "dtype", "token")))


def dtype_name(dtype: Any) -> str:
    """A dtype in few letters.

    >>> dtype_name("bfloat16"), dtype_name("float8_e4m3fn"), dtype_name("int32")
    ('bf16', 'fp8_e4m3fn', 'int32')
    """
    name = str(dtype)
    return DTYPES.get(name, name.replace("float8", "fp8"))


def uses(ops: list[Op]) -> Mapping[str, list[Op]]:
    """The operations that use each named argument, changes of layout apart."""
    found: dict[str, list[Op]] = {}
    for op in ops:
        if op.name not in SAME:
            for argument in op.arguments:
                found.setdefault(argument, []).append(op)
    return found
