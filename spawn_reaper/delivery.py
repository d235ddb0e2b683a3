"""What the script has been told of releases, what it has begun, what it has done.

Owns the order of the releases and the backlog of those that a runner has not begun. Every release
is handled at least once: what a runner did not finish goes to the next, in order, but for one that
two of them ended on. Nobody here waits: who wants to keep a directory until the script had a look
at it says what to call then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from spawn_reaper.release import Release
from spawn_reaper.report import printable, readable
from spawn_reaper.wire import FAILURES_MAX, Ack, Numbered, fields_of

_log = logging.getLogger(__name__)

_CHUNK: Final = 64  # releases in a message
_WINDOW: Final = 128  # releases that a runner has, and has not begun
_PATIENCE: Final = 1.0  # seconds until a directory is deleted although nobody had a look at it
_TRIES: Final = 2  # runners that may end on a release
_LONELY_TRIES: Final = 5  # runners that may end while it is the only one that waits

Begun = Callable[[], None]
"""Is called when the last of some releases was begun, or if that takes too long."""


class _Item:
    """A release that is not done."""

    __slots__ = ("attempt", "line", "lonely", "number", "release", "strikes")

    def __init__(self, number: int, release: Release) -> None:
        self.number = number
        self.release = release
        self.attempt = 1
        self.strikes = 0  # runners that ended while they had it in hand
        self.lonely = 0  # runners that ended while it was the only one that had begun
        self.line: Line | None = None  # to the runner that has got it


class Line:
    """What one runner has got of the releases, and not begun."""

    def __init__(self, run: Callable[[list[Numbered]], None]) -> None:
        """RUN lets the runner handle releases."""
        self.run = run
        self.begun_count = 0
        self.unbegun: deque[_Item] = deque()

    def has_room(self) -> bool:
        """Whether the runner may have more.

        What one has ended on is tried alone: if it ends the next one, too, it is known.
        """
        return not self.unbegun or (len(self.unbegun) < _WINDOW and self.unbegun[-1].attempt == 1)

    def send(self, items: Sequence[_Item]) -> None:
        """Let the runner have ITEMS."""
        numbered = [Numbered(item.number, item.attempt, fields_of(item.release)) for item in items]
        for item in items:
            item.line = self
        self.unbegun.extend(items)
        self.run(numbered)

    def begin(self, count: int) -> int:
        """Take note that it has begun so many in all; return the highest new number, or 0."""
        highest = 0
        while self.begun_count < count and self.unbegun:
            highest = max(highest, self.unbegun.popleft().number)
            self.begun_count += 1
        return highest


class Delivery:
    """All releases that are on their way to the script."""

    def __init__(self, limit: int) -> None:
        """LIMIT is how many may be waiting to be begun."""
        self._limit = limit
        self._items: dict[int, _Item] = {}  # by number
        self._last = 0  # number that was given out
        self._backlog: deque[_Item] = deque()
        self._line: Line | None = None  # to the runner that gets what comes
        self._where = ""  # the function of the script is defined that handles them
        self._refused = True  # there is nobody who takes releases
        self._behind = True  # nobody waits for what is begun
        self._waiting: deque[tuple[int, float, Begun]] = deque()  # last number, since when
        self._timer: asyncio.TimerHandle | None = None
        self._full = False
        self._empty: asyncio.Future[None] | None = None
        self.set_aside_count = 0

    def __len__(self) -> int:
        return len(self._items)

    # For who has releases

    def full(self) -> bool:
        """Whether as many wait to be begun as may."""
        room_again = self._limit * 9 // 10  # or it would be full again at once
        waiting = len(self._backlog) + (len(self._line.unbegun) if self._line else 0)
        self._full = waiting > (room_again if self._full else self._limit - 1)
        return self._full

    def hand_over(self, releases: Iterable[Release], begun: Begun) -> None:
        """Take releases, and call BEGUN as soon as nothing waits for them any more."""
        if self._refused:
            begun()
            return
        for release in releases:
            self._last += 1
            item = self._items[self._last] = _Item(self._last, release)
            self._backlog.append(item)
        self._send()
        if self._behind:
            begun()
            return
        loop = asyncio.get_running_loop()
        self._waiting.append((self._last, loop.time(), begun))
        if self._timer is None:
            self._timer = loop.call_later(_PATIENCE, self._look)

    def fall_behind(self) -> None:
        """Let nobody wait, until all is begun again: they have waited for as long as they can."""
        self._behind = True
        self._tell(self._last)

    async def finish(self, seconds: float) -> int:
        """Let the script finish for so long at most; return how many are not done."""
        if self._items and seconds > 0:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._empty], timeout=seconds)
        return len(self._items)

    # For who has runners

    def connect(self, run: Callable[[list[Numbered]], None], where: str) -> Line:
        """Let a runner have all that comes, and what no other has.

        WHERE says in messages which function of the script handles it.
        """
        self._refused = False
        self._line = Line(run)
        self._where = where
        self.fall_behind()
        self._send()
        self._catch_up()
        return self._line

    def refuse(self) -> None:
        """Take no releases: the script that runs now does not handle any."""
        self._refused = True
        self._line = None
        self.fall_behind()
        self._drop_backlog()

    def _drop_backlog(self) -> None:
        if self._backlog:
            _log.error("%d releases are not handled: the script takes none", len(self._backlog))
        while self._backlog:
            self._drop(self._backlog.popleft())

    def _drop(self, item: _Item) -> None:
        """Forget a release: it is done, or never will be."""
        del self._items[item.number]
        if not self._items and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    def has_some(self, line: Line | None) -> bool:
        """Whether a runner has releases that are not done."""
        return line is not None and any(item.line is line for item in self._items.values())

    def acknowledge(self, line: Line, ack: Ack) -> None:
        """Take note of what a runner has begun and done."""
        for number in ack.done:
            item = self._items.get(number)
            if item is not None and item.line is line:
                self._drop(item)
        for message in ack.failed[:FAILURES_MAX]:
            _log.error("%s", readable(message))
        number = line.begin(ack.begun)
        if line is self._line:
            self._send()
            self._tell(number)
            self._catch_up()

    def lost(self, line: Line, begun: int, in_hand: int) -> str:
        """Take back what a runner did not finish that has ended, and find out why.

        BEGUN is how many it had begun in all, IN_HAND the number of what it was doing, if that is
        the number of a release. Returns the path of the release that has ended it, as far as that
        is known.
        """
        suspect = self._suspect(line, begun, in_hand)
        place = self._place_of(suspect)
        waited = self._begun_by(line, begun)
        for item in waited:
            item.strikes += item.number == suspect
            item.lonely += len(waited) == 1
            if item.strikes >= _TRIES or item.lonely >= _LONELY_TRIES:
                self._set_aside(item)
        self.take_back(line, begun)
        return place

    def take_back(self, line: Line, begun: int) -> None:
        """Take back what a runner did not finish that was ended for no fault of its own."""
        for item in self._begun_by(line, begun):
            item.attempt += 1
        taken = [item for item in self._items.values() if item.line is line]
        for item in taken:
            item.line = None
        self._backlog.extendleft(reversed(taken))
        if line is self._line:
            self._line = None
            self.fall_behind()
        elif self._refused:
            self._drop_backlog()
        else:
            self._send()

    def _begun_by(self, line: Line, begun: int) -> list[_Item]:
        """Return what a runner has begun, which is BEGUN in all, and not done."""
        line.begin(begun)
        unbegun = {item.number for item in line.unbegun}
        return [
            item
            for item in self._items.values()
            if item.line is line and item.number not in unbegun
        ]

    def _suspect(self, line: Line, begun: int, in_hand: int) -> int:
        """Return the number of the release that may have ended a runner; 0 if that is not clear."""
        if in_hand in self._items:
            return in_hand
        # What closes the channel, say, comes to its end, and cannot tell it.
        untold = min(max(0, begun - line.begun_count), len(line.unbegun))  # it can say anything
        return line.unbegun[0].number if untold == 1 else 0

    def _place_of(self, number: int) -> str:
        item = self._items.get(number)
        return printable(item.release.path).decode() if item else ""

    def _set_aside(self, item: _Item) -> None:
        """Give up a release that has ended too many runners."""
        self._drop(item)
        self.set_aside_count += 1
        _log.error(
            "%s: set aside: the script's process ended %d times while it handled this release "
            "(cgroup_released is at %s)",
            *(printable(item.release.path).decode(), item.attempt, self._where),
        )

    # Inside

    def _send(self) -> None:
        """Let the runner have as much as it may."""
        line, backlog = self._line, self._backlog
        while line is not None and backlog and line.has_room():
            if backlog[0].attempt == 1:
                line.send([backlog.popleft() for _ in range(min(_CHUNK, len(backlog)))])
            elif not line.unbegun:
                line.send([backlog.popleft()])
            else:
                break

    def _tell(self, begun: int) -> None:
        while self._waiting and self._waiting[0][0] <= begun:
            self._waiting.popleft()[2]()

    def _look(self) -> None:
        """Find out whether somebody has waited for too long."""
        self._timer = None
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        end = self._waiting[0][1] + _PATIENCE
        if end <= loop.time():
            self.fall_behind()
        else:
            self._timer = loop.call_at(end, self._look)

    def _catch_up(self) -> None:
        if self._line is not None and not self._backlog and not self._line.unbegun:
            self._behind = False
