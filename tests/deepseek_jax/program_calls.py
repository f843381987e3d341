"""What a traced step calls: its equations, with the loops around them and kernels by name."""

from typing import NamedTuple

import jax


class Call(NamedTuple):
    """An equation, and the loops around it from the outside in: "micro", "layers", "reverse"."""

    loops: tuple[str, ...]
    name: str
    operands: tuple
    results: tuple
    equation: object


def calls(jaxpr, loops=()):
    """All equations but those inside kernels; a kernel has its name."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, inside = eqn.primitive.name, loops
        kernel = name == "mpmd_map"
        avals = lambda atoms: tuple(atom.aval for atom in atoms)
        operands, results = avals(eqn.invars), avals(eqn.outvars)
        if kernel and not results:
            # With jax 0.11 and later some write into a reference that they are given.
            results = tuple(aval.inner_aval for aval in operands if hasattr(aval, "inner_aval"))
        yield Call(loops, eqn.params["name"] if kernel else name, operands, results, eqn)
        if kernel:
            continue
        if name == "scan":
            inner = "reverse" if eqn.params["reverse"] else "layers"
            inside = (*loops, "micro" if not loops and eqn.params["length"] == 2 else inner)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from calls(value, inside)
