"""The keeper: a process that outlives the daemon and holds all that must not end with it.

Every descriptor of a namespace or lease is a Record; the daemon has it, and the keeper has it too.
A daemon that starts gets them back from the keeper, whose socket the service manager stores. If the
keeper dies, the daemon starts another one and hands it everything. See programs/keeper.c for the
other side.

The keeper also makes those namespaces that need a program of their own: it is small, and so are its
children.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import msgspec

from spawn_accessory.namespaces import limit_reached
from spawn_accessory.programs import find
from spawn_accessory.protocol import Maps, Namespace
from spawn_accessory.records import (
    Header,
    Operation,
    Record,
    Truncated,
    close_all,
    ended,
    foreign,
    pack_header,
    read_record,
    receive,
)
from spawn_accessory.strays import end_strays, pid_of
from spawn_accessory.watch import Watch

_log = logging.getLogger("spawn_accessory")

_VERSION: Final = 1
_TIMEOUT: Final = struct.pack("@ll", 10, 0)
_PAUSE: Final = 1.0  # seconds, before another keeper is tried again
_WAITING: Final = int(socket.MSG_NOSIGNAL)
_TRYING: Final = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


_Rights = Iterable[tuple[int, int, bytes]]


class Keeper:
    """The daemon's end of the keeper; holds what it is given, whatever happens to the process."""

    def __init__(
        self,
        address: str,
        watch: Watch,
        store: Callable[[int], None],
        olds: Iterable[socket.socket] = (),
    ) -> None:
        """Take over the keeper at one of OLDS, or start one, which is handed to STORE.

        ADDRESS tells the inits of one daemon from those of others. OSError if no keeper can be
        started.
        """
        self._address = address
        self._watch = watch
        self._store = store
        self._keeper, self._init = find("keeper"), find("init")
        self._records: dict[int, Record] = {}
        self._free: list[int] = []
        self._ordered: list[Record] = []
        self._socket: socket.socket | None = None
        self._queue: socket.socket | None = None
        self._untold: dict[int, Record] = {}  # what a new keeper has not been told yet
        self._undropped: list[bytes] = []
        self._hangs = False  # the keeper did not answer in time
        self._full: set[socket.socket] = set()  # it did not make room in them in time
        self._retry: asyncio.TimerHandle | None = None
        for old in olds:
            if self._socket is None:
                self._try_to_take_over(old)
            else:
                old.close()
        if self._socket is None:
            self._start()
        self._end_strays()

    @property
    def records(self) -> Iterable[Record]:
        """All that is held."""
        return self._records.values()

    def hold(
        self, kind: Namespace | None, name: bytes, maps: Maps | None, descriptors: tuple[int, ...]
    ) -> Record:
        """Keep descriptors, which belong to us from now on."""
        record = self._new(kind, name, maps, descriptors)
        self._records[record.slot] = record
        try:
            self._enqueue(record)
        except OSError as error:
            del self._records[record.slot]
            self._untold.pop(record.slot, None)
            self._free.append(record.slot)
            close_all(descriptors)
            raise _unreachable(error) from None
        return record

    def order(self, kind: Namespace, name: bytes) -> Record:
        """Ask for a new PID, mount or time namespace; ``collect`` returns it."""
        record = self._new(kind, name, None, ())
        self._ordered.append(record)
        try:
            self._send(record)
        except OSError as error:
            self._ordered.remove(record)
            self._free.append(record.slot)
            raise _unreachable(error) from None
        return record

    def collect(self, ordered: Record) -> Record:
        """Return what was ordered, as soon as it is there; OSError if it could not be made.

        Records are collected in the order in which they were ordered, and each of them is.
        """
        number, descriptors = errno.EIO, tuple[int, ...]()
        try:
            number, descriptors = self._answer(ordered)
        finally:
            if ordered in self._ordered:
                self._ordered.remove(ordered)
            if number or not descriptors:
                self._free.append(ordered.slot)
        if number or not descriptors:
            close_all(descriptors)
            raise _failure(ordered, number)
        record = msgspec.structs.replace(ordered, descriptors=descriptors)
        self._records[record.slot] = record
        return record

    def drop(self, record: Record) -> None:
        """End a record: closes its descriptors, and kills the init of a PID namespace.

        A keeper that does not read is told later.
        """
        if record.kind is Namespace.PID:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(record.descriptors[1], signal.SIGKILL)
        del self._records[record.slot]
        self._untold.pop(record.slot, None)
        close_all(record.descriptors)
        self._free.append(record.slot)
        self._tell_drop(record)

    def close(self) -> None:
        """Close our descriptors. The keeper goes on if somebody else holds its socket."""
        if self._retry is not None:
            self._retry.cancel()
        self._forget_sockets()
        for record in self._records.values():
            close_all(record.descriptors)
        self._records.clear()

    def _new(
        self, kind: Namespace | None, name: bytes, maps: Maps | None, descriptors: tuple[int, ...]
    ) -> Record:
        slot = self._free.pop() if self._free else len(self._records) + len(self._ordered)
        since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return Record(slot, kind, name, maps, since, descriptors)

    # Messages

    def _send(self, record: Record) -> None:
        """Ask for a namespace."""
        try:
            self._catch_up()
            self._try_to_send((record.header(Operation.MAKE), record.text()))
        except ConnectionError:
            self._replace()  # asks the new one

    def _enqueue(self, record: Record) -> None:
        """Put a record into the queue; nobody is woken up for it, unless there is no room."""
        try:
            self._catch_up()
            self._try_to_enqueue(record)
        except ConnectionError:
            self._replace()  # tells the new one of everything

    def _try_to_send(self, parts: Iterable[bytes], *, wait: bool = True) -> None:
        if self._socket is None:
            raise ended()
        self._sendmsg(self._socket, parts, (), wait=wait)

    def _try_to_enqueue(self, record: Record, *, wait: bool = True) -> None:
        if self._queue is None:
            raise ended()
        fds = struct.pack(f"={len(record.descriptors)}i", *record.descriptors)
        rights = ((socket.SOL_SOCKET, socket.SCM_RIGHTS, fds),)
        parts = (record.header(Operation.HOLD), record.text())
        try:
            self._sendmsg(self._queue, parts, rights, wait=False)
        except BlockingIOError:
            self._try_to_read(wait=wait)
            self._sendmsg(self._queue, parts, rights, wait=wait)

    def _try_to_read(self, *, wait: bool = True) -> None:
        """Let the keeper read the queue."""
        self._try_to_send((pack_header(Operation.READ, 0),), wait=wait)

    def _sendmsg(
        self, end: socket.socket, parts: Iterable[bytes], rights: _Rights, *, wait: bool
    ) -> None:
        """Send a message; BlockingIOError if there is no room. Nobody waits for that twice."""
        waits = wait and not self._hangs and end not in self._full
        try:
            end.sendmsg(parts, rights, _WAITING if waits else _TRYING)
        except BlockingIOError:
            if waits:
                self._full.add(end)
            raise
        self._full.discard(end)

    def _tell_drop(self, record: Record) -> None:
        self._undropped.append(record.header(Operation.DROP))
        try:
            self._tell_drops(wait=False)
        except BlockingIOError:
            self._wait_for(select.EPOLLIN | select.EPOLLOUT)
        except ConnectionError:
            self._recover()
        except OSError as error:
            _log.error("the keeper cannot be told what to end: %s", error.strerror)

    def _tell_drops(self, *, wait: bool) -> None:
        while self._undropped:
            self._try_to_send((self._undropped[0],), wait=wait)
            self._undropped.pop(0)

    def _wait_for(self, events: int) -> None:
        if self._socket is not None:
            self._watch.change_event(self._socket.fileno(), events)

    def _catch_up(self, *, wait: bool = True) -> None:
        """Tell the keeper what it has not been told when it was time."""
        if not self._untold and not self._undropped:
            return
        self._tell_drops(wait=wait)
        while self._untold:
            slot, record = next(iter(self._untold.items()))
            self._try_to_enqueue(record, wait=wait)
            del self._untold[slot]
        self._try_to_read(wait=wait)
        self._wait_for(select.EPOLLIN)

    def _answer(self, ordered: Record) -> tuple[int, tuple[int, ...]]:
        """Return errno and descriptors of what was ordered."""
        for _ in range(2):
            try:
                while True:
                    header, _, descriptors = self._receive()
                    if header.operation == Operation.MAKE and header.since == ordered.since:
                        return header.error, descriptors
                    close_all(descriptors)  # of one that came too late
            except BlockingIOError:
                self._hangs = True
                return self._give_up(ordered, errno.ETIMEDOUT)
            except Truncated:
                return self._give_up(ordered, errno.EMFILE)
            except ConnectionError:
                self._replace()
        return self._give_up(ordered, errno.ECONNRESET)

    def _give_up(self, ordered: Record, number: int) -> tuple[int, tuple[int, ...]]:
        """Have nobody make what was ordered; return why there is nothing."""
        self._ordered.remove(ordered)
        self._tell_drop(ordered)
        return number, ()

    def _receive(self) -> tuple[Header, bytes, tuple[int, ...]]:
        if self._socket is None:
            raise ended()
        flags = socket.MSG_DONTWAIT if self._hangs else 0
        message = receive(self._socket, flags)
        self._hangs = False
        return message

    # The process

    def _start(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_spawn(
                self._keeper,
                [str(self._keeper), str(self._init), self._address],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, its.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, null, 1),
                    (os.POSIX_SPAWN_DUP2, null, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            its.close()
            os.close(null)
        if not self._try_to_take_over(ours):
            raise ended()
        try:
            self._store(ours.fileno())
        except OSError as error:
            _log.error("the service manager does not keep what a restart needs: %s", error.strerror)

    def _forget_sockets(self) -> None:
        if self._socket is not None:
            self._watch.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _ready(self) -> None:
        """Look at the socket: take answers that nobody waits for, and replace a dead keeper."""
        try:
            while self._socket is not None:
                with suppress(Truncated):
                    close_all(receive(self._socket, socket.MSG_DONTWAIT)[2])
                self._hangs = False
        except BlockingIOError:
            self._go_on()
        except ConnectionError:
            self._recover()

    def _go_on(self) -> None:
        """Tell a keeper that lives what it has not been told, as far as there is room."""
        try:
            self._catch_up(wait=False)
        except BlockingIOError:
            self._wait_for(select.EPOLLIN | select.EPOLLOUT)
        except ConnectionError:
            self._recover()

    def _recover(self) -> None:
        """Replace the keeper, later if that is not possible now."""
        try:
            self._replace()
        except OSError as error:
            _log.error("the keeper has died, and there is no other: %s", error.strerror)

    def _replace(self) -> None:
        """Start another keeper, and tell it of everything; tried again later if it fails."""
        _log.warning("the keeper has died; starting another")
        self._forget_sockets()
        self._hangs = False
        self._full.clear()
        self._untold = dict(self._records)
        self._undropped.clear()
        try:
            self._start()
            self._catch_up()
            self._end_strays()  # while all inits that live are known
            for record in self._ordered:
                self._try_to_send((record.header(Operation.MAKE), record.text()))
        except OSError:
            if self._retry is None:
                self._retry = asyncio.get_running_loop().call_later(_PAUSE, self._try_again)
            raise

    def _try_again(self) -> None:
        self._retry = None
        if self._socket is None:
            self._recover()
        else:
            self._go_on()

    def _end_strays(self) -> None:
        try:
            known = {
                pid_of(record.descriptors[1])
                for record in self._records.values()
                if record.kind is Namespace.PID
            }
            end_strays(self._init, self._address, known)
        except OSError as error:
            _log.error("inits that were lost cannot be found: %s", error.strerror)

    def _try_to_take_over(self, end: socket.socket) -> bool:
        """Use the keeper at END, unless it has died; get everything back that it has.

        Any other OSError means that it has what we cannot take now, and that shall not be lost.
        """
        try:
            records, queue, limit = _take_over(end)
        except ConnectionError:
            end.close()
            return False
        except BlockingIOError as error:
            raise _unreachable(error) from None
        _limit_descriptors(limit)
        if records:
            self._records = records
            self._free = [slot for slot in range(max(records)) if slot not in records]
        self._socket, self._queue = end, queue
        self._watch.add_event(end.fileno(), select.EPOLLIN, self._ready)
        return True


def _limit_descriptors(keeper: int) -> None:
    """Have as many descriptors as we may, but not more than the KEEPER.

    So the one to run out of them is the daemon, which can say so: it has all that the keeper has.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(keeper, hard), hard))


def _take_over(end: socket.socket) -> tuple[dict[int, Record], socket.socket, int]:
    """Return what the keeper at END has, the end of its queue, and its limit of descriptors."""
    nonce = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    records: dict[int, Record] = {}
    try:
        _prepared(end).sendmsg([pack_header(Operation.ALL, nonce)], (), _WAITING)
        while True:
            header, text, descriptors = receive(end)
            if header.operation == Operation.ALL and header.since == nonce:
                if header.kind != _VERSION or not descriptors:
                    close_all(descriptors)
                    raise foreign()
                queue = _prepared(socket.socket(fileno=descriptors[0]))
                return records, queue, header.slot
            # Else it is what was sent to a daemon that has died meanwhile.
            if header.operation == Operation.HOLD and descriptors and header.slot not in records:
                records[header.slot] = read_record(header, text, descriptors)
            else:
                close_all(descriptors)
    except OSError:
        for record in records.values():
            close_all(record.descriptors)
        raise


def _prepared(end: socket.socket) -> socket.socket:
    # Not settimeout(): that makes two system calls of each.
    end.setblocking(True)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEOUT)
    return end


def _unreachable(error: OSError) -> OSError:
    """Return what to tell a client about an error on the way to the keeper."""
    if isinstance(error, BlockingIOError):
        return OSError(errno.ETIMEDOUT, "the keeper does not answer")
    if isinstance(error, ConnectionError):
        return ended()
    return error


def _failure(ordered: Record, number: int) -> OSError:
    assert ordered.kind is not None
    if number == errno.ENOSPC:
        return limit_reached(ordered.kind)
    reasons = {
        0: "out of descriptors",
        errno.ETIMEDOUT: "the keeper does not answer",
        errno.ECONNRESET: "the keeper has ended",
    }
    reason = reasons.get(number) or os.strerror(number)
    return OSError(number or errno.EMFILE, f"no {ordered.kind.name} namespace: {reason}")
