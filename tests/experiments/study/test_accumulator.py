"""The model of the FP8 accumulator: cases by hand, exactness with enough bits, promotion."""

import numpy as np
import pytest

from experiments.study.accumulator import accumulate, cut, last_place, relative_error


def row(*values):
    """A row of the contraction, filled up with zeros to groups of 32."""
    return np.pad(np.asarray(values, np.float64), (0, -len(values) % 32))[None]


def test_what_is_far_below_the_largest_of_a_group_is_lost():
    ones = row(*[1.0] * 3)
    # 2^-13 is the last of 13 fraction bits of numbers from 1 to 2.
    assert accumulate(row(1, 2.0**-13, 2.0**-14), ones)[0, 0] == 1 + 2.0**-13
    assert accumulate(row(1, -(2.0**-14), -(2.0**-14)), ones)[0, 0] == 1
    assert accumulate(row(1, 2.0**-14), ones[:, :32], fraction_bits=14)[0, 0] == 1 + 2.0**-14


def test_a_running_sum_swallows_small_groups_and_promotion_saves_them():
    a_MK = np.concatenate([row(1), row(2.0**-14), row(2.0**-14)], axis=1)
    ones = np.ones((1, 96))
    assert accumulate(a_MK, ones)[0, 0] == 1
    assert accumulate(a_MK, ones, promote=32)[0, 0] == 1 + 2.0**-13


def test_a_sum_is_cut_to_the_same_bits():
    # 1 + 1 + 2^-13 is exact before it is cut to the place of 2.
    assert accumulate(row(1, 1, 2.0**-13), row(1, 1, 1))[0, 0] == 2
    assert accumulate(row(-1, -1, -(2.0**-13)), row(1, 1, 1))[0, 0] == -2


def test_places_and_cuts():
    np.testing.assert_array_equal(
        last_place(np.array([1, 1.9, 2, -3, 0]), 2), [0.25, 0.25, 0.5, 0.5, 1]
    )
    np.testing.assert_array_equal(cut(np.array([1.9, -1.9]), np.array(0.5)), [1.5, -1.5])


def test_enough_bits_are_exact():
    a_MK, b_NK = (np.random.default_rng(i).integers(-8, 9, (3 + i, 256)) for i in range(2))
    np.testing.assert_array_equal(accumulate(a_MK, b_NK, fraction_bits=40), a_MK @ b_NK.T)


def test_promotion_every_128_at_4096():
    for kind, least in (("zero-mean", 8), ("positive", 50)):
        errors = [relative_error(kind, promote=p, rows=8) for p in (None, 512, 256, 128)]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > least * errors[3]


@pytest.mark.parametrize("promote, width", [(100, 128), (None, 40)])
def test_bad_input_is_refused(promote, width):
    with pytest.raises(ValueError, match="multiples of 32"):
        accumulate(np.ones((1, width)), np.ones((1, width)), promote=promote)
