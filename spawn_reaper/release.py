"""The record of one release: everything that is known of a cgroup that ran empty.

A record is complete in itself: log line, hooks, queues and replay need neither a descriptor nor
the directory, which is deleted a moment after the record was made.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from spawn_reaper.usage import Counters, Pressure, Usage

Attributes = Mapping[bytes, bytes]
"""The ``user.*`` extended attributes of a cgroup, by full name."""


class Pressures(msgspec.Struct, frozen=True, gc=False):
    """Stall times of the three resources."""

    cpu: Pressure
    memory: Pressure
    io: Pressure


class Release(msgspec.Struct, frozen=True):
    """One cgroup that ran empty, or what it used after that.

    ``path`` is the path as /proc/self/cgroup would show it, ``name`` the part below the scope;
    both are bytes, since the kernel takes any byte but NUL and slash. ``attributes`` begins with
    those of the cgroup itself, followed by those of its parents inside the scope, innermost
    first. Times are in seconds: ``born`` and ``released`` since the epoch, ``age`` elapsed.
    """

    id: str
    path: bytes
    name: bytes
    released: float
    born: float | None
    age: float | None
    usage: Usage
    own: Counters
    """What may be added up: usage minus what was recorded before for this cgroup and below it."""
    attributes: tuple[Attributes, ...]
    inodes: tuple[int, ...] = ()
    """Those of the cgroup and of those above it, innermost first, as far as they are known: so that
    what has the path of one of them later is not taken for it."""
    pressures: Pressures | None = None
    remainder: bool = False
    """Used between the record of the release and the deletion; only ``own`` counts it."""


class ReleaseIds:
    """Gives out ``BOOT-INODE-SERIAL``, each once in the life of a host, with no state on disk.

    The serial starts at the nanoseconds since boot: a daemon that is started again is already
    past every number that the one before it can have given out.
    """

    def __init__(self) -> None:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        self._boot = boot.strip().replace("-", "")
        self._serials = itertools.count(time.clock_gettime_ns(time.CLOCK_BOOTTIME))

    def __call__(self, inode: int) -> str:
        """Return the next id, for a release of the cgroup whose directory has INODE."""
        return f"{self._boot}-{inode:x}-{next(self._serials):x}"
