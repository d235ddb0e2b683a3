"""Asking the accessory: what is said, what an answer means, and what is wrong with it.

Owns the connection, and when it is made anew; leaves waiting to others. A conversation is a
generator that yields a Wait for each thing it cannot go on without, and returns what came of it.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import Final, NamedTuple, TypeVar

from spawn_accessory.protocol import (
    DATAGRAM_MAX,
    Listed,
    Malformed,
    Namespace,
    Request,
    Response,
    pack_request,
    unpack_request,
    unpack_response,
)

_SUITE: Final = frozenset((Namespace.IPC, Namespace.PID, Namespace.USER))
_DESCRIPTORS: Final = socket.CMSG_SPACE((len(Namespace) + 1) * array("i").itemsize)
_PAUSES: Final = (0.0, 0.0, 0.1, 0.5, 2.0)  # before each attempt; a restart may take a second
_QUEUE_FULL_PAUSE: Final = 0.01
_KNOWN_TO_US: Final = "; the accessory of the C++ suite does not know such commands"


class AccessoryError(Exception):
    """The accessory did not do what it was asked for; the message says why."""


class Unavailable(AccessoryError):
    """Nobody listens at the address, or connections end without an answer."""


class Refused(AccessoryError):
    """The accessory answered that it will not or cannot; the message is what it said."""


class Unsupported(AccessoryError):
    """The accessory passed over what was asked for; the C++ suite's knows fewer commands."""


class Timeout(AccessoryError):
    """There was no answer in time."""


class ProtocolError(AccessoryError):
    """The answer breaks the protocol."""


class Wait(NamedTuple):
    """What a conversation waits for, SECONDS at most: EVENTS (poll(2)) of a socket, or nothing."""

    socket: socket.socket | None
    events: int
    seconds: float


T = TypeVar("T")
Conversation = Generator[Wait, None, T]


# What is said


def kind_name(kind: Namespace) -> str:
    """Return how a kind of namespace is called in arguments and attributes."""
    return kind.name.lower()


def pack_checked(request: Request) -> bytes:
    """Return the datagram of a request; ValueError if no accessory would accept it."""
    if not request.wants_answer():
        raise ValueError("neither a namespace nor a lease is asked for")
    datagram = pack_request(request)
    try:
        unpack_request(datagram)
    except Malformed as error:
        raise ValueError(str(error)) from None
    return datagram


def read_answer(request: Request, datagram: bytes, descriptors: int) -> Response:
    """Return the answer to a request, which came with that number of descriptors.

    Refused, Unsupported or ProtocolError if it does not hold what was asked for, and no more.
    """
    try:
        answer = unpack_response(datagram)
    except Malformed as error:
        raise ProtocolError(f"malformed answer: {error}") from None
    if answer.error is not None:
        raise Refused(answer.error)
    asked, given = set(request.namespaces), set(answer.namespaces)
    if given - asked or len(given) < len(answer.namespaces) or answer.lease > request.lease:
        raise ProtocolError("the answer has more than was asked for")
    if descriptors != len(answer.namespaces) + answer.lease:
        raise ProtocolError(f"the answer has a wrong number of descriptors: {descriptors}")
    if (asked - given) & _SUITE or answer.lease < request.lease:
        raise ProtocolError("the answer has less than was asked for")
    if asked - given:
        missing = [kind_name(kind) for kind in request.namespaces if kind not in given]
        raise Unsupported(f"the accessory passed over {', '.join(missing)}{_KNOWN_TO_US}")
    if request.status and answer.status is None:
        raise ProtocolError("the answer has no status")
    return answer


def silence(request: Request, seconds: float) -> AccessoryError:
    """Return what it means that there was no answer to a request."""
    if request.lease or _SUITE.intersection(request.namespaces):
        return Timeout(f"no answer within {seconds:g} s")
    what = [kind_name(kind) for kind in request.namespaces]
    what += ["list"] if request.list_after is not None else []
    what += ["status"] if request.status else []
    return Unsupported(f"no answer to {', '.join(what)} within {seconds:g} s{_KNOWN_TO_US}")


# Connections


