"""What a cgroup has used: reading the kernel's statistics files into immutable records.

Owns the names and formats of those files (Documentation/admin-guide/cgroup-v2.rst in the kernel's
sources) and the arithmetic on counters. Knows nothing of when to read or what it is for. A file
that the kernel does not have, or whose contents make no sense, yields None for its fields.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import msgspec

CPU_STAT: Final = b"cpu.stat"
_READ_SIZE: Final = 4096


class Counters(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What only ever grows while a cgroup lives, and may be added up over cgroups.

    Times are in microseconds, I/O in bytes and operations; None where the kernel has no number.
    """

    cpu_total: int | None = None
    cpu_user: int | None = None
    cpu_system: int | None = None
    cpu_throttled: int | None = None
    cpu_throttled_periods: int | None = None
    memory_events_high: int | None = None
    memory_events_max: int | None = None
    memory_events_oom: int | None = None
    memory_events_oom_kill: int | None = None
    pids_forks: int | None = None
    pids_events_max: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    io_read_operations: int | None = None
    io_write_operations: int | None = None


class Pressure(msgspec.Struct, frozen=True, gc=False):
    """Stall times of one resource in microseconds (Documentation/accounting/psi.rst)."""

    some: int | None = None
    full: int | None = None


class Peaks(msgspec.Struct, frozen=True, gc=False):
    """Highest values ever seen: bytes, and a number of processes. Not to be added up."""

    memory_peak: int | None = None
    memory_swap_peak: int | None = None
    pids_peak: int | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    """All statistics of one cgroup at one moment, as the kernel counts: children included."""

    counters: Counters
    peaks: Peaks

    def shows_use(self) -> bool:
        """Whether anything has ever run in the cgroup, as far as numbers can tell."""
        return bool(self.counters.cpu_total or self.peaks.memory_peak or self.peaks.pids_peak)


TIME_COUNTERS: Final = Counters.__struct_fields__[:4]
"""The names of the counters that are microseconds; the first ones of Counters."""

NO_COUNTERS: Final = Counters()
NO_PEAKS: Final = Peaks()

# The kernel counts these for the cgroup alone, not for its children.
_LOCAL_ALWAYS: Final = frozenset({"cpu_throttled", "cpu_throttled_periods"})
_MEMORY_EVENTS: Final = frozenset(
    {
        "memory_events_high",
        "memory_events_max",
        "memory_events_oom",
        "memory_events_oom_kill",
    }
)


def local_counters(mount_options: Iterable[bytes], *, pids_events_local: bool) -> frozenset[str]:
    """Return the names of the counters that do not include a cgroup's children on this host.

    ``memory_localevents`` and ``pids_localevents`` are options of the cgroup2 mount. pids.events
    became hierarchical together with the introduction of pids.events.local (Linux 6.11), so the
    presence of that file tells.
    """
    options = frozenset(mount_options)
    local = _LOCAL_ALWAYS
    if b"memory_localevents" in options:
        local |= _MEMORY_EVENTS
    if b"pids_localevents" in options or not pids_events_local:
        local |= {"pids_events_max"}
    return local


def subtract(value: Counters, baseline: Counters) -> Counters:
    """Return VALUE minus BASELINE, never below zero; None where VALUE has nothing."""
    if baseline is NO_COUNTERS:
        return value
    difference = Counters(
        *(
            a if a is None or b is None else max(a - b, 0)
            for a, b in zip(_as_tuple(value), _as_tuple(baseline), strict=True)
        )
    )
    total, system = difference.cpu_total, difference.cpu_system
    if total is None or system is None or difference.cpu_user is None:
        return difference
    # Only the total is exact. How it splits is estimated by the kernel for each cgroup on its
    # own: a short session may be all user while its parent is mostly system. So that the parts
    # add up to the total over any number of records, one of them is what the other leaves.
    system = min(system, total)
    return msgspec.structs.replace(difference, cpu_system=system, cpu_user=total - system)


def add(left: Counters, right: Counters, without: frozenset[str] = frozenset()) -> Counters:
    """Return the sum, leaving the counters WITHOUT as they are in LEFT."""
    if left is NO_COUNTERS and not without:
        return right
    return Counters(
        *(
            a if b is None or name in without else b + (a or 0)
            for name, a, b in zip(
                Counters.__struct_fields__, _as_tuple(left), _as_tuple(right), strict=True
            )
        )
    )


_as_tuple = msgspec.structs.astuple

_LARGEST: Final = (1 << 64) - 1
_DIGITS: Final = len(str(_LARGEST))

_Fields = dict[str, int]
_Parser = Callable[[bytes], _Fields]


_KEYED: Final = re.compile(rb"(?:[\w.]+ \d{1,20}\n)+")


def _keyed(names: dict[bytes, str]) -> _Parser:
    """Parser for "KEY NUMBER" lines, of which NAMES says which to keep."""
    wanted = re.compile(rb"^(%s) (\d+)$" % b"|".join(names), re.MULTILINE)

    def parse(data: bytes) -> _Fields:
        if not _KEYED.fullmatch(data):
            raise ValueError(f"not lines of key and number: {data[:40]!r}")
        return {names[key]: _bounded(int(value)) for key, value in wanted.findall(data)}

    return parse


