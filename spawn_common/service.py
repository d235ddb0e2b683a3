"""The life of a daemon: ready, reload, stop, watchdog; and that there is only one of it.

Speaks sd_notify(3) when a service manager listens and does nothing of the kind otherwise, so a
daemon runs the same from a shell. Which work there is, is left to the daemon.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import operator
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any


class AlreadyRunning(Exception):
    """Another daemon holds a claim; its ``pid`` says which, 0 if that cannot be seen."""

    def __init__(self, claim: str, pid: int) -> None:
        super().__init__(f"{claim} is already managed by process {pid or '(unknown)'}")
        self.pid = pid


class Claims:
    """Holds names that at most one daemon of this host (and network namespace) may hold.

    A name is an abstract socket: it needs no directory that is writable, and the kernel gives it
    back when its holder dies, however that happens.
    """

    def __init__(self, kind: str) -> None:
        """KIND sets the names of one sort of daemon apart from those of others."""
        self._kind = kind
        self._sockets: dict[str, socket.socket] = {}

    def take(self, name: str) -> None:
        """Claim NAME for this process, or raise AlreadyRunning; needs a running event loop.

        A name held by somebody who is neither root nor us cannot keep a daemon from starting:
        otherwise any user could.
        """
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        address = self._address(name)
        try:
            holder.bind(address)
            holder.listen()
        except OSError as error:
            holder.close()
            if error.errno != errno.EADDRINUSE:
                raise
            pid, uid = _peer(address)
            if uid in (0, os.geteuid()):
                raise AlreadyRunning(name, pid) from None
        else:
            # Those who come to ask who we are would fill the queue if they were left in it.
            asyncio.get_running_loop().add_reader(holder, _turn_away, holder)
            self._sockets[name] = holder

    def give_back(self, name: str) -> None:
        """Let others claim NAME."""
        if holder := self._sockets.pop(name, None):
            asyncio.get_running_loop().remove_reader(holder)
            holder.close()

    def close(self) -> None:
        """Give all names back."""
        for name in list(self._sockets):
            self.give_back(name)

    def _address(self, name: str) -> bytes:
        # Of fixed length, since an abstract name has 107 bytes at most.
        digest = hashlib.sha256(os.fsencode(f"{self._kind}\0{name}")).hexdigest()
        return f"\0cm4all-spawn-claim/{digest}".encode()


def _turn_away(holder: socket.socket) -> None:
    with suppress(OSError):
        holder.accept()[0].close()


def _peer(address: bytes) -> tuple[int, int]:
    """Return pid and uid of the process that listens on ADDRESS.

    The pid is 0 if it cannot be seen from here. The uid is -1 if the process is gone, or does not
    accept connections: one of ours would, and anybody could bind the address and fill its queue.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 1, 0))
        try:
            probe.connect(address)
        except OSError:
            return 0, -1
        size = struct.calcsize("=iII")
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, uid, _ = struct.unpack("=iII", credentials)
        return pid, uid


class _Signals:
    """Tells of signals in the event loop: each kind once, however often it came.

    Not the loop's own handlers: they queue each signal in a pipe, and a storm of one kind that
    fills it would swallow the others. And no Python code in the handler: under a storm it would be
    interrupted by the next signal, and that again, up to a RecursionError in whatever was running.
    So the handler is a C function that notes the signal's number, and the pipe only wakes us up.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, tell: Callable[[Iterable[int]], None]) -> None:
        self._tell = tell
        self._came: dict[int, object] = {}
        self._loop = asyncio.get_running_loop()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._loop.add_reader(self._reader, self._wake_up)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._NUMBERS:
            signal.signal(number, functools.partial(operator.setitem, self._came))

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):
            self._reader.recv(65536)
        numbers = list(self._came)
        for number in numbers:
            self._came.pop(number)
        self._tell(numbers)

    def close(self) -> None:
        """Ignore these signals from now on."""
        for number in self._NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._loop.remove_reader(self._reader)
        self._reader.close()
        self._writer.close()


class Service:
    """Signals and notifications of one daemon; needs a running event loop."""

    def __init__(
        self, reload: Callable[[Callable[[], None]], None], status: Callable[[], str]
    ) -> None:
        """STATUS gives a line for the service manager.

        RELOAD is called for SIGHUP, once ready; it calls its argument when the reload is complete.
        """
        self._reload = reload
        self._status = status
        self._stop = asyncio.Event()
        self._ready = False
        self._reload_wanted = False
        self._loop = asyncio.get_running_loop()
        self._notify = _notifier()
        self._signals = _Signals(self._signalled)

    def ready(self) -> None:
        """Tell that the start is complete, and begin to feed the watchdog."""
        self._ready = True
        self._notify(ready=1, status=self._status())
        interval = _watchdog_seconds()
        if interval:
            self._feed_watchdog(interval / 2)
        if self._reload_wanted:
            self._reload_now()

    def close(self) -> None:
        """Ignore signals from now on: the process is about to end."""
        self._signals.close()

    async def stopped(self) -> None:
        """Wait until the daemon shall end."""
        await self._stop.wait()
        self._notify(stopping=1, status="stopping")

    def _signalled(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number != signal.SIGHUP:
                self._stop.set()
            elif self._ready:
                self._reload_now()
            else:
                self._reload_wanted = True

    def _reload_now(self) -> None:
        self._notify(reloading=1, monotonic_usec=time.monotonic_ns() // 1000)
        self._reload(self._reloaded)

    def _reloaded(self) -> None:
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
