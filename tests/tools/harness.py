"""Real cgroups and a real reaper for tests."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from spawn_common import linux
from tests.tools.native import ROOT, build

RECORD = ROOT / "tests" / "tools" / "record.lua"
DEADLINE = 30.0
_SPECIAL = r"[^\w.-]"  # in a path or a pattern


def wait_for(what: str, condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Return as soon as CONDITION holds; fail the test if it does not within SECONDS."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)


@contextmanager
def many_descriptors() -> Iterator[None]:
    """Allow ourselves as many descriptors as we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptors_at_rest(pid: int) -> int:
    """Return how many descriptors a process has open, none of them for a moment only.

    It waits until the process sleeps, having done all that there was to do, or is stopped.
    """
    counts: list[int] = []

    def slept() -> bool:
        before = _rest(pid)
        count = len(os.listdir(f"/proc/{pid}/fd"))
        if before is None or _rest(pid) != before:
            return False
        counts.append(count)
        return True

    wait_for(f"process {pid} has nothing to do", slept)
    return counts[0]


def _rest(pid: int) -> str | None:
    """Return what tells the sleep of a process from its last and its next one, None if it runs."""
    status = Path(f"/proc/{pid}/status").read_text()
    asleep = re.search(r"^State:\t[ST]", status, re.MULTILINE)
    return status.partition("\nvoluntary_ctxt_switches:")[2] if asleep else None


