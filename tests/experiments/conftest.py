"""What the tests of commands share: one finished run, and programs compiled once."""

from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from tests.experiments import runs


class Trained(NamedTuple):
    """A finished run, the text it was trained on and what it printed."""

    run: Path
    data: Path
    printed: str


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """A folder of compiled programs, for this session alone, of this process and its children.

    They are compiled quickly rather than well: such small runs spend their time in the compiler.
    """
    folder = tmp_path_factory.mktemp("compiled")
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, compile_cache) -> Trained:
    """A run that nothing interrupted. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("trained")
    data = runs.write_text(folder / "text")
    code, out, err = runs.call(*runs.launch_words(folder / "run", data))
    assert (code, err) == (0, "")
    return Trained(folder / "run", data, out)
