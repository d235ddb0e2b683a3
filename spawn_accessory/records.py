"""Records of namespaces and leases, and how they are told to the keeper and back.

A message is a header, the record's text, and its descriptors; see programs/keeper.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

import msgspec

from spawn_accessory.protocol import Maps, Namespace

_HEADER: Final = struct.Struct("=IIIiQ")  # operation, kind, slot, errno, since
_MESSAGE_MAX: Final = 8192
_DESCRIPTORS_MAX: Final = 2
_KINDS: Final = frozenset((0, *Namespace))


class Operation(IntEnum):
    """What a message is about."""

    HOLD = 1
    MAKE = 2
    DROP = 3
    ALL = 4
    READ = 5


class Record(msgspec.Struct, frozen=True, gc=False):
    """One namespace or lease of a NAME; ``kind`` is None for a lease.

    ``since`` is when it was made, in nanoseconds of CLOCK_BOOTTIME. ``descriptors`` are the
    namespace, and the pidfd of its init if it is a PID namespace; of a lease, the pipe's read end.
    """

    slot: int
    kind: Namespace | None
    name: bytes
    maps: Maps | None
    since: int
    descriptors: tuple[int, ...] = ()

    def text(self) -> bytes:
        """Return what the keeper keeps with the descriptors."""
        if self.maps is None:
            return self.name
        return b"\0".join((self.name, self.maps.uid, self.maps.gid))

    def header(self, operation: Operation) -> bytes:
        """Return the beginning of a message about this record."""
        return _HEADER.pack(operation, self.kind or 0, self.slot, 0, self.since)


def pack_header(operation: Operation, since: int) -> bytes:
    """Return a message about no record; SINCE comes back in the answer."""
    return _HEADER.pack(operation, 0, 0, 0, since)


class Header(NamedTuple):
    """The beginning of a message; ``error`` is why MAKE failed (errno), 0 if it did not."""

    operation: int
    kind: int
    slot: int
    error: int
    since: int


class Truncated(OSError):
    """Descriptors were lost on the way to us."""


def foreign() -> OSError:
    """Return what to raise for a keeper of another version."""
    return OSError(errno.EPROTO, "it is of another version")


def read_record(header: Header, text: bytes, descriptors: tuple[int, ...]) -> Record:
    """Return the record in a message; EPROTO if it is of a kind that is not known."""
    if header.kind not in _KINDS:
        close_all(descriptors)
        raise foreign()
    name, *maps = text.split(b"\0")
    return Record(
        header.slot,
        Namespace(header.kind) if header.kind else None,
        name,
        Maps(*maps) if maps else None,
        header.since,
        descriptors,
    )


def receive(end: socket.socket, flags: int = 0) -> tuple[Header, bytes, tuple[int, ...]]:
    """Return header, text and descriptors of the next message; ConnectionError if none can come.

    Truncated if we had no room for all its descriptors.
    """
    data, rights, received, _ = end.recvmsg(
        _MESSAGE_MAX, socket.CMSG_SPACE(4 * _DESCRIPTORS_MAX), socket.MSG_CMSG_CLOEXEC | flags
    )
    descriptors: tuple[int, ...] = ()
    for level, kind, content in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = struct.unpack(f"={len(content) // 4}i", content)
    if received & socket.MSG_CTRUNC:
        close_all(descriptors)
        raise Truncated(errno.EMFILE, os.strerror(errno.EMFILE))
    if len(data) < _HEADER.size:
        close_all(descriptors)
        raise ended()
    return Header(*_HEADER.unpack_from(data)), data[_HEADER.size :], descriptors


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in descriptors:
        os.close(fd)


def ended() -> ConnectionResetError:
    """Return what to raise when there is no keeper at the other end any more."""
    return ConnectionResetError(errno.ECONNRESET, "the keeper has ended")
