"""Clients of the accessory that are processes of other users.

The process starts as root, since Python itself may lie where nobody else can read it, and becomes
the other user before it connects.
"""

from __future__ import annotations

import ast
import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from tests.tools.harness import DEADLINE
from tests.tools.native import ROOT
from tests.tools.wire import Client, Packet

# <linux/prctl.h>, <linux/capability.h>, <linux/sched.h>
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWUSER = 0x10000000
CAP_SYS_ADMIN = 1 << 21


@dataclass(frozen=True)
class Who:
    """A user; CAPABILITIES is a set of bits, CONTAINED whether it is root in its own namespace."""

    uid: int
    gid: int = 60000
    groups: tuple[int, ...] = ()
    capabilities: int = 0
    contained: bool = False


@dataclass(frozen=True)
class Asked:
    """Who asked as it sees itself, and for each request the packets and inodes that came."""

    uid: int
    capabilities: int
    answers: list[tuple[list[Packet], list[int]]]

    def counts(self) -> list[int]:
        """Return how many descriptors came for each request."""
        return [len(inodes) for _, inodes in self.answers]


def ask_as(who: Who, address: str, *requests: tuple[Packet, ...]) -> Asked:
    """Ask each of REQUESTS on a connection of its own."""
    command = _command(who, address, repr(requests))
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=DEADLINE, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    (uid, capabilities), *answers = map(ast.literal_eval, result.stdout.splitlines())
    return Asked(uid, capabilities, answers)


@contextmanager
def connections_of(who: Who, address: str, count: int) -> Iterator[None]:
    """Have COUNT connections on which nothing is said."""
    command = _command(who, address, repr(count))
    with subprocess.Popen(command, stdin=-1, stdout=-1, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 0


def _command(who: Who, address: str, what: str) -> list[str]:
    return [sys.executable, "-m", "tests.tools.peers", repr(astuple(who)), address, what]


def _become(who: Who) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0
    os.setgroups(who.groups)
    os.setresgid(who.gid, who.gid, who.gid)
    os.setresuid(who.uid, who.uid, who.uid)
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    low, high = who.capabilities & 0xFFFFFFFF, who.capabilities >> 32
    assert libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)) == 0
    if who.contained:
        assert libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0) == 0  # else /proc/self is root's
        assert libc.unshare(_CLONE_NEWUSER) == 0
        Path("/proc/self/uid_map").write_text(f"0 {who.uid} 1")


def _main() -> None:
    who, address, what = sys.argv[1:]
    _become(Who(*ast.literal_eval(who)))
    wanted = ast.literal_eval(what)
    if isinstance(wanted, int):
        clients = [Client(address) for _ in range(wanted)]
        print(len(clients), flush=True)
        sys.stdin.read()
        return
    lines = Path("/proc/self/status").read_text().splitlines()
    (effective,) = (int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    print((os.geteuid(), effective))
    for request in wanted:
        with Client(address) as client:
            with suppress(BrokenPipeError):  # it has been told something already
                client.send(*request)
            answer = client.receive()
            assert answer is not None
            with answer:
                print((answer.packets, answer.inodes()))


if __name__ == "__main__":
    _main()
