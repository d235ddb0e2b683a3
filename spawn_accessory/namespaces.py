"""Namespaces that need no program: IPC, network, UTS, cgroup, and user namespaces.

A namespace is held by a descriptor; nothing runs in it. For the others see keeper.py.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from contextlib import suppress
from typing import Final

from spawn_accessory.protocol import Maps, Namespace
from spawn_common import linux

_log = logging.getLogger("spawn_accessory")

_SLEEP: Final = 1  # seconds that it has our descriptors, should we die meanwhile

_FILES: Final = {
    Namespace.IPC: "ipc",
    Namespace.NET: "net",
    Namespace.UTS: "uts",
    Namespace.CGROUP: "cgroup",
}


class Maker:
    """Makes namespaces; knows the way back into our own. For a process with one thread."""

    def __init__(self) -> None:
        """OSError if there is no way back for us, as without CAP_SYS_ADMIN."""
        self._directory = os.open("/proc/self/ns", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._own: dict[Namespace, int] = {}
        try:
            for kind in _FILES:
                self._own[kind] = self._open(kind)
                linux.setns(self._own[kind], kind)
        except OSError:
            self.close()
            raise

    def makes(self, kind: Namespace) -> bool:
        """Whether KIND is one of those that are made here."""
        return kind in _FILES or kind is Namespace.USER

    def make(self, kind: Namespace, maps: Maps | None) -> int:
        """Return a descriptor of a new namespace; OSError says why there is none.

        MAPS are for a user namespace.
        """
        if kind is Namespace.USER:
            assert maps is not None
            return _make_user(maps)
        try:
            linux.unshare(kind)
        except OSError as error:
            raise limit_reached(kind) if error.errno == errno.ENOSPC else error from None
        try:
            return self._open(kind)
        finally:
            self._go_back(kind)

    def close(self) -> None:
        """Close all descriptors."""
        for fd in (self._directory, *self._own.values()):
            with suppress(OSError):
                os.close(fd)

    def _open(self, kind: Namespace) -> int:
        return os.open(_FILES[kind], os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)

    def _go_back(self, kind: Namespace) -> None:
        try:
            linux.setns(self._own[kind], kind)
        except OSError as error:
            # To go on in a customer's namespace, be it to clean up, would be worse than to end.
            _log.critical("cannot return from a new %s namespace: %s", kind.name, error.strerror)
            os._exit(os.EX_OSERR)


def _make_user(maps: Maps) -> int:
    try:
        pid = linux.clone_sleeper(Namespace.USER, _SLEEP)
    except OSError as error:
        raise limit_reached(Namespace.USER) if error.errno == errno.ENOSPC else error from None
    try:
        _write_map(f"/proc/{pid}/uid_map", maps.uid)
        _write_map(f"/proc/{pid}/gid_map", maps.gid)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, linux.WALL)


def _write_map(path: str, text: bytes) -> None:
    if not text:
        return
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


def limit_reached(kind: Namespace) -> OSError:
    """Return what ENOSPC from unshare(2) or clone(2) means."""
    name = {Namespace.MOUNT: "mnt"}.get(kind, kind.name.lower())
    return OSError(errno.ENOSPC, f"the kernel's limit user.max_{name}_namespaces is reached")
