"""Claims on number formats: LogFMT, the tensor core's accumulator, scales of blocks and tiles."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from deepseek_jax import Model, configs
from experiments.claims.claim import BY_RULE, EXACT, MODELLED, Claim, Tolerance, apart, between
from experiments.study.accumulator import relative_error
from pallas_kernels.logfmt import decode_logfmt, encode_logfmt
from pallas_kernels.logfmt.reference import unpack

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
SAMPLES = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "Student-t3": lambda rng, shape: rng.standard_t(3, size=shape),
}


def sample(kind: str, values: int) -> np.ndarray:
    """Tiles [M, 128] of so many random values, FP32."""
    shape = (-(-values // 128), 128)
    return SAMPLES[kind](np.random.default_rng(0), shape).astype(np.float32)


@functools.cache
def _round_trip(bits: int):
    return jax.jit(lambda x: decode_logfmt(encode_logfmt(x, bits), bits, 128, dtype=jnp.float32))


def logfmt(x_MK: np.ndarray, bits: int) -> np.ndarray:
    """The values after a journey in LogFMT."""
    return np.asarray(_round_trip(bits)(x_MK.astype(np.float32)))


def scaled(x_MK: np.ndarray, form, power_of_two: bool = False) -> np.ndarray:
    """The values in an 8-bit format, each tile scaled so that its largest is the format's."""
    scale_M1 = np.abs(x_MK).max(1, keepdims=True) / float(ml_dtypes.finfo(form).max)
    if power_of_two:
        scale_M1 = 2.0 ** np.ceil(np.log2(scale_M1))
    return (x_MK / scale_M1).astype(form).astype(np.float64) * scale_M1


def decibels(x: np.ndarray, y: np.ndarray) -> float:
    """Signal over noise."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(10 * np.log10(np.square(x).sum() / np.square(x - y).sum()))


def signal_to_noise(*, values: int, bits: tuple[int, int]) -> dict[str, float]:
    """dB of each format on each distribution. What is quantised are BF16 numbers."""
    found = {}
    for kind in SAMPLES:
        fp32 = sample(kind, values)
        x = fp32.astype(BF16).astype(np.float32)
        found |= {
            f"{kind} BF16": decibels(fp32, x),
            f"{kind} E4M3": decibels(x, scaled(x, E4M3)),
            f"{kind} E4M3, power of two": decibels(x, scaled(x, E4M3, power_of_two=True)),
            f"{kind} E5M2": decibels(x, scaled(x, E5M2)),
            f"{kind} LogFMT-8": decibels(x, logfmt(x, bits[0])),
            f"{kind} LogFMT-10": decibels(x, logfmt(x, bits[1])),
        }
    return found


def gain_over_fp8(*, values: int, bits: int) -> dict[str, float]:
    """dB of LogFMT above scaled E4M3 and E5M2, the smallest and largest of three distributions."""
    gains: dict[str, list[float]] = {"E4M3": [], "E5M2": []}
    for kind in SAMPLES:
        x = sample(kind, values).astype(BF16).astype(np.float32)
        ours = decibels(x, logfmt(x, bits))
        gains["E4M3"].append(ours - decibels(x, scaled(x, E4M3)))
        gains["E5M2"].append(ours - decibels(x, scaled(x, E5M2)))
    return {
        f"{word} over {form}": pick(of)
        for form, of in gains.items()
        for word, pick in (("least", min), ("most", max))
    }


def _codes_and_low(x_MK, bits: int):
    codes = encode_logfmt(x_MK, bits)
    return unpack(codes.words, bits)[0, 0], codes.low[0, 0]


def residual_errors(*, bits: int, tokens: int) -> dict[str, float]:
    """Errors of LogFMT over those of the next worse format on what residual branches add.

    Outputs of `tiny`'s layers, and the gradient of its loss to the last of them.
    """
    model = Model(configs.tiny(), rngs=nnx.Rngs(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (1, tokens), 0, model.config.vocab_size)

    @jax.jit
    def branches(tokens_BT):
        _, aux = model(tokens_BT, hidden=True)
        # The last of them is after the final norm.
        added = jnp.diff(aux.hidden_LBTD[:-1], axis=0)

        def loss(x_BTD):
            log_p = jax.nn.log_softmax(model.head(x_BTD))
            return -jnp.take_along_axis(log_p, jnp.roll(tokens_BT, -1, 1)[..., None], 2).mean()

        return added, jax.grad(loss)(aux.hidden_LBTD[-1])

    found = {}
    for what, array in zip(("outputs", "gradients"), branches(tokens_BT), strict=True):
        x = np.asarray(array, np.float32).reshape(-1, 128).astype(BF16).astype(np.float32)
        error = lambda y, x=x: float(np.linalg.norm(y - x) / np.linalg.norm(x))
        eight = error(logfmt(x, bits))
        found |= {
            f"{what}, E4M3 over E5M2": error(scaled(x, E4M3)) / error(scaled(x, E5M2)),
            f"{what}, LogFMT-8 over E4M3": eight / error(scaled(x, E4M3)),
            f"{what}, LogFMT-10 over LogFMT-8": error(logfmt(x, 10)) / eight,
        }
    return found


def special_codes(*, bits: int, octaves: float) -> dict[str, float]:
    """What codes 0, 1 and the last stand for in a tile from 3 down to 3 / 2^octaves, and zeros."""
    values = [3.0, 3 * 2.0**-octaves, 0.0, -3.0, 1.0]
    x_MK = jnp.zeros((1, 128), jnp.float32).at[0, :5].set(jnp.asarray(values))
    code, low = jax.jit(_codes_and_low, static_argnums=1)(x_MK, bits)
    size = np.asarray(code) & (2 ** (bits - 1) - 1)
    return {
        "code of the largest": int(size[0]),
        "code of the smallest": int(size[1]),
        "code of zero": int(size[2]),
        "sign bit": int(code[3] >> (bits - 1)),
        "octaves": float(np.log2(3.0 / np.float64(low))),
    }


def rounding_bias(*, values: int, linear: bool) -> dict[str, float]:
    """Bias of the mean of |x|, uniform from 0 to 1, over that of rounding the logarithm."""
    x = np.random.default_rng(0).uniform(size=(values // 128, 128)).astype(np.float32)
    x = x.astype(BF16).astype(np.float32)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    found = {}
    for bits in (4, 5, 6):
        step = np.log2(high / low) / (2 ** (bits - 1) - 2)
        by_log = low * 2.0 ** (step * np.round(np.log2(x / low) / step))
        mine = logfmt(x, bits) if linear else by_log
        bias = lambda y: abs(y.sum(dtype=np.float64) / x.sum(dtype=np.float64) - 1)
        found[f"n={bits}"] = float(bias(mine) / bias(by_log))
    return found


def token_bytes(*, hidden: int, bits: int) -> int:
    """Bytes of a token's row of LogFMT, codes and extremes."""
    row = jax.eval_shape(
        lambda x: encode_logfmt(x, bits), jax.ShapeDtypeStruct((1, hidden), jnp.bfloat16)
    )
    return sum(a.size * a.dtype.itemsize for a in row)


