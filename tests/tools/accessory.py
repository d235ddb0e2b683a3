"""A real accessory daemon for tests, and a stand-in for the service manager that starts it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from tests.tools.harness import DEADLINE, Cgroup, descriptors_at_rest, wait_for
from tests.tools.harness import host as make_host
from tests.tools.native import ROOT
from tests.tools.wire import Client

KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "user", "uts")
INIT = ROOT / "build" / "libexec" / "cm4all-spawn-init"
KEEPER = ROOT / "build" / "libexec" / "cm4all-spawn-keeper"


def own_namespaces(pid: int) -> dict[str, str]:
    """Return which namespaces a process is in."""
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in KINDS}


def inits_in(cgroup: Cgroup) -> dict[int, str]:
    """Return pid and name of the inits of PID namespaces that a daemon in CGROUP has made."""
    found = _processes_in(cgroup).items()
    return {pid: name for pid, name in found if name[:2] in ("in", "i-")}


def _processes_in(cgroup: Cgroup) -> dict[int, str]:
    found = {}
    for line in (cgroup.directory / "cgroup.procs").read_text().split():
        with suppress(OSError):
            found[int(line)] = Path(f"/proc/{line}/comm").read_text().rstrip("\n")
    return found


class Manager:
    """Stands in for systemd: takes notifications, stores descriptors, passes them to a start."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self.notifications: list[str] = []
        self.stored: list[tuple[str, int]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(self._socket, 4096, 16)
                if not data:
                    return
                lines = data.decode().splitlines()
                name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "stored")
                if "FDSTOREREMOVE=1" in lines:
                    self._forget(one for one in self.stored if one[0] == name)
                if "FDSTORE=1" in lines:
                    self.stored += [(name, fd) for fd in fds]
                else:
                    for fd in fds:
                        os.close(fd)
                self.notifications += lines

    def close(self) -> None:
        """End, with all that is stored."""
        self.discard()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def passed(self) -> list[tuple[str, int]]:
        """Return what is stored, without that whose other end was closed."""
        self._read_all()
        self._forget(one for one in self.stored if _is_hung_up(one[1]))
        return self.stored

    def discard(self) -> None:
        """Forget what is stored, as a manager does when the unit is removed."""
        self._forget(self.stored)

    def _read_all(self) -> None:
        """Wait until all that was sent until now has been read (sd_notify_barrier(3))."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
            open(read_end, "rb") as end,
        ):
            sender.connect(self._socket.getsockname())
            socket.send_fds(sender, [b"BARRIER=1"], [write_end])
            os.close(write_end)
            end.read()

    def _forget(self, stored: Iterable[tuple[str, int]]) -> None:
        for one in tuple(stored):
            self.stored.remove(one)
            os.close(one[1])


def _is_hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


class Accessory:
    """Daemons that follow each other at one address, in a cgroup of their own."""

    def __init__(self, directory: Path, cgroup: Cgroup, arguments: list[str]) -> None:
        self.address = f"@cm4all-spawn-test-{os.urandom(6).hex()}"
        self.manager = Manager(directory / "manager.socket")
        self.cgroup = cgroup
        self.arguments = arguments
        self.wrapper: list[str] = []
        self.listener: socket.socket | None = None
        self.settings = directory / "accessory.toml"
        self.settings.touch()
        self.error_file = directory / "accessory.stderr"
        self.error_file.touch()
        self._namespaces: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def activate(self) -> None:
        """Listen for the daemon from now on, as a socket unit does."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind("\0" + self.address[1:])
        self.listener.listen(1024)

    def passed(self) -> tuple[list[str], list[int]]:
        """Return names and descriptors of what the manager passes to a daemon."""
        passed = [*self.manager.passed()]
        if self.listener is not None:
            passed.append(("listener", self.listener.fileno()))
        return [name for name, _ in passed], [fd for _, fd in passed]

    def start(self) -> Self:
        """Start a daemon and wait until it is ready."""
        self.begin()
        wait_for("the daemon is ready", self._ready)
        self._namespaces = own_namespaces(self.pid)
        return self

    def begin(self) -> None:
        """Start a daemon."""
        self.manager.notifications.clear()
        names, fds = self.passed()
        environment = os.environ | {
            "NOTIFY_SOCKET": self.manager.address,
            "PYTHONPATH": str(ROOT),
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": ":".join(names),
        }
        # What is passed begins at 3; the descriptors are moved out of the way first.
        moves = [f"exec {100 + n}<&{fd}" for n, fd in enumerate(fds)]
        moves += [f"exec {3 + n}<&{100 + n} {100 + n}<&-" for n in range(len(fds))]
        script = "\n".join((*moves, 'echo 0 >"$1/cgroup.procs"; shift', 'LISTEN_PID=$$ exec "$@"'))
        command = [*self.wrapper, sys.executable, "-m", "spawn_accessory"]
        command += ["--listen", self.address, "--config", str(self.settings), *self.arguments]
        with self.error_file.open("ab") as errors:
            self.process = subprocess.Popen(
                ["bash", "-ec", script, "bash", str(self.cgroup.directory), *command],
                pass_fds=fds,
                stdout=errors,
                stderr=errors,
                env=environment,
                cwd="/",
            )

    def _ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended; it wrote: {self.errors()}")
        return "READY=1" in self.manager.notifications

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self.process is not None
        return self.process.pid

    def client(self) -> Client:
        """Return a new connection."""
        return Client(self.address)

    def errors(self) -> list[str]:
        """Return the lines that daemons wrote."""
        return self.error_file.read_text().splitlines()

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """End the daemon as a service manager does, and check that it ended well."""
        assert self.process is not None
        self.signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE) == 0, self.errors()

    def kill(self) -> None:
        """End the daemon at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def descriptors(self) -> int:
        """Return how many descriptors the daemon has open."""
        return descriptors_at_rest(self.pid)

    def keeper_descriptors(self) -> int:
        """Return how many descriptors the keeper has open."""
        return descriptors_at_rest(self.keeper())

    def processes(self) -> dict[int, str]:
        """Return pid and name of all processes that belong to the daemon, itself included."""
        return _processes_in(self.cgroup)

    def inits(self) -> dict[int, str]:
        """Return pid and name of the inits of PID namespaces."""
        return inits_in(self.cgroup)

    def keeper(self) -> int:
        """Return the pid of the keeper."""
        # A child that makes a namespace has its name for a moment.
        wait_for("there is but one keeper", lambda: len(self._keepers()) <= 1)
        (pid,) = self._keepers()
        return pid

    def _keepers(self) -> list[int]:
        return [pid for pid, name in self.processes().items() if name == "spawn-keeper"]

    def check_own_namespaces(self) -> None:
        """Check that a daemon that runs is in the namespaces in which it began."""
        if self.process is not None and self.process.poll() is None:
            assert own_namespaces(self.pid) == self._namespaces

    def close(self) -> None:
        """End everything."""
        with ExitStack() as stack:
            stack.callback(self.cgroup.remove)
            stack.callback(self.manager.close)
            if self.listener is not None:
                stack.callback(self.listener.close)
            if self.process is not None and self.process.poll() is None:
                stack.callback(self.kill)
            self.check_own_namespaces()


@contextmanager
def make_accessory(directory: Path, cgroup: Cgroup, *arguments: str) -> Iterator[Accessory]:
    """Return a daemon that is not started yet; everything ends with the context."""
    place = Accessory(directory, cgroup, list(arguments))
    try:
        yield place
    finally:
        place.close()


@contextmanager
def running_accessory(name: str, settings: str = "") -> Iterator[Accessory]:
    """Run a daemon that several tests share; NAME tells its cgroup from those of others."""
    with TemporaryDirectory() as directory, make_host(Path(directory), name) as host:
        os.chmod(directory, 0o755)
        with make_accessory(host.directory, host.scope("accessory.service")) as place:
            place.settings.write_text(settings)
            yield place.start()