class Dialogue:
    """Conversations with the accessory at one address, over one connection that is kept."""

    def __init__(self, address: str, timeout: float) -> None:
        """ADDRESS is @NAME or a path; an answer may take TIMEOUT seconds, reconnecting included."""
        self._address = address
        self._timeout = timeout
        self._socket: socket.socket | None = None
        self._pid = 0  # of the process that connected it

    def close(self) -> None:
        """Close the connection; the next conversation makes a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def namespaces(self, request: Request) -> Conversation[dict[str, int]]:
        """Ask for namespaces and lease; return their descriptors by kind, "lease" among them."""
        answer, descriptors = yield from self._ask(request)
        kinds = [kind_name(kind) for kind in answer.namespaces] + ["lease"] * answer.lease
        return dict(zip(kinds, descriptors, strict=True))

    def names(self) -> Conversation[tuple[Listed, ...]]:
        """Ask for all names, page by page."""
        listed: list[Listed] = []
        after, more = b"", True
        while more:
            answer, _ = yield from self._ask(Request(list_after=after))
            listed += answer.listed
            more = answer.more
            if more and not (answer.listed and answer.listed[-1].name > after):
                raise ProtocolError("the answer lists no further names, but says there are more")
            after = listed[-1].name if listed else b""
        return tuple(listed)

    def status(self) -> Conversation[dict[str, str]]:
        """Ask for the status: what its lines have before and after the equals sign."""
        answer, _ = yield from self._ask(Request(status=True))
        assert answer.status is not None
        lines = [line.partition("=") for line in answer.status.splitlines()]
        return {key: value for key, separator, value in lines if separator}

    def _ask(self, request: Request) -> Conversation[tuple[Response, list[int]]]:
        """Return the answer and the descriptors that came with it; they belong to the caller."""
        datagram = pack_checked(request)
        deadline = time.monotonic() + self._timeout
        try:
            answer, descriptors = yield from self._exchange_anew(datagram, deadline)
        except Timeout:
            self.close()
            raise silence(request, self._timeout) from None
        except BaseException:
            self.close()  # so that a late answer is not taken for that to another request
            raise
        try:
            return read_answer(request, answer, len(descriptors)), descriptors
        except AccessoryError as error:
            _close_all(descriptors)
            if not isinstance(error, Refused):
                self.close()
            raise

    def _exchange_anew(
        self, datagram: bytes, deadline: float
    ) -> Conversation[tuple[bytes, list[int]]]:
        """Exchange datagrams, on a new connection if one is lost: requests can be repeated.

        So a restart of the accessory is not noticed. Where nobody listens in the first place,
        nobody is waited for.
        """
        connected = self._socket is not None
        problem = Unavailable(self._address)
        for pause in _PAUSES:
            if pause and time.monotonic() + pause > deadline:
                break
            if pause:
                yield Wait(None, 0, pause)
            try:
                connection = yield from self._connect(deadline)
                connected = True
                return (yield from self._exchange(connection, datagram, deadline))
            except Unavailable as error:
                self.close()
                if not connected:
                    raise
                problem = error
        raise problem

    def _connect(self, deadline: float) -> Conversation[socket.socket]:
        """Return the connection that is kept if it is still good, or else a new one."""
        forked = self._pid != os.getpid()  # then it is our parent's as well
        if self._socket is not None and not forked and not _has_something(self._socket):
            return self._socket
        self.close()
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        self._pid = os.getpid()
        self._socket = connection = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        while True:
            try:
                connection.connect(name)
                return connection
            except BlockingIOError:  # the queue is full, and poll(2) does not tell of room in it
                if time.monotonic() >= deadline:
                    raise Unavailable(f"{self._address} accepts no connection") from None
                yield Wait(None, 0, _QUEUE_FULL_PAUSE)
            except OSError as error:
                reason = error.strerror or error
                raise Unavailable(f"nobody listens at {self._address}: {reason}") from None

    def _exchange(
        self, connection: socket.socket, datagram: bytes, deadline: float
    ) -> Conversation[tuple[bytes, list[int]]]:
        """Send a request and return the datagram and the descriptors of its answer."""
        while True:
            try:
                connection.send(datagram, socket.MSG_NOSIGNAL)
                break
            except BlockingIOError:
                yield Wait(connection, select.POLLOUT, _left(deadline))
            except ConnectionError:
                break  # it may have said why
        while True:
            try:
                data, descriptors = _receive(connection)
                break
            except BlockingIOError:
                yield Wait(connection, select.POLLIN, _left(deadline))
        if not data:
            _close_all(descriptors)
            raise Unavailable(f"{self._address} closed the connection without an answer")
        return data, descriptors


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise Timeout
    return seconds


def _has_something(connection: socket.socket) -> bool:
    """Whether something came unasked: most often the end, but anything means it is out of step."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return a datagram and its descriptors; nothing at the end of the connection."""
    for _ in range(2):  # a reset comes before what the other side said last
        with suppress(ConnectionError):
            return _receive_datagram(connection)
    return b"", []


def _receive_datagram(connection: socket.socket) -> tuple[bytes, list[int]]:
    data, messages, flags, _ = connection.recvmsg(
        DATAGRAM_MAX + 1, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array("i")
    for level, kind, content in messages:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    if flags & socket.MSG_CTRUNC:
        _close_all(descriptors)
        raise ProtocolError("descriptors were lost: too many came, or no more can be open here")
    return data, descriptors.tolist()


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
