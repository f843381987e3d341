"""AdamW with moments in a chosen dtype (V3 report, section 4.2), as a pure function of pytrees.

optax.adamw has a dtype for the first moment only; V3 keeps both in BF16.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import AdamW
from sharding.rules import letters_of


def is_decayed(path: tuple) -> bool:
    """Whether weight decay applies to the parameter at a tree path: matrices, not norm weights."""
    return len(letters_of(path[-1].key)) > 1


def adamw(
    params: Any,
    gradients: Any,
    first: Any,
    second: Any,
    *,
    count: jax.Array,
    learning_rate: jax.Array,
    norm: jax.Array,
    settings: AdamW,
) -> tuple[Any, Any, Any]:
    """One step; returns new parameters and moments, moments rounded to the dtype they came in.

    Gradients are scaled to a global norm of at most clip_norm. `count` is the number of updates
    already made, `norm` the global norm of `gradients`.
    """
    clip = jnp.minimum(1.0, settings.clip_norm / (norm + 1e-12))
    t = (count + 1).astype(jnp.float32)
    unbias1 = 1.0 / (1.0 - settings.beta1**t)
    unbias2 = 1.0 / (1.0 - settings.beta2**t)

    def update(path, param, gradient, m, v):
        g = gradient.astype(jnp.float32) * clip
        m32 = settings.beta1 * m.astype(jnp.float32) + (1.0 - settings.beta1) * g
        v32 = settings.beta2 * v.astype(jnp.float32) + (1.0 - settings.beta2) * g * g
        step = m32 * unbias1 / (jnp.sqrt(v32 * unbias2) + settings.eps)
        if is_decayed(path):
            step = step + settings.weight_decay * param
        return param - learning_rate * step, m32.astype(m.dtype), v32.astype(v.dtype)

    updated = jax.tree_util.tree_map_with_path(update, params, gradients, first, second)
    is_leaf = lambda node: isinstance(node, tuple)
    return tuple(jax.tree.map(lambda t, i=i: t[i], updated, is_leaf=is_leaf) for i in range(3))
