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
    try:
        text = path.read_bytes().decode()
        data = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SettingsError([f"{path}:{line}: not UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        reason = str(error)[: place.start()].strip() if place else str(error)
        raise SettingsError([f"{path}:{line}: {reason}"]) from None
    lines = _KeyLines(text)
    problems = list(_problems(data, kind, ()))
    settings = None if problems else msgspec.convert(data, kind)
    if settings is not None and check is not None:
        problems = [(tuple(key.split(".")), reason) for key, reason in check(settings)]
    if settings is None or problems:
        raise SettingsError(
            [f"{path}:{lines.line_of(key)}: {'.'.join(key)}: {why}" for key, why in problems]
        )
    return settings


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


class _KeyLines:
    """Finds the line on which a key of a TOML text is set; the parser does not tell."""

    _TABLE = re.compile(r"\s*\[\s*([\w.\"' -]+?)\s*\]")
    _KEY = re.compile(r"\s*([\w.\"'-]+)\s*=")

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[str, ...], int] = {}
        table: tuple[str, ...] = ()
        for number, line in enumerate(text.splitlines(), 1):
            if match := self._TABLE.match(line):
                table = self._split(match[1])
                self._lines.setdefault(table, number)
            elif match := self._KEY.match(line):
                self._lines.setdefault((*table, *self._split(match[1])), number)

    @staticmethod
    def _split(key: str) -> tuple[str, ...]:
        return tuple(part.strip().strip("\"'") for part in key.split("."))

    def line_of(self, key: tuple[str, ...]) -> int:
        """Return the line of KEY, or of the innermost table around it that has one."""
        while key and key not in self._lines:
            key = key[:-1]
        return self._lines.get(key, 1)
