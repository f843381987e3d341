"""Tests of what quantising kernels do in registers."""

import numpy as np

from pallas_kernels.quantize_fp8.encode import refined


def test_reciprocals_off_by_one_become_the_nearest():
    rng = np.random.default_rng(0)
    # From the smallest scale to where halves of the reciprocal are no longer normal numbers.
    scale = np.exp(rng.uniform(np.log(2e-7), np.log(1e30), 1 << 18)).astype(np.float32)
    right = np.float32(1) / scale
    for off in (-1, 0, 1):
        guess = right + np.float32(off) * np.spacing(right)
        assert np.mean(np.asarray(refined(guess, scale)) != right) < 1e-4
