"""What is said on the accessory's socket: datagrams to requests and responses, and back.

Pure: bytes in, records out. All numbers are in the machine's byte order, since both sides are on
one machine. A datagram is MAGIC, the CRC-32 of all that follows, and packets: size and command of
the payload, the payload, and NUL bytes up to the next multiple of four. All packets of a datagram
are one request, or one response.

Commands from 0x8001 on are ours: the C++ suite does not know them, and passes over them.
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
NAME_MAX: Final = 4064  # so that a response can list it

_HEADER: Final = struct.Struct("=II")
_PACKET: Final = struct.Struct("=HH")
_FLAGS: Final = struct.Struct("=I")
_LISTED: Final = struct.Struct("=III")  # CLONE_* flags, leases, age in seconds; NAME follows
_ALIGNMENT: Final = 4


class Command(IntEnum):
    """Commands of requests."""

    NOP = 0
    NAME = 1
    IPC_NAMESPACE = 2
    PID_NAMESPACE = 3
    USER_NAMESPACE = 4
    LEASE_PIPE = 5
    NET_NAMESPACE = 0x8001
    UTS_NAMESPACE = 0x8002
    CGROUP_NAMESPACE = 0x8003
    MOUNT_NAMESPACE = 0x8004
    TIME_NAMESPACE = 0x8005
    LIST = 0x8006
    STATUS = 0x8007


class Answer(IntEnum):
    """Commands of responses."""

    ERROR = 0
    NAMESPACE_HANDLES = 1
    LEASE_PIPE = 2
    LISTED = 0x8001
    LIST_MORE = 0x8002
    STATUS = 0x8003


class Namespace(IntEnum):
    """Kinds of namespaces, by their CLONE_* flag (sched.h); in the order of a response."""

    IPC = 0x08000000
    PID = 0x20000000
    USER = 0x10000000
    NET = 0x40000000
    UTS = 0x04000000
    CGROUP = 0x02000000
    MOUNT = 0x00020000
    TIME = 0x00000080


_COMMANDS: Final = {kind: Command[f"{kind.name}_NAMESPACE"] for kind in Namespace}
_KNOWN: Final = {int(command): command for command in Command}
_PLAIN: Final = bytes(range(0x20, 0x80))


class Malformed(Exception):
    """The datagram breaks the protocol; the message says how."""


class Maps(msgspec.Struct, frozen=True):
    """What is written to a user namespace's uid_map and gid_map (user_namespaces(7))."""

    uid: bytes
    gid: bytes


class Request(msgspec.Struct, frozen=True):
    """What a client wants.

    ``namespaces`` has the kinds in the order of a response; ``maps`` are there if USER is one of
    them. ``list_after`` asks for the names that sort after it: all of them after an empty one.
    """

    name: bytes | None = None
    namespaces: tuple[Namespace, ...] = ()
    maps: Maps | None = None
    lease: bool = False
    list_after: bytes | None = None
    status: bool = False

    def wants_answer(self) -> bool:
        """Whether anything is asked for; if not, there is no answer."""
        return bool(self.namespaces) or self.lease or self.list_after is not None or self.status


class Listed(msgspec.Struct, frozen=True):
    """One NAME that exists: ``age`` in seconds, ``leases`` 0 if nobody holds one.

    Else they are those that were given out since nobody held one. All that were given out by
    daemons before count as one.
    """

    name: bytes
    namespaces: tuple[Namespace, ...]
    leases: int
    age: int


class Response(msgspec.Struct, frozen=True):
    """What a client gets; the descriptors come with it, in this order, that of the lease last.

    ``more`` says that there are more names to be listed, after the last one of ``listed``.
    ``status`` is text for programs: lines of key=value.
    """

    namespaces: tuple[Namespace, ...] = ()
    lease: bool = False
    error: str | None = None
    listed: tuple[Listed, ...] = ()
    more: bool = False
    status: str | None = None


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
        raise Malformed(f"a datagram has at most {DATAGRAM_MAX} bytes")
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
    for kind in request.namespaces:
        payload = b""
        if kind is Namespace.USER:
            assert request.maps is not None
            payload = request.maps.uid + b"\0" + request.maps.gid
        packets.append((_COMMANDS[kind], payload))
    if request.lease:
        packets.append((Command.LEASE_PIPE, b""))
    if request.list_after is not None:
        packets.append((Command.LIST, request.list_after))
    if request.status:
        packets.append((Command.STATUS, b""))
    return pack_datagram(packets)


