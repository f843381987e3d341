"""Interprets one tiny case of a quantising kernel on CPU: the reference's bits, no race."""

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

from pallas_kernels.quantize_fp8 import blocks, hopper, reference, swiglu_gradient
from pallas_kernels.quantize_fp8.hopper import Form

M, K = 203, 192


def both(x_MK, power_of_two=False):
    return *reference.tiles(x_MK, power_of_two), *reference.tiles(x_MK.T, power_of_two)


def main(case: str):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    x_MK, up_MK, factor_M, gain_K = normal(M, K), normal(M, K), rng.uniform(size=M), normal(K)
    factor_M, gain_K = factor_M.astype(np.float32), gain_K.astype(jnp.float32)
    counts_m = np.array([100, 30], np.int32)
    options = dict(tiles=hopper.Tiles(1, 2, 2), cores=2, name=case)
    options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    if case == "both":
        found, right = hopper.quantize((x_MK,), form=Form(columns=True), **options), both(x_MK)
    if case == "masked":
        real_MK = reference.mask(jnp.ones((M, K), jnp.bfloat16), counts_m) > 0
        form = Form(columns=True, masked=True, power_of_two=True)
        poisoned = jnp.where(real_MK, x_MK, jnp.bfloat16(np.nan))
        found = hopper.quantize((poisoned,), counts_m=counts_m, form=form, **options)
        right = both(reference.mask(x_MK, counts_m), True)
    if case == "swiglu":
        form = Form(inputs=2, by_row=True, columns=True)
        found = hopper.quantize((x_MK, up_MK), factor_M, form=form, **options)
        right = both(reference.swiglu(x_MK, up_MK, factor_M))
    if case == "swiglu_kept":
        form = Form(inputs=2, by_row=True, masked=True, keep=True)
        found = hopper.quantize((x_MK, up_MK), factor_M, None, counts_m, form=form, **options)
        right = reference.swiglu(x_MK, up_MK, factor_M), x_MK, up_MK
        right = [both(reference.mask(x, counts_m))[:2] for x in right]
        right = [array for pair in right for array in pair]
    if case == "norm":
        factor_M = jax.lax.rsqrt(jnp.square(x_MK.astype(jnp.float32)).mean(axis=1) + 1e-6)
        form = Form(by_row=True, by_column=True)
        found = hopper.quantize((x_MK,), factor_M, gain_K, form=form, **options)
        right = reference.tiles(reference.rms_norm(x_MK, gain_K, 1e-6), False)
    if case == "retile":
        codes, scale = reference.tiles(x_MK, False)
        form = Form(codes=True, rows=False, columns=True, masked=True)
        found = hopper.quantize((codes,), scale, None, counts_m, form=form, width=K, **options)
        values_MK = reference.decode_tiles(codes, scale)[:, :K]
        right = reference.tiles(reference.mask(values_MK, counts_m).T, False)
    if case == "swiglu_gradient":
        real_MK = reference.mask(jnp.ones((M, K), jnp.bfloat16), counts_m) > 0
        kept = [reference.tiles(reference.mask(x, counts_m), False) for x in (x_MK, up_MK)]
        dy_MK = normal(M, K)
        poisoned = jnp.where(real_MK, dy_MK, jnp.bfloat16(np.nan))
        options = {"interpret": options["interpret"], "power_of_two": False}
        found = swiglu_gradient.swiglu_gradient(
            *kept, poisoned, factor_M, counts_m, cores=2, **options
        )
        values = (reference.decode_tiles(*x)[:, :K] for x in kept)
        dy_MK = reference.mask(dy_MK, counts_m)
        *right, weight_M = reference.swiglu_gradient(*values, dy_MK, factor_M)
        right = [both(x_MK) for x_MK in right]
        np.testing.assert_allclose(found[10].sum(axis=0)[:M], weight_M, rtol=1e-4, atol=1e-4)
        right = *right[0][:2], *right[1][:2], *(x for pair in right for x in pair[2:])
        found = found[:10]
    if case == "blocks":
        w_GNK = jnp.asarray(rng.standard_normal((2, 160, 192)), jnp.float32)
        options = {"interpret": options["interpret"], "power_of_two": False}
        found = blocks.quantize_blocks(w_GNK, per_core=1, cores=2, **options)
        right = *reference.blocks(w_GNK, False), *reference.blocks(w_GNK.swapaxes(1, 2), False)
        cut = lambda out: [a[..., :2] if a.dtype == jnp.float32 else a for a in out]
        found, right = cut(found), cut(right)
    for one, other in zip(found, right, strict=True):
        assert one.shape == other.shape
        different = np.mean(np.asarray(one, np.float32) != np.asarray(other, np.float32))
        print(f"{case}: jax {jax.__version__}, {one.shape}, {different:.1e} of the values differ")
        assert different < (
            1e-2 if case in ("swiglu", "swiglu_kept", "swiglu_gradient", "norm") else 1e-9
        )
    assert not gpu_callbacks.get_races().races_found


main(sys.argv[1])
