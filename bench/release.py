"""``release``: what one released cgroup costs, compared with the system calls that it takes.

A round runs the same generator twice: once under the bare loop of floor.c, once under the reaper
with log line and hook. Ratios are made round by round, so that whatever else the machine does
touches both sides alike. The reaper's time counts from when it is ready and idle until the scope
is empty and it is idle again: what it does late belongs to the releases, too.

Loads: a burst as fast as the generator can; the same with an xattr on each cgroup, which the floor
does not read; and set rates, since in a burst many cgroups share the cost of one awakening.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench.daemon import settle, start_reaper, stop, wait_for_log_line, wait_until_gone
from bench.figures import Figure
from bench.generator import generate, report_of, result
from bench.plan import Plan
from bench.processes import Drain, start
from bench.progress import progress
from bench.site import BENCH, Site, make_scope
from bench.unusable import Unusable

NAME: Final = "release"
_TARGET: Final = 2.0
_PACES: Final = (2000, 300)  # cgroups per second
_TRIAL: Final = 1000  # cgroups


@dataclass(frozen=True)
class Load:
    """What the generator does, and the options with which the floor costs least under that.

    In a burst that is --flush: without it the kernel's list of cgroups with new statistics grows
    so long now and then that the floor of a round is twice as high, and the ratio far too good.
    """

    name: str
    count: int
    generator_options: tuple[str, ...]
    floor_options: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """CPU microseconds per cgroup, and how fast the cgroups were made."""

    user: float
    system: float
    rate: float

    @property
    def total(self) -> float:
        """User and system time."""
        return self.user + self.system


@dataclass(frozen=True)
class Round:
    """One measurement of both."""

    floor: Cost
    reaper: Cost

    @property
    def ratio(self) -> float:
        """How many times the floor the reaper takes."""
        return self.reaper.total / self.floor.total


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of all loads."""
    burst = Load("burst", plan.released, (), ("--flush",))
    accounts = Load("accounts", plan.released // 2, ("--account", "bench"), ("--flush",))
    figures = [
        *_figures(burst, _measure_load(site, burst, plan.rounds), _TARGET),
        *_figures(accounts, _measure_load(site, accounts, plan.rounds), None),
    ]
    for pace in _PACES:
        # All loads take about the same time.
        paced = _paced(pace, plan.paced * pace // _PACES[0], _pause(site, pace))
        figures += _figures(paced, _measure_load(site, paced, plan.rounds), None)
    return figures


def _paced(pace: int, count: int, pause: int) -> Load:
    return Load(f"{pace} per s", count, ("--pause", str(pause)), ())


def _pause(site: Site, pace: int) -> int:
    """Find the microseconds of sleep between jobs with which the generator keeps the pace."""
    wanted = 1e6 / pace
    pause = round(wanted / 2)
    trial = _measure_floor(site, _paced(pace, min(_TRIAL, pace), pause))
    return max(1, pause + round(wanted - 1e6 / trial.rate))


def _measure_load(site: Site, load: Load, count: int) -> list[Round]:
    rounds = []
    for number in range(count):
        # Neither is always the first, or always the second.
        if number % 2 == 0:
            floor = _measure_floor(site, load)
            reaper = _measure_reaper(site, load)
        else:
            reaper = _measure_reaper(site, load)
            floor = _measure_floor(site, load)
        rounds.append(Round(floor, reaper))
        progress(
            f"{NAME}, {load.name}: round {number + 1} of {count}: floor {floor.total:.1f} us, "
            f"reaper {reaper.total:.1f} us, ratio {rounds[-1].ratio:.2f}"
        )
    return rounds


def _measure_floor(site: Site, load: Load) -> Cost:
    with make_scope(site) as scope, ExitStack() as stack:
        log = Drain(stack)
        names, announcements = os.pipe()
        try:
            floor = start(
                stack,
                [site.floor, *load.floor_options, scope],
                stdin=names,
                stdout=log.give_away(),
                stderr=subprocess.PIPE,
            )
            log.given()
            generator = generate(
                stack,
                site,
                scope,
                load.count,
                "--announce",
                *load.generator_options,
                stdout=announcements,
            )
        finally:
            os.close(names)
            os.close(announcements)
        generated = result(generator)
        report = report_of(floor, "the floor")
        if report["released"] != load.count:
            raise Unusable(f"the floor released {report['released']} of {load.count} cgroups")
        per_cgroup = 1e6 / load.count
        return Cost(report["user"] * per_cgroup, report["system"] * per_cgroup, generated.rate)


def _measure_reaper(site: Site, load: Load) -> Cost:
    with make_scope(site) as scope, ExitStack() as stack:
        reaper = start_reaper(stack, site, scope, BENCH / "hook.lua")
        wait_for_log_line(reaper)
        before = settle(reaper)
        lines = reaper.log.lines
        generated = result(generate(stack, site, scope, load.count, *load.generator_options))
        left, _ = wait_until_gone(reaper, scope)
        if left:
            raise Unusable(f"the reaper left {left} of {load.count} cgroups behind")
        used = settle(reaper).since(before)
        stop(reaper)
        if reaper.log.lines - lines < load.count:
            raise Unusable(f"the reaper logged {reaper.log.lines - lines} of {load.count} releases")
        total = used.seconds * 1e6 / load.count
        user = total * used.user_share
        return Cost(user, total - user, generated.rate)


def _figures(load: Load, rounds: Sequence[Round], target: float | None) -> Iterator[Figure]:
    def figure(
        what: str, unit: str, samples: Sequence[float], limit: float | None = None
    ) -> Figure:
        return Figure(NAME, f"{load.name}, {what}", unit, tuple(samples), limit)

    yield figure("floor", "us/cgroup", [r.floor.total for r in rounds])
    yield figure("floor, user", "us/cgroup", [r.floor.user for r in rounds])
    yield figure("floor, system", "us/cgroup", [r.floor.system for r in rounds])
    yield figure("reaper", "us/cgroup", [r.reaper.total for r in rounds])
    yield figure("reaper, user", "us/cgroup", [r.reaper.user for r in rounds])
    yield figure("reaper, system", "us/cgroup", [r.reaper.system for r in rounds])
    yield figure("reaper / floor", "times", [r.ratio for r in rounds], target)
    yield figure("jobs with reaper", "per s", [r.reaper.rate for r in rounds])
