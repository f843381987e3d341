"""measure.sh: every command in it is one of ours."""

import shlex
import subprocess

import pytest

from experiments import __main__, command_line

# Writes down the words of a command instead of running it.
PYTHON = """#!/usr/bin/env bash
[ "$1" = - ] || printf '%q ' "$@" >> "$WORDS"
[ "$1" = - ] || echo >> "$WORDS"
"""


def measure(root, tmp_path, part):
    """What the script does with a part, in a place where python only takes notes."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    words = tmp_path / "words"
    words.touch()
    done = subprocess.run(
        ["bash", root / "experiments" / "results" / "measure.sh", part, tmp_path / "out"],
        env={"PATH": f"{stub.parent}:/usr/bin:/bin", "WORDS": str(words)},
        capture_output=True, text=True,
    )
    return done, [shlex.split(line) for line in words.read_text().splitlines()]


@pytest.mark.parametrize("part", ["cpu", "train", "kernels", "loss", "mesh"])
def test_every_command_is_accepted(root, tmp_path, part):
    done, commands = measure(root, tmp_path, part)
    assert (done.returncode, done.stderr) == (0, "") and len(commands) > 1
    for module, package, *words in commands:
        assert (module, package) == ("-m", "experiments")
        name, rest = command_line.choose(__main__.COMMANDS, words)
        command_line.parse(command_line.load(__main__.COMMANDS[name]), rest, name)


def test_an_unknown_part_is_named(root, tmp_path):
    done, commands = measure(root, tmp_path, "everything")
    assert (done.returncode, commands) == (2, []) and "'everything'" in done.stderr
