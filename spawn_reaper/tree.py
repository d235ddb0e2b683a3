"""The live cgroups below the managed scopes, as inotify shows them.

Owns the inotify descriptor, the watches and the tree of Cgroup objects. Says when a cgroup should
be looked at, when one vanished and when a whole scope ran empty; what to do about it is left to
the listener. No descriptor is kept per cgroup.

What the kernel does, and what follows from it:

- A name is not an identity: it may be deleted and made again before its events are read. Every
  event therefore means "look at that name again", and the inode tells one cgroup from the next.
- Watches come first, children second, ``populated`` third: whatever happens after the watch was
  placed is notified, whatever happened before is seen by looking.
- Nothing tells a watch that its cgroup was removed; watches are removed explicitly.
- A watch on ``cgroup.events`` pins that file's inode and is reliable; one on the directory alone
  would miss its changes.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Protocol

from spawn_common import linux
from spawn_reaper.usage import NO_COUNTERS, Counters, read_file

_DIRECTORY_EVENTS: Final = (
    linux.IN_CREATE | linux.IN_DELETE | linux.IN_ONLYDIR | linux.IN_DONT_FOLLOW
)
_ABSENT: Final = (errno.ENOENT, errno.ENODEV)
_NOT_WATCHED: Final = -1
_NOT_ENTERED: Final = -1
_READ_SIZE: Final = 65536  # below malloc's mmap threshold: a bigger buffer is faulted in each time
_LONGEST_PATH: Final = 3072  # the kernel refuses 4096; leaves room for a file name
OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Cgroup:
    """One cgroup that lives below a scope, or (with ``parent`` None) the scope's own directory."""

    __slots__ = (
        "accounted",
        "born",
        "children",
        "directory_watch",
        "due",
        "events_watch",
        "gone",
        "inode",
        "name",
        "parent",
        "reported",
        "ripe",
        "scope",
        "seen",
        "settling",
        "used",
    )

    def __init__(
        self, scope: Scope, parent: Cgroup | None, name: bytes, inode: int, born: float | None
    ) -> None:
        self.scope = scope
        self.parent = parent
        self.name = name
        self.inode = inode
        self.children: dict[bytes, Cgroup] | None = None
        self.directory_watch = _NOT_WATCHED
        self.events_watch = _NOT_WATCHED
        self.born = born  # seconds since the epoch, None when it was there before us
        self.seen = time.monotonic()  # when it was first seen, or if known, born
        self.used = False  # something has run in it since it was made or last reported
        self.gone = False
        # The reaper's notes
        self.due: float | None = None  # monotonic time of the next look
        self.accounted: Counters = NO_COUNTERS  # what was recorded for it and below it
        self.reported = False
        self.ripe = False  # nothing but its children keeps it from being deleted
        self.settling = False  # it was recorded, and is about to be deleted

    def path(self) -> bytes:
        """Return the path relative to the scope's directory."""
        names = []
        cgroup = self
        while cgroup.parent is not None:
            names.append(cgroup.name)
            cgroup = cgroup.parent
        names.reverse()
        return b"/".join(names)

    def descendants(self) -> Iterator[Cgroup]:
        """Yield everything below, parents before their children."""
        pending = list(self.children.values()) if self.children else []
        while pending:
            cgroup = pending.pop()
            yield cgroup
            if cgroup.children:
                pending.extend(cgroup.children.values())


class Scope:
    """A managed directory: everything below it is ours to delete, itself never."""

    def __init__(self, path: bytes, fd: int) -> None:
        self.path = path  # as in /proc/self/cgroup
        self.fd = fd
        self.populated = True  # until the kernel says otherwise
        self.root = Cgroup(self, None, b"", os.fstat(fd).st_ino, None)
        self.inodes = self._inodes_above()
        """Those of the scope and of all above it but the hierarchy's root, innermost first."""

    def _inodes_above(self) -> tuple[int, ...]:
        inodes, above = [self.root.inode], b".."
        for _ in range(self.path.count(b"/") - 1):
            inodes.append(os.stat(above, dir_fd=self.fd).st_ino)
            above += b"/.."
        return tuple(inodes)


class Listener(Protocol):
    """What the tree tells; called while events are handled, so it must not block."""

    def touched(self, cgroup: Cgroup) -> None:
        """Something about the cgroup may have changed."""

    def childless(self, cgroup: Cgroup) -> None:
        """The last cgroup below it is gone."""

    def vanished(self, cgroup: Cgroup) -> None:
        """Somebody else deleted the cgroup."""

    def emptied(self, scope: Scope) -> None:
        """No process is left anywhere in the scope."""


