"""What the ops share about their target: which device the traced program is for."""

from typing import NamedTuple

import jax


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
