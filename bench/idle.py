"""``idle``: a reaper that has just been started and has nothing to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import proc
from bench.daemon import (
    NotifySocket,
    memory,
    settle,
    start_reaper,
    stop,
    used,
    wait_for_log_line,
)
from bench.figures import Figure
from bench.plan import Plan
from bench.progress import progress
from bench.site import BENCH, Site, make_scope

NAME: Final = "idle"
_PRIVATE_TARGET: Final = 34.0  # MB
_PROPORTIONAL_TARGET: Final = 45.0  # MB


@dataclass(frozen=True)
class Start:
    """A reaper soon after its start; ``ready`` is seconds from the start."""

    ready: float
    memory: proc.Memory

    @property
    def megabytes(self) -> float:
        """Private memory of both processes."""
        return self.memory.private / 1e6


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of reapers with and without a service manager."""
    with make_scope(site) as scope:
        plain, notified = [], []
        for number in range(plan.rounds):
            plain.append(_start_plain(site, scope))
            notified.append(_start_notified(site, scope))
            progress(
                f"{NAME}: round {number + 1} of {plan.rounds}: "
                f"{plain[-1].megabytes:.1f} MB after {plain[-1].ready:.2f} s, with NOTIFY_SOCKET "
                f"{notified[-1].megabytes:.1f} MB after {notified[-1].ready:.2f} s"
            )
        progress(f"{NAME}: idle for {plan.idle:g} s")
        used = _observe(site, scope, plan.idle)
    return [
        *_figures("", plain),
        *_figures(", NOTIFY_SOCKET", notified),
        Figure(NAME, f"CPU in {plan.idle:g} s", "ms", (used * 1000,)),
    ]


def _start_plain(site: Site, scope: Path) -> Start:
    with ExitStack() as stack:
        reaper = start_reaper(stack, site, scope, BENCH / "hook.lua")
        ready = wait_for_log_line(reaper)
        settle(reaper)
        start = Start(ready, memory(reaper))
        stop(reaper)
        return start


def _start_notified(site: Site, scope: Path) -> Start:
    with ExitStack() as stack:
        manager = NotifySocket(stack)
        reaper = start_reaper(
            stack, site, scope, BENCH / "hook.lua", environment=manager.environment
        )
        ready = manager.wait_ready(reaper)
        settle(reaper)
        start = Start(ready, memory(reaper))
        stop(reaper)
        return start


def _observe(site: Site, scope: Path, seconds: float) -> float:
    """Return the CPU seconds that an idle reaper takes in SECONDS."""
    with ExitStack() as stack:
        reaper = start_reaper(stack, site, scope, BENCH / "hook.lua")
        wait_for_log_line(reaper)
        before = settle(reaper)
        time.sleep(seconds)
        seconds_used = used(reaper).since(before).seconds
        stop(reaper)
        return seconds_used


def _figures(circumstance: str, starts: list[Start]) -> Iterator[Figure]:
    private = tuple(start.megabytes for start in starts)
    proportional = tuple(start.memory.proportional / 1e6 for start in starts)
    ready = tuple(start.ready * 1000 for start in starts)
    yield Figure(NAME, f"private memory{circumstance}", "MB", private, _PRIVATE_TARGET)
    what = f"proportional memory{circumstance}"
    yield Figure(NAME, what, "MB", proportional, _PROPORTIONAL_TARGET)
    yield Figure(NAME, f"start until ready{circumstance}", "ms", ready)
