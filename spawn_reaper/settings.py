"""The reaper's settings: what can be set, within which bounds, and the defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal

import msgspec

from spawn_reaper.scopes import check_pattern

DEFAULT_SCOPES: Final = tuple(
    f"/system.slice/system-cm4all.slice/{spawner}-spawn.scope"
    for spawner in ("bp", "lukko", "workshop")
)

Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class Handlers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits on the script's functions: how many run, how many wait, seconds, megabytes."""

    running: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 256
    queue: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 50_000
    time: PositiveSeconds = 60.0
    cpu: PositiveSeconds = 5.0
    hang: PositiveSeconds = 60.0
    memory: Annotated[float, msgspec.Meta(ge=1, le=1_000_000)] = 256.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of reaper.toml. Times are in seconds."""

    scopes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = DEFAULT_SCOPES
    grace: Seconds = 0.05
    unclaimed: PositiveSeconds = 60.0
    log: bool = True
    pressure: bool = False
    stop: Seconds = 10.0
    reload: Literal["function", "script"] = "function"
    handlers: Handlers = Handlers()


def check(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) for what is wrong although its type is right."""
    for pattern in settings.scopes:
        if reason := check_pattern(pattern):
            yield "scopes", f"{pattern!r} {reason}"
