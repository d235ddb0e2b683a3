"""What the daemon and its script said about the jobs: reading lua/examples/accounts.lua's lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_LOG_LINE: Final = re.compile(r"\S+:( since=\S+)? cpu=\S+.*")


@dataclass(frozen=True, slots=True)
class Released:
    """A "released" or "remainder" line. CPU time in microseconds, memory in bytes."""

    kind: str
    account: str
    path: str
    cpu: int
    memory_peak: int | None
    inode: int


@dataclass(frozen=True, slots=True)
class Total:
    """A "total" line: the sums of one account."""

    account: str
    releases: int
    cpu: int
    memory_peak: int | None


@dataclass(frozen=True, slots=True)
class LogLine:
    """The daemon's own line about a release."""

    text: str


Entry = Released | Total | LogLine


class Books:
    """Keeps everything that was said, in order."""

    def __init__(self) -> None:
        self.released: list[Released] = []
        self.totals: list[Total] = []
        self.log_lines: list[LogLine] = []

    def enter(self, line: str) -> Entry | None:
        """Keep a line and return what it means; None for one that is not about the accounts."""
        kind, *fields = line.split("\t")
        values = dict(field.split("=", 1) for field in fields if "=" in field)
        if kind in ("released", "remainder"):
            self.released.append(released := _released(kind, values))
            return released
        if kind == "total":
            self.totals.append(total := _total(values))
            return total
        if _LOG_LINE.fullmatch(line):
            self.log_lines.append(log_line := LogLine(line))
            return log_line
        return None

    def releases_of(self, inode: int) -> list[Released]:
        """Return the releases of one cgroup, without remainders."""
        return [r for r in self.released if r.inode == inode and r.kind == "released"]


def _released(kind: str, values: dict[str, str]) -> Released:
    inode = int(values["id"].split("-")[1], 16)  # BOOT-INODE-SERIAL
    return Released(
        kind,
        values["account"],
        values["path"],
        _microseconds(values["cpu"]),
        _bytes(values["memory_peak"]),
        inode,
    )


def _total(values: dict[str, str]) -> Total:
    return Total(
        values["account"],
        int(values["releases"]),
        _microseconds(values["cpu"]),
        _bytes(values["memory_peak"]),
    )


def _microseconds(text: str) -> int:
    return round(float(text) * 1e6)


def _bytes(text: str) -> int | None:
    return None if text == "-" else int(text)
