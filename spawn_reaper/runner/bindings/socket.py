"""Sockets that a script can connect and send on. Nothing here ever blocks the daemon."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import threading
import weakref
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Final

from spawn_reaper.runner.bindings.address import Address, HostName, addresses, resolved
from spawn_reaper.runner.bindings.calling import LIMIT, Calling, Failure, Misuse, exposed

_TYPES: Final = {
    b"stream": socket.SOCK_STREAM,
    b"dgram": socket.SOCK_DGRAM,
    b"seqpacket": socket.SOCK_SEQPACKET,
}
_BACKLOG_PAUSE: Final = 0.01  # seconds until a full backlog is tried again; nothing wakes us


class _Place:
    """A place in the line of those who wait to send, or are sending; it goes with its holder."""


class Socket:
    """A connected socket."""

    def __init__(self, plain: socket.socket, sockets: Sockets) -> None:
        self._socket = plain
        self._sockets = sockets
        self._turn = asyncio.Lock()  # so that what two handlers send does not get mixed
        # The lock is free for a moment between two of those: nobody else may send then.
        self._line: weakref.WeakSet[_Place] = weakref.WeakSet()
        self._closed = False
        self._torn = False  # the peer has got one half of something

    def __str__(self) -> str:
        return "socket (closed)" if self._closed else f"socket ({self._socket.fileno()})"

    @exposed("string integer? integer?")
    def send(self, data: bytes, start: int | None = None, end: int | None = None) -> Any:
        """Send DATA from START to END, which count as in string.sub(); return how many bytes."""
        return self.send_all(_part_of(data, start, end))

    def send_all(self, data: memoryview) -> int | Awaitable[int]:
        """Send it at once if that can be done; if not, return what has to be waited for."""
        if self._closed:
            raise Failure("socket is closed")
        if self._line or self._torn:
            return self._send_rest(data, 0, self._line_up())
        try:
            sent = self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise Failure(_reason(error)) from error
        if sent == len(data):
            return sent
        self._torn = sent > 0  # until the rest has been sent, before anything else
        return self._send_rest(data, sent, self._line_up())

    def _line_up(self) -> _Place:
        place = _Place()
        self._line.add(place)
        return place

    async def _send_rest(self, data: memoryview, sent: int, place: _Place) -> int:
        if self._turn.locked() and threading.current_thread() is not threading.main_thread():
            raise Failure("another handler is sending")
        try:
            async with asyncio.timeout(LIMIT), self._turn:
                self._check(sent)
                self._torn = self._socket.type == socket.SOCK_STREAM
                await asyncio.get_running_loop().sock_sendall(self._socket, data[sent:])
                self._torn = False
        except TimeoutError:
            raise Failure("timed out") from None
        except OSError as error:
            raise Failure(_reason(error)) from error
        finally:
            self._line.discard(place)
            if self._closed and not self._turn.locked():
                self._release()
        return len(data)

    def _check(self, sent: int) -> None:
        """Refuse to send what would follow one half of something else."""
        if self._closed:
            raise Failure("socket is closed")
        if self._torn and not sent:
            raise Failure("socket is unusable: sending failed in the middle of a message")

    @exposed()
    def close(self) -> None:
        """Close the socket; may be called again."""
        if self._closed:
            return
        self._closed = True
        if self._turn.locked():
            # Whoever is sending must let go of the descriptor first, and does when that fails.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            self._release()

    def dropped(self) -> None:
        """Close the socket: Lua has collected it."""
        self.close()

    def _release(self) -> None:
        self._socket.close()
        self._sockets.open.discard(self)


def _part_of(data: bytes, start: int | None, end: int | None) -> memoryview:
    size = len(data)
    first = 1 if start is None else _position(start, size)
    last = size if end is None else _position(end, size)
    if not 1 <= first <= size + 1:
        raise Misuse(f"bad argument #3 to 'send' (position {start} is outside the string)")
    if not 0 <= last <= size:
        raise Misuse(f"bad argument #4 to 'send' (position {end} is outside the string)")
    return memoryview(data)[first - 1 : max(first - 1, last)]


def _position(position: int, size: int) -> int:
    return position if position >= 0 else size + position + 1


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


class Sockets:
    """The table "socket" of scripts, and all the sockets that they have."""

    def __init__(self, calling: Calling) -> None:
        self._calling = calling
        self.open: set[Socket] = set()
        calling.exits.callback(self._close)

    def _close(self) -> None:
        for opened in list(self.open):
            opened.close()

    @exposed("address|string table?", returns="socket")
    def connect(self, where: Address | bytes, options: Any = None) -> Any:
        """Connect a socket to an address."""
        return self.connect_to(where, _type_in(self._calling, options), None)

    def connect_to(
        self, where: Address | bytes, kind: socket.SocketKind, default_port: int | None
    ) -> Socket | Awaitable[Socket]:
        """Connect at once if that needs no waiting; if not, return what has to be waited for."""
        found = addresses(where, default_port)
        self._make_room()
        if isinstance(found, list) and kind == socket.SOCK_DGRAM:
            plain = self._new(found[0], kind)
            try:
                plain.connect(found[0].where)
            except OSError as error:
                plain.close()
                raise Failure(_cannot_connect(found[0], _reason(error))) from None
            return self._connected(plain)
        return self._connect(found, kind)

    async def _connect(self, found: list[Address] | HostName, kind: socket.SocketKind) -> Socket:
        try:
            async with asyncio.timeout(LIMIT):
                return await self._connect_first(found, kind)
        except TimeoutError:
            shown = found if isinstance(found, HostName) else found[0]
            raise Failure(_cannot_connect(shown, "timed out")) from None

    async def _connect_first(
        self, found: list[Address] | HostName, kind: socket.SocketKind
    ) -> Socket:
        """Connect to the first address that accepts it."""
        if isinstance(found, HostName):
            found = await resolved(found)
        failure = Failure("no address")
        for address in found:
            plain = self._new(address, kind)
            try:
                await _connect_waiting(plain, address)
            except OSError as error:
                plain.close()
                failure = Failure(_cannot_connect(address, _reason(error)))
            except BaseException:
                plain.close()
                raise
            else:
                return self._connected(plain)
        raise failure

    def _connected(self, plain: socket.socket) -> Socket:
        connected = Socket(plain, self)
        self.open.add(connected)
        return connected

    def _make_room(self) -> None:
        """Leave the daemon the descriptors that it needs itself."""
        if len(self.open) >= self._allowed():
            self._calling.collect_garbage()
        if len(self.open) >= self._allowed():
            raise Failure(f"the script has {len(self.open)} open sockets, no more are allowed")

    def _new(self, address: Address, kind: socket.SocketKind) -> socket.socket:
        try:
            plain = socket.socket(address.family, kind)
        except OSError as error:
            raise Failure(_cannot_connect(address, _reason(error))) from None
        plain.setblocking(False)
        return plain

    def _allowed(self) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


async def _connect_waiting(plain: socket.socket, address: Address) -> None:
    if address.family != socket.AF_UNIX:
        await asyncio.get_running_loop().sock_connect(plain, address.where)
        return
    # A full backlog is EAGAIN, and the socket then not on its way (connect(2)).
    while (code := plain.connect_ex(address.where)) == errno.EAGAIN:
        await asyncio.sleep(_BACKLOG_PAUSE)
    if code:
        raise OSError(code, os.strerror(code))


def _cannot_connect(address: Address | HostName, reason: str) -> str:
    return f"cannot connect to {address}: {reason}"


def _type_in(calling: Calling, options: Any) -> socket.SocketKind:
    """Return the socket type that a script's table asks for."""
    kind: Any = b"stream"
    for key, value in options.items() if options is not None else ():
        if key != b"type":
            raise Misuse(f"bad argument #3 to 'connect' (unknown option: {_shown(calling, key)})")
        kind = value
    if not isinstance(kind, bytes) or kind not in _TYPES:
        raise Misuse(f"bad argument #3 to 'connect' (unknown type: {_shown(calling, kind)})")
    return _TYPES[kind]


def _shown(calling: Calling, value: Any) -> str:
    if isinstance(value, bytes):
        return f"'{value.decode(errors='replace')}'"
    return f"a {calling.type_name(value)}"


def install(calling: Calling) -> Sockets:
    """Give scripts the table "socket" and its objects."""
    sockets = Sockets(calling)
    calling.add_class("socket", Socket)
    calling.add_module("socket", sockets)
    return sockets
