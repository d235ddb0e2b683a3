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
    f"{resource}_pressure".encode(): f"{resource}.pressure".encode()
    for resource in Pressures.__struct_fields__
}
FIELDS: Final = (*_FIELDS, *(name.decode() for name in _PRESSURE), "own", "parent", "xattr")
"""The names that scripts may read of a released cgroup."""

_NO_PRESSURES: Final = (None, None, None)


def fields_of(release: Release) -> tuple[Any, ...]:
    """Return all of a release, as values that Lua knows: nothing of it is left in Python.

    A Python object in Lua would leave a trace in lupa's table of references, each time.
    """
    born, pressures = release.born, release.pressures
    return (
        *msgspec.structs.astuple(release.usage.counters),
        *msgspec.structs.astuple(release.usage.peaks),
        release.path,
        release.id.encode(),
        None if born is None else int(born),
        release.age,
        release.remainder,
        *msgspec.structs.astuple(release.own),
        *(_NO_PRESSURES if pressures is None else _totals(pressures)),
        len(release.attributes),
        *(
            part
            for level, attributes in enumerate(release.attributes)
            for name, value in attributes.items()
            for part in (level, name, value)
        ),
    )


def _totals(pressures: Pressures) -> tuple[int | None, ...]:
    return (pressures.cpu.some, pressures.memory.some, pressures.io.some)


class CgroupBinding:
    """Makes Lua objects of releases."""

    def __init__(self, load: Callable[[bytes, bytes], Any], guarded: Any, root: bytes) -> None:
        """LOAD compiles Lua code under a name; GUARDED wraps what Lua may call (script.lua).

        ROOT is the path of the cgroup root directory.
        """
        self._root = root
        self.directories: dict[bytes, int] = {}
        """The open directories of the releases that are about to be deleted, by id."""
        code = Path(__file__).with_name("cgroup.lua").read_bytes()
        self.new, self.close = load(code, b"=cgroup.lua")(
            guarded(self._pressure),
            guarded(self._xattr),
            guarded(self._parent),
            len(usage.TIME_COUNTERS),
            len(_COUNTERS),
            *(name.encode() for name in _FIELDS),
        )
        """new(*fields_of(release)) returns the Lua object for a release; close(object) makes the
        object, and all that was got from it, stale."""

    # What Lua calls. Nothing here raises: a Lua error must be a string.

    def _pressure(self, release_id: bytes, field: bytes) -> int | None:
        """Read a pressure total while there is a directory."""
        directory = self.directories.get(release_id)
        if directory is None:
            return None
        try:
            return usage.parse_pressure(usage.read_file(directory, _PRESSURE[field])).some
        except OSError:
            return None

    def _xattr(self, path: bytes, name: bytes) -> bytes | None:
        """Read an attribute that was not copied."""
        try:
            return os.getxattr(self._root + path, name)
        except (OSError, ValueError):
            return None

    def _parent(self, path: bytes, field: bytes) -> int | float | None:
        """Read one statistic of a cgroup that is (usually) still alive."""
        try:
            directory = os.open(self._root + path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError):
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
        pressure = usage.parse_pressure(usage.read_file(directory, _PRESSURE[field]))
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
