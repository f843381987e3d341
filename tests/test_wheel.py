"""The wheel: what it holds, and that it runs where the repository is not."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("deepseek_jax", "experiments", "pallas_kernels", "sharding")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, root) -> Path:
    """The wheel of the working tree, built with the tools that are installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, root]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """Run a command in an empty folder, with the installed wheel first on Python's path."""
    target, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", target, wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    environment["PATH"] = f"{target / 'bin'}{os.pathsep}{environment['PATH']}"

    def run(*command: str) -> subprocess.CompletedProcess:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert not list(empty.iterdir())
        return done

    run.target = target
    return run


def test_the_wheel_holds_exactly_the_four_packages(wheel, root):
    names = zipfile.ZipFile(wheel).namelist()
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    sources = {
        path.relative_to(root).as_posix()
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(names) - info == sources
    assert {name.split("/", 1)[1] for name in info} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_jax_has_a_lower_bound_only(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert "jax>=0.10.2" in project["dependencies"]
    assert project["requires-python"] == ">=3.11"


def test_the_console_script_is_python_m_experiments(installed):
    script = installed("deepseek-jax", "--help")
    module = installed(sys.executable, "-m", "experiments", "--help")
    for done in (script, module):
        assert done.returncode == 0, done.stderr
        assert "usage: " in done.stdout and not done.stderr
    assert script.stdout.replace("deepseek-jax", "python -m experiments") == module.stdout


def test_the_installed_packages_are_the_ones_imported(installed):
    code = f"import {', '.join(PACKAGES)}; print({', '.join(f'{p}.__file__' for p in PACKAGES)})"
    done = installed(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed.target)) for path in done.stdout.split())


def test_an_error_leaves_the_console_script_with_its_exit_code(installed):
    done = installed("deepseek-jax", "lanch")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown command 'lanch'")
