"""What a Lua script can use, one module for each name that it sees.

``calling`` knows how Lua calls; the others know nothing of Lua.
"""

from __future__ import annotations

from spawn_reaper.runner.bindings import address, control_client, pg, socket, sodium
from spawn_reaper.runner.bindings.calling import Calling


def install(calling: Calling) -> None:
    """Give scripts everything but the cgroup object."""
    address.install(calling)
    sockets = socket.install(calling)
    control_client.install(calling, sockets)
    sodium.install(calling)
    pg.install(calling)
