"""When to look at which cgroup next."""

from __future__ import annotations

import heapq
import itertools
import math

from spawn_reaper.tree import Cgroup


class Schedule:
    """Cgroups by the monotonic time at which they are due; each has one time or none.

    Setting another time only adds an entry: the old one no longer agrees with ``cgroup.due`` and
    is passed over when its time comes.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Cgroup]] = []
        self._serials = itertools.count()  # cgroups do not compare

    def at(self, when: float, cgroup: Cgroup) -> None:
        """Let CGROUP be due at WHEN instead of any other time."""
        if cgroup.due != when:
            cgroup.due = when
            heapq.heappush(self._entries, (when, next(self._serials), cgroup))

    def take_due(self, now: float, limit: int) -> list[Cgroup]:
        """Remove and return what is due at NOW, at most LIMIT, in order."""
        batch: list[Cgroup] = []
        entries = self._entries
        while entries and entries[0][0] <= now and len(batch) < limit:
            when, _, cgroup = heapq.heappop(entries)
            if cgroup.due == when and not cgroup.gone:
                cgroup.due = None
                batch.append(cgroup)
        return batch

    def next_time(self) -> float:
        """Return when something may be due next; infinity if nothing ever is."""
        return self._entries[0][0] if self._entries else math.inf
