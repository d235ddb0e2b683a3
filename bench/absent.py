"""``absent``: what it costs that the database is away, and whether all is written when it is back.

Measured twice: with as many handlers running as there are releases, which then all wait for the
database; and with the default, where most releases still wait for their handler. A handler may run
for a shorter time than the database is away: waiting for it does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench.daemon import (
    flush_records,
    memory,
    peak_memory,
    settle,
    start_reaper,
    stop,
    wait_for_log_line,
    wait_until_gone,
)
from bench.database import SCRIPT, Database, Rows, make_database, wait_for_rows
from bench.figures import Figure
from bench.generator import generate, result
from bench.plan import Plan
from bench.progress import progress
from bench.site import Site, make_scope
from bench.unusable import Unusable

NAME: Final = "absent"
_TARGET: Final = 100.0  # MB
_TIME: Final = 2  # seconds for which a handler may run
_ABSENCE: Final = 2.5 * _TIME  # from when all cgroups are gone


@dataclass(frozen=True)
class Outcome:
    """What became of the releases; memory is resident, in bytes, beyond that at the beginning."""

    begun: int  # handlers, while the database was away
    waiting: int
    most: int
    absence: float  # seconds from the last deletion until the database was back
    rate: float  # rows per second when it was back
    rows: Rows


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of both settings."""
    count = plan.waiting
    everyone = f"[handlers]\nrunning = {count}\ntime = {_TIME}\n"
    default = f"[handlers]\ntime = {_TIME}\n"
    with make_database(site) as database:
        return [
            *_figures(f"all {count} run", count, _run(site, database, count, everyone)),
            *_figures("default running", count, _run(site, database, count, default)),
        ]


def _run(site: Site, database: Database, count: int, settings: str) -> Outcome:
    database.clear()
    database.server.stop()
    database.records.write_bytes(b"")
    with make_scope(site) as scope, ExitStack() as stack:
        reaper = start_reaper(
            stack, site, scope, SCRIPT, settings=settings, environment=database.environment
        )
        wait_for_log_line(reaper)
        settle(reaper)
        before = memory(reaper).resident
        progress(f"{NAME}: {count} releases without a database")
        result(generate(stack, site, scope, count))
        left, gone = wait_until_gone(reaper, scope)
        if left:
            raise Unusable(f"the reaper left {left} of {count} cgroups behind")
        time.sleep(_ABSENCE)
        settle(reaper)
        waiting = memory(reaper).resident - before
        flush_records(reaper, database.records)
        begun = int(database.records.read_text().split()[0])
        database.server.start()
        absence = time.monotonic() - gone
        progress(f"{NAME}: {begun} handlers wait, {waiting / 1e6:.1f} MB; the database is back")
        rows = wait_for_rows(reaper, database, count)
        most = peak_memory(reaper) - before
        stop(reaper)
    return Outcome(begun, waiting, most, absence, database.rate(), rows)


def _figures(circumstance: str, count: int, outcome: Outcome) -> Iterator[Figure]:
    def figure(what: str, unit: str, value: float, target: float | None = None) -> Figure:
        return Figure(NAME, f"{circumstance}, {what}", unit, (value,), target)

    rows = outcome.rows
    yield figure("handlers begun", "handlers", outcome.begun)
    yield figure("memory of those that wait", "MB", outcome.waiting / 1e6, _TARGET)
    yield figure("most memory until all were done", "MB", outcome.most / 1e6)
    yield figure("absence", "s", outcome.absence)
    yield figure("inserts when it was back", "per s", outcome.rate)
    yield figure("releases without a row", "releases", rows.missing(count), 0)
    yield figure("rows too many", "rows", rows.surplus, 0)
