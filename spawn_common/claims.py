"""Names that only one daemon may hold: so there is only one for each thing that is managed."""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import logging
import os
import socket
import struct
from collections.abc import Iterable

from spawn_common.accepting import accept

_log = logging.getLogger(__name__)


class AlreadyRunning(Exception):
    """Another daemon holds a claim; its ``pid`` says which, 0 if that cannot be seen."""

    def __init__(self, claim: str, pid: int) -> None:
        super().__init__(f"{claim} is already managed by process {pid or '(unknown)'}")
        self.pid = pid


class Claims:
    """Holds names that at most one daemon of this host (and network namespace) may hold.

    A name is an abstract socket: it needs no directory that is writable, and the kernel gives it
    back when its holder dies, however that happens.
    """

    def __init__(self, kind: str, trusted: Iterable[int] = ()) -> None:
        """KIND sets the names of one sort of daemon apart from those of others.

        TRUSTED are the user ids of its daemons, besides root's and ours.
        """
        self._kind = kind
        self._trusted = {0, os.geteuid(), *trusted}
        self._sockets: dict[str, socket.socket] = {}

    def take(self, name: str) -> None:
        """Claim NAME for this process, or raise AlreadyRunning; needs a running event loop.

        A name held by somebody who is not trusted cannot keep a daemon from starting: otherwise
        any user could. That is only logged.
        """
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        address = self._address(name)
        try:
            holder.bind(address)
            holder.listen()
        except OSError as error:
            holder.close()
            if error.errno != errno.EADDRINUSE:
                raise
            pid, uid = _peer(address)
            if uid in self._trusted:
                raise AlreadyRunning(name, pid) from None
            _tell_of_stranger(name, pid, uid)
        else:
            # Those who come to ask who we are would fill the queue if they were left in it.
            asyncio.get_running_loop().add_reader(holder, _turn_away, holder)
            self._sockets[name] = holder

    def give_back(self, name: str) -> None:
        """Let others claim NAME."""
        if holder := self._sockets.pop(name, None):
            asyncio.get_running_loop().remove_reader(holder)
            holder.close()

    def close(self) -> None:
        """Give all names back."""
        for name in list(self._sockets):
            self.give_back(name)

    def _address(self, name: str) -> bytes:
        # Of fixed length, since an abstract name has 107 bytes at most.
        digest = hashlib.sha256(os.fsencode(f"{self._kind}\0{name}")).hexdigest()
        return f"\0cm4all-spawn-claim/{digest}".encode()


@functools.cache  # once for each, though there may be several claims of one name
def _tell_of_stranger(name: str, pid: int, uid: int) -> None:
    _log.warning(
        "%s is claimed by process %s of user %s, too, which is ignored",
        *(name, pid or "(unknown)", uid if uid >= 0 else "(unknown)"),
    )


def _turn_away(holder: socket.socket) -> None:
    if (asking := accept(holder, _turn_away)) is not None:
        asking.close()


def _peer(address: bytes) -> tuple[int, int]:
    """Return pid and uid of the process that listens on ADDRESS.

    The pid is 0 if it cannot be seen from here. The uid is -1 if the process is gone, or does not
    accept connections: one of ours would, and anybody could bind the address and fill its queue.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 1, 0))
        try:
            probe.connect(address)
        except OSError:
            return 0, -1
        size = struct.calcsize("=iII")
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, uid, _ = struct.unpack("=iII", credentials)
        return pid, uid
