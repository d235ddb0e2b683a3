"""When to look at a cgroup, when to account for it, when to delete it.

Owns the schedule. What is due together is one batch, deepest cgroups first. Each batch is read,
logged, handed to the script and only then deleted, so that a script may still read files from the
directory, and so that nothing is deleted that was not recorded.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec

from spawn_common.service import AlreadyRunning, Claims
from spawn_reaper.accounts import Accounts, Opened
from spawn_reaper.bindings.cgroup import Subject
from spawn_reaper.deletion import delete, deletions, recover
from spawn_reaper.report import printable, release_line
from spawn_reaper.scopes import ScopeFinder
from spawn_reaper.tree import OPEN_DIRECTORY, Cgroup, Scope, Tree, located
from spawn_reaper.usage import CPU_STAT, read_file

_log = logging.getLogger(__name__)

# Reading events only so often lets a burst be handled in batches. The kernel itself merges what
# happens to a cgroup within 10 ms, and a watch that is placed that late still fires.
_PAUSE: Final = 0.01
_POLL: Final = 2.0  # seconds between looks at what cannot be watched
_CHUNK: Final = 64  # cgroups whose descriptors are open at the same time
_FLUSH: Final = 8  # cgroups in a batch for which flushing the scope's statistics is worth it
_BATCH: Final = 1024  # cgroups after which events are read again
_FULL: Final = 32768  # bytes of events that say that there are more
_RETRY: Final = 60.0  # seconds until a refused deletion is tried again
_STDERR: Final = 2
_EMPTY: Final = b"populated 0\nfrozen 0\n"
_UNCLAIMED: Final = math.inf  # as a cgroup's due time: not before an event or a far deadline


class Reaper:
    """Keeps the managed scopes free of empty cgroups, and accounts for each of them."""

    def __init__(
        self,
        finder: ScopeFinder,
        accounts: Accounts,
        claims: Claims,
        *,
        grace: float,
        unclaimed: float,
        log_lines: bool,
        released: Callable[[Subject], None] | None,
    ) -> None:
        """GRACE and UNCLAIMED are seconds; RELEASED is the script's function, if it has one."""
        self._finder = finder
        self._accounts = accounts
        self._claims = claims
        self._grace = grace
        self._unclaimed_time = unclaimed
        self._log_lines = log_lines
        self._released = released
        self._tree = Tree(self)
        self._now = time.monotonic()
        self._due: deque[tuple[float, Cgroup]] = deque()
        self._unclaimed: deque[tuple[float, Cgroup]] = deque()
        self._emptied: set[Scope] = set()
        self._complaints: set[tuple[bytes, int | None]] = set()
        self._exhausted = False
        self._started = False
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_end = math.inf
        self._poll_timer: asyncio.TimerHandle | None = None
        self.released_count = 0
        self.unread_count = 0

    # Life

    def start(self) -> None:
        """Adopt the scopes that exist and begin to watch; needs a running event loop.

        AlreadyRunning if another reaper manages one of them.
        """
        self._loop = asyncio.get_running_loop()
        self._find_scopes()
        self._started = True
        self._loop.add_reader(self._finder.fd, self._scopes_readable)
        self._loop.add_reader(self._tree.fd, self._tree_readable)

    def stop(self) -> None:
        """Begin nothing new: what was not looked at stays as it is."""
        self._stopped = True
        self._loop.remove_reader(self._finder.fd)
        self._loop.remove_reader(self._tree.fd)
        for timer in (self._timer, self._poll_timer):
            if timer is not None:
                timer.cancel()
        self._tree.close()
        self._finder.close()

    def status(self) -> str:
        """Say in one line what the daemon is doing."""
        scopes = len(self._tree.scopes)
        return (
            f"{scopes} scope{'' if scopes == 1 else 's'}, {self._tree.count} cgroups, "
            f"{self.released_count} released, {self.unread_count} gone unread"
        )

    # Events

    def _scopes_readable(self) -> None:
        self._now = time.monotonic()
        if self._finder.handle_events():
            self._find_scopes()

    def _find_scopes(self) -> None:
        """Bring the managed scopes in line with what exists."""
        found = self._finder.find()
        for path, scope in list(self._tree.scopes.items()):
            if found.get(path) != scope.root.inode:
                _log.info("scope %s is gone", printable(path).decode())
                self._tree.drop(scope)
                self._claims.give_back(os.fsdecode(path))
        for path in sorted(found.keys() - self._tree.scopes.keys()):
            self._adopt(path)
        self._arm_poll()

    def _adopt(self, path: bytes) -> None:
        try:
            self._claims.take(os.fsdecode(path))
        except AlreadyRunning as error:
            if not self._started:
                raise
            _log.error("%s", error)
            return
        try:
            recover(self._tree.adopt(path, self._finder.open(path)))
        except OSError as error:
            self._claims.give_back(os.fsdecode(path))
            if error.errno != errno.ENOENT:
                _log.error("scope %s: %s", printable(path).decode(), error.strerror)
        else:
            _log.info("watching scope %s", printable(path).decode())

    def _tree_readable(self) -> None:
        self._loop.remove_reader(self._tree.fd)
        self._read_events()

    def _read_events(self) -> None:
        """Handle a buffer of events and come back soon; wait for more only when there are none."""
        if self._stopped:
            return
        self._now = time.monotonic()
        size = self._tree.handle_events()
        if size >= _FULL:
            self._loop.call_soon(self._read_events)
        elif size:
            self._loop.call_later(_PAUSE, self._read_events)
        else:
            self._loop.add_reader(self._tree.fd, self._tree_readable)
        self._arm_poll()

    def _arm_poll(self) -> None:
        if self._tree.exhausted and not self._exhausted:
            _log.warning(
                "fs.inotify.max_user_watches is reached; what cannot be watched "
                "is looked at every %g s until there is room again",
                _POLL,
            )
        elif self._exhausted and not self._tree.exhausted:
            _log.info("there is room for all watches again")
        self._exhausted = self._tree.exhausted
        if self._poll_timer is None and (self._tree.unwatched or self._finder.incomplete):
            self._poll_timer = self._loop.call_later(_POLL, self._poll)

    def _poll(self) -> None:
        self._poll_timer = None
        self._now = time.monotonic()
        if self._finder.incomplete:
            self._find_scopes()
        self._tree.poll()
        self._arm_poll()

    # What the tree tells

    def touched(self, cgroup: Cgroup) -> None:
        """Look at the cgroup when it has been left alone for the grace time."""
        due = self._now + self._grace
        if cgroup.due is None or cgroup.due == _UNCLAIMED:
            self._due.append((due, cgroup))
            if due < self._timer_end:
                self._arm()
        cgroup.due = due

    def vanished(self, cgroup: Cgroup) -> None:
        """Say that a cgroup is gone whose use was not recorded (or not all of it)."""
        if cgroup.reported and not cgroup.used:
            return
        self.unread_count += 1
        _log.warning(
            "%s: deleted by somebody else before it could be accounted for", _display(cgroup)
        )

    def emptied(self, scope: Scope) -> None:
        """Hurry: the service manager is about to delete everything in the scope."""
        if not self._emptied:
            self._loop.call_soon(self._settle_emptied)
        self._emptied.add(scope)

    # Batches

    def _arm(self) -> None:
        """Set the timer for whatever comes first."""
        if self._timer is not None:
            self._timer.cancel()
        ends = [queue[0][0] for queue in (self._due, self._unclaimed) if queue]
        self._timer_end = min(ends, default=math.inf)
        if ends and not self._stopped:
            self._timer = self._loop.call_at(self._timer_end, self._settle)

    def _settle(self) -> None:
        """Deal with everything that is due."""
        self._timer = None
        self._now = now = time.monotonic()
        while self._unclaimed and self._unclaimed[0][0] <= now:
            _, cgroup = self._unclaimed.popleft()
            if cgroup.due == _UNCLAIMED and not cgroup.gone:
                self.touched(cgroup)
        batch: list[Cgroup] = []
        due = self._due
        while due and due[0][0] <= now and len(batch) < _BATCH:
            _, cgroup = due.popleft()
            if cgroup.gone or cgroup.due is None or cgroup.due == _UNCLAIMED:
                continue
            if cgroup.due > now:  # touched again meanwhile
                due.append((cgroup.due, cgroup))
            else:
                batch.append(cgroup)
        self._settle_batch(batch)
        self._arm()

    def _settle_emptied(self) -> None:
        scopes, self._emptied = self._emptied, set()
        self._now = time.monotonic()
        for scope in scopes:
            members = list(scope.root.descendants())
            self._settle_batch([c for c in members if c.used or c.due != _UNCLAIMED])

    def _settle_batch(self, cgroups: list[Cgroup]) -> None:
        """Release what can be released, children before their parents."""
        if self._stopped:
            return
        self._accounts.begin_batch()
        if len(cgroups) >= _FLUSH:
            for scope in {cgroup.scope for cgroup in cgroups}:
                _flush_statistics(scope)
        levels: dict[int, list[Cgroup]] = {}
        for cgroup in cgroups:
            levels.setdefault(_depth(cgroup), []).append(cgroup)
        for depth in sorted(levels, reverse=True):
            level = levels[depth]
            for start in range(0, len(level), _CHUNK):
                self._settle_chunk(level[start : start + _CHUNK])

    def _settle_chunk(self, cgroups: list[Cgroup]) -> None:
        settled: list[Opened] = []
        try:
            for cgroup in cgroups:
                if not cgroup.gone:
                    cgroup.due = None
                    self._look(cgroup, settled)
            releases = [opened for opened in settled if opened.release]
            self._report(releases)
            subjects = self._call_script(releases)
            with deletions(settled) as noted:
                for opened in settled:
                    self._delete(opened, noted)
            for subject in subjects:
                subject.directory = None
        finally:
            for opened in settled:
                opened.close()

    def _look(self, cgroup: Cgroup, settled: list[Opened]) -> None:
        """Open a cgroup; if it is to be deleted, record its use and add it to SETTLED."""
        path = cgroup.path()
        try:
            with located(cgroup.scope, path) as (fd, short):
                opened = Opened(cgroup, path, os.open(short, OPEN_DIRECTORY, dir_fd=fd))
        except OSError as error:
            self._cannot_look(cgroup, error)
            return
        delete = False
        try:
            delete = self._is_empty(opened) and self._account(opened)
        except OSError as error:
            self._cannot_look(cgroup, error)
        finally:
            if delete:
                settled.append(opened)
            else:
                opened.close()

    def _is_empty(self, opened: Opened) -> bool:
        """Whether no process is in the cgroup or below it."""
        cgroup = opened.cgroup
        events = read_file(opened.directory, b"cgroup.events")
        if events == _EMPTY:
            return True
        if not events.startswith(b"populated 0"):
            cgroup.used = True
            return False
        # It is frozen, and that is what we were notified of; only numbers can show its use.
        cgroup.used = False
        return True

    def _account(self, opened: Opened) -> bool:
        """Record what was used, and say whether the cgroup may be deleted now."""
        cgroup = opened.cgroup
        found = self._accounts.read(opened)
        # After reading: what a child used is in these numbers, but the child will report it.
        if not self._is_childless(opened):
            return False
        own = self._accounts.own(cgroup, found)
        if cgroup.reported and not cgroup.used and not any(msgspec.structs.astuple(own)):
            return True  # it was only the deletion that did not work
        if not cgroup.used and not found.shows_use():
            end = cgroup.seen + self._unclaimed_time
            if self._now < end:
                self._postpone(cgroup, end)
                return False
        opened.release = self._accounts.record(opened, found, own)
        return True

    def _is_childless(self, opened: Opened) -> bool:
        cgroup = opened.cgroup
        status = os.fstat(opened.directory)
        if status.st_ino != cgroup.inode:
            assert cgroup.parent is not None
            self._tree.look_at(cgroup.parent, cgroup.name)
            return False
        if status.st_nlink > 2 and not cgroup.children:
            self._tree.look_below(cgroup)
        return status.st_nlink <= 2  # removing the last child brings us back

    def _postpone(self, cgroup: Cgroup, until: float) -> None:
        cgroup.due = _UNCLAIMED
        self._unclaimed.append((until, cgroup))

    def _cannot_look(self, cgroup: Cgroup, error: OSError) -> None:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            self._tree.lost(cgroup)
        elif error.errno not in (errno.EACCES, errno.EPERM):
            # Out of descriptors or memory: later. What we may not read counts as populated.
            self._complain(cgroup, error)
            self._postpone(cgroup, self._now + _POLL)

    def _report(self, releases: list[Opened]) -> None:
        if self._log_lines and releases:
            lines = [release_line(opened.release) for opened in releases if opened.release]
            _write_all(_STDERR, b"".join(lines))

    def _call_script(self, releases: list[Opened]) -> list[Subject]:
        """Let the script's handlers begin, while the directories still exist."""
        if self._released is None:
            return []
        subjects = [
            Subject(opened.release, opened.directory) for opened in releases if opened.release
        ]
        for subject in subjects:
            self._hand_over(subject)
        return subjects

    def _hand_over(self, subject: Subject) -> None:
        assert self._released is not None
        try:
            self._released(subject)
        except Exception:
            # A mistake of ours in one handler must not keep the others from being deleted.
            _log.exception("%s", printable(subject.release.path).decode())

    def _delete(self, opened: Opened, noted: set[Scope]) -> None:
        cgroup = opened.cgroup
        self._tree.unwatch(cgroup)  # or freezing and deleting it would notify us
        try:
            last = delete(opened, noted)
        except OSError as error:
            self._not_deleted(cgroup, error)
            return
        self._tree.forget(cgroup)
        self.released_count += 1
        if last != opened.cpu_stat and last:
            remainder = self._accounts.remainder(opened, last)
            if remainder is not None and self._released is not None:
                self._hand_over(Subject(remainder, None))

    def _not_deleted(self, cgroup: Cgroup, error: OSError) -> None:
        """Keep a cgroup that lives on, or that we may not delete."""
        assert cgroup.parent is not None
        self._tree.look_at(cgroup.parent, cgroup.name)  # somebody may have moved in
        if error.errno != errno.EBUSY and not cgroup.gone:
            self._complain(cgroup, error)
            self._postpone(cgroup, self._now + _RETRY)

    def _complain(self, cgroup: Cgroup, error: OSError) -> None:
        """Log an error once for each scope and kind."""
        key = (cgroup.scope.path, error.errno)
        if key not in self._complaints:
            self._complaints.add(key)
            _log.error("%s: %s", _display(cgroup), error.strerror)


def _depth(cgroup: Cgroup) -> int:
    depth = 0
    while cgroup.parent is not None:
        cgroup = cgroup.parent
        depth += 1
    return depth


def _flush_statistics(scope: Scope) -> None:
    """Let the kernel add up the statistics of the whole scope at once.

    Reading a cgroup's cpu.stat takes it off its parent's list of cgroups with pending updates,
    which is singly linked: one by one, that walks the list for each (kernel/cgroup/rstat.c).
    """
    with suppress(OSError):  # a scope that is gone is the finder's business
        read_file(scope.fd, CPU_STAT)


def _display(cgroup: Cgroup) -> str:
    return printable(cgroup.scope.path + b"/" + cgroup.path()).decode()


def _write_all(fd: int, data: bytes) -> None:
    """Write all of DATA; what cannot be written at all is lost, the daemon goes on."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            select.select([], [fd], [])
        except OSError:
            return
