#!/usr/bin/python3
"""What is wrong is said in one line, tried again after a while, and works once corrected."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from reaper import RECORD, SCRIPT, SERVICE, SETTINGS, SLICE, Scope, forgive, use
from support import attempt, keep, run, wait_for

PROGRAM = "cm4all-spawn-reaper"
MANAGED = f"{SLICE}/bp-spawn.scope is already managed by process"


def fails(problem: str) -> None:
    """Check that the service does not start, and says why in its status and its journal."""
    SERVICE.stop()
    forgive()
    lines = len(SERVICE.journal())
    assert attempt("systemctl", "start", SERVICE.name).returncode != 0
    wait_for(problem, lambda: f'Status: "{problem}"' in SERVICE.status())
    said = SERVICE.journal()[lines:]
    assert "Traceback (most recent call last):" not in said
    # By now it may have been tried more than once.
    assert {line for line in said if line.startswith(PROGRAM)} == {f"{PROGRAM}: {problem}"}, said


def works() -> None:
    """The service comes up by itself, and does its work."""
    wait_for("it is active", lambda: SERVICE.state == "active")
    with Scope() as scope:
        scope.run("job")
        scope.wait_empty()


def a_script_that_is_missing() -> None:
    SCRIPT.unlink()
    fails(f"{SCRIPT}: No such file or directory")
    use(RECORD)
    works()


def a_script_that_is_no_lua() -> None:
    use("function cgroup_released(cgroup)\n  cgroup.\nend\n")
    fails(f"{SCRIPT}:3: '<name>' expected near 'end'")
    use(RECORD)
    works()


def a_script_that_raises_an_error() -> None:
    use("\nlocal price = nil\nprint(price.cpu)\n")
    fails(f"{SCRIPT}:3: attempt to index local 'price' (a nil value)")
    use(RECORD)
    works()


def a_script_whose_cgroup_released_is_no_function() -> None:
    use("cgroup_released = 1\n")
    fails(f"{SCRIPT}: cgroup_released is a number, not a function")
    use(RECORD)
    works()


def a_script_that_the_daemon_may_not_read() -> None:
    SCRIPT.chmod(0o600)
    fails(f"{SCRIPT}: Permission denied")
    SCRIPT.chmod(0o644)
    works()


def settings_that_are_wrong() -> None:
    SETTINGS.write_text('grace = 0.1\nscopes = ["system.slice"]\n')
    fails(f"{SETTINGS}:2: scopes: 'system.slice' must begin with a slash")
    SETTINGS.unlink()
    works()


def settings_that_do_not_exist() -> None:
    SETTINGS.write_text("grase = 1\n")
    known = "grace, handlers, log, pressure, reload, scopes, stop, unclaimed"
    fails(f"{SETTINGS}:1: grase: unknown setting; known are {known}")
    SETTINGS.unlink()
    works()


def a_second_daemon() -> None:
    done = attempt(PROGRAM)
    assert done.returncode == 1
    assert done.stdout == f"{PROGRAM}: {MANAGED} {SERVICE.pid}\n", done.stdout
    works()


def a_daemon_that_somebody_has_started_by_hand() -> None:
    SERVICE.stop()
    pid_file = Path("/run/by-hand.pid")
    run(PROGRAM, "--detach", "--pid-file", pid_file, "--lua", "/dev/null")
    pid = int(pid_file.read_text())
    fails(f"{MANAGED} {pid}")
    os.kill(pid, signal.SIGTERM)
    works()


def next_start() -> float:
    """Wait for the service to be started once more; return when that was, in seconds."""

    def moment() -> float:
        return int(SERVICE["ExecMainStartTimestampMonotonic"]) / 1e6

    last = moment()
    wait_for("it is tried again", lambda: moment() > last)
    return moment()


def it_is_not_tried_again_at_full_speed() -> None:
    use("error('wrong')\n")
    fails(f"{SCRIPT}:1: wrong")
    first, second = next_start(), next_start()
    assert second - first > 2.5


def in_the_end_it_counts_as_failed() -> None:
    drop_in = Path(f"/run/systemd/system/{SERVICE.name}.d/often.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Unit]\nStartLimitBurst=3\n[Service]\nRestartSec=100ms\n")
    run("systemctl", "daemon-reload")
    fails(f"{SCRIPT}:1: wrong")
    wait_for("it is given up", lambda: SERVICE.state == "failed")
    assert f'Status: "{SCRIPT}:1: wrong"' in SERVICE.status()
    drop_in.unlink()
    run("systemctl", "daemon-reload")
    forgive()
    use(RECORD)
    SERVICE.start()
    works()


if __name__ == "__main__":
    use(RECORD)
    keep(
        a_script_that_is_missing,
        a_script_that_is_no_lua,
        a_script_that_raises_an_error,
        a_script_whose_cgroup_released_is_no_function,
        a_script_that_the_daemon_may_not_read,
        settings_that_are_wrong,
        settings_that_do_not_exist,
        a_second_daemon,
        a_daemon_that_somebody_has_started_by_hand,
        it_is_not_tried_again_at_full_speed,
        in_the_end_it_counts_as_failed,
    )
