"""Which managed scopes exist now.

Owns the patterns of the settings and a watch on each directory on the way to them, so that a scope
that appears, vanishes or comes back is noticed at once. Uses an inotify descriptor of its own:
the queue of the tree may overflow under a burst, this one does not.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from spawn_common import linux

_EVENTS: Final = linux.IN_CREATE | linux.IN_DELETE | linux.IN_ONLYDIR
_READ_SIZE: Final = 65536
_GLOB: Final = frozenset(b"*?[")


def check_pattern(pattern: str) -> str | None:
    """Return what is wrong with a scope's path or glob pattern, or None."""
    if not pattern.startswith("/"):
        return "must begin with a slash"
    names = pattern[1:].split("/")
    if ".." in names or "." in names:
        return "must not contain '.' or '..'"
    if pattern == "/":
        return "must name a cgroup below the root"
    if "" in names:
        return "must not contain an empty name or end with a slash"
    if "\0" in pattern:
        return "must not contain a NUL byte"
    return None


class ScopeFinder:
    """Keeps track of the directories that match the patterns."""

    def __init__(self, root: bytes, patterns: list[bytes]) -> None:
        self.fd = linux.inotify_init()
        self._root = root
        self._patterns = [pattern.strip(b"/").split(b"/") for pattern in patterns]
        self._watches: dict[int, set[bytes]] = {}  # watch -> patterns of names that matter there
        self.incomplete = False  # some directory could not be watched: ask again after a while

    def close(self) -> None:
        """Give back the inotify descriptor and with it the watches."""
        os.close(self.fd)

    def handle_events(self) -> bool:
        """Read what the kernel has queued; True if scopes may have appeared or vanished."""
        try:
            data = os.read(self.fd, _READ_SIZE)
        except BlockingIOError:
            return False
        for watch, mask, name in linux.parse_inotify_events(data):
            names = self._watches.get(watch, ())
            if mask & linux.IN_Q_OVERFLOW or any(fnmatch.fnmatchcase(name, p) for p in names):
                return True
        return False

    def find(self) -> dict[bytes, int]:
        """Return the inode of each scope that exists now, by its path below the root.

        A match inside another match is left out: it is managed as part of the outer one. On
        return, everything on the way to a scope that may appear is watched. OSError if it cannot
        be known what exists, for want of descriptors or memory.
        """
        self.incomplete = True
        watches: dict[int, set[bytes]] = {}
        found: dict[bytes, int] = {}
        complete = True
        for pattern in self._patterns:
            complete &= self._match(pattern, watches, found)
        self.incomplete = not complete
        for watch in self._watches.keys() - watches.keys():
            linux.inotify_rm_watch(self.fd, watch)
        self._watches = watches
        return {path: inode for path, inode in found.items() if not _inside_any(path, found)}

    def open(self, path: bytes) -> int:
        """Open the directory of a scope that was found."""
        return os.open(self._root + path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _match(
        self, pattern: list[bytes], watches: dict[int, set[bytes]], found: dict[bytes, int]
    ) -> bool:
        """Walk down PATTERN, placing each directory's watch before looking into it.

        Adds to WATCHES and FOUND; returns whether all watches could be placed.
        """
        complete = True
        level = {b"": 0}
        for name in pattern:
            below: dict[bytes, int] = {}
            for path in level:
                directory = self._root + path + b"/"
                try:
                    watch = linux.inotify_add_watch(self.fd, directory, _EVENTS)
                    watches.setdefault(watch, set()).add(name)
                except FileNotFoundError:
                    continue
                except OSError:  # no permission, or no room for another watch
                    complete = False
                with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                    below.update(
                        (path + b"/" + entry, inode) for entry, inode in _entries(directory, name)
                    )
            level = below
        found.update(level)
        return complete


def _entries(directory: bytes, pattern: bytes) -> Iterator[tuple[bytes, int]]:
    if not _GLOB.intersection(pattern):
        yield pattern, os.stat(directory + pattern + b"/").st_ino
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and fnmatch.fnmatchcase(entry.name, pattern):
                yield entry.name, entry.inode()


def _inside_any(path: bytes, scopes: dict[bytes, int]) -> bool:
    return any(path.startswith(scope + b"/") for scope in scopes)
