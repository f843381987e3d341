"""What all tests share: eight CPU devices, strict types, one measure of error and its limits."""

import os

# Both must be set before jax is imported, which collecting the tests does.
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A program compiled by an earlier version must not answer for today's code.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ.setdefault("MPLBACKEND", "agg")

from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# Third parties (optax's adamw, orbax) promote types, so tests of experiments are not strict.
STRICT = ("deepseek_jax", "pallas_kernels", "sharding")


@dataclass(frozen=True)
class Limits:
    """The largest allowed `relative_error` of an op or a model computed in one format."""

    value: float
    gradient: float


# Never loosened: a test that misses its limit has found something.
LIMITS = {
    "fp32": Limits(value=1e-5, gradient=1e-4),
    "bf16": Limits(value=1e-2, gradient=2e-2),
    "fp8": Limits(value=6e-2, gradient=8e-2),
}


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in float64; 0 or infinity where expected is 0.

    Shapes must agree, and a NaN or an infinity in either is an infinite error.
    """
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{actual.shape=} is not {expected.shape=}"
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    difference, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / size)


@pytest.fixture(scope="session", name="relative_error")
def relative_error_fixture():
    """The function `relative_error(actual, expected)`."""
    return relative_error


@pytest.fixture(scope="session")
def limits() -> dict[str, Limits]:
    """The table of limits: `limits["bf16"].gradient`."""
    return LIMITS


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="module", autouse=True)
def strict_promotion(request):
    """In tests of the three library packages, mixing dtypes or ranks is an error."""
    relative = request.path.relative_to(ROOT / "tests")
    if relative.parts[0] not in STRICT:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def pytest_addoption(parser):
    """The flag that has jaxtyping and beartype check every annotated shape and dtype."""
    text = "check the shapes and dtypes that signatures state, in every call"
    parser.addoption("--check-shapes", action="store_true", help=text)


def pytest_configure(config):
    """Hook the checker into the packages before any test imports them; a crash ends the run."""
    if config.pluginmanager.hasplugin("xdist"):
        # It would wait for ever for what was left of the file of a worker that crashed.
        config.option.maxworkerrestart = "0"
    if config.getoption("--check-shapes"):
        import jaxtyping

        import tests.typechecking  # noqa: F401  the hook looks it up by name

        jaxtyping.install_import_hook(STRICT, "tests.typechecking.check")


def pytest_runtest_setup(item):
    """Skip what needs a GPU when JAX has none."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU and JAX_PLATFORMS=cuda,cpu")
