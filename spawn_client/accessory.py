"""Namespaces from the accessory, for Python programs: a blocking client and one for asyncio.

    with Accessory().namespaces("alice", ipc=True, net=True) as namespaces:
        namespaces.enter()
        subprocess.run(["ip", "link"])

Programs of the C++ suite and these see the same namespaces under the same name. The C++ suite's
accessory knows the kinds ipc, pid and user, and the lease.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Final, Self, TypeVar

from spawn_accessory.idmaps import BadMap, parse_map
from spawn_accessory.protocol import Listed, Maps, Namespace, Request
from spawn_client.dialogue import (
    AccessoryError,
    Conversation,
    Dialogue,
    ProtocolError,
    Refused,
    Timeout,
    Unavailable,
    Unsupported,
    Wait,
    kind_name,
)
from spawn_common import linux

__all__ = [
    "Accessory",
    "AccessoryError",
    "AsyncAccessory",
    "IdMap",
    "Listed",
    "Namespaces",
    "ProtocolError",
    "Refused",
    "Timeout",
    "Unavailable",
    "Unsupported",
]

DEFAULT_ADDRESS: Final = "@cm4all-spawn"
DEFAULT_TIMEOUT: Final = 10.0  # seconds
_LONGEST_WAIT: Final = 1e6  # poll(2) counts milliseconds

IdMap = str | bytes | Iterable[tuple[int, int, int]]
"""A map of ids: the kernel's text, or (first inside, first outside, count) for each line."""

T = TypeVar("T")

_ENTERING: Final = {
    kind_name(kind): kind
    for kind in (
        Namespace.IPC,
        Namespace.UTS,
        Namespace.NET,
        Namespace.CGROUP,
        Namespace.TIME,
        Namespace.PID,
        Namespace.MOUNT,
        Namespace.USER,
    )
}
"""In this order: joining a user namespace costs the privileges that the others need."""


