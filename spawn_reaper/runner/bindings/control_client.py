"""The control protocol of beng-proxy, as a client: datagrams of commands.

A datagram is MAGIC, then for each command its length and number, the payload, and NUL bytes up to
the next multiple of four; all numbers big-endian.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Awaitable
from typing import Any, Final

from spawn_reaper.runner.bindings.address import CONTROL_PORT, Address
from spawn_reaper.runner.bindings.calling import Calling, Failure, Misuse, exposed
from spawn_reaper.runner.bindings.socket import Socket, Sockets

_MAGIC: Final = 0x63046101
_DATAGRAM_MAX: Final = 65507  # what UDP over IPv4 can carry
_PAYLOAD_MAX: Final = 0xFFFF
_SECONDS_MAX: Final = 0xFFFFFFFF

_FADE_CHILDREN: Final = 8
_FLUSH_FILTER_CACHE: Final = 12
_DISCARD_SESSION: Final = 14
_FLUSH_HTTP_CACHE: Final = 15
_TERMINATE_CHILDREN: Final = 16
_DISCONNECT_DATABASE: Final = 20
_RESET_LIMITER: Final = 22
_REJECT_CLIENT: Final = 23
_TARPIT_CLIENT: Final = 24
_CANCEL_JOB: Final = 25


class Builder:
    """Commands on their way into one datagram."""

    def __init__(self) -> None:
        self._datagram = bytearray(struct.pack(">I", _MAGIC))
        self._too_long: int | None = None  # size of a payload that does not fit

    def __str__(self) -> str:
        return f"builder ({len(self._datagram)} bytes)"

    def datagram(self) -> bytes:
        """Return the datagram, or Failure if it is too large."""
        if self._too_long is not None:
            raise Failure(f"a payload of {self._too_long} bytes exceeds {_PAYLOAD_MAX}")
        if len(self._datagram) > _DATAGRAM_MAX:
            raise Failure(f"a datagram of {len(self._datagram)} bytes exceeds {_DATAGRAM_MAX}")
        return bytes(self._datagram)

    def _add(self, command: int, *payloads: bytes) -> Builder:
        for payload in payloads:
            if len(payload) > _PAYLOAD_MAX:
                self._too_long = len(payload)
            elif len(self._datagram) <= _DATAGRAM_MAX:  # beyond that it is lost anyway
                self._datagram += struct.pack(">HH", len(payload), command)
                self._datagram += payload + bytes(-len(payload) % 4)
        return self

    def _add_clients(self, command: int, name: str, arguments: tuple[Any, ...]) -> Builder:
        """Add a command for each address; a number after it is its seconds."""
        payloads: list[bytes] = []
        for position, argument in enumerate(arguments, 2):
            if isinstance(argument, bytes):
                payloads.append(argument)
            elif position == 2 or not isinstance(arguments[position - 3], bytes):
                raise Misuse(f"bad argument #{position} to '{name}' (string expected, got number)")
            elif not 0 <= argument <= _SECONDS_MAX:
                raise Misuse(f"bad argument #{position} to '{name}' (not a number of seconds)")
            else:
                payloads[-1] = struct.pack(">I", int(argument)) + payloads[-1]
        return self._add(command, *payloads)

    @exposed("string string", returns="builder")
    def cancel_job(self, partition: bytes, job: bytes) -> Builder:
        """Cancel a job of Workshop."""
        return self._add(_CANCEL_JOB, partition + b"\0" + job)

    @exposed("string string...", returns="builder")
    def discard_session(self, *ids: bytes) -> Builder:
        """Discard sessions."""
        return self._add(_DISCARD_SESSION, *ids)

    @exposed("string string...", returns="builder")
    def disconnect_database(self, *accounts: bytes) -> Builder:
        """Close the database connections of accounts."""
        return self._add(_DISCONNECT_DATABASE, *accounts)

    @exposed("string string...", returns="builder")
    def fade_children(self, *tags: bytes) -> Builder:
        """Let child processes end when they are idle."""
        return self._add(_FADE_CHILDREN, *tags)

    @exposed("string string...", returns="builder")
    def flush_filter_cache(self, *tags: bytes) -> Builder:
        """Flush the filter cache."""
        return self._add(_FLUSH_FILTER_CACHE, *tags)

    @exposed("string string...", returns="builder")
    def flush_http_cache(self, *tags: bytes) -> Builder:
        """Flush the HTTP cache."""
        return self._add(_FLUSH_HTTP_CACHE, *tags)

    @exposed("string number|string...", returns="builder")
    def reject_client(self, *arguments: Any) -> Builder:
        """Reject clients, for some seconds."""
        return self._add_clients(_REJECT_CLIENT, "reject_client", arguments)

    @exposed("string string...", returns="builder")
    def reset_limiter(self, *accounts: bytes) -> Builder:
        """Reset the limiters of accounts."""
        return self._add(_RESET_LIMITER, *accounts)

    @exposed("string number|string...", returns="builder")
    def tarpit_client(self, *arguments: Any) -> Builder:
        """Slow down clients, for some seconds."""
        return self._add_clients(_TARPIT_CLIENT, "tarpit_client", arguments)

    @exposed("string string...", returns="builder")
    def terminate_children(self, *tags: bytes) -> Builder:
        """Terminate child processes."""
        return self._add(_TERMINATE_CHILDREN, *tags)


class ControlClient:
    """A datagram socket that is connected to a control server."""

    def __init__(self, connected: Socket, where: Address | bytes, sockets: Sockets) -> None:
        self._socket = connected
        self._where = where
        self._sockets = sockets

    def __str__(self) -> str:
        return f"control_client ({_shown(self._where)})"

    @exposed(returns="builder")
    def build(self) -> Builder:
        """Return an empty datagram."""
        return Builder()

    @exposed("builder")
    def send(self, builder: Builder) -> Any:
        """Send a datagram."""
        datagram = memoryview(builder.datagram())
        try:
            sent = self._socket.send_all(datagram)
        except Failure as failure:
            _raise_unless_unreachable(failure)
            return self._send_again(datagram)
        return True if isinstance(sent, int) else self._wait_for(sent, datagram)

    async def _wait_for(self, sending: Awaitable[int], datagram: memoryview) -> bool:
        try:
            await sending
        except Failure as failure:
            _raise_unless_unreachable(failure)
            await self._send_again(datagram)
        return True

    async def _send_again(self, datagram: memoryview) -> bool:
        """Send on a new socket: the old one's address may be that of an interface that is gone."""
        connected = self._sockets.connect_to(self._where, socket.SOCK_DGRAM, CONTROL_PORT)
        replaced = self._socket
        self._socket = connected if isinstance(connected, Socket) else await connected
        replaced.close()
        sent = self._socket.send_all(datagram)
        if not isinstance(sent, int):
            await sent
        return True

    def dropped(self) -> None:
        """Close the socket: Lua has collected the client."""
        self._socket.close()


def _shown(where: Address | bytes) -> str:
    return str(where) if isinstance(where, Address) else os.fsdecode(where)


def _raise_unless_unreachable(failure: Failure) -> None:
    cause = failure.__cause__
    if not isinstance(cause, OSError) or cause.errno != errno.ENETUNREACH:
        raise failure


class ControlClients:
    """The table "control_client" of scripts."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets

    @exposed("address|string", returns="control_client")
    def new(self, where: Address | bytes) -> Any:
        """Connect a client."""
        connected = self._sockets.connect_to(where, socket.SOCK_DGRAM, CONTROL_PORT)
        if isinstance(connected, Socket):
            return ControlClient(connected, where, self._sockets)
        return self._new(connected, where)

    async def _new(self, connected: Awaitable[Socket], where: Address | bytes) -> ControlClient:
        return ControlClient(await connected, where, self._sockets)


def install(calling: Calling, sockets: Sockets) -> None:
    """Give scripts the table "control_client" and its objects."""
    calling.add_class("builder", Builder)
    calling.add_class("control_client", ControlClient)
    calling.add_module("control_client", ControlClients(sockets))