def promotion_gain(*, promote: int, fraction_bits: int, num_elements: int) -> dict[str, float]:
    """How many times smaller promotion makes the error of a sum."""
    setting = dict(fraction_bits=fraction_bits, num_elements=num_elements)
    return {
        kind: relative_error(kind, **setting) / relative_error(kind, promote=promote, **setting)
        for kind in ("zero-mean", "positive")
    }


def accumulation_error(*, fraction_bits: int, num_elements: int) -> dict[str, float]:
    """Percent of error of a sum that is never promoted."""
    setting = dict(fraction_bits=fraction_bits, num_elements=num_elements)
    return {kind: 100 * relative_error(kind, **setting) for kind in ("zero-mean", "positive")}


def block_scale_error(*, outlier: float, tokens: int) -> float:
    """Error of an activation gradient with a scale for 128 x 128 over one for 1 x 128.

    One token in 128 is larger than the others, whose error it enters through a shared scale.
    """
    rng = np.random.default_rng(0)
    x_MK = rng.standard_normal((tokens, 128)) * np.exp(rng.standard_normal((1, 128)))
    x_MK[::128] *= outlier
    by_block = scaled(x_MK.reshape(-1, 128 * 128), E4M3).reshape(x_MK.shape)
    rest = np.arange(tokens) % 128 != 0
    error = lambda y: np.linalg.norm((y - x_MK)[rest])
    return float(error(by_block) / error(scaled(x_MK, E4M3)))


MILLION = 1_000_000
SNR = {
    "BF16": (55.6, 55.6, 55.5),
    "E4M3": (31.8, 32.1, 33.1),
    "E4M3, power of two": (31.5, 31.5, 31.7),
    "E5M2": (25.8, 26.1, 27.1),
    "LogFMT-8": (37.0, 36.2, 37.0),
    "LogFMT-10": (49.2, 48.3, 49.1),
}
GAINS = {"least over E4M3": 3.6, "most over E4M3": 5.4, "least over E5M2": 9.6,
         "most over E5M2": 11.4}  # fmt: skip

