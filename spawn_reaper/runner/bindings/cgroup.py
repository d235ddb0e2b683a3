"""What ``cgroup_released`` gets: a release as a Lua object.

Owns the names that scripts see and the units they are in: seconds, bytes, counts. Everything that
is in the record is handed over in one call; what is rarely wanted or costs a system call is
fetched when the script touches it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from spawn_common import linux
from spawn_reaper import usage
from spawn_reaper.release import Pressures
from spawn_reaper.wire import FIELDS

_COUNTERS: Final = usage.Counters.__struct_fields__
_PEAKS: Final = usage.Peaks.__struct_fields__
_PRESSURE: Final = {
    f"{resource}_pressure".encode(): f"{resource}.pressure".encode()
    for resource in Pressures.__struct_fields__
}
NAMES: Final = (
    *FIELDS,
    *(name.decode() for name in _PRESSURE),
    *("attempt", "own", "parent", "xattr"),
)
"""What scripts may read of a released cgroup."""


class CgroupBinding:
    """Makes Lua objects of releases."""

    def __init__(self, load: Callable[[bytes, bytes], Any], guarded: Any, root: bytes) -> None:
        """LOAD compiles Lua code under a name; GUARDED wraps what Lua may call (script.lua).

        ROOT is the path of the cgroup root directory.
        """
        self._root = root
        code = Path(__file__).with_name("cgroup.lua").read_bytes()
        self.new, self.close = load(code, b"=cgroup.lua")(
            guarded(self._xattr),
            guarded(self._field),
            len(usage.TIME_COUNTERS),
            len(_COUNTERS),
            *(name.encode() for name in FIELDS),
        )
        """new(attempt, *fields_of(release)) returns the Lua object for a release; close(object)
        makes the object, and all that was got from it, stale."""

    # What Lua calls. Nothing here raises: a Lua error must be a string.

    def _xattr(self, path: bytes, inode: int, name: bytes) -> bytes | None:
        """Read an attribute that was not copied."""
        try:
            with self._opened(path, inode) as directory:
                return os.getxattr(directory, name)
        except (OSError, ValueError):
            return None

    def _field(self, path: bytes, inode: int, field: bytes) -> int | float | None:
        """Read one statistic of a cgroup that is (usually) still alive."""
        try:
            with self._opened(path, inode) as directory:
                return _read_field(directory, field)
        except (OSError, ValueError):
            return None

    @contextmanager
    def _opened(self, path: bytes, inode: int) -> Iterator[int]:
        """Open a cgroup, and not another one that has got the same path."""
        directory = os.open(self._root + path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.fstat(directory).st_ino != inode:
                raise FileNotFoundError
            yield directory
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
