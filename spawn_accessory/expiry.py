"""When names end that nobody leases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float:
        """Return the time in seconds."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        """Call CALLBACK in DELAY seconds, unless the returned handle's ``cancel`` is called."""


class Expiry:
    """Calls END for each name that was started this many seconds ago, and not stopped since.

    The time is the same for all, so they end in the order in which they were started.
    """

    def __init__(self, seconds: float, clock: Clock, end: Callable[[bytes], None]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._end = end
        self._started: dict[bytes, float] = {}
        self._timer: Any = None

    def use(self, seconds: float) -> None:
        """Count this long from now on, also for those that are counted already."""
        self._seconds = seconds
        if self._timer is not None:
            self._timer.cancel()
            self._expire()

    def start(self, name: bytes) -> None:
        """Begin to count for NAME, again if it was counted already."""
        self._started.pop(name, None)
        self._started[name] = self._clock.time()
        if self._timer is None:
            self._timer = self._clock.call_later(self._seconds, self._expire)

    def stop(self, name: bytes) -> None:
        """Let NAME live."""
        self._started.pop(name, None)

    def close(self) -> None:
        """End no name any more."""
        self._started.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self._timer = None
        now = self._clock.time()
        while self._started:
            name, started = next(iter(self._started.items()))
            if (left := started + self._seconds - now) > 0:
                self._timer = self._clock.call_later(left, self._expire)
                return
            del self._started[name]
            self._end(name)
