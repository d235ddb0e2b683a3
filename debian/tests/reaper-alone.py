#!/usr/bin/python3
"""The reaper without the service manager: in the background, as its own user, with a log file."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from reaper import (
    CAP_DAC_OVERRIDE,
    RECORD,
    SCRIPT,
    SETTINGS,
    STATE,
    USER,
    Scope,
    capabilities_of,
    counted,
    releases,
    use,
)
from support import attempt, keep, run, wait_for

PROGRAM = "cm4all-spawn-reaper"
PID_FILE = Path("/run/reaper.pid")
LOG = Path("/var/log/reaper.log")
COMMAND = (
    *("env", "STATE_DIRECTORY=" + str(STATE), PROGRAM, "--detach"),
    *("--pid-file", PID_FILE, "--user", USER, "--log-file", LOG),
)


def pid() -> int:
    """Return which process it is."""
    return int(PID_FILE.read_text())


def alive(process: int) -> bool:
    """Whether there is such a process."""
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def end(number: signal.Signals) -> None:
    """Tell it to end, and wait until it has."""
    process = pid()
    os.kill(process, number)
    wait_for("it ends", lambda: not alive(process))


def it_is_ready_when_the_command_returns() -> None:
    assert run(*COMMAND) == ""
    assert alive(pid())
    with Scope() as scope:
        scope.run("name/session")
        scope.wait_reaped("name", "name/session")
        expected = {f"{scope.path}/name": 1, f"{scope.path}/name/session": 1}
        assert counted(releases()) == expected


def it_has_left_who_started_it() -> None:
    process = Path(f"/proc/{pid()}")
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    parent, _group, session, terminal = map(int, fields[1:5])
    assert (parent, terminal) == (1, 0)
    assert session not in (pid(), os.getsid(0))
    assert os.readlink(process / "cwd") == "/"
    status = (process / "status").read_text()
    assert "Umask:\t0022\n" in status
    assert os.readlink(process / "fd" / "0") == "/dev/null"
    assert {os.readlink(process / "fd" / number) for number in "12"} == {str(LOG)}


def it_is_its_own_user_without_power() -> None:
    assert Path(f"/proc/{pid()}").owner() == USER
    found = capabilities_of(pid())
    assert found.pop("Prm") == found.pop("Eff") == CAP_DAC_OVERRIDE
    del found["Bnd"]  # without CAP_SETPCAP, which it does not need, that cannot be changed
    assert set(found.values()) == {0}


def there_is_only_one() -> None:
    done = attempt(*COMMAND)
    assert done.returncode == 1
    assert done.stdout == f"{PROGRAM}: {PID_FILE}: process {pid()} runs already\n"


def its_log_can_be_rotated() -> None:
    old = LOG.with_suffix(".log.1")
    LOG.rename(old)
    LOG.touch()  # as logrotate does with "create"
    os.chown(LOG, int(run("id", "-u", USER)), -1)
    os.kill(pid(), signal.SIGUSR1)
    fd = Path(f"/proc/{pid()}/fd/2")
    wait_for("it writes to the new file", lambda: os.readlink(fd) == str(LOG))
    with Scope() as scope:
        scope.run("rotated")
        scope.wait_empty()
    assert any(line.startswith("rotated: ") for line in LOG.read_text().splitlines())
    assert "rotated: " not in old.read_text()


def each_of_three_signals_ends_it() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        end(number)
        assert not PID_FILE.exists()
        run(*COMMAND)
    end(signal.SIGTERM)


def it_says_on_the_terminal_why_it_does_not_start() -> None:
    SCRIPT.write_text("error('wrong')\n")
    done = attempt(*COMMAND)
    assert (done.returncode, done.stdout) == (1, f"{PROGRAM}: {SCRIPT}:1: wrong\n")
    SCRIPT.write_text(RECORD)
    SETTINGS.write_text("grace = -1\n")
    done = attempt(*COMMAND)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{PROGRAM}: {SETTINGS}:1: grace: ")
    assert done.stdout.count("\n") == 1


if __name__ == "__main__":
    STATE.mkdir(exist_ok=True)
    os.chown(STATE, int(run("id", "-u", USER)), -1)
    use(RECORD)
    keep(
        it_is_ready_when_the_command_returns,
        it_has_left_who_started_it,
        it_is_its_own_user_without_power,
        there_is_only_one,
        its_log_can_be_rotated,
        each_of_three_signals_ends_it,
        it_says_on_the_terminal_why_it_does_not_start,
    )
