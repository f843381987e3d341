"""Fair rates against linear programming, and arrival times against hand-made cases."""

import numpy as np
import pytest
from scipy.optimize import linprog

from sharding.network.flows import Routes, finish_seconds, load, max_min_rates


def random_case(seed):
    """Routes over a few links of unequal capacity: [P, R], padded, and capacities."""
    draw = np.random.default_rng(seed)
    links, routes, longest = draw.integers(2, 9), draw.integers(1, 16), 4
    link_PR = np.full((longest, routes), links)
    for r in range(routes):
        own = draw.permutation(links)[: draw.integers(1, min(links, longest) + 1)]
        link_PR[: len(own), r] = own
    return link_PR, draw.choice([1.0, 2.0, 3.5, 10.0], links) * draw.uniform(0.5, 1.5, links)


def fair_by_linear_programming(link_PR, capacity_L):
    """Raises the smallest rate as far as it goes, fixes who cannot have more, and goes on.

    Who cannot have more: routes on a link whose price (dual) is positive.
    """
    links, routes = len(capacity_L), link_PR.shape[1]
    uses_LR = np.array([[link in link_PR[:, r] for r in range(routes)] for link in range(links)])
    fixed = np.full(routes, np.nan)
    while np.isnan(fixed).any():
        free = np.isnan(fixed)
        # Unknowns: the rates that are free, and the smallest of them, which is to grow.
        carry = np.hstack((uses_LR[:, free], np.zeros((links, 1))))
        above = np.hstack((-np.eye(free.sum()), np.ones((free.sum(), 1))))
        left = capacity_L - uses_LR[:, ~free] @ fixed[~free]
        found = linprog(
            [0.0] * free.sum() + [-1.0],
            A_ub=np.vstack((carry, above)),
            b_ub=np.concatenate((left, np.zeros(free.sum()))),
        )
        assert found.success
        priced = found.ineqlin.marginals[:links] < -1e-9
        stuck = free & uses_LR[priced].any(0)
        assert stuck.any()
        fixed[stuck] = found.x[-1]
    return fixed


@pytest.mark.parametrize("seed", range(50))
def test_rates_are_those_of_linear_programming(seed):
    link_PR, capacity_L = random_case(seed)
    expected = fair_by_linear_programming(link_PR, capacity_L)
    np.testing.assert_allclose(max_min_rates(link_PR, capacity_L), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_no_link_is_overfull_and_every_route_has_a_full_one(seed):
    link_PR, capacity_L = random_case(100 + seed)
    rate_R = max_min_rates(link_PR, capacity_L)
    routes = Routes(np.arange(len(rate_R)), rate_R, link_PR)
    used_L = load(routes, len(capacity_L))
    assert (used_L <= capacity_L * (1 + 1e-9)).all()
    full = np.append(used_L >= capacity_L * (1 - 1e-9), False)
    assert full[link_PR].any(0).all()


def one_link(sizes):
    sizes = np.asarray(sizes, float)
    return Routes(np.arange(len(sizes)), sizes, np.zeros((1, len(sizes)), int))


def test_a_full_link_takes_its_bytes_over_its_capacity():
    assert finish_seconds(one_link([1.0, 2.0, 7.0]), np.array([2.0])) == pytest.approx(5.0)


def test_rates_rise_when_others_end():
    # The first shares link 0 with the second until that ends at 2 s, then has it alone; the
    # second could go faster on link 1.
    routes = Routes(np.arange(2), np.array([3.0, 1.0]), np.array([[0, 0], [2, 1]]))
    assert finish_seconds(routes, np.array([1.0, 9.0])) == pytest.approx(4.0)
    # Bounded by link 1 the second gets 0.25 and ends at 4 s; the first gets 0.75 until then.
    assert finish_seconds(routes, np.array([1.0, 0.25])) == pytest.approx(4.0)
    routes = routes._replace(bytes_R=np.array([4.5, 1.0]))
    assert finish_seconds(routes, np.array([1.0, 0.25])) == pytest.approx(5.5)


@pytest.mark.parametrize("seed", range(5))
def test_a_coarse_simulation_is_close_and_never_early(seed):
    link_PR, capacity_L = random_case(200 + seed)
    bytes_R = np.random.default_rng(seed).uniform(1, 2, link_PR.shape[1])
    routes = Routes(np.arange(len(bytes_R)), bytes_R, link_PR)
    exact = finish_seconds(routes, capacity_L)
    coarse = finish_seconds(routes, capacity_L, resolution=1e-3)
    assert exact * (1 - 1e-9) <= coarse <= exact * 1.02
    assert exact >= np.max(load(routes, len(capacity_L)) / capacity_L) * (1 - 1e-9)


def test_nothing_to_send_takes_no_time_and_a_dead_link_forever():
    assert finish_seconds(one_link([]), np.array([1.0])) == 0.0
    assert finish_seconds(one_link([1.0]), np.array([0.0])) == np.inf
