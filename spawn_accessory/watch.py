"""Descriptors that tell of something later: a lease's last holder gone, an init or keeper dead.

They are in an epoll set of their own, so that a request can look at what happened before it came,
whatever the event loop would look at first.
"""

from __future__ import annotations

import select
from collections.abc import Callable

_AT_ONCE = 64


class Watch:
    """Calls functions for descriptors that became ready; ready itself when one of them is."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}

    def fileno(self) -> int:
        """Return what an event loop can wait for."""
        return self._epoll.fileno()

    def add(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        """Call CALLBACK when one of EVENTS (EPOLL*, 0 for hang-up alone) came on FD, once each."""
        self._epoll.register(fd, events | select.EPOLLET)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Forget FD, which is about to be closed."""
        del self._callbacks[fd]
        self._epoll.unregister(fd)

    def run(self) -> None:
        """Call the functions of all that is ready now."""
        while events := self._epoll.poll(0, _AT_ONCE):
            for fd, _ in events:
                if callback := self._callbacks.get(fd):
                    callback()

    def close(self) -> None:
        """Forget everything."""
        self._epoll.close()
        self._callbacks.clear()
