"""Sockets that a daemon listens on, and what a service manager passes to it and keeps for it.

An address is written as @NAME for the abstract namespace (unix(7)), or as a path.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress

from spawn_common import linux

_FIRST_PASSED = 3  # SD_LISTEN_FDS_START
_BACKLOG = 1024


class InUse(Exception):
    """Somebody listens at an address already; the message says who."""


def passed_sockets(environment: Mapping[str, str] = os.environ) -> list[tuple[str, socket.socket]]:
    """Return the sockets that the service manager passed, each with its name (sd_listen_fds(3)).

    Descriptors that are no sockets are closed. To be called once, at the start of the process.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(environment.get("LISTEN_FDS", "0"))
    except ValueError:
        return []
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * (count - len(names))
    passed = []
    for fd, name in zip(range(_FIRST_PASSED, _FIRST_PASSED + count), names, strict=False):
        with suppress(OSError):
            os.set_inheritable(fd, False)
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                passed.append((name, socket.socket(fileno=fd)))
            else:
                os.close(fd)
    return passed


def is_listening(candidate: socket.socket) -> bool:
    """Whether connections can be accepted from a socket."""
    return bool(candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def store(name: str, fd: int) -> None:
    """Ask the service manager to keep FD for the next start; nothing without a manager.

    It comes back through ``passed_sockets`` under NAME (sd_pid_notify_with_fds(3)).
    """
    if not (target := os.environ.get("NOTIFY_SOCKET")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(_raw(target))
        socket.send_fds(sender, [f"FDSTORE=1\nFDNAME={name}".encode()], [fd])


def listen(address: str) -> socket.socket:
    """Return a SOCK_SEQPACKET socket that listens at ADDRESS; InUse if somebody else does."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        _bind(listener, address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    """Return where a socket listens."""
    name = listener.getsockname()
    return "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else str(name)


def _raw(address: str) -> str:
    return "\0" + address[1:] if address.startswith("@") else address


def _bind(listener: socket.socket, address: str) -> None:
    # Anybody may connect: who may do what is decided for each connection. Not by chmod afterwards:
    # in a directory of somebody else, the path may be another file by then.
    umask = os.umask(0o111)
    try:
        _bind_anew(listener, address)
    finally:
        os.umask(umask)


def _bind_anew(listener: socket.socket, address: str) -> None:
    """Bind a socket, to a path that a daemon has left behind, too."""
    try:
        listener.bind(_raw(address))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        if address.startswith("/") and not stat.S_ISSOCK(os.lstat(address).st_mode):
            raise  # nobody left it behind
        holder = _listener_at(address)
        if holder is not None or address.startswith("@"):
            raise InUse(f"{address} is already in use by process {holder or '(unknown)'}") from None
        os.unlink(address)  # its daemon is dead
        listener.bind(address)


def _listener_at(address: str) -> int | None:
    """Return the pid of who listens at ADDRESS, 0 if it cannot be seen, None if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(_raw(address))
        except ConnectionRefusedError:
            return None
        except OSError:
            return 0
        return linux.peer_credentials(probe)[0]
