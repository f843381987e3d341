"""Slim Fly: networks of diameter 2 on the graphs of McKay, Miller and Siran."""

import numpy as np

from sharding.network.galois import field, prime_power
from sharding.network.topology import Topology


def slim_fly(q: int, *, ports: int = 64, per_switch: int | None = None) -> Topology:
    """2 q^2 switches of network degree (3q - d) / 2, with q = 4w + d and d in -1, 0, 1.

    Switches (0, x, y) and (1, m, c) over GF(q) are joined when y = m x + c; (0, x, y) and
    (0, x, z) when y - z lies in a set X, (1, m, c) and (1, m, b) when c - b lies in Y. Every
    switch carries half its network degree in endpoints, rounded up, or what its ports leave.

    Raises:
      ValueError: no such graph for this q, or more ports than a switch has.
    """
    if not has_slim_fly(q):
        raise ValueError(f"there is no Slim Fly of {q=}: {_nearest(q)} have one")
    gf = field(q)
    first, second = (np.asarray(s) for s in generators(q, gf.powers))
    x, y = (v.ravel() for v in np.indices((q, q)))
    inside = []
    for side, steps in enumerate((first, second)):
        a = np.repeat(side * q * q + np.arange(q * q), len(steps))
        b = side * q * q + np.repeat(x, len(steps)) * q + gf.sum_QQ[y[:, None], steps].ravel()
        inside.append(np.stack((a, b), axis=1)[a < b])
    m, row, c = (v.ravel() for v in np.indices((q, q, q)))
    across = np.stack(
        (row * q + gf.sum_QQ[gf.product_QQ[m, row], c], q * q + m * q + c), axis=1
    )
    ends_C2 = np.concatenate((*inside, across)).astype(np.int32)
    if per_switch is None:
        per_switch = counts(q, ports=ports)["endpoints"] // (2 * q * q)
    return Topology(
        name=f"Slim Fly of {q=}",
        ports=ports,
        num_switches=2 * q * q,
        switch_E=np.repeat(np.arange(2 * q * q, dtype=np.int32), per_switch),
        ends_C2=ends_C2,
    )


def counts(q: int, *, ports: int = 64) -> dict[str, int]:
    """Endpoints, switches, cables and ports in use by the formula, graph or not."""
    d = {0: 0, 1: 1, 3: -1}.get(q % 4)
    if d is None:
        raise ValueError(f"{q=} must be 4w - 1, 4w or 4w + 1")
    degree = (3 * q - d) // 2
    per_switch = max(min(-(-degree // 2), ports - degree), 1)
    return {
        "endpoints": 2 * q * q * per_switch,
        "switches": 2 * q * q,
        "cables": q * q * degree,
        "ports": degree + per_switch,
    }


def generators(q: int, powers: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The two sets of steps X and Y, as powers of a primitive element."""
    even, odd = powers[0::2], powers[1::2]
    if q % 4 == 1:
        return list(even), list(odd)
    if q % 4 == 0:
        # The last of Y is the power q - 1, which is 1 again.
        return list(even), [*odd, 1]
    w = (q + 1) // 4
    return list(even[:w] + odd[w - 1 :]), [*odd[:w], *even[w:], 1]


def has_slim_fly(q: int) -> bool:
    """Whether q is a power of a prime and 4w - 1, 4w or 4w + 1."""
    return q > 2 and q % 4 != 2 and prime_power(q) is not None


def _nearest(q: int) -> str:
    below = next((n for n in range(q - 1, 2, -1) if has_slim_fly(n)), None)
    above = next(n for n in range(max(q, 2) + 1, 4 * max(q, 2)) if has_slim_fly(n))
    return f"{below} and {above}" if below else f"{above} and larger ones"
