"""What all Hopper kernels share: the target device, the launch, shared-memory layouts, versions."""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = (None, "reference", "hopper")  # None: the best for the target


class Target(NamedTuple):
    """The device that a traced program is made for."""

    platform: str
    kind: str
    cores: int | None

    @property
    def is_hopper(self) -> bool:
        names = ("H100", "H200", "H800")
        return self.platform == "gpu" and any(name in self.kind for name in names)


def target() -> Target:
    """Device of the mesh in scope, compile-only ones included; without a mesh the default one.

    Asking the mesh first lets a plan for an accelerator be made on a machine that has none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Target(device.platform, device.device_kind, device.num_cores)
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return Target(default.platform, default.device_kind, getattr(default, "core_count", None))


def require_hopper(op: str) -> int:
    """Number of SMs of the target; an error that names the device if it is not a Hopper GPU."""
    device = target()
    if not device.is_hopper:
        raise NotImplementedError(
            f"{op} has a kernel for Hopper GPUs (H100, H200), not for {device.kind} "
            f"({device.platform}): use implementation='reference'"
        )
    return device.cores


def choose(implementation: str | None, op: str) -> str:
    """The implementation to run on the target device; other accelerators are refused by name."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}")
    if implementation == "reference" or (implementation is None and target().platform == "cpu"):
        return "reference"
    require_hopper(op)
    return "hopper"


def swizzled(columns: int, dtype: jax.typing.DTypeLike, width: int = 0) -> tuple:
    """Layout in shared memory of rows of `columns` elements as TMA writes and WGMMA reads them.

    Of an array `width` wide: Mosaic copies only what divides it, so 2128 gets a swizzle of 32.
    """
    columns, itemsize = math.gcd(columns, width), jnp.dtype(dtype).itemsize
    swizzle = next(size for size in (128, 64, 32) if columns * itemsize % size == 0)
    return (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))


def pad_rows(x: jax.Array) -> jax.Array:
    """Rows of zeros added up to a multiple of 8: Mosaic refuses other numbers above 8."""
    rows = x.shape[0]
    return x if rows <= 8 or rows % 8 == 0 else jnp.pad(x, ((0, -rows % 8), (0, 0)))


def transpose(ref):
    """View of a two-dimensional reference with its dimensions exchanged."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def load(ref, layout, *, optimized=True):
    """The whole reference in registers, in the given layout; optimized: free of bank conflicts."""
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def store(ref, value) -> None:
    """The value into shared memory, with bank conflicts where the layout has them."""
    if jax.__version_info__ < (0, 12):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)


def concatenate_columns(pieces):
    """Arrays in registers side by side, each in the layout of WGMMA results."""
    if jax.__version_info__ >= (0, 11):
        return jnp.concatenate(pieces, axis=1)
    from jax.experimental.mosaic.gpu import fragmented_array

    shape = (pieces[0].shape[0], sum(piece.shape[1] for piece in pieces))
    layout = plgpu.Layout.WGMMA
    join = plgpu.inline_mgpu(
        arg_types=(layout,) * len(pieces),
        return_type=plgpu.ShapeDtypeStruct(shape, pieces[0].dtype, layout),
    )

    @join
    def joined(_, *arrays):
        registers = np.concatenate([array.registers for array in arrays], axis=1)
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=arrays[0].layout, _is_signed=arrays[0].is_signed
        )

    return joined(*pieces)


def compute_registers(warpgroups: int, memory_registers: int) -> int:
    """Registers of a compute warpgroup's thread beside one memory warpgroup.

    A block owns what it was launched with; asking for more than that never returns.
    """
    total = warpgroups + 1
    pool = 65536 // (128 * total) // 8 * 8 * total
    return min(240, (pool - memory_registers) // warpgroups // 8 * 8)


def varying_like(operand, array):
    """The array, varying over the same mesh axes as an operand: kernels' outputs do not say so."""
    axes = varying_axes(operand)
    return jax.lax.pcast(array, axes, to="varying") if axes else array


def varying_axes(operand) -> tuple[str, ...]:
    """The mesh axes over which an operand differs, inside a function on local shards."""
    return tuple(jax.typeof(operand).manual_axis_type.varying)


def launch(body, *, name, interpret=None, approx_math=False, **kernel_args):
    """`plgpu.kernel` with the semantics our kernels are written for: one thread of control per
    warpgroup, barriers placed by hand.

    Reductions over the warps of a warpgroup are refused: Mosaic has one buffer for them, in which
    warpgroups would race.
    """
    params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=interpret is None,
        reduction_scratch_bytes=0,
        approx_math=approx_math,
    )
    extra = {} if interpret is None else {"interpret": interpret}
    # The name under which profiles and programs list the kernel.
    body = functools.partial(body)
    body.__name__ = name
    return once(plgpu.kernel(body, compiler_params=params, **kernel_args, **extra))


def once(kernel):
    """The kernel, of which a program holds one copy however often it is called on equal operands.

    A jitted launcher alone is copied where its call is split for the backward pass, and the kernel
    with it; what custom_vmap calls is never split.
    """
    called = jax.custom_batching.custom_vmap(jax.jit(kernel))

    @called.def_vmap
    def batched(axis_size, in_batched, *operands):
        axes = [0 if is_batched else None for is_batched in in_batched]
        results = jax.vmap(kernel, in_axes=axes, axis_size=axis_size)(*operands)
        return results, jax.tree.map(lambda _: True, results)

    return called
