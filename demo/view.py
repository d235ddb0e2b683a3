"""What a person sees: a row for each release, a table, a line for each check."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

from demo.books import LogLine, Released, Total
from demo.checks import Check

_BOLD, _DIM, _RED, _GREEN = "1", "2", "31", "32"


class View:
    """Prints to standard output."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._began = time.monotonic()

    def note(self, text: str) -> None:
        """Print a line of explanation, or one that the daemon wrote."""
        self._print(self._paint(text, _DIM))

    def begin_releases(self) -> None:
        """Print the heading above the releases; their times count from here."""
        self._began = time.monotonic()
        heading = _row(
            "time", "account", "released cgroup", "own CPU", "memory", "namespaces", "what it was"
        )
        self._print("\n" + self._paint(heading, _BOLD))

    def release(self, released: Released, scope: str, shared: str, what: str) -> None:
        """Print a release of a cgroup below SCOPE; SHARED are namespaces that its job ran in."""
        row = _row(
            f"{time.monotonic() - self._began:.2f}s",
            released.account,
            released.path.removeprefix(scope + "/"),
            f"{released.cpu / 1e6:.3f}s",
            _mebibytes(released.memory_peak),
            shared,
            what if released.kind == "released" else "used between record and deletion",
        )
        self._print(row if released.kind == "released" else self._paint(row, _DIM))

    def example(self, line: LogLine) -> None:
        """Print one of the lines that the daemon itself wrote about the releases."""
        self._print("")
        self.note("in the daemon's log each release is a line of its own, such as")
        self.note(f"  {line.text}")

    def table(self, totals: list[Total], runs: Mapping[str | None, int]) -> None:
        """Print what each account used, and below it the sums."""
        layout = "{:<10} {:>6} {:>9} {:>13} {:>13}".format
        heading = layout("account", "jobs", "released", "CPU seconds", "peak memory")
        self._print("\n" + self._paint(heading, _BOLD))
        for total in sorted(totals, key=lambda total: (total.account == "-", total.account)):
            jobs = runs.get(None if total.account == "-" else total.account, 0)
            name = "(none)" if total.account == "-" else total.account
            memory = _mebibytes(total.memory_peak)
            self._print(layout(name, jobs, total.releases, f"{total.cpu / 1e6:.6f}", memory))
        jobs, releases = sum(runs.values()), sum(total.releases for total in totals)
        cpu = sum(total.cpu for total in totals)
        line = layout("all", jobs, releases, f"{cpu / 1e6:.6f}", "")
        self._print(self._paint(line.rstrip(), _BOLD))

    def checks(self, checks: list[Check]) -> None:
        """Print what holds and what does not."""
        self._print("")
        for check in checks:
            mark = self._paint("ok    ", _GREEN) if check.holds else self._paint("FAILED", _RED)
            self._print(f"{mark}  {check.text}")

    def _paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def _print(self, text: str) -> None:
        print(text, flush=True)


def _row(*cells: str) -> str:
    return "{:>6} {:<7} {:<22.22} {:>7} {:>9}  {:<13}  {}".format(*cells)


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / (1 << 20):.1f} MiB"
