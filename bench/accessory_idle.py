"""``accessory-idle``: an accessory daemon that has just been started, and its keeper."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from bench import proc
from bench.accessory_servers import made_daemon, settle
from bench.figures import Figure
from bench.interrupts import held
from bench.plan import Plan
from bench.progress import progress
from bench.site import Site
from tests.tools.accessory import Accessory
from tests.tools.harness import wait_for

NAME: Final = "accessory-idle"
_TARGET: Final = 36.0  # MB


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of daemons with and without a service manager."""
    plain, notified = [], []
    for number in range(plan.rounds):
        plain.append(_start(site, ["env", "--unset=NOTIFY_SOCKET"]))
        notified.append(_start(site, []))
        progress(
            f"{NAME}: round {number + 1} of {plan.rounds}: {_megabytes(plain[-1][:1])[0]:.1f} MB, "
            f"with NOTIFY_SOCKET {_megabytes(notified[-1][:1])[0]:.1f} MB"
        )
    return [*_figures("", plain), *_figures(", NOTIFY_SOCKET", notified)]


def _start(site: Site, wrapper: list[str]) -> tuple[proc.Memory, proc.Memory]:
    """Return the memory of a daemon and of its keeper."""
    with made_daemon(site, "accessory") as daemon, held():
        daemon.wrapper = wrapper
        daemon.begin()
        wait_for("the daemon takes connections", lambda: _answers(daemon))
        settle(daemon.pid)
        memory = proc.memory(daemon.pid), proc.memory(daemon.keeper())
        daemon.stop()
        return memory


def _answers(daemon: Accessory) -> bool:
    """Whether it listens, which it does for long before it is ready, and answers."""
    with suppress(ConnectionRefusedError), daemon.client() as client:
        client.socket.shutdown(socket.SHUT_WR)
        return client.dropped()
    return False


def _megabytes(memories: Sequence[proc.Memory]) -> tuple[float, ...]:
    return tuple(memory.resident / 1e6 for memory in memories)


def _figures(circumstance: str, starts: list[tuple[proc.Memory, proc.Memory]]) -> list[Figure]:
    daemons, keepers = zip(*starts, strict=True)
    proportional = tuple(daemon.proportional / 1e6 for daemon in daemons)
    return [
        Figure(NAME, f"resident memory{circumstance}", "MB", _megabytes(daemons), _TARGET),
        Figure(NAME, f"proportional memory{circumstance}", "MB", proportional),
        Figure(NAME, f"keeper, resident memory{circumstance}", "MB", _megabytes(keepers)),
    ]
