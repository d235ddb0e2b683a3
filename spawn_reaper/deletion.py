"""Deleting a cgroup so that nothing that is used in it at the last moment is lost.

Between the last look at cpu.stat and rmdir a spawner may put a process into the cgroup. On a busy
host rmdir waits for the kernel's cgroup lock long enough for that process to run to its end: then
the deletion succeeds, and nobody will ever know what was used. So the cgroup is frozen first: who
comes in cannot run, rmdir says EBUSY, and thawing lets the process go on.

Only cgroups directly in a scope need that: what is used in others is found in their parent's
numbers. A reaper that is killed while a cgroup is frozen leaves a note in an extended attribute of
the scope, so that the next one can thaw it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from spawn_reaper.accounts import Opened
from spawn_reaper.tree import Scope, located

_NOTE: Final = "user.cm4all-spawn-reaper.deleting"
_SEPARATOR: Final = b"/"
_NOT_NAMES: Final = (b"", b".", b"..")


@contextmanager
def deletions(batch: Iterable[Opened]) -> Iterator[set[Scope]]:
    """Note which cgroups are about to be deleted, for as long as the context lasts.

    Yields the scopes in which that was possible; in others nothing may be frozen.
    """
    names: dict[Scope, list[bytes]] = {}
    for opened in batch:
        if _directly_in_scope(opened):
            names.setdefault(opened.cgroup.scope, []).append(opened.path)
    noted = set()
    for scope, members in names.items():
        with suppress(OSError):
            os.setxattr(scope.fd, _NOTE, _SEPARATOR.join(members))
            noted.add(scope)
    try:
        yield noted
    finally:
        for scope in noted:
            with suppress(OSError):  # a scope that is gone needs no note
                os.removexattr(scope.fd, _NOTE)


def delete(opened: Opened, noted: set[Scope]) -> bytes:
    """Delete a cgroup that was empty a moment ago, and return its last cpu.stat, empty if unknown.

    OSError as from rmdir(2): EBUSY if somebody moved in. If somebody else has deleted it,
    that is as good; what has its name now is left alone.
    """
    scope = opened.cgroup.scope
    freeze = scope in noted and _directly_in_scope(opened) and not opened.frozen
    frozen = freeze and _write_freeze(opened, b"1")
    try:
        last = opened.read_cpu_stat()
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENOENT):
            return b""
        last = b""
    try:
        with located(scope, opened.path) as (fd, path):
            os.rmdir(path, dir_fd=fd)
    except FileNotFoundError:
        pass
    except OSError:
        if frozen:
            _write_freeze(opened, b"0")
        raise
    return last


def recover(scope: Scope) -> None:
    """Thaw what a reaper froze that was killed before it could delete it."""
    with suppress(OSError):
        names = os.getxattr(scope.fd, _NOTE)
        for name in names.split(_SEPARATOR):
            if name in _NOT_NAMES:  # whoever owns the scope can write this
                continue
            with suppress(OSError):
                fd = os.open(name + b"/cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC, dir_fd=scope.fd)
                try:
                    os.write(fd, b"0")
                finally:
                    os.close(fd)
        os.removexattr(scope.fd, _NOTE)


def _directly_in_scope(opened: Opened) -> bool:
    parent = opened.cgroup.parent
    return parent is not None and parent.parent is None


def _write_freeze(opened: Opened, value: bytes) -> bool:
    """Freeze or thaw a cgroup; False if we may not, or it is gone."""
    try:
        fd = os.open(b"cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC, dir_fd=opened.directory)
    except OSError:
        return False
    try:
        os.write(fd, value)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
