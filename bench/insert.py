"""``insert``: what it costs to write each release to PostgreSQL, and whether reaping waits for it.

The script inserts one row for each release, in a transaction of its own. Its rate is compared with
that of a bare loop around psycopg, same statement, same server, one connection; the rate at which
cgroups go, with that of a reaper whose script has no handler. In a round the bare loop runs before
and after the rest, half of it each time: how fast a disk can sync changes from minute to minute.

The reaper is paused while the generator works: what is to be measured is how fast the reaper is.
A rate of inserts counts from the first row to the last, and the reaping falls into that time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.daemon import (
    Reaper,
    paused,
    settle,
    start_reaper,
    stop,
    wait_for_log_line,
    wait_until_gone,
)
from bench.database import (
    IMPLEMENTATION,
    SCRIPT,
    Database,
    Rows,
    make_database,
    wait_for_connection,
    wait_for_rows,
)
from bench.figures import Figure
from bench.generator import generate, result
from bench.plan import Plan
from bench.progress import progress
from bench.site import BENCH, Site, make_scope
from bench.unusable import Unusable

NAME: Final = "insert"
_INSERT_TARGET: Final = 60.0  # per cent of the bare loop's rate
_REAPING_TARGET: Final = 70.0  # per cent of the rate without a handler


@dataclass(frozen=True)
class Reaping:
    """A burst, reaped: cgroups per second, and the time of the last one (epoch)."""

    rate: float
    gone: float


@dataclass(frozen=True)
class Unhandled:
    """The reaper without a handler."""

    rate: float  # cgroups per second
    cpu: float  # microseconds for each


@dataclass(frozen=True)
class Inserting:
    """The reaper with the handler; ``late`` is its rate of inserts once all cgroups are gone."""

    reaping: Reaping
    rate: float
    late: float
    cpu: float  # microseconds for each release
    rows: Rows


@dataclass(frozen=True)
class Round:
    """One measurement of everything; rates are per second."""

    bare: float
    unhandled: Unhandled
    inserting: Inserting

    @property
    def inserts(self) -> float:
        """The reaper's rate of inserts in per cent of the bare loop's."""
        return 100 * self.inserting.rate / self.bare

    @property
    def late_inserts(self) -> float:
        """The same once all cgroups are gone."""
        return 100 * self.inserting.late / self.bare

    @property
    def reaping(self) -> float:
        """The rate of reaping with the handler in per cent of that without."""
        return 100 * self.inserting.reaping.rate / self.unhandled.rate


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of all rounds."""
    progress(
        f"{NAME}: {plan.inserted} cgroups in a round, psycopg's {IMPLEMENTATION} implementation"
    )
    with make_database(site) as database:
        rounds = []
        for number in range(plan.rounds):
            rounds.append(_round(site, database, plan.inserted, handler_first=number % 2 == 0))
            progress(
                f"{NAME}: round {number + 1} of {plan.rounds}: "
                f"inserts {rounds[-1].inserts:.0f} % of {rounds[-1].bare:.0f} per s, "
                f"reaping {rounds[-1].reaping:.0f} % of {rounds[-1].unhandled.rate:.0f} per s"
            )
    return _figures(plan.inserted, rounds)


def _round(site: Site, database: Database, count: int, *, handler_first: bool) -> Round:
    first = _measure_bare(database, count // 2)
    if handler_first:
        inserting = _measure_inserting(site, database, count)
        unhandled = _measure_unhandled(site, count)
    else:
        unhandled = _measure_unhandled(site, count)
        inserting = _measure_inserting(site, database, count)
    second = _measure_bare(database, count // 2)
    return Round(statistics.harmonic_mean([first, second]), unhandled, inserting)


def _measure_bare(database: Database, count: int) -> float:
    database.clear()
    database.insert(count)
    return database.rate()


def _measure_unhandled(site: Site, count: int) -> Unhandled:
    with make_scope(site) as scope, ExitStack() as stack:
        reaper = start_reaper(stack, site, scope, BENCH / "none.lua")
        wait_for_log_line(reaper)
        before = settle(reaper)
        reaping = _reap(stack, site, scope, reaper, count)
        used = settle(reaper).since(before)
        stop(reaper)
    return Unhandled(reaping.rate, used.seconds * 1e6 / count)


def _measure_inserting(site: Site, database: Database, count: int) -> Inserting:
    database.clear()
    with make_scope(site) as scope, ExitStack() as stack:
        reaper = start_reaper(stack, site, scope, SCRIPT, environment=database.environment)
        wait_for_log_line(reaper)
        wait_for_connection(reaper, database)
        before = settle(reaper)
        reaping = _reap(stack, site, scope, reaper, count)
        rows = wait_for_rows(reaper, database, count)
        used = settle(reaper).since(before)
        stop(reaper)
    return Inserting(
        reaping,
        rate=database.rate(),
        late=database.rate(since=reaping.gone),
        cpu=used.seconds * 1e6 / count,
        rows=rows,
    )


def _reap(stack: ExitStack, site: Site, scope: Path, reaper: Reaper, count: int) -> Reaping:
    """Let the reaper find COUNT cgroups at once, and wait until they are gone."""
    with paused(reaper):
        result(generate(stack, site, scope, count))
        started = time.monotonic()
    left, gone = wait_until_gone(reaper, scope)
    if left:
        raise Unusable(f"the reaper left {left} of {count} cgroups behind")
    return Reaping(count / (gone - started), gone + time.time() - time.monotonic())


def _figures(count: int, rounds: Sequence[Round]) -> list[Figure]:
    def figure(
        what: str, unit: str, samples: Sequence[float], target: float | None = None
    ) -> Figure:
        return Figure(NAME, what, unit, tuple(samples), target)

    def share(what: str, samples: Sequence[float], target: float | None = None) -> Figure:
        return Figure(NAME, what, "%", tuple(samples), target, at_least=True)

    ours = [r.inserting for r in rounds]
    rows = [o.rows for o in ours]
    return [
        figure(f"inserts, bare loop (psycopg {IMPLEMENTATION})", "per s", [r.bare for r in rounds]),
        figure("inserts, reaper", "per s", [o.rate for o in ours]),
        figure("inserts, reaper when all are gone", "per s", [o.late for o in ours]),
        share("inserts, reaper / bare loop", [r.inserts for r in rounds], _INSERT_TARGET),
        share("inserts, when all are gone / bare loop", [r.late_inserts for r in rounds]),
        figure("reaping, no handler", "per s", [r.unhandled.rate for r in rounds]),
        figure("reaping, handler", "per s", [o.reaping.rate for o in ours]),
        share("reaping, handler / no handler", [r.reaping for r in rounds], _REAPING_TARGET),
        figure("reaper CPU, no handler", "us/cgroup", [r.unhandled.cpu for r in rounds]),
        figure("reaper CPU, handler", "us/cgroup", [o.cpu for o in ours]),
        figure("releases without a row", "releases", [r.missing(count) for r in rows], 0),
        figure("rows too many", "rows", [r.surplus for r in rows], 0),
    ]