class Cgroup:
    """A directory of the cgroup v2 hierarchy that a test made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def make(self, name: str | bytes, account: bytes | None = None) -> Cgroup:
        """Create a cgroup below this one, with its parents where they are missing."""
        cgroup = Cgroup(self.directory / os.fsdecode(name))
        cgroup.directory.mkdir(parents=True, exist_ok=True)
        if account is not None:
            os.setxattr(cgroup.directory, "user.account", account)
        return cgroup

    def start(self, command: str = "exec sleep 1000") -> subprocess.Popen[bytes]:
        """Start a shell command whose process enters this cgroup before anything else."""
        script = f'echo 0 > "$1/cgroup.procs"; {command}'
        return subprocess.Popen(["sh", "-c", script, "sh", self.directory])

    def run(self, command: str = ":") -> None:
        """Run a shell command in this cgroup to its end."""
        assert self.start(command).wait() == 0

    def exists(self) -> bool:
        """Whether the kernel still has it."""
        return self.directory.exists()

    def children(self) -> list[str]:
        """Return the names of the cgroups directly below."""
        with os.scandir(self.directory) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def populated(self) -> bool:
        """Whether there is a process in it or below it."""
        return "populated 1" in (self.directory / "cgroup.events").read_text()

    def cpu_seconds(self) -> float:
        """Return what the kernel counted for it and everything below it."""
        fields = (self.directory / "cpu.stat").read_text().split()
        return int(fields[fields.index("usage_usec") + 1]) / 1e6

    def remove(self) -> None:
        """End all processes in it and remove it with everything below."""
        if not self.exists():
            return
        wait_for(f"no process is left in {self.directory}", self._killed)
        wait_for(f"{self.directory} is removed", self._removed)

    def _killed(self) -> bool:
        with suppress(FileNotFoundError, OSError):
            (self.directory / "cgroup.kill").write_text("1")
            return not self.populated()
        return True

    def _removed(self) -> bool:
        for directory, _, _ in os.walk(self.directory, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)
        return not self.exists()


@dataclass(frozen=True)
class Release:
    """One line of record.lua."""

    id: str
    path: bytes
    total: float
    own: float
    remainder: bool


def read_releases(file: Path) -> list[Release]:
    """Return what record.lua has written to a file, which need not be there yet."""
    if not file.exists():
        return []
    # A line that crosses a page becomes visible in two steps.
    complete, _, _ = file.read_text().rpartition("\n")
    lines = [json.loads(line) for line in complete.splitlines()]
    return [Release(**(line | {"path": bytes.fromhex(line["path"])})) for line in lines]


class Reaper:
    """A running cm4all-spawn-reaper and what it wrote."""

    def __init__(
        self, directory: Path, root: Path, arguments: list[str | Path], wrapper: list[str]
    ) -> None:
        """Start it with ARGUMENTS; WRAPPER is put before the command. DIRECTORY takes its files."""
        directory.mkdir(exist_ok=True)
        self._releases = directory / "releases"
        self._output = directory / "stdout"
        self._errors = directory / "stderr"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(b"\0" + os.urandom(8).hex().encode())
        self.notifications: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        notify = "@" + os.fsdecode(self._socket.getsockname()[1:])
        environment = os.environ | {
            "NOTIFY_SOCKET": notify,
            "RELEASES": str(self._releases),
            "PYTHONPATH": str(ROOT),
        }
        command = [*wrapper, sys.executable, "-m", "spawn_reaper", "--cgroup-root", str(root)]
        with self._output.open("ab") as output, self._errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*command, *arguments], stdout=output, stderr=errors, env=environment, cwd="/"
            )

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self.process.pid

    def wait_ready(self) -> Self:
        """Return when the daemon has told its service manager that it is ready."""
        self.wait_notification("READY=1")
        return self

    def wait_notification(self, line: str, count: int = 1) -> None:
        """Return when LINE has been notified COUNT times in all."""

        def notified() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the reaper ended; it wrote: {self.errors()}")
            return self.notifications.count(line) >= count

        wait_for(line, notified)

    def _listen(self) -> None:
        """Read all notifications, as a service manager does: the sender waits for that."""
        with suppress(OSError):
            while data := self._socket.recv(4096):
                self.notifications += data.decode().splitlines()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stop(self) -> None:
        """End it as a service manager does, and check that it ended well."""
        self.signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE) == 0, self.errors()

    def kill(self) -> None:
        """End it if it runs, whatever it is doing."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        with suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def releases(self) -> list[Release]:
        """Return what record.lua has written so far."""
        return read_releases(self._releases)

    def output(self) -> list[str]:
        """Return the lines that the script printed."""
        return self._output.read_text(errors="surrogateescape").splitlines()

    def errors(self) -> list[str]:
        """Return the lines that the daemon wrote to standard error."""
        return self._errors.read_text(errors="surrogateescape").splitlines()

    def descriptors(self) -> int:
        """Return how many descriptors it has open."""
        return descriptors_at_rest(self.pid)

    def watches(self) -> int:
        """Return how many inotify watches it holds."""
        count = 0
        for path in Path(f"/proc/{self.pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):  # open for a moment only
                count += path.read_text().count("inotify wd:")
        return count


class Host:
    """A place of a test's own in the cgroup hierarchy, and the reapers that run there."""

    def __init__(self, directory: Path, base: Cgroup, root: Path) -> None:
        self.directory = directory
        self.base = base
        self.root = root
        self._reapers: list[Reaper] = []

    def scope(self, name: str = "test.scope") -> Cgroup:
        """Create a scope."""
        return self.base.make(name)

    def path_of(self, cgroup: Cgroup) -> str:
        """Return the path of a cgroup as /proc/self/cgroup has it."""
        return f"/{cgroup.directory.relative_to(self.root)}"

    def start_reaper(
        self,
        *scopes: Cgroup,
        script: str | Path | None = RECORD,
        settings: str = "",
        wrapper: list[str] | None = None,
    ) -> Reaper:
        """Start a reaper; SCRIPT is Lua code, a path, or None for the default; SETTINGS is TOML."""
        files = self.directory
        if isinstance(script, str):
            (files / "reaper.lua").write_text(script)
            script = files / "reaper.lua"
        (files / "reaper.toml").write_text(settings)
        command: list[str | Path] = ["--config", files / "reaper.toml"]
        if script is not None:
            command += ["--lua", script]
        for scope in scopes:
            command += ["--scope", self.path_of(scope)]
        reaper = Reaper(files / "reaper", self.root, command, wrapper or [])
        self._reapers.append(reaper)
        return reaper

    def reaper(self, *scopes: Cgroup, script: str | Path = RECORD, settings: str = "") -> Reaper:
        """Start a reaper and wait until it is ready."""
        return self.start_reaper(*scopes, script=script, settings=settings).wait_ready()

    def close(self) -> None:
        """End all reapers and remove everything."""
        with ExitStack() as stack:
            stack.callback(self.base.remove)
            for reaper in self._reapers:
                stack.callback(reaper.kill)


@contextmanager
def host(directory: Path, name: str) -> Iterator[Host]:
    """Make a place below the cgroup root for as long as the context lasts."""
    mount = linux.find_cgroup2_mount()
    assert mount is not None, "no cgroup v2 hierarchy is mounted"
    root = Path(os.fsdecode(mount.path))
    directory_name = f"cm4all-spawn-test-{os.getpid()}-{re.sub(_SPECIAL, '_', name)}"
    place = Host(directory, Cgroup(root).make(directory_name), root)
    try:
        yield place
    finally:
        place.close()


@dataclass(frozen=True)
class Spawned:
    """What the spawner reported."""

    jobs: int
    names: int
    targets: int
    retries: int


def spawner_command(scope: Cgroup, count: int, *options: str) -> list[str]:
    """Return the command that runs COUNT jobs in SCOPE; see spawner.c for the options."""
    program = build(ROOT / "tests" / "tools" / "spawner.c")
    return [str(program), *options, str(scope.directory), str(count)]


def spawn(scope: Cgroup, count: int, *options: str) -> Spawned:
    """Run COUNT jobs as fast as the machine can."""
    result = subprocess.run(
        spawner_command(scope, count, *options), stderr=subprocess.PIPE, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stderr)
    created = report["created"]
    return Spawned(report["jobs"], created["names"], created["targets"], report["retries"])
