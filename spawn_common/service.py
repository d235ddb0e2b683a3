"""The life of a daemon: ready, reload, stop, watchdog; and that there is only one of it.

Speaks sd_notify(3) when a service manager listens and does nothing of the kind otherwise, so a
daemon runs the same from a shell. Which work there is, is left to the daemon.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any


class AlreadyRunning(Exception):
    """Another daemon holds one of the claims; its ``pid`` says which."""

    def __init__(self, claim: str, pid: int) -> None:
        super().__init__(f"{claim} is already managed by process {pid}")
        self.pid = pid


class Claims:
    """Holds names that at most one daemon of this host (and network namespace) may hold.

    A name is an abstract socket: it needs no directory that is writable, and the kernel gives it
    back when its holder dies, however that happens.
    """

    def __init__(self, kind: str, names: Iterable[str]) -> None:
        """Claim all NAMES for this process, or raise AlreadyRunning.

        A name held by somebody who is neither root nor us cannot keep a daemon from starting:
        otherwise any user could.
        """
        self._sockets: list[socket.socket] = []
        for name in names:
            holder = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._sockets.append(holder)
            address = f"\0{kind}/{name}".encode()[:107]
            try:
                holder.bind(address)
                holder.listen()
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                pid, uid = _peer(address)
                if pid and uid in (0, os.geteuid()):
                    self.close()
                    raise AlreadyRunning(name, pid) from None

    def close(self) -> None:
        """Give all names back."""
        for holder in self._sockets:
            holder.close()
        self._sockets.clear()


def _peer(address: bytes) -> tuple[int, int]:
    """Return pid and uid of the process that listens on ADDRESS; (0, 0) if it is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(address)
        except OSError:
            return 0, 0
        size = struct.calcsize("=iII")
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, uid, _ = struct.unpack("=iII", credentials)
        return pid, uid


class Service:
    """Signals and notifications of one daemon; needs a running event loop."""

    def __init__(self, reload: Callable[[], None], status: Callable[[], str]) -> None:
        """RELOAD is called for SIGHUP, once ready; STATUS gives a line for the service manager."""
        self._reload = reload
        self._status = status
        self._stop = asyncio.Event()
        self._terminated = False
        self._ready = False
        self._reload_wanted = False
        self._loop = asyncio.get_running_loop()
        self._notify = _notifier()
        # Not the loop's own handlers: they queue each signal in a pipe, and a storm of one kind
        # that fills it would swallow the others.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._terminate)
        signal.signal(signal.SIGHUP, self._hang_up)

    def ready(self) -> None:
        """Tell that the start is complete, and begin to feed the watchdog."""
        self._ready = True
        self._notify(ready=1, status=self._status())
        interval = _watchdog_seconds()
        if interval:
            self._feed_watchdog(interval / 2)
        if self._reload_wanted:
            self._loop.call_soon(self._reload_now)

    async def stopped(self) -> None:
        """Wait until the daemon shall end."""
        await self._stop.wait()
        self._notify(stopping=1, status="stopping")

    def _terminate(self, *_: object) -> None:
        if not self._terminated:
            self._terminated = True
            self._loop.call_soon_threadsafe(self._stop.set)

    def _hang_up(self, *_: object) -> None:
        """Reload soon, once for all hang-ups that have come until then."""
        if self._ready and not self._reload_wanted:
            self._loop.call_soon_threadsafe(self._reload_now)
        self._reload_wanted = True

    def _reload_now(self) -> None:
        self._reload_wanted = False
        self._notify(reloading=1, monotonic_usec=time.monotonic_ns() // 1000)
        self._reload()
        self._notify(ready=1, status=self._status())

    def _feed_watchdog(self, interval: float) -> None:
        self._notify(watchdog=1, status=self._status())
        self._loop.call_later(interval, self._feed_watchdog, interval)


def _notifier() -> Callable[..., Any]:
    """Return sd_notify with its variables as keyword arguments; nothing without a manager.

    The library is imported only where it is of use: it brings ten megabytes along.
    """
    if "NOTIFY_SOCKET" not in os.environ:
        return lambda **_: None
    from pystemd.daemon import notify

    return lambda **variables: notify(False, **variables)


def _watchdog_seconds() -> float:
    """Return the interval that the service manager expects, 0 if it expects none."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0
