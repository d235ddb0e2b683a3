"""Running a script once against a release from a file, and telling what it did.

Owns the format of that file: JSON with the names and units that scripts see, all of them optional.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from spawn_reaper import usage
from spawn_reaper.release import Pressures, Release
from spawn_reaper.report import one_line, release_line
from spawn_reaper.script import Script
from spawn_reaper.usage import Counters, Peaks, Pressure, Usage

_Amount = Annotated[float, msgspec.Meta(ge=0, le=2**53)]


Tell = Callable[[str], None]
"""Prints a line of what happened."""


class TrialError(Exception):
    """The file cannot be used; the message says why."""


class _Parent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be given of a parent."""

    xattr: dict[str, str] = {}
    parent: _Parent | None = None


_Amounts: Any = msgspec.defstruct(
    "_Amounts",
    [(name, _Amount | None, None) for name in usage.Counters.__struct_fields__],
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
        *((name, _Amount | None, None) for name in usage.Counters.__struct_fields__),
        *((name, _Amount | None, None) for name in usage.Peaks.__struct_fields__),
        *((f"{name}_pressure", _Amount | None, None) for name in Pressures.__struct_fields__),
        ("own", _Amounts | None, None),
        ("xattr", dict[str, str], msgspec.field(default_factory=dict)),
        ("parent", _Parent | None, None),
    ],
    frozen=True,
    forbid_unknown_fields=True,
)


def read_release(data: bytes) -> Release:
    """Return the release in a file's contents."""
    try:
        given = msgspec.json.decode(data, type=_Given)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TrialError(str(error)) from None
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


async def try_script(script: Script, release: Release, seconds: float, tell: Tell) -> bool:
    """Run the script's cgroup_released once; return whether it came to its end without an error."""
    tell(f"cgroup_released: {release_line(release).decode(errors='replace').rstrip()}")
    before = script.failed_count
    start = time.monotonic()
    script.released(release, None)
    left = await script.finish(seconds)
    elapsed = time.monotonic() - start
    if left:
        tell(f"cgroup_released: still waiting after {elapsed:.3f} s, ended")
    elif script.failed_count > before:
        tell(f"cgroup_released: failed after {elapsed:.3f} s")
    else:
        tell(f"cgroup_released: done after {elapsed:.3f} s")
    return not left and script.failed_count == before


def tracer(tell: Tell) -> Callable[[bytes, bytes, bytes, bytes], None]:
    """Return what prints a line for each call that the script makes."""

    def trace(place: bytes, name: bytes, arguments: bytes, results: bytes) -> None:
        call = place + name + b"(" + arguments + b")"
        tell(one_line(call + b" -> " + results if results else call))

    return trace


def read_file(path: Path) -> bytes:
    """Return the contents of PATH; ``-`` is standard input."""
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
