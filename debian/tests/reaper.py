"""What the tests of the reaper share: the service, scopes with jobs in them, what it recorded."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path
from typing import Final, Self

from support import Unit, attempt, run, wait_for

SERVICE: Final = Unit("cm4all-spawn-reaper.service")
USER: Final = "cm4all-spawn-reaper"
SCRIPT: Final = Path("/etc/cm4all/spawn/reaper.lua")
SETTINGS: Final = Path("/etc/cm4all/spawn/reaper.toml")
STATE: Final = Path("/var/lib/cm4all-spawn-reaper")
SLICE: Final = "/system.slice/system-cm4all.slice"
CGROUPS: Final = Path("/sys/fs/cgroup")

CAP_DAC_OVERRIDE: Final = 1 << 1
CAPABILITIES: Final = ("Inh", "Prm", "Eff", "Bnd", "Amb")

# Keeps each release, in a file that the unit lets the script write.
RECORD: Final = """
local file = assert(io.open(os.getenv("STATE_DIRECTORY") .. "/releases", "a"))
file:setvbuf("line")

local line = '{"id": "%s", "path": "%s", "account": "%s", "total": %.6f, "own": %.6f, ' ..
  '"remainder": %s}\\n'

function cgroup_released(cgroup)
  file:write(line:format(cgroup.id, cgroup.path, cgroup.xattr.account or "", cgroup.cpu_total,
    cgroup.own.cpu_total, tostring(cgroup.remainder)))
end
"""


@dataclass(frozen=True)
class Release:
    """One call of the script that RECORD is."""

    id: str
    path: str
    account: str
    total: float
    own: float
    remainder: bool


def releases() -> list[Release]:
    """Return what RECORD has written so far."""
    file = STATE / "releases"
    if not file.exists():
        return []
    complete, _, _ = file.read_text().rpartition("\n")
    return [Release(**json.loads(line)) for line in complete.splitlines()]


def counted(found: Sequence[Release]) -> Counter[str]:
    """Return how often each cgroup was released; remainders are no releases of their own."""
    return Counter(release.path for release in found if not release.remainder)


def forget_releases() -> None:
    """Begin anew; the daemon must not run."""
    (STATE / "releases").unlink(missing_ok=True)


def use(script: str) -> None:
    """Let SCRIPT be the administrator's."""
    SCRIPT.write_text(script)


def forgive() -> None:
    """Forget failures, and how often the service was started again."""
    attempt("systemctl", "reset-failed", SERVICE.name)


def capabilities_of(pid: int) -> dict[str, int]:
    """Return the sets of capabilities that a process has."""
    return capabilities(Path(f"/proc/{pid}/status").read_text())


def capabilities(status: str) -> dict[str, int]:
    """Return the sets of capabilities in the text of a file /proc/PID/status."""
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    return {kind: int(fields[f"Cap{kind}"], 16) for kind in CAPABILITIES}


def cpu_usec(cgroup: Path) -> int:
    """Return what the kernel counted for a cgroup and all below it."""
    fields = (cgroup / "cpu.stat").read_text().split()
    return int(fields[fields.index("usage_usec") + 1])


class Scope:
    """A scope as spawners have it: from the service manager, with the spawner in its cgroup "_"."""

    def __init__(
        self, name: str = "bp-spawn", *properties: str, within: str = "system-cm4all.slice"
    ) -> None:
        """PROPERTIES are further ones, as busctl takes them: name, type, value, and so on."""
        self.unit = Unit(f"{name}.scope")
        self._spawner = subprocess.Popen(["sleep", "infinity"])
        count = 3 + len(properties) // 3
        run(
            *("busctl", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1"),
            *("org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))"),
            *(self.unit.name, "fail", str(count), "PIDs", "au", "1", str(self._spawner.pid)),
            *("Slice", "s", within, "Delegate", "b", "true", *properties, "0"),
        )
        wait_for(f"{self.unit.name} is active", lambda: self.unit.state == "active")
        self.path = self.unit["ControlGroup"]
        self.directory = CGROUPS / self.path[1:]
        self.own = self.directory / "_"
        self.own.mkdir()
        (self.own / "cgroup.procs").write_text(str(self._spawner.pid))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the unit, and with it all that runs in the scope."""
        self.unit.stop()
        self._spawner.wait()

    def make(self, name: str) -> Path:
        """Make a cgroup for a job, with its parents where they are missing."""
        directory = self.directory / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def begin(self, name: str, command: str = "exec sleep infinity") -> subprocess.Popen[bytes]:
        """Start a shell command in a cgroup of its own; return when it is in there."""
        script = f'echo 0 >"$1/cgroup.procs" && echo && {command}'
        job = subprocess.Popen(
            ["sh", "-c", script, "sh", self.make(name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert job.stdout is not None
        assert job.stdout.readline() == b"\n", f"no process can enter {name}"
        return job

    def run(self, name: str, command: str = ":") -> None:
        """Run a shell command in a cgroup of its own to its end."""
        assert self.begin(name, command).wait() == 0

    def jobs(self) -> list[str]:
        """Return the cgroups directly in the scope, the spawner's own left out."""
        return sorted(
            entry.name
            for entry in os.scandir(self.directory)
            if entry.is_dir() and entry.name != self.own.name
        )

    def wait_empty(self, seconds: float = 20.0) -> None:
        """Return when all jobs have been reaped."""
        wait_for(f"{self.path} is empty", lambda: not self.jobs(), seconds)

    def wait_reaped(self, *names: str) -> None:
        """Return when all jobs have been reaped, and RECORD has written that these were.

        The script may learn of a release after the cgroup is gone.
        """
        self.wait_empty()
        wait_for(f"{names} are recorded", lambda: all(map(self.released, names)))

    def released(self, name: str) -> int:
        """Return how often RECORD has written that a cgroup was released."""
        return counted(releases())[f"{self.path}/{name}"]

    def jobs_usec(self) -> int:
        """Return what the kernel counted for all jobs that there ever were."""
        return cpu_usec(self.directory) - cpu_usec(self.own)


class Load:
    """Short jobs one after the other: some on their own, the others in sessions of few names."""

    def __init__(self, scope: Scope, count: int) -> None:
        """Start COUNT jobs in the background."""
        self._scope = scope
        self._names = [
            f"name-{number % 5}/session-{number}" if number % 2 else f"job-{number}"
            for number in range(count)
        ]
        self._process = Process(target=self._run)
        self._process.start()

    @property
    def paths(self) -> set[str]:
        """The cgroups in which exactly one job was, as the script sees them."""
        return {f"{self._scope.path}/{name}" for name in self._names}

    @property
    def running(self) -> bool:
        """Whether there are jobs to come."""
        return self._process.is_alive()

    def wait(self) -> None:
        """Return when all jobs have ended."""
        self._process.join()
        assert self._process.exitcode == 0

    def _run(self) -> None:
        for name in self._names:
            while not self._run_job(self._scope.directory / name):
                pass  # the reaper has deleted what is above it in between

    @staticmethod
    def _run_job(directory: Path) -> bool:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:
            return False
        if (pid := os.fork()) == 0:
            status = 1
            try:
                (directory / "cgroup.procs").write_text("0")
                end = time.process_time() + 0.0005
                while time.process_time() < end:
                    pass
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        return status == 0