CLAIMS = (
    Claim(
        name="logfmt_codes",
        section="3.2",
        says="LogFMT-8: the last code is the largest of a tile, 1 the smallest, 0 zero; 32 octaves",
        printed={"code of the largest": 127, "code of the smallest": 1, "code of zero": 0,
                 "sign bit": 1, "octaves": 32},
        compute=special_codes,
        inputs=dict(bits=8, octaves=32),
        tolerance=EXACT,
        how="A tile of 3, 3 / 2^32, 0, -3 and 1 encoded by pallas_kernels/logfmt; 2^(n-1) - 1 = "
        "127. What is smaller than the largest over 2^32 has no code of its own.",
        otherwise=dict(bits=9),
    ),
    Claim(
        name="logfmt_noise",
        section="3.2",
        says="signal to noise of the formats, dB",
        printed={f"{kind} {form}": values[i] for i, kind in enumerate(SAMPLES)
                 for form, values in SNR.items()},
        compute=signal_to_noise,
        inputs=dict(values=MILLION, bits=(8, 10)),
        tolerance=apart(0.3, " dB"),
        verdict=BY_RULE,
        how="The paper prints no figures. Expected are those of another simulation of the formats "
        "on tiles of 128; ours encodes a million BF16 numbers of each distribution. E4M3 and E5M2 "
        "are scaled by the largest of a tile.",
        otherwise=dict(bits=(7, 10)),
    ),
    Claim(
        name="logfmt_over_fp8",
        section="3.2",
        says="LogFMT-8 is more accurate than E4M3 and E5M2 at the same number of bits, dB",
        printed=GAINS,
        compute=gain_over_fp8,
        inputs=dict(values=MILLION, bits=8),
        tolerance=Tolerance(
            "3.6 to 5.4 dB over E4M3, 9.6 to 11.4 over E5M2",
            lambda ours, printed: (
                3.6 <= ours <= 5.4 if printed in (3.6, 5.4) else 9.6 <= ours <= 11.4
            ),
        ),
        verdict=BY_RULE,
        how="Signal to noise on a million values of three distributions, both FP8 formats scaled "
        "by the largest of a tile: the error of what is sent, not the loss of a training run.",
        otherwise=dict(bits=7),
    ),
    Claim(
        name="logfmt_residual",
        section="3.2",
        says="on residual branches LogFMT-8 is more accurate than E4M3 and E5M2: errors in order",
        printed={f"{what}, {pair}": 1.0 for what in ("outputs", "gradients")
                 for pair in ("E4M3 over E5M2", "LogFMT-8 over E4M3", "LogFMT-10 over LogFMT-8")},
        compute=residual_errors,
        inputs=dict(bits=8, tokens=256),
        tolerance=Tolerance("each below 0.8", lambda ours, printed: ours < 0.8 * printed),
        verdict=MODELLED,
        how="What the layers of `tiny` add to the residual stream, and the gradient of its loss, "
        "at the weights it starts with, in each format. Whether a model of 7 B then trains better "
        "is not said by that.",
        otherwise=dict(bits=6),
    ),
    Claim(
        name="logfmt_bias",
        section="3.2",
        says="rounding in linear space keeps means: its bias over that of rounding logarithms",
        printed={"n=4": 0.02, "n=5": 0.02, "n=6": 0.02},
        compute=rounding_bias,
        inputs=dict(values=3 * MILLION, linear=True),
        tolerance=Tolerance("at most a fiftieth", lambda ours, printed: ours <= printed),
        verdict=BY_RULE,
        how="Three million values, uniform from 0 to 1, so that the density is even within a step. "
        "Rounding the logarithm enlarges means by 9.5, 1.9 and 0.4 %.",
        otherwise=dict(linear=False),
    ),
    Claim(
        name="logfmt_bytes",
        section="3.2",
        says="bytes of V3's token in LogFMT-10, as DeepEP sends it",
        printed=9184,
        compute=token_bytes,
        inputs=dict(hidden=7168, bits=10),
        tolerance=EXACT,
        how="7168 x 10 / 8 bytes of codes and 56 pairs of BF16: 64 % of BF16.",
        otherwise=dict(bits=8),
    ),
    Claim(
        name="accumulation_promotion",
        section="3.1.1; V3 report, 3.3.2",
        says="adding up in FP32 after every 128 elements cuts the error at K = 4096",
        printed={"zero-mean": 8, "positive": 50},
        compute=promotion_gain,
        inputs=dict(promote=128, fraction_bits=13, num_elements=4096),
        tolerance=Tolerance("at least so many times", lambda ours, printed: ours >= printed),
        verdict=MODELLED,
        how="A bit-level model of Hopper's accumulator: 32 products and the sum aligned to the "
        "largest exponent, 13 fraction bits kept, toward zero; E4M3 operands. In positive sums "
        "the cut is always downward and adds up.",
        otherwise=dict(promote=512),
    ),
    Claim(
        name="accumulation_error",
        section="3.1.1; V3 report, 3.3.2",
        says="a sum of 4096 products in FP22 is off by about 2 %",
        printed={"zero-mean": 2.0, "positive": 2.0},
        compute=accumulation_error,
        inputs=dict(fraction_bits=13, num_elements=4096),
        tolerance=between(0.1, 8, "0.1 to 8 %, by the data"),
        verdict=MODELLED,
        how="The same model without promotion: 0.14 % of the norm for normal operands, 6.6 % for "
        "positive ones, on both sides of the printed figure, which depends on the data.",
        otherwise=dict(fraction_bits=20),
    ),
    Claim(
        name="block_scales",
        section="V3 report, appendix B.2",
        says="128 x 128 blocks are too coarse for gradients: error over that of 1 x 128 tiles",
        printed=1.0,
        compute=block_scale_error,
        inputs=dict(outlier=1e4, tokens=4096),
        tolerance=Tolerance("above 2, direction only", lambda ours, printed: ours > 2 * printed),
        verdict=MODELLED,
        how="One token in 128 ten thousand times larger: with a shared scale the others fall below "
        "E4M3's normal numbers. That training diverged after 300 B tokens is not reproduced.",
        otherwise=dict(outlier=1.0),
    ),
)  # fmt: skip