class Namespaces:
    """The namespaces of one name, as descriptors that this object owns; None for all others.

    While ``lease`` is open, the accessory keeps the name. All are close-on-exec. They are closed
    with the object, by close(), or at the end of a with statement.
    """

    ipc: int | None
    pid: int | None
    user: int | None
    net: int | None
    uts: int | None
    cgroup: int | None
    mount: int | None
    time: int | None
    lease: int | None

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        """Own DESCRIPTORS, which are found by the names of the attributes."""
        for kind in (*_ENTERING, "lease"):
            setattr(self, kind, descriptors.get(kind))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors; harmless if they are closed."""
        for kind in (*_ENTERING, "lease"):
            if getattr(self, kind) is not None:
                os.close(self.detach(kind))

    def detach(self, kind: str) -> int:
        """Return the descriptor of a KIND, or of the "lease", and no longer own it.

        ValueError if there is none.
        """
        descriptor: int | None = getattr(self, kind)
        if descriptor is None:
            raise ValueError(f"there is no descriptor for {kind}")
        setattr(self, kind, None)
        return descriptor

    def enter(self, *kinds: str) -> None:
        """Let the calling process join the namespaces of these KINDS, or all if none is named.

        A PID namespace is only for children that are forked from now on. A mount namespace brings
        its own root and working directory. A user namespace leaves the ids as they are, and gives
        all capabilities in it; before it is joined, nobody in there should be able to trace the
        process (PR_SET_DUMPABLE in prctl(2)). See setns(2), also for what a process with threads
        cannot join.

        ValueError if a KIND is unknown. OSError names what could not be joined; those before it, in
        the order ipc, uts, net, cgroup, time, pid, mount, user, have been.
        """
        for name in kinds:
            if name not in _ENTERING:
                raise ValueError(f"{name!r} is no kind of namespace")
        for name, kind in _ENTERING.items():
            descriptor = getattr(self, name)
            if descriptor is None or (kinds and name not in kinds):
                continue
            try:
                linux.setns(descriptor, kind)
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise OSError(error.errno, f"cannot enter the {name} namespace: {reason}") from None


class Accessory:
    """The accessory, for programs that may block. Threads can share it; each waits for its turn.

    Every method raises Unavailable, Refused, Unsupported, Timeout or ProtocolError, which are
    AccessoryErrors, and OSError if no more descriptors can be open.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout: float = DEFAULT_TIMEOUT) -> None:
        """ADDRESS is @NAME for an abstract socket, or a path; TIMEOUT is seconds for each answer.

        Nothing is sent before it is needed; the connection is kept, and made anew when it is lost.
        """
        self._dialogue = Dialogue(address, timeout)
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what was got over it stays."""
        with self._turn:
            self._dialogue.close()

    def namespaces(
        self,
        name: str | bytes,
        *,
        ipc: bool = False,
        pid: bool = False,
        user: tuple[IdMap, IdMap] | None = None,
        net: bool = False,
        uts: bool = False,
        cgroup: bool = False,
        mount: bool = False,
        time: bool = False,
        lease: bool = True,
    ) -> Namespaces:
        """Return the namespaces of NAME (plain ASCII), made now if they do not exist.

        USER has the maps of user and group ids: each pair of maps has a namespace of its own under
        NAME. Without LEASE, what nobody uses is gone a minute later. ValueError if the name or a
        map is bad.
        """
        wanted = (ipc, pid, user, net, uts, cgroup, mount, time)
        request = _request(name, wanted, user, lease)
        return Namespaces(self._converse(self._dialogue.namespaces(request)))

    def list(self) -> tuple[Listed, ...]:
        """Return the names that exist, as far as the caller may use them."""
        return self._converse(self._dialogue.names())

    def status(self) -> dict[str, str]:
        """Return how the accessory is: its figures by their names."""
        return self._converse(self._dialogue.status())

    def _converse(self, conversation: Conversation[T]) -> T:
        with self._turn, closing(conversation):
            while True:
                try:
                    wait = next(conversation)
                except StopIteration as end:
                    result: T = end.value
                    return result
                _wait(wait)


class AsyncAccessory:
    """The accessory, for asyncio; else like Accessory.

    Coroutines can share it; they are served one after the other. One that is cancelled harms none
    of the others.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout: float = DEFAULT_TIMEOUT) -> None:
        """See Accessory."""
        import asyncio  # which those who block need not load

        self._dialogue = Dialogue(address, timeout)
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; what was got over it stays."""
        async with self._turn:
            self._dialogue.close()

    async def namespaces(
        self,
        name: str | bytes,
        *,
        ipc: bool = False,
        pid: bool = False,
        user: tuple[IdMap, IdMap] | None = None,
        net: bool = False,
        uts: bool = False,
        cgroup: bool = False,
        mount: bool = False,
        time: bool = False,
        lease: bool = True,
    ) -> Namespaces:
        """See Accessory.namespaces()."""
        wanted = (ipc, pid, user, net, uts, cgroup, mount, time)
        request = _request(name, wanted, user, lease)
        return Namespaces(await self._converse(self._dialogue.namespaces(request)))

    async def list(self) -> tuple[Listed, ...]:
        """See Accessory.list()."""
        return await self._converse(self._dialogue.names())

    async def status(self) -> dict[str, str]:
        """See Accessory.status()."""
        return await self._converse(self._dialogue.status())

    async def _converse(self, conversation: Conversation[T]) -> T:
        async with self._turn:
            with closing(conversation):
                while True:
                    try:
                        wait = next(conversation)
                    except StopIteration as end:
                        result: T = end.value
                        return result
                    await _wait_async(wait)


# Requests


def _request(
    name: str | bytes,
    wanted: tuple[object, ...],
    user: tuple[IdMap, IdMap] | None,
    lease: bool,
) -> Request:
    """Return a request for the kinds that are WANTED, which are in the order of Namespace."""
    return Request(
        name=name.encode() if isinstance(name, str) else name,
        namespaces=tuple(kind for kind, asked in zip(Namespace, wanted, strict=True) if asked),
        maps=None if user is None else Maps(_map_text("uid", user[0]), _map_text("gid", user[1])),
        lease=lease,
    )


def _map_text(what: str, lines: IdMap) -> bytes:
    """Return a map as the kernel takes it; ValueError if it would not."""
    if isinstance(lines, str):
        text = lines.encode()
    elif isinstance(lines, bytes):
        text = lines
    else:
        text = b"".join(b"%d %d %d\n" % line for line in lines)
    try:
        parse_map(text)
    except BadMap as error:
        raise ValueError(f"{what} map: {error}") from None
    return text


# Waiting


def _wait(wait: Wait) -> None:
    poll = select.poll()
    if wait.socket is not None:
        poll.register(wait.socket, wait.events)
    poll.poll(min(wait.seconds, _LONGEST_WAIT) * 1000)


async def _wait_async(wait: Wait) -> None:
    import asyncio

    if wait.socket is None:
        await asyncio.sleep(wait.seconds)
        return
    loop = asyncio.get_running_loop()
    writable = wait.events == select.POLLOUT
    add, remove = (
        (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
    )
    ready = asyncio.Event()
    add(wait.socket, ready.set)
    try:
        async with asyncio.timeout(wait.seconds):
            await ready.wait()
    except TimeoutError:
        pass  # whoever waited looks at the clock
    finally:
        remove(wait.socket)
