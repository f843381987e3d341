"""Which dimension lies on which mesh axis, and the only places where devices exchange data.

Knows letters (the alphabet of deepseek_jax), meshes and arrays; knows no model and no config.
"""

from sharding.mesh import AXES, make_mesh
from sharding.placement import local, shard

__all__ = ["AXES", "local", "make_mesh", "shard"]
