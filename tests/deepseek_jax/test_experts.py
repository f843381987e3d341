"""Tokens on their way to experts on other devices: FP8 out, BF16 back, the same bits as at home."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax import fp8
from deepseek_jax.experts import to_rows
from deepseek_jax.swiglu import send_tiles
from pallas_kernels.quantize_fp8 import quantize_tiles
from sharding import make_mesh
from sharding.expert_parallel import plan_path, send
from sharding.placement import Scheme, under_mesh

T, D, E, K = 32, 256, 16, 3


def tiles(x_TD):
    """Codes and scales of each token as they are dispatched."""
    return fp8.per_token(quantize_tiles(x_TD, power_of_two=True), x_TD.shape[:1])


def there(x_TD, g_TD, expert_TK, token_T1):
    """What arrives of tokens and of gradients, and whose it is."""
    path = plan_path(expert_TK, E, 128, held=E // 8)
    rows = to_rows(fp8.Quantized(x_TD, *tiles(x_TD), True), path)
    gradients = fp8.per_token(send_tiles(g_TD, path), rows.x.shape[:1])
    return rows.x, rows.codes, fp8.decode_tiles(*gradients, D), send(token_T1 + 1, path)


@pytest.mark.parametrize("nodes", [1, 4], ids=["one-hop", "two-hops"])
def test_tokens_and_gradients_arrive_as_one_device_would_quantise_them(nodes):
    rng = np.random.RandomState(0)
    draw = lambda: jnp.asarray(rng.randn(T, D) * 10.0 ** rng.randint(-3, 3, (T, 1)), jnp.bfloat16)
    x_TD, g_TD = draw(), draw()
    expert_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    mesh, each = make_mesh(expert=8), P("expert")
    mapped = jax.shard_map(there, mesh=mesh, in_specs=(each,) * 4, out_specs=each)
    rows, codes, gradients, token = jax.jit(
        under_mesh(mapped, mesh, Scheme(expert_nodes=nodes))
    )(x_TD, g_TD, expert_TK, jnp.arange(T, dtype=jnp.int32)[:, None])
    token = np.asarray(token)[:, 0] - 1
    real = token >= 0
    assert sorted(token[real]) == sorted(np.repeat(np.arange(T), K))
    assert codes.dtype == jnp.float8_e4m3fn
    for arrived, sent in ((rows, x_TD), (gradients, g_TD)):
        wanted = np.asarray(fp8.decode_tiles(*tiles(sent), D).astype(jnp.float32))
        arrived = np.asarray(arrived.astype(jnp.float32))
        np.testing.assert_array_equal(arrived[real], wanted[token[real]])
        assert not np.any(arrived[~real])


def test_dispatch_in_fp8_takes_little_more_than_half_the_bytes():
    encode = lambda x_TD: fp8.to_wire(*tiles(x_TD))
    sent = jax.eval_shape(encode, jax.ShapeDtypeStruct((64, 7168), jnp.bfloat16))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in sent)
    assert size / (64 * 7168 * 2) <= 0.505


@pytest.mark.parametrize("count", [1, 16, 56])
def test_scales_of_powers_of_two_travel_as_bytes(count):
    exponents = np.random.RandomState(0).randint(-126, 128, (5, count))
    scale = jnp.asarray(np.ldexp(np.float32(1), exponents))
    scale = scale.at[0, 0].set(jnp.nan).at[1, -1].set(0.0)
    words = fp8.scales_to_words(scale)
    assert words.dtype == jnp.uint32 and words.shape == (5, -(-count // 16) * 4)
    np.testing.assert_array_equal(fp8.words_to_scales(words, count), scale)
