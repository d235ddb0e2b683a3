"""The reaper as the benchmarks run it, and waiting for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import proc
from bench.interrupts import held
from bench.processes import Drain, end, start
from bench.site import Site, population
from bench.unusable import Unusable

READY_LINE: Final = b"watching scope"
OVERFLOW_LINE: Final = b"the inotify queue overflowed"
TRACEBACK_LINE: Final = b"Traceback (most recent call last)"

_PATIENCE: Final = 60.0  # seconds for whatever should take less than one
_ENDURANCE: Final = 600.0  # seconds for many transactions, each of which waits for the disk
_QUIET: Final = 0.2  # seconds without CPU time that show that nothing is left to be done
_STUCK: Final = 75.0  # seconds without any progress; more than the minute that unclaimed ones have
_GLANCE: Final = 0.01

# What a service manager tells its services would change what the reaper does.
_SERVICE_VARIABLES: Final = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)


@dataclass(frozen=True)
class Reaper:
    """A running reaper; ``started`` is the monotonic time in seconds."""

    process: subprocess.Popen[bytes]
    log: Drain
    started: float

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def pids(self) -> list[int]:
        """Its processes: itself, and the one that runs the script."""
        return [self.pid, *proc.children(self.pid)]

    def check(self) -> None:
        """Raise Unusable if it ended or ran into a bug of its own."""
        if self.process.poll() is not None:
            raise Unusable(
                f"the reaper ended with status {self.process.returncode}: {self.log.last_line()}"
            )
        if self.log.occurrences[TRACEBACK_LINE]:
            raise Unusable(f"the reaper wrote a traceback: {self.log.last_line()}")


def start_reaper(
    stack: ExitStack,
    site: Site,
    scope: Path,
    script: Path,
    *,
    settings: str = "",
    environment: Mapping[str, str] | None = None,
) -> Reaper:
    """Start a reaper for SCOPE; SETTINGS are lines of TOML. STACK ends it."""
    config = site.folder / "reaper.toml"
    config.write_text(settings)
    log = Drain(stack, READY_LINE, OVERFLOW_LINE, TRACEBACK_LINE)
    started = time.monotonic()
    process = start(
        stack,
        reaper_command(site, scope, script, config),
        stderr=log.give_away(),
        environment=reaper_environment(environment or {}),
    )
    log.given()
    return Reaper(process, log, started)


def reaper_command(
    site: Site, scope: Path, script: Path, config: Path
) -> list[str | os.PathLike[str]]:
    """Return the command of a reaper of SCOPE."""
    return [
        *(sys.executable, "-m", "spawn_reaper"),
        *("--cgroup-root", site.mount),
        *("--scope", f"/{scope.relative_to(site.mount)}"),
        *("--lua", script),
        *("--config", config),
    ]


def reaper_environment(further: Mapping[str, str]) -> dict[str, str]:
    """Return our environment with FURTHER variables, and without a service manager's."""
    inherited = {k: v for k, v in os.environ.items() if k not in _SERVICE_VARIABLES}
    return inherited | dict(further)


@contextmanager
def paused(reaper: Reaper) -> Iterator[None]:
    """Keep the reaper from running: what happens meanwhile, it finds all at once."""
    with held():
        reaper.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with held():
            reaper.process.send_signal(signal.SIGCONT)


def stop(reaper: Reaper) -> None:
    """End the reaper as a service manager does."""
    reaper.check()
    end(reaper.process)
    if reaper.process.returncode != 0:
        raise Unusable(
            f"the reaper did not stop well, status {reaper.process.returncode}: "
            f"{reaper.log.last_line()}"
        )


def wait_for_log_line(reaper: Reaper) -> float:
    """Wait until the log says that it watches its scope; return the seconds from its start."""
    wait_until(reaper, "ready", lambda: READY_LINE in reaper.log.first_seen)
    return reaper.log.first_seen[READY_LINE] - reaper.started


