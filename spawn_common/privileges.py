"""Which user a daemon is, and which of root's powers it has.

Root has all of them, always. What is here about capabilities concerns daemons that run as somebody
else, whoever saw to that: the service manager, or we when we were told to.
"""

from __future__ import annotations

import grp
import os
import pwd
from typing import Final, NamedTuple

from spawn_common import linux
from spawn_common.linux import Capabilities

_NO_ID: Final = 0xFFFFFFFF  # means "stay what we are" to the kernel


class Account(NamedTuple):
    """Who to become; None is to stay what we are."""

    uid: int | None
    gid: int | None
    groups: list[int]
    environment: dict[str, str]


def find_account(user: str | None, group: str | None) -> Account | None:
    """Look up a user and a group, both names or numbers; a user brings his groups along.

    A number need not be known, a user's if there is a group: in containers it often is not.
    LookupError says what does not exist. None if there is nothing to look up.
    """
    gid = _find_group(group) if group is not None else None
    if user is None:
        return None if gid is None else Account(None, gid, [], {})
    uid = _number(user)
    try:
        entry = pwd.getpwnam(user) if uid is None else pwd.getpwuid(uid)
    except KeyError:
        if uid is not None and gid is not None:
            return Account(uid, gid, [gid], {"HOME": "/", "USER": user, "LOGNAME": user})
        raise LookupError(f"there is no user {user!r}") from None
    if gid is None:
        gid = entry.pw_gid
    name = entry.pw_name
    environment = {"HOME": entry.pw_dir, "USER": name, "LOGNAME": name}
    return Account(entry.pw_uid, gid, os.getgrouplist(name, gid), environment)


def _find_group(group: str) -> int:
    gid = _number(group)
    try:
        return grp.getgrnam(group).gr_gid if gid is None else gid
    except KeyError:
        raise LookupError(f"there is no group {group!r}") from None


def _number(text: str) -> int | None:
    """Return the id that a text is, None if it is none: then it may be a name."""
    if not text.isdecimal() or len(text) > len(str(_NO_ID)) or int(text) >= _NO_ID:
        return None
    return int(text)


def become(account: Account) -> None:
    """Become that user, who holds all our capabilities, none of which is effective.

    Say directly afterwards which are needed, by pass_on() or keep(). PermissionError if we may
    not become that user.
    """
    linux.keep_capabilities()
    if account.gid is not None:
        os.setgroups(account.groups)
        os.setresgid(account.gid, account.gid, account.gid)
    if account.uid is not None:
        os.setresuid(account.uid, account.uid, account.uid)
        linux.allow_tracing()
    os.environ.update(account.environment)  # libpq looks for certificates in the home directory


def pass_on(*needed: int) -> None:
    """Keep only the CAP_* in NEEDED, and let the programs that we execute have them, too."""
    if os.geteuid() == 0:
        return
    held = linux.capabilities().permitted & _bits(needed)
    linux.set_capabilities(Capabilities(held, held, held).pack())
    linux.clear_ambient_capabilities()
    for capability in needed:
        if held & 1 << capability:
            linux.raise_ambient_capability(capability)


def keep(*needed: int) -> None:
    """Keep only the CAP_* in NEEDED, and let no program that we execute have them."""
    if os.geteuid() == 0:
        return
    held = linux.capabilities().permitted & _bits(needed)
    linux.clear_ambient_capabilities()
    linux.set_capabilities(Capabilities(held, held, 0).pack())


def _bits(capabilities: tuple[int, ...]) -> int:
    return sum(1 << capability for capability in capabilities)
