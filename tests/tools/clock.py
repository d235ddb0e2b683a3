"""A clock that moves when a test says so."""

from __future__ import annotations

from collections.abc import Callable


class FakeTimer:
    """A call that is due at a time."""

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        """Do not make the call."""
        self.cancelled = True


class FakeClock:
    """What is needed of an event loop: its time, and calls at a later time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[FakeTimer] = []

    def time(self) -> float:
        """Return the time in seconds."""
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        """Make a call when the clock has moved that far."""
        timer = FakeTimer(self.now + delay, callback)
        self._timers.append(timer)
        return timer

    def timers(self) -> list[FakeTimer]:
        """Return the calls that are still to come, in their order."""
        self._timers = [timer for timer in self._timers if not timer.cancelled]
        return sorted(self._timers, key=lambda timer: timer.due)

    def advance(self, seconds: float) -> None:
        """Let time pass, and make the calls that are due, each at its time."""
        end = self.now + seconds
        while (timers := self.timers()) and timers[0].due <= end:
            self._timers.remove(timers[0])
            self.now = max(self.now, timers[0].due)
            timers[0].callback()
        self.now = end
