"""What a benchmark found out, and how it is shown: a table for people, JSON lines for programs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

_HEADER: Final = ("benchmark", "what", "value", "min", "max", "unit", "target", "met")
_TEXT_COLUMNS: Final = frozenset({0, 1, 5, 7})


@dataclass(frozen=True)
class Figure:
    """One measured quantity with a sample for each round.

    ``target`` is the highest value that is good enough, or with ``at_least`` the lowest; None if
    there is nothing to be met.
    """

    benchmark: str
    what: str
    unit: str
    samples: tuple[float, ...]
    target: float | None = None
    at_least: bool = False

    @property
    def value(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def table(figures: Iterable[Figure]) -> str:
    """Return aligned lines, one for each figure, with a header and a final newline."""
    rows = [_HEADER, *(_row(figure) for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(_line(row, widths) for row in rows)


def _row(figure: Figure) -> tuple[str, ...]:
    samples = figure.samples
    several = len(samples) > 1
    return (
        figure.benchmark,
        figure.what,
        _number(figure.value),
        _number(min(samples)) if several else "",
        _number(max(samples)) if several else "",
        figure.unit,
        _target(figure),
        {None: "", True: "met", False: "NOT MET"}[figure.met],
    )


def _target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"{'>=' if figure.at_least else '<='} {_number(figure.target)}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = (
        text.ljust(width) if column in _TEXT_COLUMNS else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip() + "\n"


def _number(value: float) -> str:
    if value == int(value):
        return f"{int(value)}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def append(path: Path, figures: Iterable[Figure], scale: str) -> None:
    """Add a JSON object for each figure to the file at PATH; SCALE is that of the run."""
    lines = [json.dumps(_object(figure) | _circumstances(scale)) for figure in figures]
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines)


def _object(figure: Figure) -> dict[str, object]:
    return {
        "name": f"{figure.benchmark}: {figure.what}",
        "value": figure.value,
        "unit": figure.unit,
        "target": figure.target,
        "at_least": figure.at_least,
        "met": figure.met,
        "samples": list(figure.samples),
    }


def _circumstances(scale: str) -> dict[str, object]:
    return {
        "scale": scale,
        "kernel": os.uname().release,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
