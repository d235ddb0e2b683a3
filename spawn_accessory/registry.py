"""NAME to namespaces and leases: what exists, for how long, and how much of it there may be."""

from __future__ import annotations

import array
import os
import select
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Final

from spawn_accessory.expiry import Clock, Expiry
from spawn_accessory.idmaps import parse_maps
from spawn_accessory.keeper import Keeper, Record
from spawn_accessory.namespaces import Maker
from spawn_accessory.policy import Refused
from spawn_accessory.protocol import Listed, Maps, Namespace, Request
from spawn_accessory.settings import Settings
from spawn_accessory.watch import Watch

_RIGHTS_MAX: Final = 64  # different requests that are remembered for a name


class _Entry:
    """One NAME; ``leases`` as in Listed."""

    __slots__ = ("lease", "leases", "name", "namespaces", "rights", "since", "users")

    def __init__(self, name: bytes, since: int) -> None:
        self.name = name
        self.since = since
        self.namespaces: dict[Namespace, Record] = {}
        self.users: dict[Maps, Record] = {}
        self.lease: Record | None = None
        self.leases = 0
        # What to send for a request again: most requests are for what is there.
        self.rights: dict[Request, bytes] = {}

    def find(self, kind: Namespace, maps: Maps | None) -> Record | None:
        if kind is Namespace.USER:
            return self.users.get(maps) if maps is not None else None
        return self.namespaces.get(kind)

    def add(self, record: Record) -> None:
        if record.kind is None:
            self.lease = record
        elif record.kind is Namespace.USER:
            assert record.maps is not None
            self.users[record.maps] = record
        else:
            self.namespaces[record.kind] = record

    def records(self) -> Iterator[Record]:
        yield from self.namespaces.values()
        yield from self.users.values()
        if self.lease is not None:
            yield self.lease

    def kinds(self) -> Iterator[Namespace]:
        """Yield which kinds of namespaces there are, in the order of a response."""
        for kind in Namespace:
            if kind in self.namespaces or (kind is Namespace.USER and self.users):
                yield kind


