#!/usr/bin/python3
"""The accessory when something is wrong: it says what, and works again without anybody's help."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accessory import (
    SERVICE,
    SETTINGS,
    SOCKET,
    Inhabitant,
    client,
    inits,
    inodes_of,
    keeper,
    kill_daemon,
    leases,
    wait_for_daemon,
)
from support import attempt, keep, run, wait_for

DAEMON = Path("/usr/sbin/cm4all-spawn-accessory")
IN_USE = "@cm4all-spawn is already in use by process"


def wrong_settings_fail_the_start_and_the_status_says_why() -> None:
    SOCKET.start()
    SETTINGS.write_text("\n[limits]\nnames = 0\n")
    assert attempt("systemctl", "start", SERVICE.name).returncode != 0
    problem = f"{SETTINGS}:3: limits.names: Expected `int` >= 1"
    assert f'Status: "{problem}"' in SERVICE.status()
    assert f"{DAEMON.name}: {problem}" in SERVICE.journal()


def it_is_tried_again_about_every_second() -> None:
    restarts, began = SERVICE.restarts, time.monotonic()
    wait_for("it is tried again", lambda: SERVICE.restarts >= restarts + 3)
    assert time.monotonic() - began > 2
    assert SOCKET.state == "active"


def who_asked_meanwhile_has_an_answer_when_the_settings_are_corrected() -> None:
    command = ["cm4all-spawn-client", "patient", "--ipc", "--timeout", "60", "--", "true"]
    with subprocess.Popen(command) as patient:
        sockets = Path("/proc/net/unix")  # the one that listens, and one end of each connection
        wait_for("somebody waits", lambda: sockets.read_text().count(" @cm4all-spawn\n") > 1)
        SETTINGS.unlink()
        assert patient.wait() == 0
    assert SERVICE.state == "active"


def a_second_daemon_says_that_it_is_the_second() -> None:
    known, daemon = inodes_of("alice"), SERVICE.pid
    done = attempt(DAEMON)
    assert done.returncode == 1
    assert done.stdout == f"{DAEMON.name}: {IN_USE} 1\n"
    assert SERVICE.pid == daemon
    assert inodes_of("alice") == known


def an_address_that_somebody_else_has_is_used_when_it_is_free() -> None:
    known = inodes_of("alice")
    run("systemctl", "stop", SOCKET.name, SERVICE.name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as foreign:
        foreign.bind("\0cm4all-spawn")
        foreign.listen()
        assert attempt("systemctl", "start", SOCKET.name).returncode != 0
        assert SOCKET.state == "failed"
        assert attempt("systemctl", "start", SERVICE.name).returncode != 0
        assert f'Status: "{IN_USE} {os.getpid()}"' in SERVICE.status()
    wait_for_daemon()
    assert inodes_of("alice") == known
    SERVICE.restart()
    assert SOCKET.state == "active"
    assert inodes_of("alice") == known


def a_keeper_that_is_killed_is_replaced_and_nothing_is_lost() -> None:
    inhabitant, daemon = Inhabitant("alice"), SERVICE.pid
    known, listed = inodes_of("alice"), leases()
    os.kill(keeper(), signal.SIGKILL)
    assert inodes_of("alice") == known
    client("new", "--ipc", "--pid", "--", "true")
    assert "the keeper has died; starting another" in SERVICE.journal()
    assert SERVICE.pid == daemon
    kill_daemon()
    wait_for_daemon()
    assert inodes_of("alice") == known
    assert leases() == listed | {"new": 0}
    inhabitant.check()
    inhabitant.end()


def where_daemon_and_keeper_are_killed_names_begin_anew() -> None:
    inhabitant = Inhabitant("alice")
    lost = inits()
    os.kill(SERVICE.pid, signal.SIGSTOP)  # or it would replace the keeper
    os.kill(keeper(), signal.SIGKILL)
    kill_daemon()
    wait_for_daemon()
    assert not leases()
    wait_for("inits that are lost end", lambda: not inits())
    wait_for("what ran inside ends", inhabitant.has_ended)
    journal = SERVICE.journal()
    for pid in lost:
        assert f"ending the init of a lost PID namespace, process {pid}" in journal
    inodes_of("alice")
    wait_for("there is an init", lambda: list(inits().values()) == ["init-alice"])
    assert inits().keys().isdisjoint(lost)


def a_full_run_holds_up_nothing() -> None:
    known = inodes_of("alice")
    with full("/run"):
        client("new", "--ipc", "--pid", "--", "true")
        SERVICE.reload()
        kill_daemon()
        wait_for_daemon()
        assert inodes_of("alice") == known
        client("newer", "--ipc", "--pid", "--", "true")
        done = attempt(DAEMON, "--listen", "@other", "--pid-file", "/run/other.pid")
        assert done.returncode == 1
        assert done.stdout == f"{DAEMON.name}: /run/other.pid: No space left on device\n"


@contextmanager
def full(place: str) -> Iterator[None]:
    """Let a file system in memory have no room during this context."""
    before = os.statvfs(place)
    used = (before.f_blocks - before.f_bfree) * before.f_frsize
    run("mount", "-o", f"remount,size={used + 65536}", place)
    filler = Path(place, "filler")
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    yield
    filler.unlink()
    run("mount", "-o", f"remount,size={before.f_blocks * before.f_frsize}", place)


if __name__ == "__main__":
    keep(
        wrong_settings_fail_the_start_and_the_status_says_why,
        it_is_tried_again_about_every_second,
        who_asked_meanwhile_has_an_answer_when_the_settings_are_corrected,
        a_second_daemon_says_that_it_is_the_second,
        an_address_that_somebody_else_has_is_used_when_it_is_free,
        a_keeper_that_is_killed_is_replaced_and_nothing_is_lost,
        where_daemon_and_keeper_are_killed_names_begin_anew,
        a_full_run_holds_up_nothing,
    )
