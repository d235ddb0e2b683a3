"""The accessory daemon and its floor as the benchmarks run them, and the client that asks them.

Kinds of what is asked for are letters, as accessory_floor.c has them.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from bench import proc
from bench.generator import report_of
from bench.interrupts import held
from bench.processes import start
from bench.site import BENCH, Site
from bench.unusable import Unusable
from tests.tools import wire
from tests.tools.accessory import INIT, Accessory
from tests.tools.harness import Cgroup
from tests.tools.native import build

_QUIET: Final = 0.2  # seconds without CPU time that show that nothing is left to be done
_PATIENCE: Final = 30.0  # seconds
_TURNS: Final = 10
_CLIENT: Final = 0
_SERVER: Final = 1
_PACKETS: Final = {
    "i": (wire.IPC, b""),
    "p": (wire.PID, b""),
    "u": (wire.USER, b"0 100000 65536\x000 100000 65536"),
    "l": (wire.LEASE, b""),
}


def _on_processor(number: int) -> list[str]:
    """Return what to put before a command that shall run on one of our processors.

    Clients run on one and servers on another: where the scheduler puts two processes that talk
    changes each figure by up to five times, and it decides that anew all the time.
    """
    processors = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(processors[number % len(processors)])]


@contextmanager
def running_daemon(site: Site, name: str) -> Iterator[Accessory]:
    """Run a daemon in a cgroup of its own, which is called NAME."""
    with made_daemon(site, name) as daemon:
        with held():
            daemon.start()
        yield daemon


@contextmanager
def made_daemon(site: Site, name: str) -> Iterator[Accessory]:
    """Return a daemon that is not started yet; it ends with all that it made."""
    with _unusable(), tempfile.TemporaryDirectory(dir=site.folder) as directory:
        daemon = Accessory(Path(directory), Cgroup(site.cgroup).make(name), [])
        daemon.wrapper = _on_processor(_SERVER)
        try:
            yield daemon
            traceback = [line for line in daemon.errors() if line.startswith("Traceback")]
            assert not traceback, f"the daemon wrote a traceback: {daemon.errors()[-1]}"
        finally:
            with held():
                daemon.close()


@contextmanager
def running_floor(site: Site, kinds: str, how: str) -> Iterator[str]:
    """Run the bare server in a cgroup of its own; gives its address."""
    cgroup = Cgroup(site.cgroup).make("floor")
    with _unusable():
        try:
            with ExitStack() as stack:
                yield _start_floor(stack, cgroup, [kinds, how])
        finally:
            with held():
                cgroup.remove()


def _start_floor(stack: ExitStack, cgroup: Cgroup, arguments: list[str]) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")  # the kernel finds an abstract name
        listener.listen()
        program = _built("accessory_floor.c")
        process = start(
            stack,
            [*_on_processor(_SERVER), program, *arguments, str(INIT)],
            stdin=listener.fileno(),
        )
        # Nothing is made before the first request.
        (cgroup.directory / "cgroup.procs").write_text(str(process.pid))
        return "@" + os.fsdecode(listener.getsockname()[1:])


@contextmanager
def _unusable() -> Iterator[None]:
    """Turn what tools of tests find wrong into our own exception."""
    try:
        yield
    except AssertionError as error:
        reason = str(error).replace("\n", " ") or "it is not as it should be"
        raise Unusable(f"the accessory: {reason}") from None


def _built(source: str) -> str:
    try:
        return os.fspath(build(BENCH / source))
    except RuntimeError as error:
        raise Unusable(str(error).replace("\n", " ").strip()) from None


def start_asker(
    stack: ExitStack,
    site: Site,
    address: str,
    kinds: str,
    names: Iterable[str],
    *,
    seconds: int = 0,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a client that asks for KINDS of each of NAMES, or again and again for SECONDS."""
    packets = [_PACKETS[kind] for kind in kinds]
    with tempfile.NamedTemporaryFile(dir=site.folder, prefix="requests-", delete=False) as file:
        for name in names:
            request = wire.datagram((wire.NAME, name.encode()), *packets)
            file.write(struct.pack("=I", len(request)) + request)
    numbers = (str(len(kinds)), str(kinds.count("l")), str(seconds))
    return start(
        stack,
        [*_on_processor(_CLIENT), _built("asker.c"), address, file.name, *numbers],
        stdin=stdin,
        stderr=subprocess.PIPE,
    )


def ask_in_turns(
    site: Site, addresses: tuple[str, str], kinds: str, names: Sequence[str]
) -> tuple[float, float]:
    """Ask at both ADDRESSES for KINDS of each of NAMES; return microseconds from request to answer.

    They take turns, each time with a new client, and the median of the clients' medians is
    returned: that of one depends on which processors the scheduler happened to choose for it.
    """
    medians: tuple[list[float], list[float]] = ([], [])
    sides = list(zip(medians, addresses, strict=True))
    for turn in range(_TURNS):
        # Neither is always the first.
        for taken, address in sides if turn % 2 == 0 else reversed(sides):
            taken.append(_ask(site, address, kinds, names[turn::_TURNS]))
    return statistics.median(medians[0]), statistics.median(medians[1])


def _ask(site: Site, address: str, kinds: str, names: Sequence[str]) -> float:
    with ExitStack() as stack:
        asker = start_asker(stack, site, address, kinds, names)
        return float(report_of(asker, "the asker")["median"])


def settle(pid: int) -> None:
    """Wait until a process has nothing to do any more."""
    end = time.monotonic() + _PATIENCE
    before = -1
    while (now := proc.cpu(pid).total) != before:
        if time.monotonic() > end:
            raise Unusable(f"process {pid} did not come to rest within {_PATIENCE:g} s")
        before = now
        time.sleep(_QUIET)