class Registry:
    """All names of this daemon."""

    def __init__(
        self, settings: Settings, keeper: Keeper, maker: Maker, watch: Watch, clock: Clock
    ) -> None:
        """Begin with what the keeper has."""
        self._limits = settings.limits
        self._keeper = keeper
        self._watch = watch
        self._maker = maker
        self._expiry = Expiry(settings.expiry, clock, self._end)
        self._entries: dict[bytes, _Entry] = {}
        self._namespaces = 0
        for record in sorted(keeper.records, key=lambda record: record.since):
            self._adopt(record)
        for entry in self._entries.values():
            if not entry.leases:
                self._expiry.start(entry.name)

    def use(self, settings: Settings) -> None:
        """Follow other settings from now on."""
        self._limits = settings.limits
        self._expiry.use(settings.expiry)

    def obtain(self, request: Request) -> tuple[bytes, int]:
        """Return the descriptors for a request, made where they are missing.

        Those of namespaces come as SCM_RIGHTS takes them (unix(7)). That of the lease belongs to
        the caller; it is -1 if none was asked for. Refused, BadMap or OSError says why there is
        nothing; and nothing was made then.
        """
        name = request.name
        if name is None:
            raise Refused("NAME is missing")
        entry = self._entries.get(name)
        if entry is None:
            if len(self._entries) >= self._limits.names:
                raise Refused(f"there are {len(self._entries)} names already (limits.names)")
            entry = _Entry(name, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        rights = entry.rights.get(request)
        made = self._make(entry, request) if rights is None else []
        lease = -1
        if request.lease:
            try:
                lease = self._new_lease(entry)
            except OSError:
                self._undo(made)
                raise
        self._entries[name] = entry
        for record in made:
            self._add(entry, record)
        if rights is None:
            if len(entry.rights) >= _RIGHTS_MAX:
                entry.rights.clear()
            rights = entry.rights[request] = _rights(entry, request)
        if entry.leases:
            self._expiry.stop(name)
        else:
            self._expiry.start(name)
        return rights, lease

    def listing(self, after: bytes) -> Iterator[Listed]:
        """Yield the names that sort after AFTER, in their order."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for name in sorted(name for name in self._entries if name > after):
            entry = self._entries[name]
            age = (now - entry.since) // 1_000_000_000
            yield Listed(name, tuple(entry.kinds()), entry.leases, age)

    def summary(self) -> str:
        """Return a line for the service manager."""
        return f"{len(self._entries)} names, {self._namespaces} namespaces"

    def counts(self) -> dict[str, int]:
        """Return how many of everything there are."""
        counts = {"names": len(self._entries)}
        counts["leased"] = sum(entry.leases > 0 for entry in self._entries.values())
        counts["namespaces"] = self._namespaces
        kinds = Counter(record.kind for record in self._keeper.records)
        return counts | {f"namespaces.{kind.name.lower()}": kinds[kind] for kind in Namespace}

    def close(self) -> None:
        """End no name any more; what the keeper has lives on."""
        self._expiry.close()

    # Making

    def _make(self, entry: _Entry, request: Request) -> list[Record]:
        """Make the namespaces that are missing, all or none."""
        name, maps = entry.name, request.maps
        kinds = [kind for kind in request.namespaces if entry.find(kind, maps) is None]
        if self._namespaces + len(kinds) > self._limits.namespaces:
            raise Refused(f"there are {self._namespaces} namespaces already (limits.namespaces)")
        if Namespace.USER in kinds and maps is not None:
            parse_maps(maps.uid, maps.gid)
        made: list[Record] = []
        ordered: list[Record] = []
        problem: OSError | None = None
        try:
            # The keeper works on its part while we work on ours.
            for kind in kinds:
                if not self._maker.makes(kind):
                    theirs = maps if kind is Namespace.USER else None
                    ordered.append(self._keeper.order(kind, name, theirs))
            for kind in kinds:
                if self._maker.makes(kind):
                    fd = self._maker.make(kind)
                    made.append(self._keeper.hold(kind, name, None, (fd,)))
        except OSError as error:
            problem = error
        for record in ordered:
            try:
                made.append(self._keeper.collect(record))
            except OSError as error:
                problem = problem or error
        if problem is not None:
            self._undo(made)
            raise problem
        return made

    def _undo(self, made: Iterable[Record]) -> None:
        for record in made:
            self._keeper.drop(record)

    def _new_lease(self, entry: _Entry) -> int:
        """Return a write end of the name's pipe."""
        if entry.lease is not None:
            path = f"/proc/self/fd/{entry.lease.descriptors[0]}"
            write_end = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        else:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            try:
                self._add(entry, self._keeper.hold(None, entry.name, None, (read_end,)))
            except OSError:
                os.close(write_end)
                raise
        entry.leases += 1
        return write_end

    # Living and ending

    def _adopt(self, record: Record) -> None:
        """Take over what an earlier daemon made."""
        entry = self._entries.get(record.name)
        if entry is None:
            entry = self._entries[record.name] = _Entry(record.name, record.since)
        # It died while it replaced a PID namespace or a lease.
        double = entry.lease if record.kind is None else entry.find(record.kind, record.maps)
        if double is not None:
            self._drop(entry, double)
        self._add(entry, record)
        if record.kind is None:
            entry.leases = int(not _is_ready(record.descriptors[0], select.POLLHUP))

    def _add(self, entry: _Entry, record: Record) -> None:
        entry.add(record)
        self._namespaces += record.kind is not None
        if record.kind is None:
            self._watch.add_event(record.descriptors[0], 0, partial(self._hung_up, entry))
        elif record.kind is Namespace.PID:
            died = partial(self._init_died, entry)
            self._watch.add_event(record.descriptors[1], select.EPOLLIN, died)

    def _drop(self, entry: _Entry, record: Record) -> None:
        entry.rights.clear()
        self._namespaces -= record.kind is not None
        if record.kind is None:
            self._watch.remove(record.descriptors[0])
        elif record.kind is Namespace.PID:
            self._watch.remove(record.descriptors[1])
        self._keeper.drop(record)

    def _hung_up(self, entry: _Entry) -> None:
        """Begin to count when the last lease was closed, and no other one given out since."""
        if entry.lease and _is_ready(entry.lease.descriptors[0], select.POLLHUP):
            entry.leases = 0
            self._expiry.start(entry.name)

    def _init_died(self, entry: _Entry) -> None:
        """Forget a PID namespace in which nothing can be started any more."""
        self._drop(entry, entry.namespaces.pop(Namespace.PID))

    def _end(self, name: bytes) -> None:
        entry = self._entries.pop(name)
        for record in entry.records():
            self._drop(entry, record)


def _rights(entry: _Entry, request: Request) -> bytes:
    found = (entry.find(kind, request.maps) for kind in request.namespaces)
    return array.array("i", [record.descriptors[0] for record in found if record]).tobytes()


def _is_ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(0))
