"""What scripts talk to in tests: sockets that receive, each with a deadline for everything.

Nothing here runs in the background: what a script has sent waits in the kernel until the test asks
for it. A test in whose event loop the script still runs asks in a thread, by asyncio.to_thread().
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Self

SECONDS: Final = 10.0
_LARGEST: Final = 1 << 20  # more than any datagram
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWNET: Final = 0x40000000


class Peer:
    """A socket that a script has sent to: a receiver of datagrams or an accepted connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(SECONDS)

    def receive(self) -> bytes:
        """Return the next datagram, or what a stream has; empty at its end."""
        return self.socket.recv(_LARGEST)

    def receive_exactly(self, size: int) -> bytes:
        """Return the next SIZE bytes of a stream."""
        received = bytearray()
        while len(received) < size:
            part = self.socket.recv(min(size - len(received), _LARGEST))
            assert part, f"the stream ended after {len(received)} bytes of {size}"
            received += part
        return bytes(received)

    def receive_all(self) -> bytes:
        """Return all that is left in a stream; its sender must close it."""
        received = bytearray()
        while part := self.socket.recv(_LARGEST):
            received += part
        return bytes(received)

    def has_more(self) -> bool:
        """Whether something has arrived that was not received yet, be it the end of a stream."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def close(self) -> None:
        """Close it; what was not received is lost, which a sender over TCP sees as a reset."""
        self.socket.close()


class Receiver(Peer):
    """A socket for datagrams."""

    def __init__(self, receiver: socket.socket) -> None:
        super().__init__(receiver)
        self.address = _text(receiver)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Listener:
    """A socket for connections."""

    def __init__(self, listener: socket.socket, backlog: int = 64) -> None:
        self._listener = listener
        self._listener.settimeout(SECONDS)
        self._listener.listen(backlog)
        self._open = ExitStack()
        self._open.callback(self._listener.close)
        self.address = _text(listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def accept(self) -> Peer:
        """Return the next connection."""
        peer = Peer(self._listener.accept()[0])
        self._open.callback(peer.close)
        return peer

    def receive_all(self) -> bytes:
        """Return all that came through the next connection; its other end must be closed."""
        return self.accept().receive_all()

    def fill(self) -> int:
        """Connect until the backlog of a Unix socket is full; return how many it took."""
        for count in range(1000):
            connection = socket.socket(socket.AF_UNIX, self._listener.type)
            self._open.callback(connection.close)
            connection.setblocking(False)
            try:
                connection.connect(self._listener.getsockname())
            except BlockingIOError:
                return count
        raise AssertionError("its backlog does not become full")


def udp(host: str = "127.0.0.1", port: int = 0) -> Receiver:
    """Receive datagrams at an address of this host."""
    return Receiver(_bound(_family(host), socket.SOCK_DGRAM, (host, port)))


def multicast(group: str) -> Receiver:
    """Receive datagrams that arrive on lo for an IPv4 multicast group."""
    receiver = _bound(socket.AF_INET, socket.SOCK_DGRAM, (group, 0))
    request = struct.pack("@4s4si", socket.inet_aton(group), bytes(4), socket.if_nametoindex("lo"))
    receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)  # struct ip_mreqn
    return Receiver(receiver)


def tcp(host: str = "127.0.0.1", port: int = 0) -> Listener:
    """Take connections at an address of this host."""
    return Listener(_bound(_family(host), socket.SOCK_STREAM, (host, port)))


def unix(kind: str, address: Path | str) -> Receiver:
    """Receive datagrams at a path, or at an abstract name that begins with "@"."""
    return Receiver(_bound(socket.AF_UNIX, _TYPES[kind], _unix(address)))


def unix_listener(kind: str, address: Path | str, backlog: int = 64) -> Listener:
    """Take connections at a path, or at an abstract name that begins with "@"."""
    return Listener(_bound(socket.AF_UNIX, _TYPES[kind], _unix(address)), backlog)


def free_port() -> int:
    """Return a TCP and UDP port that nobody uses, most likely also a moment later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def abstract_name() -> str:
    """Return an abstract name that nobody else has, as scripts write it."""
    return f"@cm4all-spawn-test-{os.urandom(8).hex()}"


@contextmanager
def short_directory() -> Iterator[Path]:
    """Make a directory whose path leaves room for names: addresses of Unix sockets are short."""
    with TemporaryDirectory(prefix="st-") as directory:
        yield Path(directory)


def isolated(test: Callable[[], None]) -> None:
    """Run a test with a network and mounts of its own, as root; lo is up, and no route leads out.

    Both belong to a thread, and what it starts; they end with it.
    """
    problems: list[BaseException] = []

    def body() -> None:
        try:
            _leave_namespaces(_CLONE_NEWNET | _CLONE_NEWNS)
            command("mount --make-rprivate /")
            command("ip link set lo up")
            test()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=body, daemon=True)  # should it hang, nobody waits for it
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


def command(line: str) -> None:
    """Run a command that must succeed."""
    result = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{line}: {result.stderr}"


_TYPES: Final = {
    "stream": socket.SOCK_STREAM,
    "dgram": socket.SOCK_DGRAM,
    "seqpacket": socket.SOCK_SEQPACKET,
}


def _leave_namespaces(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bound(family: int, kind: int, address: tuple[str, int] | bytes) -> socket.socket:
    bound = socket.socket(family, kind)
    try:
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


def _unix(address: Path | str) -> bytes:
    name = os.fsencode(address)
    return b"\0" + name[1:] if name.startswith(b"@") else name


def _text(bound: socket.socket) -> str:
    """Return the address of a socket as a script writes it."""
    name = bound.getsockname()
    if bound.family == socket.AF_UNIX:
        return os.fsdecode(b"@" + name[1:] if isinstance(name, bytes) else name)
    host, port = name[:2]
    return f"[{host}]:{port}" if bound.family == socket.AF_INET6 else f"{host}:{port}"