class NotifySocket:
    """The service manager's end of sd_notify(3)."""

    def __init__(self, stack: ExitStack) -> None:
        self._socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        name = f"spawn-bench-{os.getpid()}"
        self._socket.bind(f"\0{name}")
        self._socket.settimeout(_PATIENCE)
        self.environment = {"NOTIFY_SOCKET": f"@{name}"}

    def wait_ready(self, reaper: Reaper) -> float:
        """Wait until the reaper says that it is ready; return the seconds from its start."""
        self._socket.settimeout(1.0)
        end_time = time.monotonic() + _PATIENCE
        while time.monotonic() < end_time:
            try:
                message = self._socket.recv(4096)
            except TimeoutError:
                reaper.check()
                continue
            if b"READY=1" in message.split(b"\n"):
                return time.monotonic() - reaper.started
        raise Unusable("the reaper never sent READY=1")


def used(reaper: Reaper) -> proc.Cpu:
    """Return the CPU time that its processes have used."""
    return proc.total(map(proc.cpu, reaper.pids))


def memory(reaper: Reaper) -> proc.Memory:
    """Return how much memory its processes have."""
    return proc.total_memory(map(proc.memory, reaper.pids))


def peak_memory(reaper: Reaper) -> int:
    """Return the most resident memory in bytes that each of its processes ever had, added up."""
    return sum(map(proc.peak_memory, reaper.pids))


def settle(reaper: Reaper, patience: float = _PATIENCE) -> proc.Cpu:
    """Wait until the reaper has nothing to do any more; return the CPU time it has used."""
    before = used(reaper)
    quiet_since = time.monotonic()
    end_time = quiet_since + patience
    while time.monotonic() < end_time:
        time.sleep(_GLANCE)
        reaper.check()
        now = used(reaper)
        if now.total != before.total or not all(map(proc.sleeping, reaper.pids)):
            before, quiet_since = now, time.monotonic()
        elif time.monotonic() - quiet_since >= _QUIET:
            return now
    raise Unusable(f"the reaper did not come to rest within {patience:g} s")


def wait_until_gone(
    reaper: Reaper, scope: Path, tell: Callable[[int], None] | None = None
) -> tuple[int, float]:
    """Wait until SCOPE is empty, or as long as there is progress.

    Returns how many cgroups are left and the monotonic time of the last change. TELL is called
    with their number every few seconds.
    """
    left = population(scope)
    changed = told = time.monotonic()
    while left > 0 and time.monotonic() - changed < _STUCK:
        time.sleep(_GLANCE)
        reaper.check()
        now = population(scope)
        if now != left:
            left, changed = now, time.monotonic()
        if tell is not None and time.monotonic() - told >= 5.0:
            told = time.monotonic()
            tell(left)
    return left, changed


def wait_for_progress(reaper: Reaper, measure: Callable[[], int], goal: int) -> None:
    """Wait until the reaper is at rest and MEASURE gives GOAL, or as long as there is progress.

    MEASURE is asked only when the reaper is at rest: it may cost time.
    """
    last = -1
    changed = time.monotonic()
    while time.monotonic() - changed < _STUCK:
        settle(reaper, _ENDURANCE)
        now = measure()
        if now >= goal:
            return
        if now != last:
            last, changed = now, time.monotonic()


def flush_records(reaper: Reaper, records: Path) -> None:
    """Let record.lua or insert.lua complete its file."""
    reaper.process.send_signal(signal.SIGHUP)
    wait_until(reaper, "done with its records", lambda: records.read_bytes().endswith(b"end\n"))


def wait_until(reaper: Reaper, what: str, condition: Callable[[], bool]) -> None:
    """Wait for what takes only a moment; WHAT completes "the reaper was not"."""
    end_time = time.monotonic() + _PATIENCE
    while not condition():
        reaper.check()
        if time.monotonic() > end_time:
            raise Unusable(f"the reaper was not {what} within {_PATIENCE:g} s")
        time.sleep(_GLANCE)
