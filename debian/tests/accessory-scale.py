#!/usr/bin/python3
"""The accessory with as many names and leases as a large host has, under the service manager."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from contextlib import ExitStack

from accessory import SERVICE, SOCKET, inits, leases
from support import keep, run, wait_for

from spawn_client.accessory import Accessory

NAMES = 5000
LEASES = 4  # of each name
# A name with a PID namespace takes three descriptors of daemon and keeper, an IPC namespace one
# more. Where a process may have 20,000 of them, so many fit:
NAMES_WITH_IPC = 4500
HOLDERS = 2  # processes: one may not have descriptors for all leases


def restart_and_reload_are_fast_with_5000_names_and_20000_leases() -> None:
    with ExitStack() as holders:
        for one in [start_holder(number, holders) for number in range(HOLDERS)]:
            assert one.stdout is not None
            assert one.stdout.readline() == b"done\n"
        assert leases() == {name_of(number): LEASES for number in range(NAMES)}
        known, processes = namespaces(), SERVICE.processes().keys() - {SERVICE.pid}
        wait_for("inits have their names", lambda: len(inits()) == NAMES)
        check_fast(1, "systemctl", "daemon-reload")
        check_fast(2, "systemctl", "restart", SERVICE.name)
        listed = leases()
        assert len(listed) == NAMES
        assert all(listed.values())
        assert namespaces() == known
        assert SERVICE.processes().keys() - {SERVICE.pid} == processes
        check_fast(1, "systemctl", "daemon-reload")
    assert SERVICE.restarts == 0


def name_of(number: int) -> str:
    return f"name{number}"


def namespaces() -> list[tuple[int, ...]]:
    """Return the inode numbers of the namespaces of all names."""
    found = []
    with Accessory() as accessory:
        for number in range(NAMES):
            ipc = number < NAMES_WITH_IPC
            with accessory.namespaces(name_of(number), pid=True, ipc=ipc, lease=False) as one:
                descriptors = (one.pid, one.ipc)
                found.append(tuple(os.fstat(fd).st_ino for fd in descriptors if fd is not None))
    return found


def check_fast(limit: float, *command: str) -> None:
    """Check that a command can be over within LIMIT seconds; others use the host as well."""
    times: list[float] = []
    while not times or (times[-1] >= limit and len(times) < 5):
        began = time.monotonic()
        run(*command)
        times.append(time.monotonic() - began)
    print(f"{' '.join(command)}:", " ".join(f"{seconds:.2f}" for seconds in times), "s")
    assert times[-1] < limit


def start_holder(number: int, stack: ExitStack) -> subprocess.Popen[bytes]:
    """Start a process that makes a part of the names, and holds their leases."""
    command = [sys.executable, __file__, str(number)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.enter_context(holder)
    stack.callback(holder.kill)
    return holder


def hold(part: int) -> None:
    """Be such a process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = []
    with Accessory() as accessory:
        for number in range(part, NAMES, HOLDERS):
            name, ipc = name_of(number), number < NAMES_WITH_IPC
            with accessory.namespaces(name, pid=True, ipc=ipc) as namespaces:
                held.append(namespaces.detach("lease"))
            held += [accessory.namespaces(name).detach("lease") for _ in range(1, LEASES)]
    print("done", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1:]:
        hold(int(sys.argv[1]))
    else:
        SOCKET.start()
        keep(restart_and_reload_are_fast_with_5000_names_and_20000_leases)
