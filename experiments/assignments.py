"""FIELD=VALUE of the command line, put into a dataclass."""

import contextlib
import dataclasses
import io
import typing
from collections.abc import Iterable
from typing import Any

import tyro

from deepseek_jax.config import Precision, Schedule


def assigned(value: Any, words: Iterable[str]) -> Any:
    """A dataclass with the fields that words such as config.num_experts=32 name."""
    assignments = {}
    for word in words:
        field, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word!r} must be FIELD=VALUE")
        assignments[field.replace("-", "_")] = text
    return replace_fields(value, assignments)


def replace_fields(value: Any, assignments: dict[str, str], where: str = "") -> Any:
    """A dataclass with fields, named by dotted paths, parsed from text.

    All are put in place before sizes are checked against each other, so their order is free.
    """
    kinds = typing.get_type_hints(type(value))
    changes: dict[str, Any] = {}
    inner: dict[str, dict[str, str]] = {}
    for field, text in assignments.items():
        name, dot, rest = field.partition(".")
        if name not in kinds:
            raise ValueError(
                f"unknown field {where}{field}: {type(value).__name__} has {', '.join(kinds)}"
            )
        if dot:
            inner.setdefault(name, {})[rest] = text
        else:
            changes[name] = parse_value(kinds[name], text, f"{where}{field}")
    for name, below in inner.items():
        current = changes.get(name, getattr(value, name))
        if not dataclasses.is_dataclass(current):
            raise ValueError(f"field {where}{name} is {current!r} and has no {', '.join(below)}")
        changes[name] = replace_fields(current, below, f"{where}{name}.")
    return dataclasses.replace(value, **changes)


def parse_value(kind: Any, text: str, field: str) -> Any:
    """Text as a value of a field's type; a number for a Schedule is a constant one."""
    if kind is Precision:
        return Precision.of(text)
    try:
        if kind is Schedule:
            return Schedule.constant(float(text))
        # tyro prints a box of several lines before it gives up; the error below says it in one.
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(kind, args=[text])
    except (ValueError, SystemExit) as error:
        shown = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise ValueError(f"{field}={text!r} is not a {shown}") from error
