"""``delay``: how soon a job's cgroup is deleted, and its handler begins.

Jobs come one after the other, so that each meets a reaper at rest: that is where a hand-over from
one process to another shows. Then the script's process is killed, again and again, to see how soon
its successor handles a release; and in the end a handler does not come back.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import proc
from bench.daemon import READY_LINE, reaper_command, reaper_environment
from bench.figures import Figure
from bench.plan import Plan
from bench.processes import start
from bench.progress import progress
from bench.site import BENCH, Site, make_scope
from bench.unusable import Unusable

NAME: Final = "delay"
_BEGUN_TARGET: Final = 5.0  # ms
_SUCCESSOR_TARGET: Final = 500.0  # ms
_HANG: Final = 1.0  # seconds
_HANDLED_TARGET: Final = (_HANG + 2) * 1000  # ms
_KILLS: Final = 5
_BESIDE: Final = 10  # jobs
_PATIENCE: Final = 20.0  # seconds
_GLANCE: Final = 0.0005


class Stamps:
    """What a process writes into a pipe, and when it arrived."""

    def __init__(self, stack: ExitStack) -> None:
        reader, self.writer = os.pipe()
        self._reader = reader
        stack.callback(os.close, reader)
        self.lines: list[tuple[float, bytes]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        rest = b""
        while data := os.read(self._reader, 65536):
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            self.lines += [(now, line) for line in lines]

    def when(self, beginning: bytes) -> float | None:
        """Return when the first line with such a beginning arrived, if one did."""
        return next((when for when, line in self.lines if line.startswith(beginning)), None)


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of one run."""
    delays = _run(site, plan.delayed)
    progress(
        f"{NAME}: deleted after {statistics.median(delays.deleted):.1f} ms, "
        f"begun after {statistics.median(delays.begun):.2f} ms"
    )

    def figure(what: str, samples: list[float], target: float | None = None) -> Figure:
        return Figure(NAME, what, "ms", tuple(samples), target)

    return [
        figure("from a job's end to its deletion", delays.deleted),
        figure("from the log line to the handler", delays.begun, _BEGUN_TARGET),
        figure(
            "from the end of the script's process to a handler",
            delays.successors,
            _SUCCESSOR_TARGET,
        ),
        figure("deletion while a handler hangs", delays.beside),
        figure("all are handled that were beside it", [delays.handled], _HANDLED_TARGET),
    ]


@dataclass
class _Delays:
    """Milliseconds."""

    deleted: list[float]
    begun: list[float]
    successors: list[float]
    beside: list[float]
    handled: float = 0.0


def _run(site: Site, count: int) -> _Delays:
    """Measure all of it, with one daemon."""
    delays = _Delays([], [], [], [])
    with make_scope(site) as scope, ExitStack() as stack:
        daemon = _Daemon(stack, site, scope)
        for number in range(count):
            name = f"job-{number}"
            delays.deleted.append(daemon.run_job(name))
            delays.begun.append(daemon.begun_after(name))
        for number in range(_KILLS):
            name = f"next-{number}"
            (runner,) = proc.children(daemon.process.pid)
            os.kill(runner, signal.SIGKILL)
            killed = time.monotonic()
            daemon.run_job(name)
            daemon.begun_after(name)
            delays.successors.append((time.monotonic() - killed) * 1000)
        started = time.monotonic()
        daemon.run_job("hangs")
        names = [f"beside-{number}" for number in range(_BESIDE)]
        delays.beside += map(daemon.run_job, names)
        for name in names:
            daemon.begun_after(name)
        delays.handled = (time.monotonic() - started) * 1000
    return delays


class _Daemon:
    """A reaper whose lines are watched as they come."""

    def __init__(self, stack: ExitStack, site: Site, scope: Path) -> None:
        self._scope = scope
        self._log, self._output = Stamps(stack), Stamps(stack)
        config = site.folder / "reaper.toml"
        config.write_text(f"[handlers]\nhang = {_HANG}\n")
        self.process = start(
            stack,
            reaper_command(site, scope, BENCH / "delay.lua", config),
            stdout=self._output.writer,
            stderr=self._log.writer,
            environment=reaper_environment({}),
        )
        os.close(self._log.writer)
        os.close(self._output.writer)
        self._wait(lambda: self._log.when(READY_LINE) is not None)

    def run_job(self, name: str) -> float:
        """Run a process in a cgroup; return the milliseconds from its end to the deletion."""
        directory = self._scope / name
        directory.mkdir()
        subprocess.run(["sh", "-c", 'echo 0 > "$1/cgroup.procs"', "sh", directory], check=True)
        ended = time.monotonic()
        self._wait(lambda: not directory.exists())
        return (time.monotonic() - ended) * 1000

    def begun_after(self, name: str) -> float:
        """Return the milliseconds from the log line of a release to its handler."""
        line = f"{name}:".encode()
        pipes = (self._log, self._output)
        self._wait(lambda: all(pipe.when(line) is not None for pipe in pipes))
        logged, handled = (pipe.when(line) or 0.0 for pipe in pipes)
        return (handled - logged) * 1000

    def _wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + _PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise Unusable("the reaper did not do its work")
            time.sleep(_GLANCE)
