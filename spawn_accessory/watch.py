"""Descriptors that become ready: requests, and what happened that requests must know of.

They are in an epoll set of their own, for two reasons. A lease that was closed or an init that died
before a request came is seen before the request, whatever order an event loop has. And a client
that asks for one thing after the other is served without going back to the event loop each time,
which would take longer than to answer.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final

_AT_ONCE: Final = 64
_WAIT: Final = 0.001  # seconds for the next request, the shortest time that epoll has
_TURN: Final = 0.01  # seconds until the event loop may see to other things


class Watch:
    """Calls functions for descriptors that became ready; ready itself when one of them is."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._events: dict[int, Callable[[], object]] = {}
        self._requests: dict[int, Callable[[], object]] = {}

    def fileno(self) -> int:
        """Return what an event loop waits for to call ``run``."""
        return self._epoll.fileno()

    def add_event(self, fd: int, events: int, callback: Callable[[], object]) -> None:
        """Call CALLBACK before requests when one of EVENTS (EPOLL*, 0 for hang-up) comes on FD."""
        self._epoll.register(fd, events | select.EPOLLET)
        self._events[fd] = callback

    def change_event(self, fd: int, events: int) -> None:
        """Wait for other EVENTS on FD from now on; those that are there already count."""
        self._epoll.modify(fd, events | select.EPOLLET)

    def add_request(self, fd: int, events: int, callback: Callable[[], object]) -> None:
        """Call CALLBACK for as long as there is one of EVENTS (EPOLL*) on FD."""
        self._epoll.register(fd, events)
        self._requests[fd] = callback

    def remove(self, fd: int) -> None:
        """Forget FD, if it is known: it is about to be closed."""
        if self._events.pop(fd, None) or self._requests.pop(fd, None):
            self._epoll.unregister(fd)

    def look(self) -> None:
        """Call the functions of all events that have happened, but of no request."""
        for fd, _ in self._epoll.poll(0):
            if callback := self._events.get(fd):
                callback()

    def run(self) -> None:
        """Call the functions of all that is ready, and for a while of what becomes ready."""
        end = time.monotonic() + _TURN
        while ready := self._epoll.poll(_WAIT, _AT_ONCE):
            for fd, _ in ready:
                if callback := self._events.get(fd):
                    callback()
            if len(ready) == _AT_ONCE:
                self.look()  # there may be more
            for fd, _ in ready:
                if callback := self._requests.get(fd):
                    callback()
            if time.monotonic() > end:
                return

    def close(self) -> None:
        """Forget everything."""
        self._epoll.close()
        self._events.clear()
        self._requests.clear()
