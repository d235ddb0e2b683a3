"""Processes in shared namespaces: started as spawners do it, and asked where they arrived.

The namespaces themselves come from the accessory; whoever got them closes them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from demo.sandbox import Failed
from spawn_accessory.protocol import Namespace
from spawn_client.accessory import Namespaces
from spawn_common import linux

Process = subprocess.Popen[bytes]
Where = Mapping[str, str]
"""Which namespaces a process is in: by kind, what the kernel calls it ("mnt:[4026531841]")."""

KINDS: Final = ("ipc", "pid", "user", "net", "uts", "cgroup", "mount", "time")

_FILES: Final = {"mount": "mnt"}  # those in /proc/PID/ns that are called otherwise
_NAMESPACE: Final = re.compile(r"(ipc|pid|user|net|uts|cgroup|mnt|time):\[\d+\]")
_INIT: Final = ("init-", "i-")  # how the accessory's inits begin; the second for a long NAME


def where() -> Where:
    """Return where the calling process is."""
    return {kind: os.readlink(f"/proc/self/ns/{_FILES.get(kind, kind)}") for kind in KINDS}


def start(
    namespaces: Namespaces, spawn: Callable[[Callable[[], None]], Process]
) -> tuple[Process, Where]:
    """Return the process that SPAWN starts, and where it is.

    SPAWN is handed what the process has to call before its exec. Failed: it could not enter.
    """
    reader, writer = os.pipe()
    with open(reader, "rb") as report:
        with open(writer, "wb", buffering=0), _children_inside(namespaces):
            process = spawn(partial(_enter, namespaces, writer))
        found = report.read()
    arrived = json.loads(found or '"it was killed on its way"')
    if isinstance(arrived, str):
        raise Failed(f"a job is not where it should be: {arrived}")
    return process, arrived


def kept(processes: Iterable[int], ours: Where) -> set[str]:
    """Return what PROCESSES hold open or are: namespaces that are not OURS, and inits."""
    found = set()
    for pid in processes:
        with suppress(OSError):  # it has ended meanwhile
            name = Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
            found |= {name} if name.startswith(_INIT) else set()
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):  # it was closed meanwhile
                    found |= {link for link in [os.readlink(entry)] if _NAMESPACE.fullmatch(link)}
    return found - set(ours.values())


@contextmanager
def _children_inside(namespaces: Namespaces) -> Iterator[None]:
    """Let children that are forked meanwhile be in the PID namespace, should there be one."""
    if namespaces.pid is None:
        yield
        return
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        namespaces.enter("pid")
        yield
    finally:
        linux.setns(own, Namespace.PID)
        os.close(own)


# In the child


def _enter(namespaces: Namespaces, writer: int) -> None:
    """Enter all that a process enters itself, and report where that led."""
    try:
        namespaces.enter()
        report: Where | str = where()
        if namespaces.user is not None:
            _become_root()
    except OSError as error:
        report = error.strerror or str(error)
    os.write(writer, json.dumps(report).encode())
    if isinstance(report, str):
        os._exit(1)


def _become_root() -> None:
    """Be root of the user namespace; else nobody of the host's would be left, with no right."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
