"""``alive``: what many cgroups cost that all live at the same time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import proc
from bench.daemon import Reaper, settle, start_reaper, stop, used, wait_for_log_line
from bench.figures import Figure
from bench.generator import generate, result
from bench.interrupts import held
from bench.plan import Plan
from bench.progress import progress
from bench.site import BENCH, Site, make_scope, population
from bench.unusable import Unusable

NAME: Final = "alive"
_TARGET: Final = 1500  # bytes of memory for each cgroup
_RESERVE: Final = 10_000  # watches for everybody else
_SETTINGS: Final = "unclaimed = 3600\n"  # seconds: no process ever runs in these cgroups
_MAX_WATCHES: Final = Path("/proc/sys/fs/inotify/max_user_watches")


@dataclass(frozen=True)
class Holdings:
    """What the reaper has at one moment."""

    memory: proc.Memory
    descriptors: int
    watches: int


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of one run."""
    count = plan.alive
    with _enough_watches(2 * count + _RESERVE), make_scope(site) as scope, ExitStack() as stack:
        reaper = start_reaper(stack, site, scope, BENCH / "hook.lua", settings=_SETTINGS)
        wait_for_log_line(reaper)
        settle(reaper)
        before = _holdings(reaper)
        progress(f"{NAME}: making {count} cgroups")
        result(generate(stack, site, scope, count, "--empty"))
        settled = settle(reaper)
        after = _holdings(reaper)
        if population(scope) != count:
            raise Unusable(f"{population(scope)} of {count} cgroups are alive")
        progress(f"{NAME}: idle with {count} cgroups for {plan.idle:g} s")
        time.sleep(plan.idle)
        idle = used(reaper).since(settled).seconds / plan.idle
        stop(reaper)
        progress(f"{NAME}: removing {count} cgroups")
    return _figures(count, before, after, idle)


def _holdings(reaper: Reaper) -> Holdings:
    pid = reaper.pid
    return Holdings(proc.memory(pid), proc.descriptors(pid), proc.watches(pid))


def _figures(count: int, before: Holdings, after: Holdings, idle: float) -> list[Figure]:
    def figure(what: str, unit: str, value: float, target: float | None = None) -> Figure:
        return Figure(NAME, what, unit, (value,), target)

    resident = after.memory.resident - before.memory.resident
    proportional = after.memory.proportional - before.memory.proportional
    return [
        figure("descriptors before", "descriptors", before.descriptors),
        figure(
            f"descriptors with {count} alive", "descriptors", after.descriptors, before.descriptors
        ),
        figure(f"watches with {count} alive", "watches", after.watches),
        figure("memory per cgroup, Rss", "B", resident / count, _TARGET),
        figure("memory per cgroup, Pss", "B", proportional / count),
        figure(f"memory with {count} alive, Rss", "MB", after.memory.resident / 1e6),
        figure(f"CPU idle with {count} alive", "ms/s", idle * 1000),
    ]


@contextmanager
def _enough_watches(needed: int) -> Iterator[None]:
    """Raise the limit on inotify watches if it is lower, and put it back."""
    limit = _MAX_WATCHES.read_text()
    if int(limit) >= needed:
        yield
        return
    try:
        _MAX_WATCHES.write_text(str(needed))
    except OSError as error:
        raise Unusable(
            f"{_MAX_WATCHES} is {limit.strip()} and cannot be set to {needed}: {error.strerror}"
        ) from None
    try:
        yield
    finally:
        with held():
            _MAX_WATCHES.write_text(limit)
