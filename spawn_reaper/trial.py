"""A release from a file, to try a script on.

Owns the format of that file: JSON with the names and units that scripts see, all of them optional.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from spawn_reaper import usage
from spawn_reaper.release import Pressures, Release
from spawn_reaper.usage import Counters, Peaks, Pressure, Usage

_Amount = Annotated[float, msgspec.Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=2**53 / 1e6)]  # are counted in microseconds


def _kind(name: str) -> Any:
    """Return the type of a counter or peak."""
    return _Seconds | None if name in usage.TIME_COUNTERS else _Amount | None


class TrialError(Exception):
    """The file cannot be used; the message says why."""


class _Parent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be given of a parent."""

    xattr: dict[str, str] = {}
    parent: _Parent | None = None


_Amounts: Any = msgspec.defstruct(
    "_Amounts",
    [(name, _kind(name), None) for name in usage.Counters.__struct_fields__],
    frozen=True,
    forbid_unknown_fields=True,
)

_Given: Any = msgspec.defstruct(
    "_Given",
    [
        ("path", Annotated[str, msgspec.Meta(pattern="^/[^\0]+$")], "/trial.scope/job"),
        ("id", str, "0-0-0"),
        ("btime", _Amount | None, None),
        ("age", _Amount | None, None),
        ("remainder", bool, False),
        ("attempt", Annotated[int, msgspec.Meta(ge=1, le=1000)], 1),
        *((name, _kind(name), None) for name in usage.Counters.__struct_fields__),
        *((name, _Amount | None, None) for name in usage.Peaks.__struct_fields__),
        *((f"{name}_pressure", _Seconds | None, None) for name in Pressures.__struct_fields__),
        ("own", _Amounts | None, None),
        ("xattr", dict[str, str], msgspec.field(default_factory=dict)),
        ("parent", _Parent | None, None),
    ],
    frozen=True,
    forbid_unknown_fields=True,
)


class Trial(NamedTuple):
    """What a script is tried on."""

    release: Release
    attempt: int


def read_trial(data: bytes) -> Trial:
    """Return what is in a file's contents."""
    try:
        given = msgspec.json.decode(data, type=_Given)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TrialError(str(error)) from None
    return Trial(_release(given), given.attempt)


def _release(given: Any) -> Release:
    counters = _counters(given)
    path = given.path.encode()
    return Release(
        id=given.id,
        path=path,
        name=path.split(b"/", 2)[-1],
        released=time.time(),
        born=given.btime,
        age=given.age,
        usage=Usage(counters, Peaks(**_integers(given, Peaks))),
        own=_counters(given.own) if given.own is not None else counters,
        attributes=_attributes(given),
        pressures=Pressures(
            *(
                Pressure(_microseconds(getattr(given, f"{name}_pressure")))
                for name in Pressures.__struct_fields__
            )
        ),
        remainder=given.remainder,
    )


def _counters(given: Any) -> Counters:
    times = {name: _microseconds(getattr(given, name)) for name in usage.TIME_COUNTERS}
    return Counters(**(_integers(given, Counters) | times))


def _integers(given: Any, kind: type[msgspec.Struct]) -> dict[str, int | None]:
    values = {name: getattr(given, name) for name in kind.__struct_fields__}
    return {name: None if value is None else int(value) for name, value in values.items()}


def _microseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)


def _attributes(given: Any) -> tuple[dict[bytes, bytes], ...]:
    """Return the attributes of the cgroup and its parents, with full names as scripts form them."""
    levels = []
    while given is not None:
        levels.append(
            {
                (name if "." in name else f"user.{name}").encode(): value.encode()
                for name, value in given.xattr.items()
            }
        )
        given = given.parent
    return tuple(levels)


def read_file(path: Path) -> bytes:
    """Return the contents of PATH; ``-`` is standard input."""
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
