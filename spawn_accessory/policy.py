"""Who may ask, and for what.

Root, those who could do the same by themselves, and whom the settings allow.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import select
import socket
from pathlib import Path
from typing import Final

import msgspec

from spawn_accessory.idmaps import parse_maps
from spawn_accessory.protocol import Maps, Request
from spawn_accessory.settings import Allow, Settings, group_id, user_id
from spawn_common import linux


class Refused(Exception):
    """What is asked for cannot be had; the message tells the client why."""


class Access(msgspec.Struct, frozen=True):
    """What a peer may do; ``names`` are patterns of the names that it may use, None for all.

    ``maps`` says whether it may have user namespaces.
    """

    root: bool = False
    names: tuple[re.Pattern[str], ...] | None = None
    maps: bool = True

    def may_use(self, name: bytes) -> bool:
        """Whether the peer may have the namespaces of NAME, and know of it."""
        if self.names is None:
            return True
        text = name.decode("ascii")
        return any(pattern.fullmatch(text) for pattern in self.names)

    def check(self, request: Request) -> None:
        """Raise Refused if the peer may not ask for this, BadMap if that cannot be said."""
        if self.root:
            return
        if request.name is not None and not self.may_use(request.name):
            raise Refused("you may not use this name")
        maps = request.maps
        if maps is not None and not self.maps:
            raise Refused("only who has CAP_SETUID and CAP_SETGID may map ids")
        if maps is not None and _maps_zero(maps):
            raise Refused("only root may map the host's user or group 0")


def _maps_zero(maps: Maps) -> bool:
    return any(extent.contains_outside(0) for extent in parse_maps(maps.uid, maps.gid))


class _Rule(msgspec.Struct, frozen=True):
    uids: frozenset[int]
    gids: frozenset[int]
    names: tuple[re.Pattern[str], ...]


class Policy:
    """The rules of this daemon."""

    def __init__(self, settings: Settings) -> None:
        self._rules = [_rule(allow) for allow in settings.allow]
        self._uid_map = Path("/proc/self/uid_map").read_bytes()

    def access(self, peer: socket.socket) -> Access | None:
        """Return what the peer of a connection may do; None if it may do nothing."""
        pid, uid, gid = linux.peer_credentials(peer)
        if uid == 0:
            return Access(root=True)
        capabilities = self._capabilities(peer, pid, uid)
        if _has(capabilities, linux.CAP_SYS_ADMIN):
            maps = _has(capabilities, linux.CAP_SETUID) and _has(capabilities, linux.CAP_SETGID)
            return Access(maps=maps)
        gids = frozenset((gid,))
        if any(rule.gids for rule in self._rules):
            gids |= linux.peer_groups(peer)
        names = tuple(
            name
            for rule in self._rules
            if uid in rule.uids or gids & rule.gids
            for name in rule.names
        )
        return Access(names=names) if names else None

    def _capabilities(self, peer: socket.socket, pid: int, uid: int) -> int:
        """Return which capabilities the peer has in our user namespace, as capget(2) does.

        That tells of the peer's own user namespace, and which one it is can only be seen by those
        who may trace it. But its uid map may be read by all, and to make another namespace with the
        same one takes a privileged process.
        """
        if pid <= 0:
            return 0  # out of our sight
        try:
            pidfd = linux.peer_pidfd(peer, pid)
        except OSError as error:
            if error.errno in _GONE:
                return 0
            raise
        try:
            capabilities = linux.capabilities(pid).effective
            ours = Path(f"/proc/{pid}/uid_map").read_bytes() == self._uid_map
            # A user's process may have connected, and then have executed a set-user-ID program.
            same = _uids(pid) == {uid}
            # Was it the peer all the time, and not another process with its number?
            return capabilities if ours and same and _is_alive(pidfd) else 0
        except (FileNotFoundError, ProcessLookupError):
            return 0
        finally:
            os.close(pidfd)


_GONE: Final = (errno.ESRCH, errno.EINVAL, errno.ENODATA)


def _has(capabilities: int, number: int) -> bool:
    return bool(capabilities >> number & 1)


def _uids(pid: int) -> set[int]:
    """Return the real, effective, saved and file system uid of a process."""
    text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    return set(map(int, text.partition("\nUid:")[2].partition("\n")[0].split()))


def _rule(allow: Allow) -> _Rule:
    return _Rule(
        frozenset(map(user_id, allow.users)),
        frozenset(map(group_id, allow.groups)),
        tuple(re.compile(fnmatch.translate(pattern)) for pattern in allow.names),
    )


def _is_alive(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)
