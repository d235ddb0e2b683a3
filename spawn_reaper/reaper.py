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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Final, Protocol

import msgspec

from spawn_common.claims import AlreadyRunning, Claims
from spawn_reaper.accounts import Accounts, Opened
from spawn_reaper.baselines import load_baselines, save_baselines
from spawn_reaper.deletion import delete, deletions, recover
from spawn_reaper.release import Release
from spawn_reaper.report import printable, release_line
from spawn_reaper.schedule import Schedule
from spawn_reaper.scopes import ScopeFinder
from spawn_reaper.tree import OPEN_DIRECTORY, Cgroup, Scope, Tree, located
from spawn_reaper.usage import CPU_STAT, read_file

_log = logging.getLogger(__name__)

# All work is done at multiples of this many seconds, so that much of it is done in one go. The
# kernel itself merges what happens to a cgroup within 10 ms; a watch placed that late still fires.
_TICK: Final = 0.01
_POLL: Final = 2.0  # seconds between looks at what cannot be watched
_FLUSH: Final = 8  # cgroups in a batch for which flushing the scope's statistics is worth it
_BATCH: Final = 64  # cgroups whose descriptors are open at the same time
_SCAN: Final = 3.0  # seconds from one scan of everything to the next
_FULL: Final = 32768  # bytes of events that say that there are more
_HOLD: Final = 0.1  # seconds until the hooks are asked again whether they have room
_RETRY: Final = 60.0  # seconds until what failed, such as a refused deletion, is tried again
_STDERR: Final = 2
_EMPTY: Final = b"populated 0\nfrozen 0\n"


class Hooks(Protocol):
    """What is told of each release."""

    def full(self) -> bool:
        """Whether to keep further releases back, by letting cgroups be."""

    def hand_over(self, releases: list[Release], begun: Callable[[], None]) -> None:
        """Take releases; call BEGUN, now or later, when their directories need not be kept."""

    def fall_behind(self) -> None:
        """Call what waits to be called; let nothing wait again before all releases have begun."""


