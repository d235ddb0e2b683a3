"""NAME to namespaces and leases: what exists, for how long, and how much of it there may be."""

from __future__ import annotations

import array
import os
import select
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Final

from spawn_accessory.expiry import Clock, Expiry
from spawn_accessory.idmaps import parse_maps
from spawn_accessory.keeper import Keeper
from spawn_accessory.namespaces import Maker
from spawn_accessory.policy import Refused
from spawn_accessory.protocol import Listed, Maps, Namespace, Request
from spawn_accessory.records import Record
from spawn_accessory.settings import Settings
from spawn_accessory.watch import Watch

_RIGHTS_MAX: Final = 16  # different requests that are remembered for a name


_Key = tuple[Namespace | None, Maps | None]
_LEASE: Final = (None, None)


class _Entry:
    """One NAME; ``leases`` as in Listed."""

    __slots__ = ("leases", "name", "records", "rights", "since")

    def __init__(self, name: bytes, since: int) -> None:
        self.name = name
        self.since = since
        self.records: dict[_Key, Record] = {}
        self.leases = 0
        # What to send for a request again: most requests are for what is there.
        self.rights: dict[Request, bytes] = {}

    def find(self, request: Request) -> Iterator[Record | None]:
        """Yield what there is of what is asked for."""
        for kind in request.namespaces:
            yield self.records.get((kind, request.maps if kind is Namespace.USER else None))

    def kinds(self) -> tuple[Namespace, ...]:
        """Return which kinds of namespaces there are, in the order of a response."""
        kinds = {kind for kind, _ in self.records}
        return tuple(kind for kind in Namespace if kind in kinds)


def _key(record: Record) -> _Key:
    return record.kind, record.maps


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
        try:
            for record in made:
                self._add(entry, record)
            if request.lease:
                lease = self._new_lease(entry)
        except OSError:
            for record in made:
                self._drop(entry, record)
            raise
        self._entries[name] = entry
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
            yield Listed(name, entry.kinds(), entry.leases, age)

    def summary(self) -> str:
        """Return a line for the service manager."""
        names = len(self._entries)
        return f"{names} name{'' if names == 1 else 's'}, {self._namespaces} namespaces"

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
        found = zip(request.namespaces, entry.find(request), strict=True)
        kinds = [kind for kind, record in found if record is None]
        if kinds and self._namespaces + len(kinds) > self._limits.namespaces:
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
                    record = self._keeper.order(kind, name)
                    ordered.append(record)
            for kind in kinds:
                if self._maker.makes(kind):
                    fd = self._maker.make(kind, maps)
                    its_maps = maps if kind is Namespace.USER else None
                    made.append(self._keeper.hold(kind, name, its_maps, (fd,)))
        except OSError as error:
            problem = error
        for record in ordered:
            try:
                made.append(self._keeper.collect(record))
            except OSError as error:
                problem = problem or error
        if problem is not None:
            for record in made:
                self._keeper.drop(record)
            raise problem
        return made

    def _new_lease(self, entry: _Entry) -> int:
        """Return a write end of the name's pipe."""
        if (held := entry.records.get(_LEASE)) is not None:
            path = f"/proc/self/fd/{held.descriptors[0]}"
            write_end = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        else:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            record: Record | None = None
            try:
                record = self._keeper.hold(None, entry.name, None, (read_end,))
                self._add(entry, record)
            except OSError:
                os.close(write_end)
                if record is not None:
                    self._drop(entry, record)
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
        if (double := entry.records.get(_key(record))) is not None:
            self._drop(entry, double)
        self._add(entry, record)
        if record.kind is None:
            entry.leases = int(not _is_ready(record.descriptors[0], select.POLLHUP))

    def _add(self, entry: _Entry, record: Record) -> None:
        if record.kind is None:
            self._watch.add_event(record.descriptors[0], 0, partial(self._hung_up, entry))
        elif record.kind is Namespace.PID:
            died = partial(self._init_died, entry)
            self._watch.add_event(record.descriptors[1], select.EPOLLIN, died)
        entry.records[_key(record)] = record
        self._namespaces += record.kind is not None

    def _drop(self, entry: _Entry, record: Record) -> None:
        """End a record, whether it has been added or not."""
        if entry.records.pop(_key(record), None) is not None:
            entry.rights.clear()
            self._namespaces -= record.kind is not None
        for fd in record.descriptors:
            self._watch.remove(fd)
        self._keeper.drop(record)

    def _hung_up(self, entry: _Entry) -> None:
        """Begin to count when the last lease was closed, and no other one given out since."""
        if _is_ready(entry.records[_LEASE].descriptors[0], select.POLLHUP):
            entry.leases = 0
            self._expiry.start(entry.name)

    def _init_died(self, entry: _Entry) -> None:
        """Forget a PID namespace in which nothing can be started any more."""
        self._drop(entry, entry.records[Namespace.PID, None])

    def _end(self, name: bytes) -> None:
        entry = self._entries.pop(name)
        for record in tuple(entry.records.values()):
            self._drop(entry, record)


def _rights(entry: _Entry, request: Request) -> bytes:
    descriptors = [record.descriptors[0] for record in entry.find(request) if record]
    return array.array("i", descriptors).tobytes()


def _is_ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(0))
