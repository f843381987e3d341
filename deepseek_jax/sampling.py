"""Drawing tokens: temperature, top-k, top-p, min-p, and the acceptance of drafted tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

COLDEST = 1e-30  # well above the FP32 numbers that a device may take for 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; None leaves a rule out. Values may change without a new program."""

    temperature: float | jax.Array | None = None  # None: always the most likely token
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None
    min_p: float | jax.Array | None = None

    @classmethod
    def of(cls, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None):
        """Checked; temperature 0 is greedy, and a rule that keeps every token is left out."""
        if not (temperature == 0.0 or COLDEST <= temperature < float("inf")):
            raise ValueError(f"{temperature=} must be 0 (greedy) or at least {COLDEST}")
        if top_k is not None and (int(top_k) != top_k or not 1 <= top_k < 2**31):
            raise ValueError(f"{top_k=} must be a whole number of at least 1, below 2**31")
        if top_p is not None and not COLDEST <= top_p <= 1.0:
            raise ValueError(f"{top_p=} must be above 0 (at least {COLDEST}) and at most 1")
        if min_p is not None and not 0.0 <= min_p <= 1.0:
            raise ValueError(f"{min_p=} must be between 0 and 1")
        if temperature == 0.0:
            return cls()
        values = (jnp.float32(temperature),
                  None if top_k is None else jnp.int32(top_k),
                  None if top_p in (None, 1.0) else jnp.float32(top_p),
                  None if min_p in (None, 0.0) else jnp.float32(min_p))  # fmt: skip
        return cls(*values)


def log_probabilities(logits: Float[Array, "... V"], sampling: Sampling) -> jax.Array:
    """log p of the distribution that is drawn from, -inf for tokens that a rule excludes.

    In order: temperature; the top_k most likely; of those, the fewest whose probabilities reach
    top_p; those at least min_p times as likely as the most likely. Tokens as likely as the last
    that is kept are kept with it.
    """
    logits = logits.astype(jnp.float32)
    # The largest becomes 0, which no temperature makes infinite.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        kept = ordered
        if sampling.top_k is not None:
            kept = jnp.where(_like(rank < sampling.top_k, ordered), ordered, -jnp.inf)
        if sampling.top_p is not None:
            p = jax.nn.softmax(kept, axis=-1)
            before = jnp.cumsum(p, axis=-1) - p
            kept = jnp.where(before < sampling.top_p, kept, -jnp.inf)
        lowest = jnp.min(jnp.where(kept > -jnp.inf, kept, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    if sampling.min_p is not None:
        limit = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= limit, logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def _like(row: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(row, x.shape)


def row_keys(key: jax.Array, position_B: Int[Array, " B"], purpose: int) -> jax.Array:
    """A key for each row's token at a position: it depends on no other row and on no length."""
    rows_B = jnp.arange(position_B.shape[0], dtype=jnp.int32)

    def one(row, position):
        folded = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.fold_in(folded, purpose)

    return jax.vmap(one)(rows_B, position_B)


def draw(
    logits_BV: Float[Array, "B V"],
    sampling: Sampling,
    key: jax.Array,
    position_B: Int[Array, " B"],
    purpose: int = 0,
) -> Int[Array, " B"]:
    """The token at each row's position: the most likely, or one drawn."""
    if sampling.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    log_p_BV = log_probabilities(logits_BV, sampling)
    keys_B = row_keys(key, position_B, purpose)
    return jax.vmap(jax.random.categorical)(keys_B, log_p_BV).astype(jnp.int32)


def verify(
    logits_BWV: Float[Array, "B W V"],
    draft_logits_BPV: Float[Array, "B P V"],
    draft_BP: Int[Array, "B P"],
    sampling: Sampling,
    key: jax.Array,
    position_B: Int[Array, " B"],
) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """Tokens of positions position_B on, and how many drafts were accepted (W = P + 1).

    A draft d of distribution q is accepted with probability min(1, p(d) / q(d)), p being the main
    model's; the first one rejected is drawn again from max(p - q, 0), so that tokens are
    distributed by p exactly. The token after the accepted ones is the last that counts.
    """
    P = draft_BP.shape[1]
    if sampling.temperature is None:
        best_BW = jnp.argmax(logits_BWV, axis=-1).astype(jnp.int32)
        accepted_B = leading(best_BW[:, :P] == draft_BP)
        return best_BW, accepted_B
    p_BWV = jnp.exp(log_probabilities(logits_BWV, sampling))
    q_BPV = jnp.exp(log_probabilities(draft_logits_BPV, sampling))
    taken = lambda x: jnp.take_along_axis(x, draft_BP[:, :, None], axis=-1)[..., 0]
    uniform_BP = jnp.stack(
        [jax.vmap(jax.random.uniform)(row_keys(key, position_B + d, 1)) for d in range(P)], axis=1
    )
    accepted_B = leading(uniform_BP * taken(q_BPV) < taken(p_BWV[:, :P]))
    # Past the last draft nothing was proposed: q is 0 and the rest is p.
    q_BWV = jnp.pad(q_BPV, ((0, 0), (0, 1), (0, 0)))
    at = lambda x: jnp.take_along_axis(x, accepted_B[:, None, None], axis=1)[:, 0]
    p_BV = at(p_BWV)
    rest_BV = residual(p_BV, at(q_BWV))
    keys_B = row_keys(key, position_B + accepted_B, 2)
    last_B = jax.vmap(jax.random.categorical)(keys_B, jnp.log(rest_BV)).astype(jnp.int32)
    slots_W = jnp.arange(P + 1, dtype=jnp.int32)[None, :]
    drafts_BW = jnp.pad(draft_BP, ((0, 0), (0, 1)))
    return jnp.where(slots_W == accepted_B[:, None], last_B[:, None], drafts_BW), accepted_B


def residual(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """max(p - q, 0), not normalised; p where rounding leaves nothing."""
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    return jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0.0, rest_BV, p_BV)


def leading(true_BP: Bool[Array, "B P"]) -> Int[Array, " B"]:
    """How many entries of each row are True before the first that is not."""
    return jnp.sum(jnp.cumprod(true_BP.astype(jnp.int32), axis=1), axis=1)
