"""Addresses: from text to what the kernel takes, and back.

Numeric addresses and paths are read at once. Names are looked up by the system's resolver, each
in a thread of its own, which nobody has to wait for when the daemon ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from typing import Any, Final, NamedTuple

from spawn_reaper.runner.bindings.calling import LIMIT, Calling, Failure, Misuse, exposed

CONTROL_PORT: Final = 5478
_PATH_MAX: Final = 107  # unix(7): sun_path holds 108 bytes, the last one NUL

_lookups: Final = threading.BoundedSemaphore(64)  # threads that wait for the resolver


class BadAddress(Exception):
    """The text is not an address, or its name cannot be looked up."""


class Address(NamedTuple):
    """Where a socket can connect to."""

    family: int
    where: Any
    """A tuple as in the socket module, or bytes: a path, or NUL and an abstract name."""

    def __str__(self) -> str:
        if self.family == socket.AF_UNIX:
            return os.fsdecode(self.where.replace(b"\0", b"@", 1))
        host, port = socket.getnameinfo(self.where, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        return f"[{host}]:{port}" if self.family == socket.AF_INET6 else f"{host}:{port}"


class HostName(NamedTuple):
    """A name that must be looked up."""

    host: bytes
    port: bytes

    def __str__(self) -> str:
        return os.fsdecode(self.host)


def parse(text: bytes, default_port: int | None) -> Address | HostName:
    """Read an address; BadAddress says what is wrong with it.

    /PATH, @ABSTRACT, IPv4, IPv6, [IPv6] or a name; with :PORT if there is no default.
    """
    if text[:1] in (b"/", b"@"):
        return _parse_local(text)
    if b"\0" in text:
        raise BadAddress(f"{_quote(text)} contains a NUL byte")
    host, port = _split(text)
    if not host:
        raise BadAddress(f"{_quote(text)} is not an address")
    if port is None and default_port is None:
        raise BadAddress(f"{_quote(text)} lacks a port")
    if port == b"":
        raise BadAddress(f"{_quote(text)} lacks a port after the colon")
    if port is not None and port.isdigit() and not 0 < int(port[:9]) < 0x10000:
        raise BadAddress(f"{_quote(text)} has a port out of range")
    name = HostName(host, port if port is not None else b"%d" % (default_port or 0))
    try:
        return _look_up(name, socket.AI_NUMERICHOST)[0]
    except BadAddress:
        if b":" in host or b"[" in text or b"]" in text:
            raise BadAddress(f"{_quote(text)} is not an address") from None
    return name


def _parse_local(text: bytes) -> Address:
    if len(text) > _PATH_MAX:
        raise BadAddress(f"{_quote(text)} is longer than {_PATH_MAX} bytes")
    if b"\0" in text:
        raise BadAddress(f"{_quote(text)} contains a NUL byte")
    if text == b"@":
        raise BadAddress("an abstract address needs a name")
    return Address(socket.AF_UNIX, b"\0" + text[1:] if text.startswith(b"@") else text)


def _split(text: bytes) -> tuple[bytes, bytes | None]:
    """Split host and port; the latter is None where there is none."""
    if text.startswith(b"["):
        host, bracket, rest = text[1:].partition(b"]")
        if not bracket or (rest and not rest.startswith(b":")):
            return b"", None
        return host, rest[1:] if rest else None
    if text.count(b":") > 1:
        return text, None
    host, colon, port = text.partition(b":")
    return host, port if colon else None


def _quote(text: bytes) -> str:
    shown = text if len(text) <= 64 else text[:61] + b"..."
    return repr(shown)[1:]


def _look_up(name: HostName, flags: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM, flags=flags)
    except OSError as error:  # socket.gaierror is one
        raise BadAddress(f"cannot resolve {_quote(name.host)}: {error.strerror}") from None
    return [Address(family, where) for family, _, _, _, where in found]


async def resolve(name: HostName) -> list[Address]:
    """Return all addresses of NAME, in the order in which they are to be tried."""
    if not _lookups.acquire(blocking=False):
        raise BadAddress(f"cannot resolve {_quote(name.host)}: too many names are being looked up")
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Address]] = loop.create_future()

    def settle(result: list[Address] | BadAddress) -> None:
        if found.done():
            return
        if isinstance(result, BadAddress):
            found.set_exception(result)
        else:
            found.set_result(result)

    def run() -> None:
        result: list[Address] | BadAddress
        try:
            result = _look_up(name, 0)
        except BadAddress as error:
            result = error
        finally:
            _lookups.release()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result)

    try:
        threading.Thread(target=run, name="resolver", daemon=True).start()
    except RuntimeError:
        _lookups.release()
        raise BadAddress(f"cannot resolve {_quote(name.host)}: no thread for it") from None
    try:
        async with asyncio.timeout(LIMIT):
            return await found
    except TimeoutError:
        raise BadAddress(f"cannot resolve {_quote(name.host)}: timed out") from None


@exposed("string", returns="address")
def control_resolve(text: bytes) -> Any:
    """Return the address that a text stands for."""
    try:
        address = parse(text, CONTROL_PORT)
    except BadAddress as error:
        raise Misuse(str(error)) from None
    return _first(address) if isinstance(address, HostName) else address


async def _first(name: HostName) -> Address:
    try:
        return (await resolve(name))[0]
    except BadAddress as error:
        raise Misuse(str(error)) from None


def addresses(where: Address | bytes, default_port: int | None) -> list[Address] | HostName:
    """Return what a script's ADDRESS or STRING stands for; Failure if it is not an address."""
    if isinstance(where, Address):
        return [where]
    try:
        address = parse(where, default_port)
    except BadAddress as error:
        raise Failure(str(error)) from None
    return address if isinstance(address, HostName) else [address]


async def resolved(name: HostName) -> list[Address]:
    """Return all addresses of NAME, or Failure."""
    try:
        return await resolve(name)
    except BadAddress as error:
        raise Failure(str(error)) from None


def install(calling: Calling) -> None:
    """Give scripts control_resolve() and address objects."""
    calling.add_class("address", Address)
    calling.add_function("control_resolve", control_resolve)
