"""The accessory as its clients see it, and who must not notice what happens to it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from support import Unit, run, wait_for

from spawn_client.accessory import Accessory, Namespaces

SOCKET: Final = Unit("cm4all-spawn-accessory.socket")
SERVICE: Final = Unit("cm4all-spawn-accessory.service")
SETTINGS: Final = Path("/etc/cm4all/spawn/accessory.toml")

MAP: Final = "0 100000 65536"
KINDS: Final = ("ipc", "pid", "user", "net", "uts", "cgroup", "mount", "time")
OPTIONS: Final = [f"--{kind}" for kind in KINDS if kind != "user"] + ["--user", MAP]
_FILES: Final = {"mount": "mnt"}  # in /proc/PID/ns

Inodes = Mapping[str, int]
"""Which namespaces: their inode numbers by kind."""


def client(*arguments: str) -> str:
    """Run cm4all-spawn-client, which has to succeed, and return what it writes."""
    return run("cm4all-spawn-client", *arguments)


def everything(accessory: Accessory, name: str, *, lease: bool = False) -> Namespaces:
    """Ask for all namespaces of NAME."""
    return accessory.namespaces(
        name,
        ipc=True,
        pid=True,
        user=(MAP, MAP),
        net=True,
        uts=True,
        cgroup=True,
        mount=True,
        time=True,
        lease=lease,
    )


def inodes(namespaces: Namespaces) -> Inodes:
    """Return which namespaces these are."""
    found = {}
    for kind in KINDS:
        if (descriptor := getattr(namespaces, kind)) is not None:
            found[kind] = os.fstat(descriptor).st_ino
    return found


def inodes_of(name: str) -> Inodes:
    """Return which namespaces NAME has."""
    with Accessory() as accessory, everything(accessory, name) as namespaces:
        return inodes(namespaces)


def leases() -> dict[str, int]:
    """Return which names there are, each with how many leases were given out."""
    with Accessory() as accessory:
        return {one.name.decode(): one.leases for one in accessory.list()}


def namespaces_of(pid: int | str) -> Inodes:
    """Return which namespaces a process is in."""
    return {kind: os.stat(f"/proc/{pid}/ns/{_FILES.get(kind, kind)}").st_ino for kind in KINDS}


def keeper() -> int:
    """Return the pid of the keeper, as soon as there is one."""
    # Whatever makes a namespace for it has its name for a moment.
    wait_for("there is one keeper", lambda: len(_keepers()) == 1)
    return _keepers()[0]


def _keepers() -> list[int]:
    return [pid for pid, name in SERVICE.processes().items() if name == "spawn-keeper"]


def inits() -> dict[int, str]:
    """Return pid and name of the inits of PID namespaces."""
    found = SERVICE.processes().items()
    return {pid: name for pid, name in found if re.match("init-|i-", name)}


def kill_daemon() -> None:
    """Kill the daemon, and wait until the service manager knows."""
    pid = SERVICE.pid
    assert pid > 0
    os.kill(pid, signal.SIGKILL)
    wait_for("the daemon is gone", lambda: SERVICE.pid != pid)


def wait_for_daemon() -> None:
    """Wait until the daemon runs again."""
    wait_for("the daemon runs", lambda: SERVICE.state == "active")


class Inhabitant:
    """A command in all namespaces of a name, which it leases."""

    def __init__(self, name: str) -> None:
        """Return as soon as it runs."""
        self._client = subprocess.Popen(
            ["cm4all-spawn-client", name, *OPTIONS, "--", "sh", "-c", "echo; exec sleep infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._client.stdout is not None
        assert self._client.stdout.read(1) == b"\n"
        self.pid = _last_descendant(self._client.pid)
        self._home = namespaces_of(self.pid)

    def check(self) -> None:
        """Check that it lives where it has always lived."""
        assert not self.has_ended(), "a command in the namespaces has ended"
        assert namespaces_of(self.pid) == self._home

    def has_ended(self) -> bool:
        """Whether it lives no more."""
        return self._client.poll() is not None

    def end(self) -> None:
        """End the command, and with it the lease."""
        self._client.terminate()
        self._client.communicate()


def _last_descendant(pid: int) -> int:
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


class Crowd:
    """Threads that ask all the time, for what there is and for what is new.

    Nobody may be refused, see an error, or get other namespaces than before.
    """

    def __init__(self, known: Mapping[str, Inodes]) -> None:
        """KNOWN are names, each with its namespaces."""
        self._known = known
        self._end = threading.Event()
        self._failures: list[Exception] = []
        self._answers = [0] * 4
        # The first ones keep their connection, the others make one for each request.
        self._threads = [
            threading.Thread(target=self._ask, args=(number, number < 2))
            for number in range(len(self._answers))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        assert not self._failures, self._failures

    def check(self) -> None:
        """Wait until each has answers to what was asked from now on; nobody has complained."""
        before = list(self._answers)
        wait_for("all clients have their answers", lambda: self._have_answers_after(before))
        assert not self._failures, self._failures

    def _have_answers_after(self, before: list[int]) -> bool:
        # What comes next may have been asked for earlier.
        pairs = zip(self._answers, before, strict=True)
        return bool(self._failures) or all(now > then + 1 for now, then in pairs)

    def _ask(self, number: int, stays: bool) -> None:
        accessory = Accessory()
        try:
            while not self._end.is_set():
                if self._answers[number] % 20 == 0:
                    name = f"new-{number}-{self._answers[number]}"
                    accessory.namespaces(name, ipc=True, pid=True, lease=False).close()
                for name, expected in self._known.items():
                    with everything(accessory, name, lease=True) as namespaces:
                        assert inodes(namespaces) == expected, f"{name} has other namespaces"
                self._answers[number] += 1
                if not stays:
                    accessory.close()
        except Exception as error:
            self._failures.append(error)
        finally:
            accessory.close()


@contextmanager
def nobody_notices() -> Iterator[None]:
    """Check that another daemon follows in this context, and that all else is as it was.

    That is names, namespaces, leases, inits, a process inside, keeper and socket; and what clients
    get, who ask all the time.
    """
    daemon, listening = SERVICE.pid, SOCKET["ActiveEnterTimestampMonotonic"]
    inhabitant = Inhabitant("carol")
    with Accessory() as accessory, everything(accessory, "alice", lease=True) as alice:
        known = {"alice": inodes(alice)} | {name: inodes_of(name) for name in ("bob", "carol")}
        processes = _lasting_processes(known)
        with Crowd(known) as crowd:
            yield
            crowd.check()
        assert inodes_of("alice") == known["alice"]
        assert not _has_no_reader(alice.lease)
        assert leases()["alice"] > 0
    inhabitant.check()
    inhabitant.end()
    assert SERVICE.pid not in (0, daemon)
    assert _lasting_processes(known) == processes
    assert (SOCKET.state, SERVICE.state) == ("active", "active")
    assert SOCKET["ActiveEnterTimestampMonotonic"] == listening, "the socket was started again"


def _lasting_processes(names: Iterable[str]) -> set[int]:
    """Return keeper and inits; those of other names may expire at any time."""
    lasting = {f"init-{name}" for name in names}
    wait_for("inits have their names", lambda: lasting <= set(inits().values()))
    return {keeper()} | {pid for pid, name in inits().items() if name in lasting}


def _has_no_reader(pipe: int | None) -> bool:
    assert pipe is not None
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))
