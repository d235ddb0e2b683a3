"""Inits that nobody knows of any more.

Their keeper died, and the daemon that could have told a new one died too, or had not yet heard of
them.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from spawn_common import linux

_log = logging.getLogger("spawn_accessory")


def pid_of(pidfd: int) -> int:
    """Return which process a pidfd is of; 0 or below if it is gone (pidfd_open(2))."""
    text = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    return int(text.partition("\nPid:")[2].split()[0])


def end_strays(init: Path, address: str, known: Collection[int]) -> None:
    """Kill the inits of the daemon at ADDRESS in our cgroup whose pids are not in KNOWN."""
    for pid in _neighbours():
        if pid in known:
            continue
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if _is_init(pid, init, address):
                    _log.warning("ending the init of a lost PID namespace, process %d", pid)
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


def _neighbours() -> Iterator[int]:
    """Yield the processes of our own cgroup; none where there is no cgroup v2."""
    mount = linux.find_cgroup2_mount()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if mount is not None and line.startswith("0::/"):
            path = Path(os.fsdecode(mount.path)) / line[4:] / "cgroup.procs"
            with suppress(OSError):
                yield from map(int, path.read_text().split())


def _is_init(pid: int, init: Path, address: str) -> bool:
    name = Path(f"/proc/{pid}/comm").read_bytes()
    if not name.startswith((b"init-", b"i-", b"cm4all-spawn-in")):
        return False  # the last one before it has named itself
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")  # by an upgrade
    return program == str(init.resolve()) and arguments[1:2] == [os.fsencode(address)]
