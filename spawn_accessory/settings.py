"""The settings of the accessory daemon (accessory.toml)."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Iterator
from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much there may be of everything, in all."""

    connections: Count = 4096
    names: Count = 10_000
    namespaces: Count = 40_000


class Allow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who besides root may ask, and for which names (patterns as of the shell)."""

    users: tuple[str | int, ...] = ()
    groups: tuple[str | int, ...] = ()
    names: tuple[str, ...] = ("*",)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings; ``expiry`` is how many seconds a name lives that nobody leases."""

    expiry: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 60.0
    limits: Limits = Limits()
    allow: tuple[Allow, ...] = ()


def user_id(user: str | int) -> int:
    """Return the uid of a user; KeyError if there is none of that name."""
    return user if isinstance(user, int) else pwd.getpwnam(user).pw_uid


def group_id(group: str | int) -> int:
    """Return the gid of a group; KeyError if there is none of that name."""
    return group if isinstance(group, int) else grp.getgrnam(group).gr_gid


def check(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) for what types cannot express."""
    for rule in settings.allow:
        if not rule.users and not rule.groups:
            yield "allow", "a rule needs users or groups"
        for what, names, number in (
            ("user", rule.users, user_id),
            ("group", rule.groups, group_id),
        ):
            for name in names:
                try:
                    number(name)
                except (KeyError, ValueError):  # with a NUL byte in it
                    yield "allow", f"there is no {what} {name!r}"
