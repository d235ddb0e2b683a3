"""Turns a cgroup that ran empty into a record, and remembers what was recorded.

Owns the baselines: what was recorded for a cgroup and below it is subtracted from what the kernel
says next time, so that ``own`` may be added up over all records. Reads through an open directory,
which is the cgroup's identity; knows nothing of when, and deletes nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress
from types import MappingProxyType
from typing import Final

import msgspec

from spawn_reaper import usage
from spawn_reaper.release import Attributes, Pressures, Release, ReleaseIds
from spawn_reaper.report import printable
from spawn_reaper.tree import OPEN_DIRECTORY, Cgroup, located

_log = logging.getLogger(__name__)

# A pattern of a script may take time quadratic in the length of a value, and no limit on handlers
# reaches into Lua's own functions.
_ATTRIBUTE_SIZE: Final = 4096
_ATTRIBUTE_LEVELS: Final = 8  # of a cgroup and its parents
_INODES_MAX: Final = 64
_NO_ATTRIBUTES: Final[Attributes] = MappingProxyType({})


class Opened:
    """A cgroup that is being looked at, with its directory and its cpu.stat open."""

    __slots__ = ("cgroup", "cpu", "cpu_stat", "directory", "frozen", "path", "release")

    def __init__(self, cgroup: Cgroup, path: bytes, directory: int) -> None:
        self.cgroup = cgroup
        self.path = path
        self.directory = directory
        self.cpu = -1
        self.cpu_stat = b""  # as it was when the record was made
        self.frozen = False  # by somebody else, when it was looked at
        self.release: Release | None = None  # what was recorded of it, if anything was

    def close(self) -> None:
        """Close what is open."""
        if self.cpu >= 0:
            os.close(self.cpu)
        os.close(self.directory)

    def read_cpu_stat(self) -> bytes:
        """Return cpu.stat as it is now; OSError if it cannot be read."""
        if self.cpu < 0:
            self.cpu = os.open(usage.CPU_STAT, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.directory)
        return usage.read_descriptor(self.cpu)


class Accounts:
    """Makes the records of one daemon."""

    def __init__(self, local: frozenset[str], *, pressure: bool) -> None:
        """LOCAL names the counters that do not include children; PRESSURE: read PSI always."""
        self._local = local
        self._pressure = pressure
        self._new_id = ReleaseIds()
        self._files: dict[bytes, tuple[bytes, ...]] = {}  # by cgroup.subtree_control
        self._complained: set[str] = set()
        self._batch_files: dict[Cgroup, tuple[bytes, ...]] = {}
        self._batch_attributes: dict[Cgroup, Attributes] = {}

    def begin_batch(self) -> None:
        """Forget what may have changed since the last batch."""
        self._batch_files.clear()
        self._batch_attributes.clear()

    def read(self, opened: Opened) -> usage.Usage:
        """Read the statistics of a cgroup, as the kernel counts.

        OSError if they cannot be read now; a file that does not exist is none of them.
        """
        opened.cpu_stat = opened.read_cpu_stat()
        contents = [(usage.CPU_STAT, opened.cpu_stat)]
        for name in self._files_of(opened):
            with suppress(FileNotFoundError):  # its controller was turned off meanwhile
                contents.append((name, usage.read_file(opened.directory, name)))
        result, malformed = usage.parse_usage(contents)
        for problem in malformed:
            self._complain(str(problem), opened)
        return result

    def own(self, cgroup: Cgroup, found: usage.Usage) -> usage.Counters:
        """Return the part of FOUND that was not recorded yet."""
        return usage.subtract(found.counters, cgroup.accounted)

    def record(self, opened: Opened, found: usage.Usage, own: usage.Counters) -> Release:
        """Make the record of a release and remember it as the cgroup's baseline."""
        pressures = _read_pressures(opened.directory) if self._pressure else None
        opened.cgroup.reported = True
        opened.cgroup.used = False
        return self._record(opened, found, own, pressures, remainder=False)

    def remainder(self, opened: Opened, last: bytes) -> list[Release]:
        """Return the record of what a deleted cgroup used after it was read, if it used anything.

        LAST is its cpu.stat directly before the deletion.
        """
        found, _ = usage.parse_usage([(usage.CPU_STAT, last)])
        own = self.own(opened.cgroup, found)
        if not any(msgspec.structs.astuple(own)):
            return []
        return [self._record(opened, found, own, None, remainder=True)]

    def bequeath(self, cgroup: Cgroup) -> None:
        """Pass what was recorded for a deleted cgroup on to its parent, which still counts it.

        A cgroup with children is never recorded, so this is early enough.
        """
        parent = cgroup.parent
        if parent and parent.parent and cgroup.accounted is not usage.NO_COUNTERS:
            parent.accounted = usage.add(parent.accounted, cgroup.accounted, without=self._local)

    def _record(
        self,
        opened: Opened,
        found: usage.Usage,
        own: usage.Counters,
        pressures: Pressures | None,
        *,
        remainder: bool,
    ) -> Release:
        cgroup = opened.cgroup
        cgroup.accounted = usage.add(cgroup.accounted, own)
        # Attributes stay readable through the open directory even after the deletion.
        attributes = [self._read_attributes(opened.directory)]
        parent = cgroup.parent
        while parent and parent.parent and len(attributes) < _ATTRIBUTE_LEVELS:
            attributes.append(self._attributes_of(parent))
            parent = parent.parent
        return Release(
            self._new_id(cgroup.inode),
            cgroup.scope.path + b"/" + opened.path,
            opened.path,
            time.time(),
            cgroup.born,
            None if cgroup.born is None else time.monotonic() - cgroup.seen,
            found,
            own,
            tuple(attributes),
            _inodes_of(cgroup),
            pressures,
            remainder,
        )

    def _files_of(self, opened: Opened) -> tuple[bytes, ...]:
        """Return which statistics files the cgroup has besides cpu.stat.

        Its parent's cgroup.subtree_control decides; one look into the first directory of that
        kind tells which of the files this kernel knows.
        """
        parent = opened.cgroup.parent
        assert parent is not None
        if parent not in self._batch_files:
            with located(parent.scope, parent.path()) as (fd, path):
                control = usage.read_file(fd, os.path.join(path, b"cgroup.subtree_control"))
            if control not in self._files:
                present = {os.fsencode(name) for name in os.listdir(opened.directory)}
                if usage.CPU_STAT not in present:  # always there, unless the cgroup is gone
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                wanted = usage.STATISTICS_FILES - {usage.CPU_STAT}
                self._files[control] = tuple(sorted(wanted & present))
            self._batch_files[parent] = self._files[control]
        return self._batch_files[parent]

    def _attributes_of(self, cgroup: Cgroup) -> Attributes:
        """Return the attributes of a parent, read once for each batch."""
        if cgroup not in self._batch_attributes:
            attributes = _NO_ATTRIBUTES
            try:
                with located(cgroup.scope, cgroup.path()) as (fd, path):
                    directory = os.open(path, OPEN_DIRECTORY, dir_fd=fd)
                try:
                    attributes = self._read_attributes(directory)
                finally:
                    os.close(directory)
            except OSError:
                pass  # gone, or not ours to read
            self._batch_attributes[cgroup] = attributes
        return self._batch_attributes[cgroup]

    def _read_attributes(self, directory: int) -> Attributes:
        """Return the attributes of an open cgroup, without what is too long to be meant well."""
        try:
            names = os.listxattr(directory)
            if not names:
                return _NO_ATTRIBUTES
            attributes = {
                os.fsencode(name): os.getxattr(directory, name)
                for name in names
                if name.startswith("user.")
            }
        except OSError:
            return _NO_ATTRIBUTES
        return {name: value for name, value in attributes.items() if len(value) <= _ATTRIBUTE_SIZE}

    def _complain(self, problem: str, opened: Opened) -> None:
        """Say once for each kind of problem that a file cannot be used."""
        if problem not in self._complained and len(self._complained) < 100:
            self._complained.add(problem)
            _log.warning("%s: %s", printable(opened.path).decode(), problem)


def _inodes_of(cgroup: Cgroup) -> tuple[int, ...]:
    """Return the inodes of a cgroup and of those above it; of a deep one, only the innermost."""
    inodes = [cgroup.inode]
    parent = cgroup.parent
    while parent is not None and parent.parent is not None:
        if len(inodes) == _INODES_MAX:
            return tuple(inodes)
        inodes.append(parent.inode)
        parent = parent.parent
    return (*inodes, *cgroup.scope.inodes)


def _read_pressures(directory: int) -> Pressures:
    totals = []
    for name in usage.PRESSURE_FILES:
        try:
            totals.append(usage.parse_pressure(usage.read_file(directory, name)))
        except OSError:
            totals.append(usage.Pressure())
    return Pressures(*totals)
