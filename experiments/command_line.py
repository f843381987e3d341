"""From words on the command line to a call: names, typed arguments, help and one-line errors."""

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TRACEBACK = "DEEPSEEK_JAX_TRACEBACK"
INTERRUPTED = 130
# What a command raises when its input or the machine is at fault.
USER_ERRORS = (ValueError, NotImplementedError, OSError)
ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(
    str(ROOT / package) for package in ("deepseek_jax", "experiments", "pallas_kernels", "sharding")
)


class Command(NamedTuple):
    """A command: `function` of `module` takes one frozen dataclass, its arguments."""

    module: str
    function: str
    summary: str
    example: str  # arguments that show the command at its most useful


class UsageError(ValueError):
    """The words do not name a command, or do not fit its arguments."""


def program() -> str:
    """How the user called us, to be repeated in help and errors."""
    return "python -m experiments" if sys.argv[0].endswith("__main__.py") else "deepseek-jax"


def run(commands: Mapping[str, Command], words: Sequence[str]) -> int:
    """Carry out the words and return the exit code: 0, 2 for an error, 130 when interrupted."""
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(overview(commands))
            return 0
        name, rest = choose(commands, words)
        if name not in commands:
            print(overview({n: c for n, c in commands.items() if n.startswith(f"{name} ")}))
            return 0
        function = load(commands[name])
        arguments = parse(function, rest, name)
        check_written(arguments)
        function(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away; the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK) == "1" and not isinstance(error, UsageError):
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        return 2
    return 0


def choose(commands: Mapping[str, Command], words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that the first one or two words name, and the words after it.

    A first word shared by several commands is itself a name when help is asked for.
    """
    pair = " ".join(words[:2])
    if pair in commands:
        return pair, list(words[2:])
    if words[0] in commands:
        return words[0], list(words[1:])
    family = [name for name in commands if name.startswith(f"{words[0]} ")]
    if not family:
        raise UsageError(unknown("command", words[0], commands))
    if len(words) > 1 and words[1] in ("-h", "--help"):
        return words[0], []
    if len(words) > 1:
        raise UsageError(unknown(f"command {words[0]}", words[1], [n.split()[1] for n in family]))
    raise UsageError(f"{words[0]} needs one of: {', '.join(name.split()[1] for name in family)}")


def unknown(what: str, value: str, known: typing.Iterable[str]) -> str:
    """A sentence that names the value, the nearest known one, and all of them.

    >>> unknown("command", "lanch", ["launch", "eval"])
    "unknown command 'lanch': did you mean launch? (launch, eval)"
    """
    known = list(known)
    near = difflib.get_close_matches(value, known, n=1)
    if not near:
        return f"unknown {what} {value!r}: use one of {', '.join(known)}"
    return f"unknown {what} {value!r}: did you mean {near[0]}? ({', '.join(known)})"


def load(command: Command) -> Callable[[Any], None]:
    """The command's function; its module is imported only now."""
    return getattr(importlib.import_module(command.module), command.function)


def arguments_of(function: Callable[[Any], None]) -> type:
    """The frozen dataclass that the function takes."""
    hints = typing.get_type_hints(function)
    return hints[next(name for name in hints if name != "return")]


def parse(function: Callable[[Any], None], words: Sequence[str], name: str) -> Any:
    """The words as the function's dataclass; prints help and exits when asked to."""
    import tyro

    arguments, printed = arguments_of(function), io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(arguments, prog=f"{program()} {name}", args=list(words))
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UsageError(
        diagnose(arguments, words, printed.getvalue()) + f"; see {program()} {name} --help"
    )


def check_written(arguments: Any) -> None:
    """Raises where a file could not be written: before the work whose result it is to hold."""
    for option in ("json", "picture", "html"):
        path = getattr(arguments, option, None)
        if path is not None:
            check_path(f"--{option}", path, arguments)


def check_path(option: str, path: Path, arguments: Any) -> None:
    """Raises where an option's file is a folder, one of what is read, or cannot be written."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    for name in ("run", "source", "destination", "imported"):
        folder = getattr(arguments, name, None)
        # A file in a folder that is yet to be made would be in its way.
        of_it = folder and (path.exists() or name == "destination")
        if of_it and path.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{option} {path} is a file of {folder}: name another")
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written ({error.strerror}): name another file"
        ) from error


def option_name(field: dataclasses.Field) -> str:
    """What a field is called on the command line, where `tyro.conf.arg` may rename it."""
    renamed = [
        name
        for note in getattr(field.type, "__metadata__", ())
        if (name := getattr(note, "name", None)) is not None
    ]
    return (renamed or [field.name])[-1].replace("_", "-")


def diagnose(arguments: type, words: Sequence[str], printed: str) -> str:
    """One line for words that do not fit: the unknown option, or the first paragraph printed."""
    fields = [option_name(field) for field in dataclasses.fields(arguments)]
    for word in words:
        option = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("_", "-")
        if word.startswith("--") and option.split(".")[0] not in [*fields, "help", ""]:
            near = difflib.get_close_matches(option, fields, n=1)
            fix = f"did you mean --{near[0]}?" if near else f"use --{', --'.join(fields)}"
            return f"unknown option {word.partition('=')[0]}: {fix}"
    # tyro prints a title, a rule, the sentence, a blank line or a rule, and details, in a box
    # whose lines the encoding of stdout decides.
    _, *lines = (line.strip(" |\u2502") for line in printed.splitlines() or [""])
    rules = [not line.strip("-\u2500\u256d\u256e\u2570\u256f") for line in lines]
    start = rules.index(False) if False in rules else 0
    end = rules.index(True, start) if True in rules[start:] else len(lines)
    sentence = lines[start:end]
    text = " ".join(sentence).removeprefix("Error parsing ").rstrip(".") or printed.strip()
    return text[:1].lower() + text[1:]


def message(error: BaseException) -> str:
    """The error in one line; one that no file of ours raised says how to see where it arose."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    raised_in = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-1:]
    if raised_in and not raised_in[0].startswith(OURS):
        text += f" ({TRACEBACK}=1 shows where this arose)"
    return text


def overview(commands: Mapping[str, Command]) -> str:
    """The help of the whole command line: what there is, and one example of each."""
    width = max(map(len, commands), default=0) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in commands.items()]
    examples = [f"  {program()} {name} {c.example}".rstrip() for name, c in commands.items()]
    return textwrap.dedent(
        """\
        Train, serve and study DeepSeek-V3 in JAX.

        usage: {program} COMMAND [ARGUMENTS]

        commands
        {commands}

        examples
        {examples}

        {program} COMMAND --help lists a command's arguments.
        {traceback}=1 in the environment shows the whole traceback of an error."""
    ).format(
        program=program(),
        commands="\n".join(lines),
        examples="\n".join(examples),
        traceback=TRACEBACK,
    )