class _Level:
    """Cgroups of one depth that were recorded together, and will be deleted together."""

    __slots__ = ("members", "recorded")

    def __init__(self, recorded: float) -> None:
        self.members: list[Opened] = []
        self.recorded = recorded  # monotonic time


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
        hooks: Hooks | None,
    ) -> None:
        """GRACE and UNCLAIMED are seconds."""
        self._finder = finder
        self._accounts = accounts
        self._claims = claims
        self._grace = grace
        self._unclaimed_time = unclaimed
        self._log_lines = log_lines
        self._hooks = hooks
        self._tree = Tree(self)
        self._now = time.monotonic()
        self._schedule = Schedule()
        self._complaints: set[tuple[bytes, int | None]] = set()
        self._refused: set[str] = set()  # scopes that another reaper manages
        self._exhausted = False
        self._holding = False  # releases, since the hooks are full
        self._started = False
        self._stopped = False
        self._settling: list[_Level] = []  # what hooks may look at before it is deleted
        self._patience = max(grace, _TICK)  # seconds that others are kept waiting for a hook
        self._timer: asyncio.TimerHandle | None = None
        self._timer_end = math.inf
        self._poll_timer: asyncio.TimerHandle | None = None
        self._scan_timer: asyncio.TimerHandle | None = None
        self._scanned = -_SCAN  # monotonic time of the last scan
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
        for timer in (self._timer, self._poll_timer, self._scan_timer):
            if timer is not None:
                timer.cancel()
        self._finish_all()
        for scope in self._tree.scopes.values():
            save_baselines(scope)
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
        try:
            found = self._finder.find()
        except OSError as error:  # out of descriptors or memory: ask again later
            _log.error("cannot look for scopes: %s", error.strerror)
            self._arm_poll()
            return
        for path, scope in list(self._tree.scopes.items()):
            if found.get(path) != scope.root.inode:
                _log.info("scope %s is gone", printable(path).decode())
                self._tree.drop(scope)
                self._claims.give_back(os.fsdecode(path))
        for path in sorted(found.keys() - self._tree.scopes.keys()):
            self._adopt(path)
        self._arm_poll()

    def _adopt(self, path: bytes) -> None:
        """Begin to manage a scope; if that fails, it is tried again at the next poll."""
        name = os.fsdecode(path)
        try:
            self._claims.take(name)
        except AlreadyRunning as error:
            if not self._started:
                raise
            self._finder.incomplete = True
            if name not in self._refused:
                self._refused.add(name)
                _log.error("%s", error)
            return
        try:
            scope = self._tree.adopt(path, self._finder.open(path))
        except OSError as error:
            self._claims.give_back(name)
            if error.errno != errno.ENOENT:
                self._finder.incomplete = True
                _log.error("scope %s: %s", printable(path).decode(), error.strerror)
            return
        recover(scope)
        load_baselines(scope)
        self._refused.discard(name)
        _log.info("watching scope %s", printable(path).decode())

    def _tree_readable(self) -> None:
        self._loop.remove_reader(self._tree.fd)
        self._read_events()

    def _read_events(self) -> None:
        """Handle a buffer of events and come back soon; wait for more only when there are none."""
        if self._stopped:
            return
        self._now = time.monotonic()
        size = _FULL  # after a mistake of ours, which the loop reports, there may be more to read
        try:
            size = self._tree.handle_events()
        finally:
            if size >= _FULL:
                self._loop.call_soon(self._read_events)
            elif size or not self._wait_for_events():
                self._loop.call_at(_next_tick(time.monotonic()), self._read_events)
        if self._tree.overflowed and self._scan_timer is None:
            # Not at once if it was only just done: a flood would keep us scanning.
            start = max(self._now, self._scanned + _SCAN)
            self._scan_timer = self._loop.call_at(start, self._scan)
        self._arm_poll()

    def _wait_for_events(self) -> bool:
        """Be called when there are more; False if the kernel has no room for that."""
        try:
            self._loop.add_reader(self._tree.fd, self._tree_readable)
        except OSError:  # fs.epoll.max_user_watches, which somebody else of our user may use up
            return False
        return True

    def _scan(self) -> None:
        self._scan_timer = None
        self._now = time.monotonic()
        _log.warning("the inotify queue overflowed, scanning all scopes again")
        self._tree.scan()
        self._scanned = time.monotonic()

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
        cgroup.ripe = False
        grace = self._grace if cgroup.scope.populated else 0.0
        self._look_at(_next_tick(self._now + grace), cgroup)

    def childless(self, cgroup: Cgroup) -> None:
        """Look at the cgroup now, if it was only its children that kept it from being deleted."""
        if cgroup.ripe:
            self._look_at(self._now, cgroup)
        else:
            self.touched(cgroup)

    def vanished(self, cgroup: Cgroup) -> None:
        """Take note that somebody else deleted a cgroup; say so if its use was not recorded."""
        self._accounts.bequeath(cgroup)
        if cgroup.used or self._is_new_to_us(cgroup):
            self.unread_count += 1
            _log.warning(
                "%s: deleted by somebody else before it could be accounted for", _display(cgroup)
            )

    def _is_new_to_us(self, cgroup: Cgroup) -> bool:
        """Whether something has happened to it that was not looked into."""
        return cgroup.due is not None and cgroup.due <= self._now + self._grace + _TICK

    def emptied(self, scope: Scope) -> None:
        """Hurry: the service manager is about to delete everything in the scope."""
        self._loop.call_soon(self._finish_all)
        soon = _next_tick(self._now + self._grace)
        for cgroup in scope.root.descendants():
            # What has not been used yet, and is known to be so, is left to its spawner.
            if cgroup.used or cgroup.due is None or cgroup.due <= soon:
                self._look_at(self._now, cgroup)

    # Batches

    def _look_at(self, when: float, cgroup: Cgroup) -> None:
        self._schedule.at(when, cgroup)
        if when < self._timer_end:
            self._arm()

    def _arm(self) -> None:
        """Set the timer for whatever comes first."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_end = self._schedule.next_time()
        if self._timer_end < math.inf and not self._stopped:
            self._timer = self._loop.call_at(self._timer_end, self._settle)

    def _settle(self) -> None:
        """Deal with what is due, and come back for the rest after other events."""
        self._timer = None
        self._timer_end = math.inf
        self._now = time.monotonic()
        if self._settling and self._now < (end := self._settling[-1].recorded + self._patience):
            # What is recorded and not deleted yet, a kill of ours would record again.
            self._timer_end = end
            self._timer = self._loop.call_at(end, self._settle)
            return
        if self._settling and self._hooks is not None:
            self._hooks.fall_behind()  # others are due: whoever waits is told now
        if self._must_hold():
            batch = self._in_danger()
            self._timer_end = self._now if batch else self._now + _HOLD
            self._timer = self._loop.call_at(self._timer_end, self._settle)
            self._settle_batch(batch)
            return
        try:
            self._settle_batch(self._schedule.take_due(self._now, _BATCH))
        finally:
            self._arm()

    def _must_hold(self) -> bool:
        """Whether nothing may be released now; what is not released is not lost."""
        hold = self._hooks is not None and self._hooks.full()
        if hold and not self._holding:
            _log.warning("too many releases wait for handlers; cgroups stay until there is room")
        elif self._holding and not hold:
            _log.info("there is room for releases again")
        self._holding = hold
        return hold

    def _in_danger(self) -> list[Cgroup]:
        """Take what is due in scopes that have run empty, and may go at any moment."""
        due = (
            cgroup
            for scope in self._tree.scopes.values()
            if not scope.populated
            for cgroup in scope.root.descendants()
            if cgroup.due is not None and cgroup.due <= self._now
        )
        batch = list(islice(due, _BATCH))
        for cgroup in batch:
            cgroup.due = None
        return batch

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
            self._settle_level(levels[depth])

    def _settle_level(self, cgroups: list[Cgroup]) -> None:
        """Record what can be released; it is deleted when the hooks have had a look at it."""
        level = _Level(self._now)
        settled = level.members
        self._settling.append(level)
        try:
            for cgroup in cgroups:
                if not cgroup.gone and not cgroup.settling:
                    self._look(cgroup, settled)
            self._report(settled)
            self._hand_over(
                [opened.release for opened in settled if opened.release],
                partial(self._finish, level),
            )
        except Exception:
            self._interrupted(cgroups)
            self._close(level)
        if not all(opened.cgroup.scope.populated for opened in settled):
            self._finish(level)  # there are others to be read before they go

    def _finish_all(self) -> None:
        for level in list(self._settling):
            self._finish(level)

    def _finish(self, level: _Level) -> None:
        """Delete cgroups that were recorded together, unless that was done before."""
        if level not in self._settling:
            return
        self._now = time.monotonic()
        settled = level.members
        try:
            self._delete_all([opened for opened in settled if self._is_unchanged(opened)])
        except Exception:
            self._interrupted([opened.cgroup for opened in settled])
        finally:
            self._close(level)
            if not self._settling:
                self._arm()

    def _is_unchanged(self, opened: Opened) -> bool:
        """Whether a cgroup is there, and nothing was used in it since it was recorded.

        What was used by now is recorded as it was before: after the grace time. An event alone does
        not mean that: somebody may have frozen it, and some events come late.
        """
        cgroup = opened.cgroup
        if cgroup.gone or not cgroup.used:
            return not cgroup.gone
        with suppress(OSError):  # deleted by somebody else: that is seen once more
            if opened.read_cpu_stat() != opened.cpu_stat:
                self.touched(cgroup)
                return False
        cgroup.used = False
        return True

    def _interrupted(self, cgroups: list[Cgroup]) -> None:
        """Go on after a mistake of ours: nothing else may wait for it, nothing may be forgotten."""
        _log.exception("a batch of %d cgroups was interrupted", len(cgroups))
        for cgroup in cgroups:
            if not cgroup.gone:
                self._look_at(self._now + _RETRY, cgroup)

    def _close(self, level: _Level) -> None:
        if level in self._settling:
            self._settling.remove(level)
            for opened in level.members:
                opened.cgroup.settling = False
                opened.close()

    def _delete_all(self, settled: list[Opened]) -> None:
        remainders: list[Release] = []
        try:
            with deletions(settled) as noted:
                for opened in settled:
                    remainders += self._delete(opened, noted)
        finally:
            self._hand_over(remainders, lambda: None)

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
                cgroup.settling = True
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
        opened.frozen = True
        cgroup.used = False
        return True

    def _account(self, opened: Opened) -> bool:
        """Record what was used, and say whether the cgroup may be deleted now."""
        cgroup = opened.cgroup
        found = self._accounts.read(opened)
        # After reading: what a child used is in these numbers, but the child will report it.
        if not self._is_childless(opened):
            cgroup.ripe = True
            return False
        own = self._accounts.own(cgroup, found)
        if cgroup.reported and not cgroup.used and not any(msgspec.structs.astuple(own)):
            return True  # it was only the deletion that did not work
        if not cgroup.used:
            if found.shows_use():
                # By its first process, perhaps, which came in after we had looked.
                if not self._is_empty(opened):
                    return False
            elif self._now < (end := cgroup.seen + self._unclaimed_time):
                self._look_at(end, cgroup)
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

    def _cannot_look(self, cgroup: Cgroup, error: OSError) -> None:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            self._tree.lost(cgroup)
        elif error.errno in (errno.EACCES, errno.EPERM):
            self._tree.unwatched.add(cgroup)  # counts as populated until poll may read it
            self._arm_poll()
        else:
            # Out of descriptors or memory: later.
            self._complain(cgroup, error)
            self._look_at(self._now + _POLL, cgroup)

    def _report(self, settled: list[Opened]) -> None:
        if self._log_lines:
            lines = [release_line(opened.release) for opened in settled if opened.release]
            _write_all(_STDERR, b"".join(lines))

    def _hand_over(self, releases: list[Release], begun: Callable[[], None]) -> None:
        if self._hooks is None or not releases:
            begun()
        else:
            self._hooks.hand_over(releases, begun)

    def _delete(self, opened: Opened, noted: set[Scope]) -> list[Release]:
        """Delete a cgroup if that is possible; return what it used since it was recorded."""
        cgroup = opened.cgroup
        self._tree.unwatch(cgroup)  # or freezing and deleting it would notify us
        try:
            last = delete(opened, noted)
        except OSError as error:
            self._not_deleted(cgroup, error)
            return []
        remainders = []
        if last != opened.cpu_stat and last:
            remainders = self._accounts.remainder(opened, last)
        self._accounts.bequeath(cgroup)
        self._tree.forget(cgroup)
        self.released_count += 1
        return remainders

    def _not_deleted(self, cgroup: Cgroup, error: OSError) -> None:
        """Keep a cgroup that lives on, or that we may not delete."""
        assert cgroup.parent is not None
        self._tree.look_at(cgroup.parent, cgroup.name)  # somebody may have moved in
        if error.errno != errno.EBUSY and not cgroup.gone:
            self._complain(cgroup, error)
            self._look_at(self._now + _RETRY, cgroup)

    def _complain(self, cgroup: Cgroup, error: OSError) -> None:
        """Log an error once for each scope and kind."""
        key = (cgroup.scope.path, error.errno)
        if key not in self._complaints:
            self._complaints.add(key)
            _log.error("%s: %s", _display(cgroup), error.strerror)


def _next_tick(when: float) -> float:
    return math.ceil(when / _TICK) * _TICK


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
