"""``burst``: cgroups that live only for a moment, made as fast as the machine can."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.daemon import (
    OVERFLOW_LINE,
    Reaper,
    flush_records,
    settle,
    start_reaper,
    stop,
    wait_for_log_line,
    wait_until_gone,
)
from bench.figures import Figure
from bench.generator import generate, result
from bench.plan import Plan
from bench.progress import progress
from bench.site import BENCH, Site, make_scope, population

NAME: Final = "burst"
_WORKERS: Final = 2
_TELL: Final = 5.0  # seconds between signs of life


@dataclass(frozen=True)
class Records:
    """What record.lua wrote down: releases by path, and how many remainders."""

    releases: Counter[str]
    remainders: int


@dataclass(frozen=True)
class Outcome:
    """What became of the cgroups.

    ``most`` is how many were seen at once; ``cpu`` is what the reaper used. Times are in seconds.
    """

    created: int
    left: int
    most: int
    overflows: int
    cpu: float
    generation: float
    duration: float
    records: Records


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of one burst."""
    outcome = _run(site, plan.burst)
    releases = outcome.records.releases
    released = releases.total()
    progress(
        f"{NAME}: {outcome.created} made in {outcome.generation:.1f} s, "
        f"all gone after {outcome.duration:.1f} s, {released} releases"
    )
    # A name made again may be released again; nothing else may.
    allowed = outcome.created - plan.burst

    def figure(what: str, unit: str, value: float, target: float | None = None) -> Figure:
        return Figure(NAME, what, unit, (value,), target)

    return [
        figure("cgroups made", "cgroups", outcome.created),
        figure("left behind", "cgroups", outcome.left, 0),
        figure("never released", "cgroups", max(0, plan.burst - len(releases)), 0),
        figure("released again", "cgroups", max(0, released - len(releases) - allowed), 0),
        figure("released exactly once", "cgroups", list(releases.values()).count(1)),
        figure("remainders recorded", "records", outcome.records.remainders),
        figure("queue overflows", "times", outcome.overflows),
        figure("most alive at once", "cgroups", outcome.most),
        figure("reaper CPU", "us/cgroup", outcome.cpu * 1e6 / outcome.created),
        figure("rate of generation", "per s", outcome.created / outcome.generation),
        figure("rate until all are gone", "per s", outcome.created / outcome.duration),
    ]


def _run(site: Site, count: int) -> Outcome:
    progress(f"{NAME}: {count} cgroups")
    path = site.folder / "records"
    with make_scope(site) as scope, ExitStack() as stack:
        reaper = start_reaper(
            stack,
            site,
            scope,
            BENCH / "record.lua",
            environment={"BENCH_RECORDS": str(path)},
        )
        wait_for_log_line(reaper)
        before = settle(reaper)
        started = time.monotonic()
        generator = generate(stack, site, scope, count, "--workers", str(_WORKERS))
        most = _watch(reaper, scope, generator)
        generated = result(generator)
        left, gone = wait_until_gone(reaper, scope, lambda n: progress(f"{NAME}: {n} still there"))
        used = settle(reaper).since(before)
        flush_records(reaper, path)
        stop(reaper)
        overflows = reaper.log.occurrences[OVERFLOW_LINE]
        return Outcome(
            created=generated.created,
            left=left,
            most=most,
            overflows=overflows,
            cpu=used.seconds,
            generation=generated.seconds,
            duration=gone - started,
            records=_read(path),
        )


def _watch(reaper: Reaper, scope: Path, generator: subprocess.Popen[bytes]) -> int:
    """Follow the generator to its end; return the highest number of cgroups that was seen."""
    most = 0
    told = time.monotonic()
    while generator.poll() is None:
        reaper.check()
        now = population(scope)
        most = max(most, now)
        if time.monotonic() - told >= _TELL:
            told = time.monotonic()
            progress(f"{NAME}: generating, {now} alive, {reaper.log.lines} lines of log")
        time.sleep(0.02)
    return most


def _read(path: Path) -> Records:
    releases: Counter[str] = Counter()
    remainders = 0
    with path.open(errors="surrogateescape") as file:
        for line in file:
            kind, _, cgroup = line.rstrip("\n").partition(" ")
            if kind == "release":
                releases[cgroup] += 1
            elif kind == "remainder":
                remainders += 1
    return Records(releases, remainders)
