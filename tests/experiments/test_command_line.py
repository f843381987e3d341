"""The command line: what it calls, what it teaches, and how it says no."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro

from experiments import __main__, command_line
from experiments.command_line import Command

CALLS = []


@dataclass(frozen=True)
class Brew:
    """Make a pot of tea."""

    leaf: tyro.conf.Positional[str] = "assam"
    """What to brew."""
    minutes: int = 4
    """How long."""
    water: Literal["soft", "hard"] = "soft"
    """Which water."""
    milk_first: bool = False
    """A matter of taste."""
    guests: tuple[str, ...] = ()
    """Who comes."""


def brew(arguments: Brew) -> None:
    CALLS.append(arguments)


@dataclass(frozen=True)
class Nothing:
    """Takes no arguments."""


def spill(arguments: Nothing) -> None:
    raise ValueError("cups=3 must be divisible by guests=2:\n  use cups=4")


def lose(arguments: Nothing) -> None:
    Path("no/such/kettle").read_text()


def give_up(arguments: Nothing) -> None:
    raise KeyboardInterrupt


def break_down(arguments: Nothing) -> None:
    raise RuntimeError("a defect of ours")


COMMANDS = {
    "brew": Command(__name__, "brew", "make tea", "darjeeling --minutes 3"),
    "spill": Command(__name__, "spill", "spill it", ""),
    "lose": Command(__name__, "lose", "lose the kettle", ""),
    "give-up": Command(__name__, "give_up", "go to bed", ""),
    "break-down": Command(__name__, "break_down", "fall apart", ""),
    "bench boil": Command(__name__, "brew", "time the kettle", ""),
    "bench pour": Command(__name__, "brew", "time the pot", ""),
}


def run(line: str) -> int:
    return command_line.run(COMMANDS, line.split())


@pytest.fixture
def error(capsys):
    """Run a line that must fail with exit code 2, and return the one line it printed."""

    def of(line: str) -> str:
        assert run(line) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return of


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("brew", Brew()),
        ("brew oolong --minutes 2 --milk-first", Brew("oolong", minutes=2, milk_first=True)),
        ("brew --guests ann bob --water hard", Brew(guests=("ann", "bob"), water="hard")),
        ("brew --milk_first", Brew(milk_first=True)),
        ("bench pour --minutes=1", Brew(minutes=1)),
    ],
)
def test_words_become_typed_arguments(line, expected):
    assert run(line) == 0
    assert CALLS[-1] == expected


@pytest.mark.parametrize("line", ["", "--help", "-h", "help"])
def test_help_shows_every_command_with_an_example(line, capsys):
    assert run(line) == 0
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"{name} " in out and command.summary in out
    assert "brew darjeeling --minutes 3" in out


def test_help_of_a_family_shows_its_members_only(capsys):
    assert run("bench --help") == 0
    out = capsys.readouterr().out
    assert "bench boil" in out and "bench pour" in out and "make tea" not in out


def test_help_of_a_command_lists_its_arguments(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("brew --help")
    out = capsys.readouterr().out
    assert "Make a pot of tea." in out and "--minutes" in out and "How long." in out


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("brwe", ["unknown command 'brwe'", "did you mean brew?"]),
        ("xyzzy", ["unknown command 'xyzzy'", "use one of brew, spill"]),
        ("bench bowl", ["unknown command bench 'bowl'", "did you mean boil?"]),
        ("bench", ["bench needs one of: boil, pour"]),
        ("brew --minuts 3", ["unknown option --minuts", "did you mean --minutes?", "brew --help"]),
        ("brew --sugar=2", ["unknown option --sugar", "use --leaf, --minutes, --water"]),
        ("brew --minutes five", ["--minutes", "five", "brew --help"]),
        ("brew --minutes", ["--minutes", "missing value"]),
        ("brew --water sparkling", ["--water", "sparkling", "soft", "hard"]),
        ("brew oolong assam", ["assam", "brew --help"]),
    ],
)
def test_words_that_do_not_fit_are_named_with_the_fix(line, parts, error):
    text = error(line)
    for part in parts:
        assert part in text, text


def test_an_error_of_a_command_is_one_line(error, monkeypatch):
    monkeypatch.setattr(command_line, "OURS", (str(Path(__file__).parent),))
    assert error("spill") == "error: cups=3 must be divisible by guests=2: use cups=4\n"


def test_an_error_from_elsewhere_says_how_to_find_it(error):
    assert "DEEPSEEK_JAX_TRACEBACK=1" in error("spill")


def test_an_option_is_called_what_the_command_line_calls_it():
    function = command_line.load(__main__.COMMANDS["launch"])
    with pytest.raises(ValueError, match="unknown option --form: did you mean --from"):
        command_line.parse(function, ["--form", "x"], "launch")


def test_a_missing_file_is_named(error):
    assert error("lose") == "error: no/such/kettle: No such file or directory\n"


def test_the_traceback_is_there_on_request(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="cups=3"):
        run("spill")


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="defect"):
        run("break-down")


def test_interrupted_is_exit_code_130(capsys):
    assert run("give-up") == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_every_command_of_ours_takes_one_frozen_dataclass_that_explains_itself(name):
    function = command_line.load(__main__.COMMANDS[name])
    arguments = command_line.arguments_of(function)
    assert arguments.__dataclass_params__.frozen
    assert arguments.__doc__ and not arguments.__doc__.startswith(f"{arguments.__name__}(")


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_every_command_of_ours_accepts_the_words_of_its_example(name):
    command = __main__.COMMANDS[name]
    command_line.parse(command_line.load(command), shlex.split(command.example), name)


def test_a_reader_that_goes_away_is_no_error(root):
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    command = f"{sys.executable} -m experiments --help | true"
    done = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
