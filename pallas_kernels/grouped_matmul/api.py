"""Grouped product over experts' rows, its checks, the choice of implementation and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import hopper, reference


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_GNK: Float[Array, "G N K"],
    group_sizes_G: Int32[Array, "G"],
    *,
    alignment: int,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """y[m] = x[m] @ w[group of row m].T, in the dtype of x, summed in FP32.

    Rows are sorted by group. Groups lie back to back, each padded to a multiple of `alignment`
    rows, so that a block of `alignment` rows belongs to one group (groups.py); rows after the last
    group are unused. Padding and unused rows may hold anything, NaN included: they reach neither a
    real row nor a weight gradient. In the output and in the gradient of x they are 0 from the
    reference and unspecified from the kernel.

    Weights of another dtype are cast to the dtype of x here. Their gradient is summed in FP32 and
    leaves in their own dtype; a group without rows gets exactly 0.

    Args:
      group_sizes_G: real rows of each group; the padded sizes must sum to at most M.
      alignment: rows of a block; the kernel wants a multiple of 128.
      implementation: "reference", "hopper", or None: the kernel for BF16 on Hopper, else the
        reference.
    """
    _check(x_MK, w_GNK, group_sizes_G, alignment)
    implementation = choose(implementation, x_MK.dtype)
    if implementation == "hopper":
        _check_hopper(x_MK, w_GNK, alignment)
    return _grouped_matmul(x_MK, w_GNK, group_sizes_G, alignment, implementation)


def choose(implementation: str | None, dtype: jax.typing.DTypeLike) -> str:
    """The implementation to run on the target device."""
    if implementation not in mosaic.IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be one of {mosaic.IMPLEMENTATIONS}")
    if implementation is None:
        return "hopper" if dtype == jnp.bfloat16 and mosaic.target().is_hopper else "reference"
    return implementation


def _check_hopper(x_MK, w_GNK, alignment):
    mosaic.require_hopper("grouped_matmul")
    if x_MK.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"the kernel takes bfloat16 rows, not {x_MK.dtype}: use implementation='reference'"
        )
    if alignment % hopper.ROWS:
        raise NotImplementedError(
            f"the kernel needs {alignment=} to be a multiple of {hopper.ROWS}"
        )
    if w_GNK.shape[1] % hopper.DEPTH or w_GNK.shape[2] % hopper.DEPTH:
        raise NotImplementedError(
            f"the kernel needs N={w_GNK.shape[1]} and K={w_GNK.shape[2]} to be multiples of "
            f"{hopper.DEPTH}: use implementation='reference'"
        )


def _check(x_MK, w_GNK, group_sizes_G, alignment):
    if x_MK.ndim != 2 or w_GNK.ndim != 3 or group_sizes_G.ndim != 1:
        raise ValueError(
            f"grouped_matmul wants x [M, K], w [G, N, K] and group sizes [G], not {x_MK.shape}, "
            f"{w_GNK.shape} and {group_sizes_G.shape}"
        )
    if x_MK.shape[1] != w_GNK.shape[2]:
        raise ValueError(
            f"x has K={x_MK.shape[1]} and w has K={w_GNK.shape[2]}: weights are stored [G, N, K]"
        )
    if w_GNK.shape[0] != group_sizes_G.shape[0]:
        raise ValueError(
            f"w has {w_GNK.shape[0]} groups and group_sizes has {group_sizes_G.shape[0]}"
        )
    if group_sizes_G.dtype != jnp.int32:
        raise ValueError(f"group sizes must be int32, not {group_sizes_G.dtype}")
    if alignment < 1 or x_MK.shape[0] % alignment:
        raise ValueError(f"M={x_MK.shape[0]} must be a multiple of {alignment=}")
    for name, dtype in (("x", x_MK.dtype), ("w", w_GNK.dtype)):
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} must be float32 or bfloat16, not {dtype}")
    if not isinstance(group_sizes_G, jax.core.Tracer):
        sizes = np.asarray(group_sizes_G)
        used = int((-(-sizes // alignment) * alignment).sum())
        if sizes.min(initial=0) < 0 or used > x_MK.shape[0]:
            raise ValueError(
                f"groups of {sizes.tolist()} rows take {used} rows at {alignment=}, "
                f"x has M={x_MK.shape[0]}"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(x_MK, w_GNK, group_sizes_G, alignment, implementation):
    return _by_rows(x_MK, w_GNK, group_sizes_G, alignment, implementation, contract_last=True)


def _forward(x_MK, w_GNK, group_sizes_G, alignment, implementation):
    y_MN = _grouped_matmul(x_MK, w_GNK, group_sizes_G, alignment, implementation)
    return y_MN, (x_MK, w_GNK, group_sizes_G)


def _backward(alignment, implementation, saved, dy_MN):
    x_MK, w_GNK, group_sizes_G = saved
    dx_MK = _by_rows(dy_MN, w_GNK, group_sizes_G, alignment, implementation, contract_last=False)
    dw_GNK = _by_contraction(dy_MN, x_MK, group_sizes_G, alignment, implementation, w_GNK.dtype)
    return dx_MK, dw_GNK, None


_grouped_matmul.defvjp(_forward, _backward)


def _by_rows(x, w_GNK, group_sizes_G, alignment, implementation, *, contract_last):
    w_GNK = w_GNK.astype(x.dtype)
    sides = w_GNK.shape[1:] if contract_last else w_GNK.shape[:0:-1]
    if implementation == "hopper":
        return hopper.by_rows(
            x,
            w_GNK,
            group_sizes_G,
            alignment=alignment,
            contract_last=contract_last,
            tiles=hopper.tiles_by_rows(x.shape[0], w_GNK.shape[0], *sides),
            cores=mosaic.target().cores,
        )
    return reference.by_rows(
        x, w_GNK, group_sizes_G, alignment=alignment, contract_last=contract_last
    )


def _by_contraction(y_MN, x_MK, group_sizes_G, alignment, implementation, out_dtype):
    if implementation == "hopper":
        return hopper.by_contraction(
            y_MN,
            x_MK,
            group_sizes_G,
            alignment=alignment,
            tiles=hopper.tiles_by_contraction(
                x_MK.shape[0], group_sizes_G.shape[0], y_MN.shape[1], x_MK.shape[1]
            ),
            cores=mosaic.target().cores,
            out_dtype=jnp.dtype(out_dtype),
        )
    return reference.by_contraction(
        y_MN, x_MK, group_sizes_G, alignment=alignment, out_dtype=out_dtype
    )
