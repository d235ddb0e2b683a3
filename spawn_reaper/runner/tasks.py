"""Functions of the script that wait: for how long, what they get, how they are ended.

A task is one run of a function of the script, in a coroutine of its own. Most never wait and are
never seen here. Owns their clocks; the Lua side, which knows the coroutines, is script.lua.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Protocol

from spawn_reaper.runner.bindings.calling import Outcome, Queued, raising

# What a slice of a task ends with; anything else is the task's number, and it waits.
NOT_WAITING: Final = (0, 1)  # done, or parked by itself


class Lua(Protocol):
    """What is needed of script.lua."""

    def resume(self, number: int, release: int, *outcome: Any) -> int:
        """Run the next slice of a task, which is about a RELEASE, or OURS."""

    def abandon(self, number: int) -> None:
        """Give up a task: it is not resumed any more."""


class _Task:
    """A task that waits, or has done so."""

    __slots__ = (
        "ended",
        "left",
        "number",
        "operation",
        "overdue",
        "path",
        "release",
        "since",
        "timer",
        "told",
    )

    def __init__(self, number: int, path: bytes | None, release: int, left: float) -> None:
        self.number = number
        self.path = path  # of the released cgroup, if it is about one
        self.release = release  # its number
        self.left = left  # seconds
        self.ended: Callable[[], None] | None = None
        self.operation: asyncio.Future[Any] | None = None
        self.overdue: str | None = None  # why it must end
        self.told = False  # that it must end
        self.timer: asyncio.TimerHandle | None = None
        self.since = 0.0  # when the clock was started, by the loop's clock


class Tasks:
    """All tasks that wait."""

    def __init__(
        self,
        limit: float,
        lua: Lua,
        outcome: Callable[[asyncio.Future[Any]], Outcome],
        failed: Callable[[bytes | None, bytes], None],
    ) -> None:
        """LIMIT is the time of a task in seconds; OUTCOME makes what it gets of an operation."""
        self._limit = limit
        self._lua = lua
        self._outcome = outcome
        self._failed = failed
        self._tasks: dict[int, _Task] = {}
        self.ended: list[Callable[[int], None]] = []
        """To be called with the number of a task that has waited and is done or parked."""

    def __len__(self) -> int:
        return len(self._tasks)

    def suspended(
        self, number: int, path: bytes | None, release: int, operation: Awaitable[Any]
    ) -> None:
        """Take note that a task begins to wait; Lua calls this just before it does."""
        task = self._tasks.get(number)
        if task is None:
            task = self._tasks[number] = _Task(number, path, release, self._limit)
        task.operation = asyncio.ensure_future(operation)
        task.operation.add_done_callback(partial(self._resume, task))
        if task.overdue:
            task.operation.cancel()
        elif isinstance(operation, Queued) and operation.waiting:
            self._stop_clock(task)
            operation.begun = partial(self._start_clock, task)
            operation.put_back = partial(self._stop_clock, task)
        elif task.timer is None:
            self._start_clock(task)

    def after(self, state: int, ended: Callable[[], None]) -> None:
        """Call ENDED when a task that was just started, and ended its slice so, is done."""
        if state in NOT_WAITING:
            ended()
        else:
            self._tasks[state].ended = ended

    def expire_all(self, reason: str) -> None:
        """End all tasks."""
        for task in list(self._tasks.values()):
            self._expire(task, reason)

    # One task

    def _start_clock(self, task: _Task) -> None:
        loop = asyncio.get_running_loop()
        task.since = loop.time()
        reason = f"ran longer than {self._limit:g} s"
        task.timer = loop.call_later(max(0.0, task.left), self._expire, task, reason)

    def _stop_clock(self, task: _Task) -> None:
        if task.timer is not None:
            task.timer.cancel()
            task.timer = None
            task.left -= asyncio.get_running_loop().time() - task.since

    def _expire(self, task: _Task, reason: str) -> None:
        task.overdue = reason
        if task.operation is not None:
            task.operation.cancel()

    def _resume(self, task: _Task, operation: asyncio.Future[Any]) -> None:
        if task.told:
            # It has caught the error for its time, and waits again.
            self._lua.abandon(task.number)
            self._failed(task.path, b"went on after its time was over")
            self._end(task)
            return
        if operation.cancelled():
            task.told = task.overdue is not None
            outcome = raising(task.overdue or "was cancelled")
        else:
            outcome = self._outcome(operation)  # even if it is late: it may be an open socket
        task.operation = None
        if self._lua.resume(task.number, task.release, *outcome) in NOT_WAITING:
            self._end(task)

    def _end(self, task: _Task) -> None:
        self._stop_clock(task)
        del self._tasks[task.number]
        for callback in self.ended:
            callback(task.number)
        if task.ended is not None:
            task.ended()
