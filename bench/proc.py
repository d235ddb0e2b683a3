"""What the kernel counted for a process (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.unusable import Unusable

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpu:
    """CPU time: the exact run time in nanoseconds; user and system, sampled, in ticks."""

    total: int
    user: int
    system: int

    def since(self, earlier: Cpu) -> Cpu:
        """Return what was used from EARLIER to this."""
        return Cpu(
            self.total - earlier.total, self.user - earlier.user, self.system - earlier.system
        )

    @property
    def seconds(self) -> float:
        """The run time."""
        return self.total / 1e9

    @property
    def user_share(self) -> float:
        """The part of it that was spent outside the kernel, from 0 to 1; 0 if too short to tell."""
        ticks = self.user + self.system
        return self.user / ticks if ticks else 0.0


@dataclass(frozen=True)
class Memory:
    """Resident memory in bytes.

    ``proportional`` counts a shared page only in part, and ``private`` does not count it at all.
    """

    resident: int
    proportional: int
    private: int


def cpu(pid: int) -> Cpu:
    """Return the CPU time of a process with a single thread."""
    # Only the run time of the first thread is to be had, and nothing of threads that ended.
    threads = len(os.listdir(f"/proc/{pid}/task"))
    if threads != 1:
        raise Unusable(f"process {pid} has {threads} threads, its CPU time cannot be measured")
    run_time = _read(pid, "schedstat").split()[0]
    user, system = _stat(pid)[11:13]
    return Cpu(int(run_time), int(user), int(system))


def total(parts: Iterable[Cpu]) -> Cpu:
    """Return the sum of CPU times."""
    sums = map(sum, zip(*((part.total, part.user, part.system) for part in parts), strict=True))
    return Cpu(*sums)


def total_memory(parts: Iterable[Memory]) -> Memory:
    """Return the sum of memory; what is shared counts several times in ``resident``."""
    sums = map(
        sum,
        zip(*((part.resident, part.proportional, part.private) for part in parts), strict=True),
    )
    return Memory(*sums)


def children(pid: int) -> list[int]:
    """Return the process ids of the children of a process with a single thread."""
    return [int(child) for child in _read(pid, f"task/{pid}/children").split()]


def sleeping(pid: int) -> bool:
    """Whether a process waits for something that may take long."""
    return _stat(pid)[0] == "S"


def memory(pid: int) -> Memory:
    """Return how much memory a process has."""
    fields = _read(pid, "smaps_rollup").split()

    def size(name: str) -> int:
        return int(fields[fields.index(name) + 1]) * 1024

    private = size("Private_Clean:") + size("Private_Dirty:")
    return Memory(size("Rss:"), size("Pss:"), private)


def peak_memory(pid: int) -> int:
    """Return the most resident memory in bytes that a process ever had."""
    fields = _read(pid, "status").split()
    return int(fields[fields.index("VmHWM:") + 1]) * 1024


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def watches(pid: int) -> int:
    """Return how many inotify watches a process has."""
    names = os.listdir(f"/proc/{pid}/fdinfo")
    return sum(_read(pid, f"fdinfo/{name}").count("inotify wd:") for name in names)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on: the second may hold anything."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()
