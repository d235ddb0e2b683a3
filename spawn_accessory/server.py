"""Connections: takes requests, asks the registry, sends the answers."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Final

from spawn_accessory.idmaps import BadMap
from spawn_accessory.policy import Access, Policy, Refused
from spawn_accessory.protocol import (
    DATAGRAM_MAX,
    Malformed,
    Namespace,
    Request,
    Response,
    pack_page,
    pack_response,
    unpack_request,
)
from spawn_accessory.registry import Registry
from spawn_accessory.settings import Settings
from spawn_accessory.watch import Watch
from spawn_common import linux

_log = logging.getLogger("spawn_accessory")

_STRANGERS_MAX: Final = 64  # connections of those who may ask for nothing
_AT_ONCE: Final = 64  # connections accepted before others get a turn
_LAST_REQUESTS: Final = 1000  # answered to one connection when the daemon ends
_UNREAD_SECONDS: Final = 10.0
_QUIET_SECONDS: Final = 60.0
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# Plain numbers: "&" of the enumeration costs as much as a system call.
_SENDING: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_TRUNCATED: Final = int(socket.MSG_CTRUNC)
_INT: Final = struct.Struct("=i")

# A spawner asks for the same again and again.
_understood = lru_cache(256)(unpack_request)


@lru_cache(256)
def _granted(namespaces: tuple[Namespace, ...], lease: bool) -> bytes:
    return pack_response(Response(namespaces, lease))


class _Connection:
    """One client; ``access`` is None for one who may ask for nothing."""

    __slots__ = ("access", "socket", "timer", "uid")

    def __init__(self, end: socket.socket, uid: int, access: Access | None) -> None:
        self.socket = end
        self.uid = uid
        self.access = access
        self.timer: asyncio.TimerHandle | None = None


class Server:
    """Serves clients that connect to some listening sockets; needs a running event loop."""

    def __init__(
        self,
        listeners: Iterable[socket.socket],
        registry: Registry,
        settings: Settings,
        watch: Watch,
        describe: Callable[[], str],
    ) -> None:
        """DESCRIBE gives the answer to STATUS."""
        self._listeners = tuple(listeners)
        self._registry = registry
        self._watch = watch
        self._describe = describe
        self._loop = asyncio.get_running_loop()
        self._connections: dict[_Connection, None] = {}
        self._strangers: dict[_Connection, None] = {}
        self._complaints: dict[int, float] = {}
        self._spare = _open_spare()
        self.use(settings)
        for listener in self._listeners:
            listener.setblocking(False)
            linux.refuse_descriptors(listener)
            self._listen(listener)

    def use(self, settings: Settings) -> None:
        """Follow other settings from now on, for new connections."""
        self._policy = Policy(settings)
        self._limits = settings.limits

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    def accept(self) -> None:
        """Take in who has connected until now: they would be lost if their listener was closed."""
        for listener in self._listeners:
            while self._accept(listener):
                pass

    def close(self) -> None:
        """Answer what has been asked, and close all connections."""
        for listener in self._listeners:
            self._watch.remove(listener.fileno())
        for connection in tuple(self._connections):
            with suppress(OSError):  # who has sent something gets an answer, and nobody sends more
                connection.socket.shutdown(socket.SHUT_RD)
            for _ in range(_LAST_REQUESTS):
                if connection.timer is not None or not self._serve(connection):
                    break
            self._drop(connection)
        if self._spare >= 0:
            os.close(self._spare)

    # Connections

    def _listen(self, listener: socket.socket) -> None:
        if self._spare < 0:
            self._spare = _open_spare()
        self._watch.add_request(listener.fileno(), select.EPOLLIN, partial(self._accept, listener))

    def _accept(self, listener: socket.socket) -> bool:
        """Accept connections; whether there may be more."""
        for _ in range(_AT_ONCE):
            try:
                end = listener.accept()[0]
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in _NO_DESCRIPTOR:
                    self._turn_away(listener, error)
                    return False
                continue  # the client has gone again
            try:
                self._connected(end)
            except OSError as error:
                with suppress(OSError), end:
                    _dismiss(end, f"no connection: {error.strerror}")
        return True

    def _turn_away(self, listener: socket.socket, problem: OSError) -> None:
        """Tell a client that we have no descriptor for it, with the help of one set aside."""
        if self._spare >= 0:
            os.close(self._spare)
        try:
            with suppress(OSError), listener.accept()[0] as end:
                _dismiss(end, f"no connection: {problem.strerror}")
        finally:
            self._spare = _open_spare()
        self._watch.remove(listener.fileno())
        self._loop.call_later(0.1, self._listen, listener)

    def _connected(self, end: socket.socket) -> None:
        end.setblocking(False)
        linux.refuse_descriptors(end)  # who connected before a listener did has not got that
        # Then a truncated control message can only be one with descriptors.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        connection = _Connection(end, linux.peer_credentials(end)[1], self._policy.access(end))
        if connection.access is None:
            if len(self._strangers) >= _STRANGERS_MAX:
                self._drop(next(iter(self._strangers)))
        elif len(self._connections) - len(self._strangers) >= self._limits.connections:
            self._complain(connection.uid, "too many connections (limits.connections)")
            _dismiss(end, "there are too many connections (limits.connections)")
            end.close()
            return
        self._watch.add_request(end.fileno(), select.EPOLLIN, partial(self._serve, connection))
        self._connections[connection] = None
        if connection.access is None:
            self._strangers[connection] = None

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            del self._connections[connection]
            self._strangers.pop(connection, None)
            self._watch.remove(connection.socket.fileno())
            if connection.timer is not None:
                connection.timer.cancel()
            connection.socket.close()

    def _reject(self, connection: _Connection, reason: str) -> None:
        """Tell the client what is wrong with it, and drop it."""
        self._complain(connection.uid, reason)
        try:
            _dismiss(connection.socket, reason)
        except BlockingIOError:
            self._pause(connection, partial(self._reject, connection, reason))
        else:
            self._drop(connection)

    # Requests

    def _serve(self, connection: _Connection) -> bool:
        """Answer one request; whether there was one."""
        try:
            datagram, _, flags, _ = connection.socket.recvmsg(DATAGRAM_MAX + 1)
        except BlockingIOError:
            return False
        except OSError:
            self._drop(connection)
            return False
        if flags & _TRUNCATED:
            self._reject(connection, "descriptors are not taken")
        elif datagram or not _is_over(connection.socket):
            self._handle(connection, datagram)
        else:
            self._drop(connection)
            return False
        return True

    def _handle(self, connection: _Connection, datagram: bytes) -> None:
        try:
            request = _understood(datagram)
            if request.wants_answer():
                self._answer(connection, request)
        except Malformed as error:
            self._reject(connection, f"malformed request: {error}")
        except BlockingIOError:
            self._pause(connection, partial(self._handle, connection, datagram))
        except ConnectionError:
            self._drop(connection)  # it has gone meanwhile
        except OSError as error:
            self._reject(connection, _reason(error))  # as with too many descriptors under way

    def _answer(self, connection: _Connection, request: Request) -> None:
        """Send the answer; BlockingIOError if there is no room for it."""
        access = connection.access
        if access is None:
            self._reject(connection, "permission denied")
            return
        rights, lease = b"", -1
        try:
            if request.list_after is not None:
                listed = self._registry.listing(request.list_after)
                answer = pack_page(one for one in listed if access.may_use(one.name))
            elif request.status:
                answer = pack_response(Response(status=self._describe()))
            else:
                access.check(request)
                rights, lease = self._registry.obtain(request)
                answer = _granted(request.namespaces, request.lease)
        except (Refused, BadMap, OSError) as error:
            reason = _reason(error)
            self._complain(connection.uid, reason)
            answer = pack_response(Response(error=reason))
        try:
            _send(connection.socket, answer, rights if lease < 0 else rights + _INT.pack(lease))
        finally:
            if lease >= 0:
                os.close(lease)

    # Clients that do not read

    def _pause(self, connection: _Connection, again: Callable[[], None]) -> None:
        """Take no more requests, and call AGAIN as soon as an answer can be sent."""
        fd = connection.socket.fileno()
        self._watch.remove(fd)
        self._watch.add_request(fd, select.EPOLLOUT, partial(self._writable, connection, again))
        connection.timer = self._loop.call_later(_UNREAD_SECONDS, self._tired, connection)

    def _writable(self, connection: _Connection, again: Callable[[], None]) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
            connection.timer = None
        fd = connection.socket.fileno()
        self._watch.remove(fd)
        self._watch.add_request(fd, select.EPOLLIN, partial(self._serve, connection))
        again()

    def _tired(self, connection: _Connection) -> None:
        self._complain(connection.uid, "it does not read its answers")
        self._drop(connection)

    # Log

    def _complain(self, uid: int, reason: str) -> None:
        """Log a refusal, if the last one to this user was a while ago."""
        now = time.monotonic()
        if now - self._complaints.get(uid, -_QUIET_SECONDS) >= _QUIET_SECONDS:
            if len(self._complaints) > 1000:
                self._complaints.clear()
            self._complaints[uid] = now
            _log.warning("refused to a process of user %d: %s", uid, reason)


def _open_spare() -> int:
    """Return a descriptor to be closed when there is no other, or -1 if that is now."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _is_over(end: socket.socket) -> bool:
    """Whether the peer sends no more; else what reads like the end was an empty datagram."""
    poll = select.poll()
    poll.register(end, select.POLLRDHUP)
    return bool(poll.poll(0))


def _reason(error: Exception) -> str:
    """Return what to tell about an error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _dismiss(end: socket.socket, reason: str) -> None:
    """Tell a client why its connection is going to be closed; BlockingIOError if there is no room.

    Requests that are left unread would take the answer from it (ECONNRESET).
    """
    try:
        _send(end, pack_response(Response(error=reason)), b"")
        end.shutdown(socket.SHUT_RD)
        while end.recv(DATAGRAM_MAX):
            pass
    except BlockingIOError:
        raise
    except OSError:
        return  # it has gone meanwhile


def _send(end: socket.socket, datagram: bytes, rights: bytes) -> None:
    """Send a datagram with descriptors, which are as SCM_RIGHTS takes them."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    end.sendmsg([datagram], control, _SENDING)
