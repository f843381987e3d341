"""Flows on links: fair rates, and when everything has arrived.

A flow may be cut in parts that take different routes; a route is a row of links. Rates are
max-min fair: no route can get more without one that has no more getting less.
"""

from typing import NamedTuple

import numpy as np

# Links whose shares differ by less are equally full.
EQUAL = 1e-12


class Routes(NamedTuple):
    """R routes of at most P links each. Padding is the number of links, one past the last."""

    flow_R: np.ndarray  # the flow that this is a part of
    bytes_R: np.ndarray  # the bytes of that part
    link_PR: np.ndarray  # int32


def load(routes: Routes, num_links: int) -> np.ndarray:
    """Bytes that cross each link, [L]."""
    bytes_L = np.zeros(num_links + 1)
    for link_R in routes.link_PR:
        bytes_L += np.bincount(link_R, routes.bytes_R, minlength=num_links + 1)
    return bytes_L[:-1]


def max_min_rates(link_PR: np.ndarray, capacity_L: np.ndarray) -> np.ndarray:
    """The fair rate of every route. A route without links is not limited: infinity.

    In each round every link offers its free capacity in equal shares. A link whose share is the
    smallest on all of its routes is full: they get that share, whatever the others do.
    """
    num_links, num_routes = len(capacity_L), link_PR.shape[1]
    rate_R = np.full(num_routes, np.inf)
    free_L = np.append(capacity_L, np.inf).astype(np.float64)
    active = np.arange(num_routes)
    link_PA = link_PR
    while len(active):
        count_L = sum(np.bincount(link_A, minlength=num_links + 1) for link_A in link_PA)
        share_L = np.full(num_links + 1, np.inf)
        np.divide(free_L[:-1], count_L[:-1], out=share_L[:-1], where=count_L[:-1] > 0)
        share_A = np.full(len(active), np.inf)
        for link_A in link_PA:
            np.minimum(share_A, share_L[link_A], out=share_A)
        # Routes that another link holds below the share that this link offers.
        full_L = np.ones(num_links + 1, bool)
        for link_A in link_PA:
            full_L[link_A[share_A < share_L[link_A] * (1 - EQUAL)]] = False
        full_L[-1] = False
        done_A = np.isinf(share_A)
        for link_A in link_PA:
            done_A |= full_L[link_A]
        rate_R[active[done_A]] = share_A[done_A]
        for link_A in link_PA:
            free_L -= np.bincount(
                link_A[done_A], np.nan_to_num(share_A[done_A], posinf=0.0), num_links + 1
            )
        np.maximum(free_L, 0.0, out=free_L)
        active, link_PA = active[~done_A], link_PA[:, ~done_A]
    return rate_R


def finish_seconds(routes: Routes, capacity_L: np.ndarray, *, resolution: float = 0.0) -> float:
    """When the last byte arrives, all routes starting together at max-min fair rates.

    Rates change whenever a route ends. No route is ever slower than the smallest share that a
    link offers, and no link moves its bytes faster than its capacity; where these two bounds
    meet (equal flows, say) the end is known without following every route to it.

    Args:
      resolution: routes that end within this fraction of the shortest possible time of each
        other end together, which makes the result later by no more than that at each end.
    """
    left, seconds = routes, 0.0
    smallest_step = None
    while len(left.bytes_R):
        needs_L = load(left, len(capacity_L))
        used = needs_L > 0
        if (capacity_L[used] == 0).any():
            return float("inf")
        at_least = np.max(needs_L[used] / capacity_L[used], initial=0.0)
        count_L = sum(
            np.bincount(link_R, minlength=len(capacity_L) + 1) for link_R in left.link_PR
        )[:-1]
        smallest = np.min(capacity_L[used] / count_L[used], initial=np.inf)
        if left.bytes_R.max() / smallest <= at_least * (1 + max(resolution, EQUAL)):
            return float(seconds + at_least)
        if smallest_step is None:
            smallest_step = resolution * at_least
        rate_R = max_min_rates(left.link_PR, capacity_L)
        step = max(np.min(left.bytes_R / rate_R), smallest_step)
        bytes_R = left.bytes_R - rate_R * step
        alive = bytes_R > EQUAL * routes.bytes_R.max()
        left = Routes(left.flow_R[alive], bytes_R[alive], left.link_PR[:, alive])
        seconds += step
    return float(seconds)
