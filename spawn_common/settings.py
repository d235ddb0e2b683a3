"""Settings from a TOML file into a typed, frozen record, with problems that name file and line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)

Check = Callable[[S], Iterable[tuple[str, str]]]
"""Finds what types cannot express: yields (key, what is wrong with its value)."""


class SettingsError(Exception):
    """The settings cannot be used; ``problems`` holds one line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load(path: Path, kind: type[S], check: Check[S] | None = None) -> S:
    """Read the file at PATH; SettingsError names everything that is wrong with it.

    Keys are the fields of KIND, tables are fields that are records themselves. OSError if the
    file cannot be read.
    """
    data = path.read_bytes()
    try:
        text = data.decode()
        values = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingsError([f"{path}:{line}: not UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([_syntax_problem(path, text, str(error))]) from None
    except (ValueError, RecursionError):
        line = _line_beyond_the_parser(text)
        raise SettingsError([f"{path}:{line}: number too long or nested too deeply"]) from None
    problems = list(_problems(values, kind, ()))
    settings = None if problems else msgspec.convert(values, kind)
    if settings is not None and check is not None:
        problems = [(tuple(key.split(".")), reason) for key, reason in check(settings)]
    if settings is None or problems:
        raise SettingsError(
            [f"{path}:{_line_of(text, key)}: {_shown(key)}: {why}" for key, why in problems]
        )
    return settings


def _syntax_problem(path: Path, text: str, message: str) -> str:
    """Move the place from the end of the parser's message to where people look for it."""
    place = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)$", message)
    line = int(place[1]) if place and place[1] else text.count("\n") + 1
    reason = message[: place.start()].strip() if place else message
    return f"{path}:{line}: {reason}"


def _line_beyond_the_parser(text: str) -> int:
    """Return the line at which the parser gives up, although it found no mistake so far."""
    lines = text.split("\n")
    for end in range(1, len(lines) + 1):
        try:
            tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        except (ValueError, RecursionError):
            return end
    return len(lines)


def _problems(
    data: dict[str, Any], kind: type[msgspec.Struct], place: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (key, reason) for each value that does not fit its field in KIND."""
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in data.items():
        here = (*place, key)
        if key not in fields:
            yield here, f"unknown setting; known are {', '.join(sorted(fields))}"
        elif isinstance(fields[key], type) and issubclass(fields[key], msgspec.Struct):
            if isinstance(value, dict):
                yield from _problems(value, fields[key], here)
            else:
                yield here, "must be a table"
        else:
            try:
                msgspec.convert(value, fields[key])
            except msgspec.ValidationError as error:
                yield here, str(error).replace(" - at `$", " at `" + key)


def _shown(key: tuple[str, ...]) -> str:
    text = ".".join(key)
    return text if text.isprintable() else ascii(text)


def _line_of(text: str, key: tuple[str, ...]) -> int:
    """Return the line on which KEY is set; the parser does not tell.

    It is where the first statement begins with which KEY is there: found by parsing ever more
    of the lines, which leaves all of TOML's syntax to the parser.
    """
    lines = text.split("\n")
    start = 0
    for end in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[:end]) + "\n")
        except ValueError:
            continue  # within a statement
        if _has(values, key):
            break
        start = end
    while lines[start].strip() == "" or lines[start].lstrip().startswith("#"):
        start += 1
    return start + 1


def _has(values: object, key: tuple[str, ...]) -> bool:
    for name in key:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True
