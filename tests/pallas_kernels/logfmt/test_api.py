"""LogFMT against tables of its values, the paper's signal-to-noise ratios, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.logfmt import LogFMT, decode_logfmt, encode_logfmt, reference
from pallas_kernels.logfmt.octaves import extremes, octaves
from pallas_kernels.quantize_fp8 import quantize_tiles
from pallas_kernels.quantize_fp8.reference import decode_tiles
from tests.pallas_kernels.lowering import A100, TPU, on
from tests.pallas_kernels.numeric import float64

ROWS = 7813  # of 128 values: a million
SAMPLES = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student-t3": lambda rng, shape: rng.standard_t(3, size=shape),
}
# Signal to noise in dB, tile 1 x 128.
BITS_8, BITS_10, E4M3 = (37.0, 36.2, 37.0), (49.2, 48.3, 49.1), (31.8, 32.1, 33.1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_trip(x_MK, n, dtype=jnp.float32):
    codes = encode_logfmt(x_MK, n)
    return codes, decode_logfmt(codes, n, x_MK.shape[1], dtype=dtype)


def sample(kind, dtype=jnp.float32):
    return jnp.asarray(SAMPLES[kind](np.random.default_rng(0), (ROWS, 128)), dtype)


def decibels(x, y):
    x, y = float64(x), float64(y)
    return 10 * np.log10(np.square(x).sum() / np.square(x - y).sum())


def table(low, high, n):
    """All magnitudes of a tile, code by code, in float64."""
    steps = 2 ** (n - 1) - 2
    step = np.log2(high / low) / steps if high > 0 else 0.0
    return np.array([0.0, *(low * 2.0 ** (step * np.arange(steps + 1)))])


def hard_rows(rng):
    """Tiles at the edges of the format, in BF16: 200 channels, so that the last tile is short."""
    x_MK = rng.standard_normal((12, 200)) * np.exp(rng.standard_normal((12, 1)))
    x_MK[1, :128] = 0
    x_MK[2, :128] = -2.5
    x_MK[3, ::2] = 0
    x_MK[4] = 2.0 ** rng.uniform(-20, 0, 200)
    x_MK[5] = rng.choice([1.0, 1.0078125], 200)
    x_MK[6] = 2.0 ** rng.uniform(-120, -100, 200)
    return jnp.asarray(x_MK, jnp.bfloat16)


@pytest.mark.parametrize("n", [4, 5, 8, 10], ids="n{}".format)
def test_codes_are_those_of_the_nearest_value(n):
    x_MK = hard_rows(np.random.default_rng(n))
    codes, values_MK = round_trip(x_MK, n)
    found = np.asarray(reference.unpack(codes.words, n))
    x = np.pad(float64(x_MK), ((0, 0), (0, 56))).reshape(12, 2, 128)
    for row, tile in np.ndindex(12, 2):
        size = np.abs(x[row, tile])
        low, high = size[size > 0].min(initial=np.inf), size.max()
        assert float64(codes.high)[row, tile] == high
        assert float64(codes.low)[row, tile] == (low if high > 0 else 0)
        decoded = table(low, high, n)
        distance = np.abs(size[:, None] - decoded)
        mine = found[row, tile] & (2 ** (n - 1) - 1)
        # Nearest but for the rounding of a threshold in FP32, and of the extremes' logarithms.
        slack = 3e-5 * size + 1e-30
        assert (distance[np.arange(128), mine] <= distance.min(1) + slack).all()
        np.testing.assert_array_equal(mine == 0, size == 0)
        np.testing.assert_array_equal(found[row, tile] >> (n - 1), np.signbit(x[row, tile]))
        width = min(128, 200 - 128 * tile)
        right = np.copysign(decoded[mine], x[row, tile])[:width]
        got = float64(values_MK)[row, 128 * tile : 128 * tile + width]
        np.testing.assert_allclose(got, right, rtol=3e-5)


def test_the_extremes_have_the_first_and_the_last_code():
    x_MK = sample("gaussian", jnp.bfloat16)[:500]
    for n in (4, 8, 10):
        codes, values_MK = round_trip(x_MK, n)
        sizes = reference.unpack(codes.words, n)[:, 0] & (2 ** (n - 1) - 1)
        low_M, high_M = np.abs(float64(x_MK)).min(1), np.abs(float64(x_MK)).max(1)
        for code, right_M in ((1, low_M), (2 ** (n - 1) - 1, high_M)):
            at = np.asarray(sizes == code)
            assert at.any(1).all()
            right_MK = np.broadcast_to(right_M[:, None], at.shape)
            np.testing.assert_array_equal(np.abs(float64(values_MK))[at], right_MK[at])


def test_the_range_is_32_octaves():
    x_MK = jnp.asarray([[2.0, 2.0**-31, 2.0**-40, 0.0, -(2.0**-33)]], jnp.bfloat16)
    codes, values_MK = round_trip(x_MK, 8)
    assert float64(codes.low)[0, 0] == 2.0**-31
    np.testing.assert_array_equal(values_MK, [[2.0, 2.0**-31, 0, 0, 0]])


@pytest.mark.parametrize("n", range(4, 11), ids="n{}".format)
def test_words_hold_n_bits_of_each_value(n):
    code = np.random.default_rng(n).integers(0, 2**n, (3, 2, 128), np.uint32)
    words = np.asarray(reference.pack(jnp.asarray(code), n))
    assert words.dtype == np.uint16 and words.nbytes * 8 == n * code.size
    np.testing.assert_array_equal(reference.unpack(jnp.asarray(words), n), code)
    # A string of bits for each residue of the channel's number modulo 8.
    strings = code.reshape(3, 2, 16, 8)
    right = [
        sum(int(strings[2, 1, i, c]) << (n * i) for i in range(16)) >> (16 * p) & 0xFFFF
        for p in range(n)
        for c in range(8)
    ]
    np.testing.assert_array_equal(words.reshape(3, 2, 8 * n)[2, 1], right)


@pytest.mark.parametrize("kind", SAMPLES)
def test_signal_to_noise_of_a_million_values(kind):
    x_MK, column = sample(kind, jnp.bfloat16), list(SAMPLES).index(kind)
    found = {n: decibels(x_MK, round_trip(x_MK, n)[1]) for n in (8, 10)}
    assert abs(found[8] - BITS_8[column]) < 0.3
    assert abs(found[10] - BITS_10[column]) < 0.3
    # Beside it E4M3, scaled by the largest magnitude of the same tile.
    e4m3 = decibels(x_MK, decode_tiles(*quantize_tiles(x_MK)))
    assert abs(e4m3 - E4M3[column]) < 0.3
    assert 3.6 < found[8] - e4m3 < 5.4


@pytest.mark.parametrize("n", [4, 5, 6, 8], ids="n{}".format)
def test_rounding_keeps_the_mean(n):
    x_MK = jnp.asarray(np.random.default_rng(1).uniform(size=(ROWS, 128)), jnp.float32)
    codes, values_MK = round_trip(x_MK, n)
    bias = float64(values_MK).sum() / float64(x_MK).sum() - 1
    # The same codes' values, taken by the nearest logarithm instead.
    low, high = float64(codes.low), float64(codes.high)
    step = np.log2(high / low) / (2 ** (n - 1) - 2)
    number = np.round(np.log2(float64(x_MK) / low) / step)
    log_bias = (low * 2 ** (step * number)).sum() / float64(x_MK).sum() - 1
    assert log_bias > {4: 8e-2, 5: 1.5e-2, 6: 3.5e-3, 8: 2e-4}[n]
    assert abs(bias) < (log_bias / 50 if n <= 6 else 5e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
def test_a_second_pass_changes_nothing(dtype):
    x_MK = sample("laplace", dtype)[:500]
    for n in (4, 8, 10):
        codes, values_MK = round_trip(x_MK, n)
        again, values_again_MK = round_trip(values_MK, n)
        jax.tree.map(np.testing.assert_array_equal, again, codes)
        np.testing.assert_array_equal(values_again_MK, values_MK)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_makes_its_tile_nan(poison):
    x_MK = sample("gaussian")[:8].reshape(4, 256).at[2, 130].set(poison)
    _, values_MK = round_trip(x_MK, 8)
    bad_MK = np.zeros((4, 256), bool)
    bad_MK[2, 128:] = True
    np.testing.assert_array_equal(np.isnan(values_MK), bad_MK)


def test_extremes_are_rounded_to_bf16_and_any_nan_stays_one():
    bits = np.array([0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF, 0x7F800000], np.uint32)
    for low in (jnp.full(4, 1.0), jnp.asarray(bits.view(np.float32))):
        for found in extremes(low, jnp.asarray(bits.view(np.float32))):
            assert np.isnan(found).all()
    low, high = extremes(jnp.float32(1.001), jnp.float32(2.9961))
    assert (float(low), float(high)) == (1.0, 3.0)
    assert [float(x) for x in extremes(jnp.float32(jnp.inf), jnp.float32(0))] == [0, 0]


def test_octaves_are_logarithms_of_bf16_numbers():
    rng = np.random.default_rng(0)
    low, high = (2.0 ** rng.uniform(-100, 100, 4096) for _ in range(2))
    low, high = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (low, high))
    found = np.asarray(octaves(jnp.asarray(low), jnp.asarray(high)))
    np.testing.assert_allclose(found, np.log2(float64(high) / float64(low)), atol=4e-5)
    np.testing.assert_array_equal(octaves(jnp.asarray(low), jnp.asarray(low)), 0)


def test_decoded_values_are_rounded_once():
    x_MK = sample("gaussian", jnp.bfloat16)[:64]
    _, fp32_MK = round_trip(x_MK, 8)
    _, bf16_MK = round_trip(x_MK, 8, jnp.bfloat16)
    right = np.asarray(fp32_MK).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(float64(bf16_MK), right.astype(np.float64))


def codes_of(n=8):
    line = jnp.zeros((4, 1), jnp.bfloat16)
    return LogFMT(jnp.zeros((4, 8 * n), jnp.uint16), line, line)


BAD = {
    "few-bits": (lambda: encode_logfmt(jnp.zeros((4, 128)), 3), "4 to 10 bits, not n=3"),
    "many-bits": (lambda: decode_logfmt(codes_of(), 11, 128), "not n=11"),
    "rank": (lambda: encode_logfmt(jnp.zeros(128), 8), r"\[M, K\]"),
    "dtype": (lambda: encode_logfmt(jnp.zeros((4, 128), jnp.float16), 8), "float16"),
    "other-bits": (lambda: decode_logfmt(codes_of(8), 10, 128), r"uint16 \[4, 80\]"),
    "width": (lambda: decode_logfmt(codes_of(), 8, 129), r"uint16 \[4, 128\]"),
    "out": (lambda: decode_logfmt(codes_of(), 8, 128, dtype=jnp.float16), "float32 or bfloat16"),
    "extremes": (
        lambda: decode_logfmt(LogFMT(codes_of().words, codes_of().low, jnp.zeros((4, 1))), 8, 128),
        r"high must be bfloat16 \[4, 1\]",
    ),
    "implementation": (
        lambda: encode_logfmt(jnp.zeros((4, 128)), 8, implementation="fast"),
        "one of",
    ),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("device", [TPU, A100], ids=["tpu", "a100"])
def test_other_accelerators_are_refused_by_name(device):
    x_MK = jnp.zeros((4, 128))
    with on(device), pytest.raises(NotImplementedError, match=device.device_kind):
        encode_logfmt(x_MK, 8)
    with on(device):
        jax.eval_shape(lambda x: encode_logfmt(x, 8, implementation="reference"), x_MK)
