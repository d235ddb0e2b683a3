"""What is said on the accessory's socket: datagrams to requests and responses, and back.

Pure: bytes in, records out. All numbers are in the machine's byte order, since both sides are on
one machine. A datagram is MAGIC, the CRC-32 of all that follows, and packets: size and command of
the payload, the payload, and NUL bytes up to the next multiple of four. All packets of a datagram
are one request, or one response.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Final

import msgspec

MAGIC: Final = 0x63046173
DATAGRAM_MAX: Final = 4096

_HEADER: Final = struct.Struct("=II")
_PACKET: Final = struct.Struct("=HH")
_FLAGS: Final = struct.Struct("=I")
_ALIGNMENT: Final = 4


class Command(IntEnum):
    """Commands of requests."""

    NOP = 0
    NAME = 1
    IPC_NAMESPACE = 2
    PID_NAMESPACE = 3
    USER_NAMESPACE = 4
    LEASE_PIPE = 5


class Answer(IntEnum):
    """Commands of responses."""

    ERROR = 0
    NAMESPACE_HANDLES = 1
    LEASE_PIPE = 2


class Namespace(IntEnum):
    """Kinds of namespaces, by their CLONE_* flag (sched.h); in the order of a response."""

    IPC = 0x08000000
    PID = 0x20000000
    USER = 0x10000000


class Malformed(Exception):
    """The datagram breaks the protocol; the message says how."""


class Maps(msgspec.Struct, frozen=True):
    """What is written to a user namespace's uid_map and gid_map (user_namespaces(7))."""

    uid: bytes
    gid: bytes


class Request(msgspec.Struct, frozen=True):
    """What a client wants."""

    name: bytes | None = None
    ipc: bool = False
    pid: bool = False
    user: Maps | None = None
    lease: bool = False

    def wants_answer(self) -> bool:
        """Whether anything is asked for; if not, there is no answer."""
        return self.ipc or self.pid or self.user is not None or self.lease


class Response(msgspec.Struct, frozen=True):
    """What a client gets; the descriptors come with it, in this order, that of the lease last."""

    namespaces: tuple[Namespace, ...] = ()
    lease: bool = False
    error: str | None = None


# Datagrams


def pack_datagram(packets: Iterable[tuple[int, bytes]]) -> bytes:
    """Return a datagram of (command, payload) pairs; ValueError if it would be too large."""
    body = b"".join(
        _PACKET.pack(len(payload), command) + payload + bytes(-len(payload) % _ALIGNMENT)
        for command, payload in packets
    )
    datagram = _HEADER.pack(MAGIC, zlib.crc32(body)) + body
    if len(datagram) > DATAGRAM_MAX:
        raise ValueError(f"a datagram of {len(datagram)} bytes exceeds {DATAGRAM_MAX}")
    return datagram


def unpack_datagram(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the packets of a datagram as (command, payload) pairs; Malformed if it has none."""
    if len(datagram) < _HEADER.size:
        raise Malformed(f"{len(datagram)} bytes are too short for a datagram")
    if len(datagram) > DATAGRAM_MAX:
        raise Malformed(f"{len(datagram)} bytes are too long for a datagram")
    magic, crc = _HEADER.unpack_from(datagram)
    if magic != MAGIC:
        raise Malformed(f"wrong magic number 0x{magic:08x}")
    if crc != zlib.crc32(memoryview(datagram)[_HEADER.size :]):
        raise Malformed("wrong checksum")
    position = _HEADER.size
    while position < len(datagram):
        if position + _PACKET.size > len(datagram):
            raise Malformed("truncated packet header")
        size, command = _PACKET.unpack_from(datagram, position)
        position += _PACKET.size
        end = position + size
        if end + -size % _ALIGNMENT > len(datagram):
            raise Malformed(f"truncated payload of command {command}")
        yield command, datagram[position:end]
        position = end + -size % _ALIGNMENT


# Requests


def pack_request(request: Request) -> bytes:
    """Return the datagram of a request."""
    packets: list[tuple[int, bytes]] = []
    if request.name is not None:
        packets.append((Command.NAME, request.name))
    if request.ipc:
        packets.append((Command.IPC_NAMESPACE, b""))
    if request.pid:
        packets.append((Command.PID_NAMESPACE, b""))
    if request.user is not None:
        packets.append((Command.USER_NAMESPACE, request.user.uid + b"\0" + request.user.gid))
    if request.lease:
        packets.append((Command.LEASE_PIPE, b""))
    return pack_datagram(packets)


def unpack_request(datagram: bytes) -> Request:
    """Return the request in a datagram; commands that are not known are those of newer clients."""
    payloads: dict[Command, bytes] = {}
    for number, payload in unpack_datagram(datagram):
        try:
            command = Command(number)
        except ValueError:
            continue
        if command in payloads and command is not Command.NOP:
            raise Malformed(f"{command.name} is there twice")
        payloads[command] = payload
    for command in (Command.IPC_NAMESPACE, Command.PID_NAMESPACE, Command.LEASE_PIPE):
        if payloads.get(command):
            raise Malformed(f"{command.name} takes no payload")
    user = payloads.get(Command.USER_NAMESPACE)
    return Request(
        name=_checked_name(payloads.get(Command.NAME)),
        ipc=Command.IPC_NAMESPACE in payloads,
        pid=Command.PID_NAMESPACE in payloads,
        user=None if user is None else _maps(user),
        lease=Command.LEASE_PIPE in payloads,
    )


def _checked_name(name: bytes | None) -> bytes | None:
    if name is not None and not name:
        raise Malformed("NAME is empty")
    if name is not None and not all(0x20 <= byte <= 0x7F for byte in name):
        raise Malformed("NAME has characters that are not plain ASCII")
    return name


def _maps(payload: bytes) -> Maps:
    parts = payload.split(b"\0")
    if len(parts) != 2:
        raise Malformed("USER_NAMESPACE needs two maps with a NUL byte between them")
    return Maps(*parts)


# Responses


def pack_response(response: Response) -> bytes:
    """Return the datagram of a response; the text of an error is cut off where it gets too long."""
    packets: list[tuple[int, bytes]] = []
    if response.error is not None:
        text = response.error.encode(errors="replace")
        packets.append((Answer.ERROR, text[: DATAGRAM_MAX - _HEADER.size - _PACKET.size]))
    if response.namespaces:
        flags = b"".join(_FLAGS.pack(namespace) for namespace in response.namespaces)
        packets.append((Answer.NAMESPACE_HANDLES, flags))
    if response.lease:
        packets.append((Answer.LEASE_PIPE, b""))
    return pack_datagram(packets)


def unpack_response(datagram: bytes) -> Response:
    """Return the response in a datagram."""
    namespaces: tuple[Namespace, ...] = ()
    lease, error = False, None
    for command, payload in unpack_datagram(datagram):
        if command == Answer.ERROR:
            error = payload.decode(errors="replace")
        elif command == Answer.NAMESPACE_HANDLES:
            namespaces = _namespaces(payload)
        elif command == Answer.LEASE_PIPE:
            lease = True
    return Response(namespaces, lease, error)


def _namespaces(payload: bytes) -> tuple[Namespace, ...]:
    if len(payload) % _FLAGS.size:
        raise Malformed("NAMESPACE_HANDLES has half a number")
    try:
        return tuple(Namespace(flag) for (flag,) in _FLAGS.iter_unpack(payload))
    except ValueError as error:
        raise Malformed(f"NAMESPACE_HANDLES: {error}") from None
