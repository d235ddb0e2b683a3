"""The accessory's protocol as its contract has it, written independently of the program.

Requests are built byte by byte as the C++ suite's client does; answers are only taken apart.
"""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

MAGIC = 0x63046173

NAME, IPC, PID, USER, LEASE = 1, 2, 3, 4, 5
NET, UTS, CGROUP, MOUNT, TIME, LIST, STATUS = range(0x8001, 0x8008)
ERROR, HANDLES, LEASE_PIPE = 0, 1, 2
LISTED, LIST_MORE, STATUS_TEXT = 0x8001, 0x8002, 0x8003

Packet = tuple[int, bytes]


def datagram(*packets: Packet, magic: int = MAGIC, crc: int | None = None) -> bytes:
    """Return a datagram as the contract describes it."""
    body = b""
    for command, payload in packets:
        body += struct.pack("=HH", len(payload), command) + payload
        while len(body) % 4:
            body += b"\0"
    return struct.pack("=II", magic, zlib.crc32(body) if crc is None else crc) + body


def packets(raw: bytes) -> Iterator[Packet]:
    """Yield what is in a datagram, which must be right."""
    magic, crc = struct.unpack_from("=II", raw)
    assert magic == MAGIC
    assert crc == zlib.crc32(raw[8:])
    position = 8
    while position < len(raw):
        size, command = struct.unpack_from("=HH", raw, position)
        payload = raw[position + 4 : position + 4 + size]
        assert len(payload) == size
        yield command, payload
        position += 4 + size + -size % 4
    assert position == len(raw)


@dataclass
class Answer:
    """What came back: packets and descriptors, which ``close`` closes."""

    packets: list[Packet]
    fds: list[int]

    @property
    def error(self) -> str | None:
        """The text of an ERROR."""
        return next((text.decode() for command, text in self.packets if command == ERROR), None)

    @property
    def flags(self) -> list[int]:
        """The CLONE_* flags, one for each namespace's descriptor."""
        for command, payload in self.packets:
            if command == HANDLES:
                return [flag for (flag,) in struct.iter_unpack("=I", payload)]
        return []

    @property
    def lease(self) -> int:
        """The descriptor of the lease."""
        assert self.packets[-1] == (LEASE_PIPE, b"")
        return self.fds[-1]

    def inodes(self) -> list[int]:
        """Return what the descriptors refer to."""
        return [os.fstat(fd).st_ino for fd in self.fds]

    def close(self) -> None:
        """Close all descriptors that are still open."""
        while self.fds:
            os.close(self.fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Listed:
    """What a LISTED packet tells of a name: CLONE_* flags, leases, age in seconds."""

    flags: int
    leases: int
    age: int


def listed(answer: Answer) -> dict[bytes, Listed]:
    """Return the names in one answer to LIST."""
    return {
        payload[12:]: Listed(*struct.unpack("=III", payload[:12]))
        for command, payload in answer.packets
        if command == LISTED
    }


class Client:
    """A connection as the C++ suite's client has it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(30)
        self.socket.connect("\0" + address[1:] if address.startswith("@") else address)

    def send(self, *packets: Packet) -> None:
        """Send a request."""
        self.socket.send(datagram(*packets))

    def receive(self) -> Answer | None:
        """Return the next answer; None if the daemon has closed the connection."""
        data, fds, flags, _ = socket.recv_fds(self.socket, 8192, 64)
        assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        if not data:
            return None
        return Answer(list(packets(data)), list(fds))

    def ask(self, *packets: Packet) -> Answer:
        """Send a request and return its answer."""
        self.send(*packets)
        answer = self.receive()
        assert answer is not None, "the connection was closed"
        return answer

    def names(self) -> dict[bytes, Listed]:
        """Return all names that this client may see, in the order in which they come."""
        found: dict[bytes, Listed] = {}
        while True:
            page = self.ask((LIST, next(reversed(found), b"")))
            assert page.error is None, page.error
            found |= listed(page)
            if (LIST_MORE, b"") not in page.packets:
                return found

    def dropped(self) -> bool:
        """Wait until the daemon has closed the connection; False if an answer comes first."""
        try:
            answer = self.receive()
        except ConnectionResetError:
            return True
        if answer is not None:
            answer.close()
        return answer is None

    def close(self) -> None:
        """Disconnect."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
