"""Takes datagrams of the control protocol apart: written from its description alone."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

MAGIC: Final = 0x63046101

FADE_CHILDREN: Final = 8
FLUSH_FILTER_CACHE: Final = 12
DISCARD_SESSION: Final = 14
FLUSH_HTTP_CACHE: Final = 15
TERMINATE_CHILDREN: Final = 16
DISCONNECT_DATABASE: Final = 20
RESET_LIMITER: Final = 22
REJECT_CLIENT: Final = 23
TARPIT_CLIENT: Final = 24
CANCEL_JOB: Final = 25


class Command(NamedTuple):
    """One command of a datagram."""

    number: int
    payload: bytes


def decode(datagram: bytes) -> list[Command]:
    """Return the commands of DATAGRAM; whatever is not as it must be is an AssertionError."""
    assert len(datagram) >= 4, f"only {len(datagram)} bytes"
    assert len(datagram) % 4 == 0, f"{len(datagram)} bytes are no multiple of 4"
    (magic,) = struct.unpack_from(">I", datagram)
    assert magic == MAGIC, f"it begins with {magic:#010x}"
    commands = []
    position = 4
    while position < len(datagram):
        length, number = struct.unpack_from(">HH", datagram, position)
        position += 4
        padded = (length + 3) & ~3
        assert position + padded <= len(datagram), f"command {number} is cut off"
        body = datagram[position : position + padded]
        assert not any(body[length:]), f"the padding of command {number} is {body[length:]!r}"
        commands.append(Command(number, body[:length]))
        position += padded
    return commands
