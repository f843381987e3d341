"""What the README says: its commands, its tree of files, its example."""

import subprocess
import sys

import pytest

PACKAGES = ("deepseek_jax", "sharding", "pallas_kernels", "experiments")


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text()


def block(text: str, before: str) -> str:
    """The fenced block after a line, without its fences."""
    _, after = text.split(f"{before}\n", 1)
    return after.split("```")[1].split("\n", 1)[1]


@pytest.mark.parametrize("mark", ["<!-- run command -->", "<!-- test command -->"])
def test_a_command_is_one_line(readme, mark):
    assert block(readme, mark).strip().count("\n") == 0


def test_the_tree_names_every_file_and_no_other(readme, root):
    named, folder = set(), ""
    for line in block(readme, "## What is where").splitlines():
        name = line.split()[0]
        path = f"{folder}{name}" if line.startswith(" ") else name
        if name.endswith("/") and not line.startswith(" "):
            folder = name
        assert (root / path).exists(), f"README names {path}, which is not there"
        named.add(path)
    there = {
        f"{package}/{path.name}{'/' if path.is_dir() else ''}"
        for package in PACKAGES
        for path in (root / package).iterdir()
        if path.name not in ("__init__.py", "__pycache__")
        and (path.suffix == ".py" or path.is_dir() and list(path.glob("*")))
    }
    missing = sorted(there - named)
    assert not missing, f"give each file its line in README's tree: {missing}"


def test_the_example_runs(readme, root):
    code = block(readme, "## From Python")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
