"""What ``cgroup_released`` gets: a release as a Lua object.

Owns the names that scripts see and the units they are in: seconds, bytes, counts. Everything that
is in the record is handed over in one call; what is rarely wanted or costs a system call is
fetched when the script touches it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from spawn_common import linux
from spawn_reaper import usage
from spawn_reaper.release import Pressures, Release

_COUNTERS: Final = usage.Counters.__struct_fields__
_PEAKS: Final = usage.Peaks.__struct_fields__
_FIELDS: Final = (*_COUNTERS, *_PEAKS, "path", "id", "btime", "age", "remainder")
_PRESSURE: Final = {
    f"{resource}_pressure".encode(): (resource, f"{resource}.pressure".encode())
    for resource in Pressures.__struct_fields__
}


class Subject:
    """A release on its way through a handler.

    ``directory`` is the cgroup's open directory until the reaper deletes it, then None.
    """

    __slots__ = ("directory", "release")

    def __init__(self, release: Release, directory: int | None) -> None:
        self.release = release
        self.directory = directory


def fields_of(release: Release) -> tuple[Any, ...]:
    """Return what a release brings along into Lua, in the order of _FIELDS."""
    born = release.born
    return (
        *msgspec.structs.astuple(release.usage.counters),
        *msgspec.structs.astuple(release.usage.peaks),
        release.path,
        release.id.encode(),
        None if born is None else int(born),
        release.age,
        release.remainder,
    )


class CgroupBinding:
    """Makes Lua objects of releases."""

    def __init__(self, load: Callable[[bytes, bytes], Any], root: bytes) -> None:
        """LOAD compiles Lua code under a name; ROOT is the path of the cgroup root directory."""
        self._root = root
        code = Path(__file__).with_name("cgroup.lua").read_bytes()
        self.new, self.close = load(code, b"=cgroup.lua")(
            self._pressure,
            self._own,
            self._xattr,
            self._parent,
            len(usage.TIME_COUNTERS),
            len(_COUNTERS),
            *(name.encode() for name in _FIELDS),
        )
        """new(subject, *fields_of(release)) returns the Lua object for a release; close(object)
        makes the object, and all that was got from it, stale."""

    # What Lua calls. Nothing here raises: a Lua error must be a string.

    def _pressure(self, subject: Subject, field: bytes) -> float | None:
        """Read a pressure total while there is a directory, or take it from the record."""
        resource, file = _PRESSURE[field]
        if subject.release.pressures is not None:
            pressure = getattr(subject.release.pressures, resource)
        elif subject.directory is not None:
            try:
                pressure = usage.parse_pressure(usage.read_file(subject.directory, file))
            except OSError:
                return None
        else:
            return None
        return None if pressure.some is None else pressure.some / 1e6

    def _own(self, subject: Subject) -> tuple[int | None, ...]:
        return msgspec.structs.astuple(subject.release.own)

    def _xattr(self, subject: Subject, level: int, path: bytes, name: bytes) -> bytes | None:
        """Return an attribute: copied for the cgroup and its parents in the scope, else read."""
        attributes = subject.release.attributes
        if level < len(attributes) and name.startswith(b"user."):
            return attributes[level].get(name)
        try:
            return os.getxattr(self._root + path, name)
        except (OSError, ValueError):
            return None

    def _parent(self, path: bytes, field: bytes) -> int | float | None:
        """Read one statistic of a cgroup that is (usually) still alive."""
        try:
            directory = os.open(self._root + path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return _read_field(directory, field)
        except OSError:
            return None
        finally:
            os.close(directory)


def _read_field(directory: int, field: bytes) -> int | float | None:
    if field in (b"btime", b"age"):
        born = linux.birth_time(directory, b".")
        if born is None:
            return None
        return int(born) if field == b"btime" else time.time() - born
    if field in _PRESSURE:
        pressure = usage.parse_pressure(usage.read_file(directory, _PRESSURE[field][1]))
        return None if pressure.some is None else pressure.some / 1e6
    name = field.decode("ascii", "replace")
    file = usage.file_of(name)
    if file is None:
        return None
    found, _ = usage.parse_usage([(file, usage.read_file(directory, file))])
    if name in _PEAKS:
        peak: int | None = getattr(found.peaks, name)
        return peak
    counter: int | None = getattr(found.counters, name)
    return counter / 1e6 if counter is not None and name in usage.TIME_COUNTERS else counter