class located:  # noqa: N801 - reads like the function that it would be if that were faster
    """Context that gives a directory descriptor and a path relative to it that the kernel takes.

    The kernel refuses paths of 4096 bytes, yet a customer can nest cgroups deeper than that.
    """

    __slots__ = ("_fd", "_path", "_scope_fd")

    def __init__(self, scope: Scope, path: bytes) -> None:
        self._scope_fd = self._fd = scope.fd
        self._path = path

    def __enter__(self) -> tuple[int, bytes]:
        while len(self._path) > _LONGEST_PATH:
            cut = self._path.rindex(b"/", 0, _LONGEST_PATH)
            try:
                inner = os.open(self._path[:cut], os.O_PATH | OPEN_DIRECTORY, dir_fd=self._fd)
            finally:
                self.__exit__()
            self._fd, self._path = inner, self._path[cut + 1 :]
        return self._fd, self._path

    def __exit__(self, *_: object) -> None:
        if self._fd != self._scope_fd:
            os.close(self._fd)
            self._fd = self._scope_fd


class Tree:
    """All managed scopes and what lives in them."""

    def __init__(self, listener: Listener) -> None:
        self.fd = linux.inotify_init()
        self.scopes: dict[bytes, Scope] = {}
        self.unwatched: set[Cgroup] = set()
        self.count = 0  # of live cgroups, scopes not counted
        self._listener = listener
        self._watches: dict[int, Cgroup] = {}
        self._home = _open_working_directory()
        self._entered = self._home  # the descriptor of the working directory, if known
        self.overflowed = False  # events were lost since the last scan
        self.exhausted = False  # fs.inotify.max_user_watches was reached since the last poll
        self._probe_birth_time = True

    def close(self) -> None:
        """Give back all descriptors; the kernel removes the watches with them."""
        for scope in self.scopes.values():
            os.close(scope.fd)
        self.scopes.clear()
        self._watches.clear()
        os.close(self._home)
        os.close(self.fd)

    # Scopes

    def adopt(self, path: bytes, fd: int) -> Scope:
        """Manage the scope at PATH, whose directory is open as FD (which is ours from now on)."""
        scope = Scope(path, fd)
        try:
            with self._working_directory():
                self._enter(scope, fd)
                self._watch(scope.root, b".")
                self._scope_changed(scope)
                self._compare(scope.root)
        except OSError:
            self.lost(scope.root)
            os.close(fd)
            raise
        self.scopes[path] = scope
        return scope

    def drop(self, scope: Scope) -> None:
        """Manage SCOPE no longer: it was deleted."""
        del self.scopes[scope.path]
        self.lost(scope.root)
        os.close(scope.fd)

    # Events

    def handle_events(self) -> int:
        """Read and handle what the kernel has queued; return how many bytes that was.

        Handles at most one buffer, so that a flood of events does not keep the caller from its
        other work.
        """
        try:
            data = os.read(self.fd, _READ_SIZE)
        except BlockingIOError:
            return 0
        watches, touched = self._watches, self._listener.touched
        now = time.time()
        with self._working_directory():
            for watch, mask, name in linux.parse_inotify_events(data):
                cgroup = watches.get(watch)
                if cgroup is None:
                    if mask & linux.IN_Q_OVERFLOW:
                        self.overflowed = True
                elif mask & linux.IN_MODIFY:
                    if cgroup.parent is None:
                        self._scope_changed(cgroup.scope)
                    else:
                        cgroup.used = True
                        touched(cgroup)
                elif mask & linux.IN_CREATE:
                    self._appeared(cgroup, name, now)
                elif mask & linux.IN_DELETE:
                    self._disappeared(cgroup, name)
        return len(data)

    def scan(self) -> None:
        """Bring everything in line with what the kernel has, after events were lost."""
        self.overflowed = False
        with self._working_directory():
            for scope in list(self.scopes.values()):
                self._compare(scope.root)

    def look_at(self, parent: Cgroup, name: bytes) -> None:
        """Find out what NAME below PARENT is now."""
        with self._working_directory():
            self._appeared(parent, name, None)

    def look_below(self, cgroup: Cgroup) -> None:
        """Find children that no event told of."""
        with self._working_directory():
            self._compare(cgroup)

    def poll(self) -> None:
        """Look at everything that could not be watched, and try again to watch it."""
        self.exhausted = False
        with self._working_directory():
            for cgroup in list(self.unwatched):
                if cgroup.gone:
                    continue
                if cgroup.parent is not None:
                    self._place(cgroup.parent, cgroup.name, cgroup.born)
                else:
                    self._enter(cgroup.scope, cgroup.scope.fd)
                    self._watch(cgroup, b".")
                    self._scope_changed(cgroup.scope)
                if not cgroup.gone:
                    self._compare(cgroup)

    def forget(self, cgroup: Cgroup) -> None:
        """Remove a cgroup that no longer exists; its parent may be due now."""
        cgroup.gone = True
        self.unwatch(cgroup)
        parent = cgroup.parent
        if parent is not None and parent.children and parent.children.get(cgroup.name) is cgroup:
            del parent.children[cgroup.name]
            self.count -= 1
            if not parent.children:
                parent.children = None
                # Removing the last child notifies nothing in the parent.
                if parent.parent is not None and not parent.gone:
                    self._listener.childless(parent)

    def lost(self, cgroup: Cgroup) -> None:
        """Remove a cgroup that somebody else deleted, with all that was below it."""
        for member in [*reversed(list(cgroup.descendants())), cgroup]:
            member.gone = True
            self.forget(member)
            if member.parent is not None:
                self._listener.vanished(member)

    # Inside; the working directory is changed by all of these

    @contextmanager
    def _working_directory(self) -> Iterator[None]:
        """Come back from the directories that inotify_add_watch forces us into.

        It has no dirfd, and from the root of the file system it would walk seven components for
        each watch.
        """
        try:
            yield
        finally:
            os.fchdir(self._home)
            self._entered = self._home

    def _enter(self, scope: Scope, fd: int) -> None:
        """Make FD, the scope's directory or one below it, the working directory."""
        if fd != self._entered:
            os.fchdir(fd)
        # Another descriptor is closed soon, and its number may come back for another directory.
        self._entered = fd if fd == scope.fd else _NOT_ENTERED

    def _scope_changed(self, scope: Scope) -> None:
        with suppress(OSError):  # a scope that is gone is the finder's business
            events = read_file(scope.fd, b"cgroup.events")
            scope.populated = not events.startswith(b"populated 0")
            if not scope.populated:
                self._listener.emptied(scope)

    def _appeared(self, parent: Cgroup, name: bytes, born: float | None) -> None:
        pending = [(parent, name)]
        while pending:
            parent, name = pending.pop()
            if found := self._place(parent, name, born):
                # A subdirectory is a child that was made before the watch was in place.
                pending.extend((found, child) for child in self._list(found) or ())

    def _place(self, parent: Cgroup, name: bytes, born: float | None) -> Cgroup | None:
        """Watch NAME below PARENT, and return its cgroup if it has children to be looked at."""
        path = name if parent.parent is None else parent.path() + b"/" + name
        known = parent.children.get(name) if parent.children else None
        cgroup = Cgroup(parent.scope, parent, name, 0, born)
        try:
            with located(parent.scope, path) as (fd, short):
                self._enter(parent.scope, fd)
                self._watch(cgroup, short)
                status = os.stat(short, follow_symlinks=False)
                if born is None and self._probe_birth_time:
                    self._set_birth_time(cgroup, fd, short)
        except OSError as error:
            self.unwatch(cgroup)
            if error.errno not in _ABSENT:
                self.unwatched.add(known or parent)  # unknown: ask again
            elif known is not None:
                self.lost(known)
            return None
        cgroup.inode = status.st_ino
        if known is not None and known.inode == cgroup.inode:
            self._take_watches(known, cgroup)
            cgroup = known
        else:
            if known is not None:
                self.lost(known)
            if parent.children is None:
                parent.children = {}
            parent.children[name] = cgroup
            self.count += 1
        self._listener.touched(cgroup)
        return cgroup if status.st_nlink > 2 else None

    def _set_birth_time(self, cgroup: Cgroup, fd: int, path: bytes) -> None:
        """Ask for the birth time until the kernel has shown that it knows none for cgroups."""
        cgroup.born = linux.birth_time(fd, path)
        if cgroup.born is None:
            self._probe_birth_time = False
        else:
            cgroup.seen -= max(0.0, time.time() - cgroup.born)

    def _disappeared(self, parent: Cgroup, name: bytes) -> None:
        known = parent.children.get(name) if parent.children else None
        if known is None:  # deleted by ourselves, or before we knew it; then it kept its parent
            if parent.parent is not None:
                self._listener.touched(parent)
            return
        try:
            with located(parent.scope, known.path()) as (fd, path):
                inode = os.stat(path, dir_fd=fd, follow_symlinks=False).st_ino
        except OSError as error:
            if error.errno not in _ABSENT:
                self.unwatched.add(parent)  # unknown: ask again
                return
            inode = 0
        if inode != known.inode:
            self.lost(known)

    def _compare(self, top: Cgroup) -> None:
        """Bring everything below TOP in line with what the kernel has, and look at all of it."""
        pending = [top]
        while pending:
            cgroup = pending.pop()
            found = self._list(cgroup)
            if found is None:
                continue
            known = cgroup.children or {}
            for name, child in list(known.items()):
                if found.get(name) == child.inode:
                    self._listener.touched(child)
                    pending.append(child)
                else:
                    self.lost(child)
            for name in found:
                if not cgroup.children or name not in cgroup.children:
                    self._appeared(cgroup, name, None)

    def _list(self, cgroup: Cgroup) -> dict[bytes, int] | None:
        """Return the inodes of the cgroups directly below, by name; None if that is unknown."""
        try:
            with located(cgroup.scope, cgroup.path()) as (fd, path):
                # Each subdirectory counts as a link: nearly every cgroup has none.
                if path and os.stat(path, dir_fd=fd, follow_symlinks=False).st_nlink <= 2:
                    return {}
                directory = os.open(path or b".", OPEN_DIRECTORY, dir_fd=fd)
            try:
                with os.scandir(directory) as entries:
                    return {
                        os.fsencode(entry.name): entry.inode()
                        for entry in entries
                        if entry.is_dir(follow_symlinks=False)
                    }
            finally:
                os.close(directory)
        except OSError as error:
            if error.errno in _ABSENT:
                return {}
            self.unwatched.add(cgroup)  # out of descriptors, or not ours to read: ask again
            return None

    # Watches

    def _watch(self, cgroup: Cgroup, path: bytes) -> None:
        """Place both watches; what the kernel has no room for goes to the unwatched."""
        try:
            watch = linux.inotify_add_watch(self.fd, path, _DIRECTORY_EVENTS)
            self._watches[watch] = cgroup
            cgroup.directory_watch = watch
            watch = linux.inotify_add_watch(self.fd, path + b"/cgroup.events", linux.IN_MODIFY)
            self._watches[watch] = cgroup
            cgroup.events_watch = watch
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EACCES, errno.EPERM):
                raise
            self.unwatched.add(cgroup)
            if error.errno == errno.ENOSPC:
                self.exhausted = True

    def unwatch(self, cgroup: Cgroup) -> None:
        """Give back the watches of a cgroup that is about to go; look_at() brings them back."""
        for watch in (cgroup.directory_watch, cgroup.events_watch):
            if watch != _NOT_WATCHED and self._watches.get(watch) is cgroup:
                del self._watches[watch]
                linux.inotify_rm_watch(self.fd, watch)
        cgroup.directory_watch = cgroup.events_watch = _NOT_WATCHED
        self.unwatched.discard(cgroup)

    def _take_watches(self, cgroup: Cgroup, other: Cgroup) -> None:
        """Give CGROUP the watches that were placed for OTHER, which proved to be the same."""
        old = {cgroup.directory_watch, cgroup.events_watch}
        new = {other.directory_watch, other.events_watch}
        for watch in old - new - {_NOT_WATCHED}:
            if self._watches.pop(watch, None) is not None:
                linux.inotify_rm_watch(self.fd, watch)
        for watch in new - {_NOT_WATCHED}:
            self._watches[watch] = cgroup
        cgroup.directory_watch, cgroup.events_watch = other.directory_watch, other.events_watch
        self.unwatched.discard(other)
        if _NOT_WATCHED in new:
            self.unwatched.add(cgroup)
        else:
            self.unwatched.discard(cgroup)


def _open_working_directory() -> int:
    """Open where scripts expect their relative paths to begin; "/" if we may not go there."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(".", flags)
    except OSError:
        return os.open("/", flags)
