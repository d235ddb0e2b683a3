"""What the core and the runner say to each other: values to bytes and back.

Pure: knows nothing of sockets or processes. A frame is its length and a message in MessagePack;
what the runner sends is hostile until it was decoded here, since scripts can write into its
descriptors.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from spawn_reaper.release import Release
from spawn_reaper.settings import Handlers
from spawn_reaper.usage import Counters, Peaks

_LENGTH: Final = struct.Struct("=I")
MESSAGE_MAX: Final = 4096
"""Bytes of an error message; more of it is cut off."""


# From the core


class Setup(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Comes first: what to run, and how."""

    script: bytes
    root: bytes
    """The path of the cgroup root directory."""
    limits: Handlers
    lint: bool = False
    """Look for unknown names in the script, too."""
    trace: bool = False
    """Print each call that the script makes."""


class Numbered(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A release on its way to the script; FIELDS are what fields_of() made of it."""

    number: int
    """Counts up over the life of the core, also over several runners."""
    attempt: int
    """1, or more if a runner ended while the script handled it."""
    fields: list[Any]


class Run(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Call ``cgroup_released`` for each, in this order."""

    releases: list[Numbered]


class Reload(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Call ``reload``, and say when it is done."""


class Reopen(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Two descriptors come along: write to these as standard output and standard error."""


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Let functions of the script end for so long, then end; those that still wait get an error."""

    seconds: float


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Answer this, in its turn."""


# From the runner


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The script's main chunk has run."""

    handler: str | None
    """Where ``cgroup_released`` is defined, as FILE:LINE; None if it is not."""
    problems: list[str] = []
    """What was found by looking at it, if that was asked for."""


class Unusable(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The script cannot be used; the runner ends."""

    problems: list[str]


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """How far the script has got since the last one."""

    begun: int
    """How many releases were begun since the runner was started."""
    done: list[int]
    """The numbers of those that were handled: to the end, with an error, or parked."""
    failed: list[str]
    """Messages of those that failed; each begins with the path of the cgroup."""


class Reloaded(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The script's ``reload`` has come to its end."""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The answer."""


FromCore = Setup | Run | Reload | Reopen | Stop | Ping
FromRunner = Ready | Unusable | Ack | Reloaded | Pong

FAILURES_MAX: Final = 100
"""How many messages an Ack has at most."""

RUNNER_FRAME_MAX: Final = 1 << 20
"""Bytes of a frame from the runner; more is none of its own."""


class Garbage(Exception):
    """What came is no message."""


encode = msgspec.msgpack.Encoder().encode
_from_core = msgspec.msgpack.Decoder(FromCore)
_from_runner = msgspec.msgpack.Decoder(FromRunner)


def frame(message: FromCore | FromRunner) -> bytes:
    """Return a message as it is sent."""
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


def read_from_core(body: bytes) -> FromCore:
    """Return the message in a frame's body; Garbage if there is none."""
    try:
        message: FromCore = _from_core.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Garbage(str(error)) from None
    return message


def read_from_runner(body: bytes) -> FromRunner:
    """Return the message in a frame's body; Garbage if there is none."""
    try:
        message: FromRunner = _from_runner.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Garbage(str(error)) from None
    return message


class Frames:
    """Puts together what arrives in pieces."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the bodies of the frames that DATA completes; Garbage if one is too long."""
        self._data += data
        bodies, start = [], 0
        while len(self._data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, start)
            if length > self._longest:
                raise Garbage(f"a frame of {length} bytes")
            begin = start + _LENGTH.size
            if begin + length > len(self._data):
                break
            start = begin + length
            bodies.append(bytes(self._data[begin:start]))
        del self._data[:start]
        return bodies


# Releases

_NO_PRESSURES: Final = (None, None, None)
_astuple = msgspec.structs.astuple

_COUNTERS: Final = Counters.__struct_fields__
FIELDS: Final = (*_COUNTERS, *Peaks.__struct_fields__, "path", "id", "btime", "age", "remainder")
"""The names of what fields_of() begins with; the times among the counters come first."""

PATH: Final = FIELDS.index("path")


def fields_of(release: Release) -> list[Any]:
    """Return all of a release that scripts can see, in the order that cgroup.lua takes it in.

    Plain values: that is what crosses into Lua, and a Python object there would leave a trace in
    lupa's table of references, each time.
    """
    born, pressures = release.born, release.pressures
    return [
        *_astuple(release.usage.counters),
        *_astuple(release.usage.peaks),
        release.path,
        release.id.encode(),
        None if born is None else int(born),
        release.age,
        release.remainder,
        *_astuple(release.own),
        *(_NO_PRESSURES if pressures is None else (p.some for p in _astuple(pressures))),
        len(release.attributes),
        len(release.inodes),
        *release.inodes,
        *(
            part
            for level, attributes in enumerate(release.attributes)
            for name, value in attributes.items()
            for part in (level, name, value)
        ),
    ]
