"""Interprets the kernels on tiny rows: the reference's codes and values, no race."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# The interpreter's callbacks block: with few cores they starve the thread pool.
os.environ["NPROC"] = "32"

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.logfmt import hopper, reference

M, K = 203, 192


def main(n: int):
    rng = np.random.default_rng(n)
    x_MK = jnp.asarray(rng.standard_normal((M, K)), jnp.bfloat16)
    # A tile of zeros, one of one magnitude, one far beyond the range, one that is not finite.
    wide = jnp.asarray(2.0 ** rng.uniform(-60, 0, 128), jnp.bfloat16)
    x_MK = x_MK.at[3, :128].set(0).at[4, :128].set(-2.5).at[5, :128].set(wide)
    x_MK = x_MK.at[6, 7].set(-jnp.inf)
    options = dict(n=n, tiles=hopper.Tiles(warpgroups=2, stages=2), cores=2)
    options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    found, right = hopper.encode(x_MK, **options), reference.encode(x_MK, n)
    for one, other in zip(found[1:], right[1:], strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one.astype(jnp.float32), other)
    codes, right_codes = (
        np.delete(np.asarray(reference.unpack(out[0], n)), 6, axis=0) for out in (found, right)
    )
    different = codes != right_codes
    assert different.mean() <= 1e-4, different.mean()
    values = hopper.decode(*right, width=K, dtype=jnp.float32, **options)
    right_values = np.asarray(reference.decode(*right, n)[:, :K])
    ulps = np.abs(values - right_values) / np.spacing(np.abs(right_values))
    # The interpreter's 2^x is that of XLA on CPU, a dozen units off for x of 8; a card's is 2 off.
    assert np.nanmax(ulps) <= 16, np.nanmax(ulps)
    np.testing.assert_array_equal(np.isnan(values), np.isnan(right_values))
    assert np.isnan(values[6, :128]).all() and np.isfinite(values[6, 128:]).all()
    rounded = hopper.decode(*right, width=K, dtype=jnp.bfloat16, **options)
    assert rounded.dtype == jnp.bfloat16 and rounded.shape == (M, K)
    print(f"n={n}: jax {jax.__version__}, {different.sum()} codes differ, {np.nanmax(ulps)} ulp")
    assert not gpu_callbacks.get_races().races_found


main(int(sys.argv[1]))
