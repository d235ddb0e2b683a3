#!/usr/bin/python3
"""systemctl reload calls the script's function reload, and returns when that is done."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from reaper import (
    RECORD,
    SCRIPT,
    SERVICE,
    SETTINGS,
    STATE,
    Scope,
    forget_releases,
    use,
)
from support import attempt, keep, wait_for

COLLECTOR = Path("/run/collector")
SIZE = 4 << 20  # bytes; more than a socket takes that nobody reads from

CALLED = """
local calls = 0

local function note()
  calls = calls + 1
  local file = assert(io.open(os.getenv("STATE_DIRECTORY") .. "/reloads", "a"))
  file:write(calls, "\\n")
  file:close()
end
"""
AT_ONCE = f"{RECORD}{CALLED}\nreload = note\n"
WAITS = f"""{RECORD}{CALLED}
function reload()
  assert(assert(socket:connect("{COLLECTOR}")):send(("x"):rep({SIZE})))
  note()
end
"""
FAILS = f"""{RECORD}
function reload()
  error("no price list")
end
"""


def calls() -> list[int]:
    """Return what the script has counted, call by call, since it was loaded."""
    file = STATE / "reloads"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def load(script: str) -> None:
    """Let the daemon run SCRIPT, from the beginning."""
    SERVICE.stop()
    (STATE / "reloads").unlink(missing_ok=True)
    forget_releases()
    use(script)
    SERVICE.start()


def each_reload_is_one_call() -> None:
    load(AT_ONCE)
    pid = SERVICE.pid
    assert calls() == []
    for number in range(1, 6):
        SERVICE.reload()
        assert calls() == list(range(1, number + 1))
        assert (SERVICE.state, SERVICE["SubState"]) == ("active", "running")
    assert (SERVICE.pid, SERVICE.restarts) == (pid, 0)


def the_signal_alone_does_the_same() -> None:
    before = calls()
    os.kill(SERVICE.pid, signal.SIGHUP)
    wait_for("it was called", lambda: calls() == [*before, len(before) + 1])
    wait_for("it runs", lambda: (SERVICE.state, SERVICE["SubState"]) == ("active", "running"))


def a_reload_that_waits_holds_up_who_asked_and_nobody_else() -> None:
    load(WAITS)
    with socket.socket(socket.AF_UNIX) as listener, Scope() as scope:
        listener.bind(str(COLLECTOR))
        COLLECTOR.chmod(0o666)
        listener.listen()
        asking = subprocess.Popen(["systemctl", "reload", SERVICE.name])
        collector, _ = listener.accept()
        with collector:
            scope.run("meanwhile")
            scope.wait_reaped("meanwhile")
            assert scope.released("meanwhile") == 1
            assert (SERVICE.state, calls(), asking.poll()) == ("reloading", [], None)
            left = SIZE
            while left:
                left -= len(collector.recv(1 << 20))
        assert asking.wait(20) == 0
    assert calls() == [1]
    assert (SERVICE.state, SERVICE["SubState"]) == ("active", "running")


def a_reload_that_fails_is_told_and_changes_nothing() -> None:
    load(FAILS)
    pid = SERVICE.pid
    SERVICE.reload()
    line = FAILS.splitlines().index('  error("no price list")') + 1
    assert f"{SCRIPT}:{line}: no price list" in SERVICE.journal()
    assert (SERVICE.state, SERVICE["SubState"], SERVICE.pid) == ("active", "running", pid)
    with Scope() as scope:
        scope.run("afterwards")
        scope.wait_reaped("afterwards")
        assert scope.released("afterwards") == 1


def a_script_without_that_function_is_fine() -> None:
    load(RECORD)
    pid = SERVICE.pid
    lines = len(SERVICE.journal())
    SERVICE.reload()
    assert (SERVICE.state, SERVICE["SubState"], SERVICE.pid) == ("active", "running", pid)
    assert not [line for line in SERVICE.journal()[lines:] if "reaper.lua" in line]


def with_the_setting_the_file_is_loaded_again_or_the_reload_fails() -> None:
    SETTINGS.write_text('reload = "script"\n')
    load("version = 1\n" + SAYS)
    pid = SERVICE.pid
    try:
        for code, version in (("version = 2\n", 2), ("version = = 3\n", 2), ("version = 4\n", 4)):
            use(code + SAYS)
            done = attempt("systemctl", "reload", SERVICE.name)
            assert (done.returncode == 0) == (code != "version = = 3\n"), done.stdout
            assert (SERVICE.state, SERVICE["SubState"], SERVICE.pid) == ("active", "running", pid)
            assert version_that_runs() == version
    finally:
        SETTINGS.unlink()
    assert f"{SCRIPT}:1: unexpected symbol near '='" in "".join(SERVICE.journal())


SAYS = """
function cgroup_released(cgroup)
  local file = assert(io.open(os.getenv("STATE_DIRECTORY") .. "/version", "w"))
  file:write(version, "\\n")
  file:close()
end
"""


def version_that_runs() -> int:
    """Return what the script that handles releases says."""
    file = STATE / "version"
    file.unlink(missing_ok=True)
    with Scope() as scope:
        scope.run("asks")
        wait_for("it says its version", lambda: file.exists() and file.read_text().endswith("\n"))
        return int(file.read_text())  # before the spawner's own cgroup is released


if __name__ == "__main__":
    keep(
        each_reload_is_one_call,
        the_signal_alone_does_the_same,
        a_reload_that_waits_holds_up_who_asked_and_nobody_else,
        a_reload_that_fails_is_told_and_changes_nothing,
        a_script_without_that_function_is_fine,
        with_the_setting_the_file_is_loaded_again_or_the_reload_fails,
    )