def _single(name: str) -> _Parser:
    """Parser for a file that holds one number."""

    def parse(data: bytes) -> _Fields:
        return {name: _number(data.strip())}

    return parse


def _number(text: bytes) -> int:
    # int() would take signs, spaces and underscores, and any number of digits
    if not text.isdigit() or len(text) > _DIGITS:
        raise ValueError(f"not a number: {text[:40]!r}")
    return _bounded(int(text))


def _bounded(number: int) -> int:
    if number > _LARGEST:
        raise ValueError(f"more than 64 bits: {number}")
    return number


_IO_KEYS: Final = {
    b"rbytes": "io_read_bytes",
    b"wbytes": "io_write_bytes",
    b"rios": "io_read_operations",
    b"wios": "io_write_operations",
}


def _parse_io_stat(data: bytes) -> _Fields:
    """Sum "MAJOR:MINOR rbytes=N wbytes=N ..." over all devices; no device at all means zero."""
    sums = dict.fromkeys(_IO_KEYS.values(), 0)
    for line in data.splitlines():
        device, *words = line.split()
        if b":" not in device:
            raise ValueError(f"not a device: {device[:40]!r}")
        for word in words:
            key, equals, value = word.partition(b"=")
            if not equals:
                raise ValueError(f"not a key with a value: {word[:40]!r}")
            if key in _IO_KEYS:
                sums[_IO_KEYS[key]] += _number(value)
    return sums


_PARSERS: Final[dict[bytes, _Parser]] = {
    CPU_STAT: _keyed(
        {
            b"usage_usec": "cpu_total",
            b"user_usec": "cpu_user",
            b"system_usec": "cpu_system",
            b"throttled_usec": "cpu_throttled",
            b"nr_throttled": "cpu_throttled_periods",
        }
    ),
    b"memory.peak": _single("memory_peak"),
    b"memory.swap.peak": _single("memory_swap_peak"),
    b"memory.events": _keyed(
        {
            b"high": "memory_events_high",
            b"max": "memory_events_max",
            b"oom": "memory_events_oom",
            b"oom_kill": "memory_events_oom_kill",
        }
    ),
    b"pids.peak": _single("pids_peak"),
    b"pids.forks": _single("pids_forks"),
    b"pids.events": _keyed({b"max": "pids_events_max"}),
    b"io.stat": _parse_io_stat,
}

_FILE_OF: Final = {
    **dict.fromkeys(TIME_COUNTERS, CPU_STAT),
    "cpu_throttled_periods": CPU_STAT,
    "memory_peak": b"memory.peak",
    "memory_swap_peak": b"memory.swap.peak",
    **dict.fromkeys(_MEMORY_EVENTS, b"memory.events"),
    "pids_peak": b"pids.peak",
    "pids_forks": b"pids.forks",
    "pids_events_max": b"pids.events",
    **dict.fromkeys(_IO_KEYS.values(), b"io.stat"),
}


def file_of(field: str) -> bytes | None:
    """Return the name of the file that a counter or peak comes from, None for any other name."""
    return _FILE_OF.get(field)


STATISTICS_FILES: Final = frozenset(_PARSERS)
PRESSURE_FILES: Final = (b"cpu.pressure", b"memory.pressure", b"io.pressure")


class Malformed(Exception):
    """A statistics file whose contents are not what the kernel documents."""


def parse_usage(files: Iterable[tuple[bytes, bytes]]) -> tuple[Usage, list[Malformed]]:
    """Turn (file name, contents) pairs into a Usage, and name the files that made no sense."""
    fields: _Fields = {}
    malformed = []
    for name, data in files:
        try:
            fields |= _PARSERS[name](data)
        except ValueError as error:
            malformed.append(Malformed(f"{name.decode()}: {error}"))
    peaks = (
        NO_PEAKS
        if fields.keys().isdisjoint(_PEAK_NAMES)
        else Peaks(*(fields.pop(name, None) for name in _PEAK_NAMES))
    )
    return Usage(Counters(**fields), peaks), malformed


_PEAK_NAMES: Final = Peaks.__struct_fields__


def parse_pressure(data: bytes) -> Pressure:
    """Return the totals of a pressure file; None for a line that is missing or malformed."""
    totals: dict[str, int] = {}
    for line in data.splitlines():
        kind, _, rest = line.partition(b" ")
        total = rest.rpartition(b"total=")[2]
        with suppress(ValueError):
            if kind in (b"some", b"full"):
                totals[kind.decode()] = _number(total)
    return Pressure(**totals)


def read_file(directory: int, name: bytes) -> bytes:
    """Return the contents of NAME in the directory descriptor; OSError as from open(2)."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return read_descriptor(fd)
    finally:
        os.close(fd)


def read_descriptor(fd: int) -> bytes:
    """Return the contents of an open statistics file from its start.

    The kernel generates the text at the first read and again whenever reading restarts at zero,
    so an open descriptor can be asked more than once.
    """
    data = os.pread(fd, _READ_SIZE, 0)
    if len(data) < _READ_SIZE:
        return data
    while chunk := os.pread(fd, _READ_SIZE, len(data)):
        data += chunk
    return data
