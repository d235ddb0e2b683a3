"""The life of a daemon: ready, reload, stop, watchdog.

Speaks sd_notify(3) when a service manager listens and does nothing of the kind otherwise, so a
daemon runs the same from a shell. Which work there is, is left to the daemon.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Final

from spawn_common.notify import notifier
from spawn_common.standalone import Standing

Told = Callable[[str], None]
"""Is told that a reload is complete, and what is wrong: nothing, if all is well."""


_RUNNING_AND_NEXT: Final = 2


class Service:
    """Signals and notifications of one daemon; needs a running event loop."""

    def __init__(
        self,
        standing: Standing,
        reload: Callable[[Told], None],
        status: Callable[[], str],
    ) -> None:
        """STATUS gives a line for the service manager.

        RELOAD is called for SIGHUP, once ready; it calls its argument when the reload is complete,
        with what is wrong, or nothing.
        """
        self._standing = standing
        self._reload = reload
        self._status = status
        self._stop = asyncio.Event()
        self._ready = False
        self._reload_wanted = False
        self._signalled_reloads = 0  # that are not complete
        self._loop = asyncio.get_running_loop()
        self._notify = notifier()
        standing.signals.serve(self._signalled)

    def starting(self, what: str) -> None:
        """Tell what the start is waiting for."""
        self._notify(status=f"starting: {what}")

    def ready(self) -> None:
        """Tell that the start is complete, and begin to feed the watchdog."""
        self._ready = True
        self._standing.started()
        self._notify(ready=1, status=self._status())
        interval = _watchdog_seconds()
        if interval:
            self._feed_watchdog(interval / 2)
        if self._reload_wanted:
            self._reload_for_signals()

    def reload(self, told: Told) -> None:
        """Do as for SIGHUP, and call TOLD when it is complete."""
        now = time.monotonic_ns() // 1000
        self._notify(reloading=1, monotonic_usec=now, status="reloading")
        self._reload(functools.partial(self._reloaded, told))

    def close(self) -> None:
        """Ignore signals from now on: the process is about to end."""
        self._standing.signals.ignore()

    async def stopped(self) -> None:
        """Wait until the daemon shall end."""
        await self._stop.wait()
        self._notify(stopping=1, status="stopping")

    def _signalled(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number == signal.SIGUSR1:
                self._standing.reopen_log()
            elif number != signal.SIGHUP:
                self._stop.set()
            elif self._ready:
                self._reload_for_signals()
            else:
                self._reload_wanted = True

    def _reload_for_signals(self) -> None:
        """Reload, unless one is pending that has not begun: signals do not count how many came."""
        if self._signalled_reloads < _RUNNING_AND_NEXT:
            self._signalled_reloads += 1
            self.reload(self._reloaded_for_signals)

    def _reloaded_for_signals(self, _: str) -> None:
        self._signalled_reloads -= 1

    def _reloaded(self, told: Told, problem: str) -> None:
        self._notify(ready=1, status=self._status())
        told(problem)

    def _feed_watchdog(self, interval: float) -> None:
        self._notify(watchdog=1, status=self._status())
        self._loop.call_later(interval, self._feed_watchdog, interval)


def _watchdog_seconds() -> float:
    """Return the interval that the service manager expects, 0 if it expects none."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0