def unpack_request(datagram: bytes) -> Request:
    """Return the request in a datagram; commands that are not known are those of newer clients."""
    payloads: dict[Command, bytes] = {}
    for number, payload in unpack_datagram(datagram):
        command = _KNOWN.get(number)
        if command is None:
            continue
        if command in payloads and command is not Command.NOP:
            raise Malformed(f"{command.name} is there twice")
        if payload and command not in _WITH_PAYLOAD:
            raise Malformed(f"{command.name} takes no payload")
        payloads[command] = payload
    for command in (Command.LIST, Command.STATUS):
        if command in payloads and not payloads.keys() <= {command, Command.NOP}:
            raise Malformed(f"{command.name} goes alone")
    user = payloads.get(Command.USER_NAMESPACE)
    return Request(
        name=_checked_name(payloads.get(Command.NAME)),
        namespaces=tuple(kind for kind, command in _COMMANDS.items() if command in payloads),
        maps=None if user is None else _maps(user),
        lease=Command.LEASE_PIPE in payloads,
        list_after=payloads.get(Command.LIST),
        status=Command.STATUS in payloads,
    )


_WITH_PAYLOAD: Final = frozenset((Command.NOP, Command.NAME, Command.USER_NAMESPACE, Command.LIST))


def _checked_name(name: bytes | None) -> bytes | None:
    if name is None:
        return None
    if not name:
        raise Malformed("NAME is empty")
    if len(name) > NAME_MAX:
        raise Malformed(f"NAME is longer than {NAME_MAX} bytes")
    if name.translate(None, _PLAIN):
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
    packets += [
        (Answer.LISTED, _LISTED.pack(sum(one.namespaces), one.leases, one.age) + one.name)
        for one in response.listed
    ]
    if response.more:
        packets.append((Answer.LIST_MORE, b""))
    if response.status is not None:
        packets.append((Answer.STATUS, response.status.encode(errors="replace")))
    return pack_datagram(packets)


def pack_page(names: Iterable[Listed]) -> bytes:
    """Return the datagram that lists as many of NAMES as fit, and says if there are more."""
    room = DATAGRAM_MAX - _HEADER.size - _PACKET.size
    page: list[Listed] = []
    for one in names:
        size = _PACKET.size + _LISTED.size + len(one.name)
        room -= size + -size % _ALIGNMENT
        if room < 0:
            return pack_response(Response(listed=tuple(page), more=True))
        page.append(one)
    return pack_response(Response(listed=tuple(page)))


def unpack_response(datagram: bytes) -> Response:
    """Return the response in a datagram."""
    namespaces: tuple[Namespace, ...] = ()
    lease, more, error, status = False, False, None, None
    listed = []
    for command, payload in unpack_datagram(datagram):
        if command == Answer.ERROR:
            error = payload.decode(errors="replace")
        elif command == Answer.NAMESPACE_HANDLES:
            namespaces = _namespaces(payload)
        elif command == Answer.LEASE_PIPE:
            lease = True
        elif command == Answer.LISTED:
            listed.append(_listed(payload))
        elif command == Answer.LIST_MORE:
            more = True
        elif command == Answer.STATUS:
            status = payload.decode(errors="replace")
    return Response(namespaces, lease, error, tuple(listed), more, status)


def _namespaces(payload: bytes) -> tuple[Namespace, ...]:
    if len(payload) % _FLAGS.size:
        raise Malformed("NAMESPACE_HANDLES has half a number")
    try:
        return tuple(Namespace(flag) for (flag,) in _FLAGS.iter_unpack(payload))
    except ValueError as error:
        raise Malformed(f"NAMESPACE_HANDLES: {error}") from None


def _listed(payload: bytes) -> Listed:
    if len(payload) <= _LISTED.size:
        raise Malformed("LISTED has no name")
    flags, leases, age = _LISTED.unpack_from(payload)
    kinds = tuple(kind for kind in Namespace if flags & kind)
    return Listed(payload[_LISTED.size :], kinds, leases, age)
