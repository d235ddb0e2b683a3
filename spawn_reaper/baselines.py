"""What was recorded for cgroups that live on, handed from one run of the daemon to the next.

Kept in an extended attribute of the scope: it needs no directory that is writable, goes with the
scope and with the boot, and the scope belongs to the spawner or to root, never to a customer. A
daemon that is killed hands nothing on.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import msgspec

from spawn_reaper.report import printable
from spawn_reaper.tree import Scope
from spawn_reaper.usage import NO_COUNTERS, Counters

_log = logging.getLogger(__name__)

_ATTRIBUTE: Final = "user.cm4all-spawn-reaper.accounted"


class _Baseline(msgspec.Struct, frozen=True, array_like=True):
    inode: int
    reported: bool
    accounted: Counters


_decoder: Final = msgspec.json.Decoder(list[_Baseline])


def save_baselines(scope: Scope) -> None:
    """Write down what was recorded for the living cgroups of SCOPE."""
    baselines = [
        _Baseline(cgroup.inode, cgroup.reported, cgroup.accounted)
        for cgroup in scope.root.descendants()
        if cgroup.accounted is not NO_COUNTERS
    ]
    if not baselines:
        return
    try:
        os.setxattr(scope.fd, _ATTRIBUTE, msgspec.json.encode(baselines))
    except OSError as error:
        _log.error(
            "%s: cannot hand over what was recorded for %d living cgroups, so their next records "
            "will count it again: %s",
            printable(scope.path).decode(),
            len(baselines),
            error.strerror,
        )


def load_baselines(scope: Scope) -> None:
    """Take over what the daemon before us had recorded."""
    try:
        data = os.getxattr(scope.fd, _ATTRIBUTE)
        os.removexattr(scope.fd, _ATTRIBUTE)
        baselines = {baseline.inode: baseline for baseline in _decoder.decode(data)}
    except OSError:
        return  # nothing was handed over
    except msgspec.DecodeError as error:
        _log.error("%s: %s: %s", printable(scope.path).decode(), _ATTRIBUTE, error)
        return
    for cgroup in scope.root.descendants():
        if baseline := baselines.get(cgroup.inode):
            cgroup.accounted = baseline.accounted
            cgroup.reported = baseline.reported
