#!/usr/bin/python3
"""Nothing is left behind or lost when the daemon is restarted, killed or hangs, all under load."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from reaper import (
    RECORD,
    SERVICE,
    Load,
    Release,
    Scope,
    counted,
    forget_releases,
    forgive,
    releases,
    use,
)
from support import keep, wait_for

JOBS = 2000
BATCH = 64  # releases that are recorded before the first of them is deleted


def begin(script: str) -> None:
    """Start the daemon with SCRIPT, as if for the first time."""
    SERVICE.stop()
    forgive()
    forget_releases()
    use(script)
    SERVICE.start()


def kill() -> None:
    """Kill the daemon, and wait for the next one."""
    pid = SERVICE.pid
    os.kill(pid, signal.SIGKILL)
    wait_for("it is back", lambda: SERVICE.pid not in (0, pid))


def wait_progress() -> None:
    """Return when the daemon that runs now has recorded some more releases."""
    before = len(releases())
    wait_for("it reaps", lambda: len(releases()) >= before + 50)


def all_releases() -> list[Release]:
    """Stop the daemon, which handles what it has recorded first; return all that was recorded."""
    SERVICE.stop()
    return releases()


def a_restart_under_load_loses_nothing_and_counts_nothing_twice() -> None:
    begin(RECORD)
    with Scope() as scope:
        load = Load(scope, JOBS)
        for _ in range(4):
            wait_progress()
            assert load.running, "all jobs had ended before the last restart"
            SERVICE.restart()
        load.wait()
        scope.wait_empty()
        expected = scope.jobs_usec()
        assert SERVICE.restarts == 0
        found = all_releases()
    counts = counted(found)
    assert load.paths <= counts.keys(), f"{len(load.paths - counts.keys())} were lost"
    assert {counts[path] for path in load.paths} == {1}
    assert len({release.id for release in found}) == len(found)
    own = round(1e6 * sum(release.own for release in found))
    # The kernel cuts off each cgroup's number at a microsecond.
    assert abs(own - expected) <= 2 * len(found), f"{own} us were accounted for, of {expected}"
    print(f"{own} us were accounted for, of {expected}, in {len(found)} records")


def a_killed_daemon_comes_back_and_loses_nothing() -> None:
    begin(RECORD)
    kills = 3
    with Scope() as scope:
        load = Load(scope, JOBS)
        for number in range(1, kills + 1):
            wait_progress()
            kill()
            assert SERVICE.restarts == number
        load.wait()
        scope.wait_empty()
        expected = scope.jobs_usec()
        found = all_releases()
    counts = counted(found)
    assert load.paths <= counts.keys(), f"{len(load.paths - counts.keys())} were lost"
    twice = sum(counts[path] - 1 for path in load.paths)
    assert twice <= kills * BATCH, f"{twice} were recorded again"
    own = round(1e6 * sum(release.own for release in found))
    assert own >= expected - 2 * len(found), f"{own} us were accounted for, of {expected}"
    print(f"{twice} of {JOBS} were recorded again after {kills} kills")


def a_stopped_daemon_finds_what_has_run_meanwhile() -> None:
    begin(RECORD)
    with Scope() as scope:
        SERVICE.stop()
        load = Load(scope, 200)
        load.wait()
        SERVICE.start()
        scope.wait_empty()
        counts = counted(all_releases())
        assert {counts[path] for path in load.paths} == {1}


def the_watchdog_ends_a_daemon_that_hangs_and_what_runs_its_script() -> None:
    SERVICE.configure("[Service]\nWatchdogSec=3\n")
    begin(RECORD)
    pid = SERVICE.pid
    (runner,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    with Scope() as scope:
        os.kill(pid, signal.SIGSTOP)
        load = Load(scope, 200)
        load.wait()
        assert scope.jobs()
        scope.wait_empty()
        assert SERVICE.pid != pid
        assert SERVICE.restarts == 1
        assert not Path(f"/proc/{runner}").exists()
        counts = counted(all_releases())
        assert {counts[path] for path in load.paths} == {1}
    SERVICE.configure("")


if __name__ == "__main__":
    keep(
        a_restart_under_load_loses_nothing_and_counts_nothing_twice,
        a_killed_daemon_comes_back_and_loses_nothing,
        a_stopped_daemon_finds_what_has_run_meanwhile,
        the_watchdog_ends_a_daemon_that_hangs_and_what_runs_its_script,
    )
