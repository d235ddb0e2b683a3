"""Namespaces that a process can make for itself and leave again: IPC, network, UTS, cgroup.

A namespace is held by a descriptor; nothing runs in it. The others need a process, see keeper.py.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from typing import Final

from spawn_accessory.protocol import Namespace
from spawn_common import linux

_log = logging.getLogger("spawn_accessory")

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
        return kind in _FILES

    def make(self, kind: Namespace) -> int:
        """Return a descriptor of a new namespace; OSError says why there is none."""
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


def limit_reached(kind: Namespace) -> OSError:
    """Return what ENOSPC from unshare(2) or clone(2) means."""
    name = {Namespace.MOUNT: "mnt"}.get(kind, kind.name.lower())
    return OSError(errno.ENOSPC, f"the kernel's limit user.max_{name}_namespaces is reached")
