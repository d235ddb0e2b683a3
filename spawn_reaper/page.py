"""A page of memory that core and runner share: what the runner is doing, seen without its help.

The runner writes and the core reads, whatever the script does meanwhile. Three numbers of 64 bits
each: one that changes whenever something else is begun; what is being done; and how many releases
were begun. A script could write nonsense there (ffi): it would be killed for no reason, or not.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final, NamedTuple

IDLE: Final = 0
"""Nothing is being done."""

OURS: Final = (1 << 53) - 1  # a number that Lua knows, too
"""Something is being done that is not about a release: the main chunk, reload, our own work."""

_SIZE: Final = mmap.PAGESIZE
_SERIAL, _IN_HAND, _BEGUN = range(3)


class Doing(NamedTuple):
    """What the runner was doing at one moment."""

    serial: int
    in_hand: int
    """IDLE, OURS or the number of a release."""


def create() -> int:
    """Return the descriptor of a new page, which nobody can shorten: that would kill who reads."""
    fd = os.memfd_create("cm4all-spawn-reaper", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _SIZE)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Page:
    """The page behind a descriptor, which is not needed any more afterwards."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _SIZE)
        self._numbers = memoryview(self._memory).cast("Q")

    def close(self) -> None:
        """Let go of the memory."""
        self._numbers.release()
        self._memory.close()

    # The runner

    def enter(self, what: int) -> None:
        """Take note that WHAT begins."""
        numbers = self._numbers
        numbers[_SERIAL] += 1
        numbers[_IN_HAND] = what

    def begin(self, release: int) -> None:
        """Take note that a handler of a release begins."""
        numbers = self._numbers
        numbers[_BEGUN] += 1
        numbers[_SERIAL] += 1
        numbers[_IN_HAND] = release

    # The core

    def doing(self) -> Doing:
        """Return what is being done."""
        return Doing(self._numbers[_SERIAL], self._numbers[_IN_HAND])

    @property
    def begun(self) -> int:
        """How many releases were begun."""
        return self._numbers[_BEGUN]
