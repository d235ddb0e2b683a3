"""Both daemons as an administrator starts them who has no service manager.

All processes that come of a command stay in a cgroup of its own: that shows what is left of it, and
ends it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.tools.harness import DEADLINE, RECORD, Host, wait_for
from tests.tools.native import ROOT
from tests.tools.wire import IPC, LEASE, NAME, STATUS, STATUS_TEXT, Client

REAPER, ACCESSORY = "cm4all-spawn-reaper", "cm4all-spawn-accessory"
_WORLD = 0o001  # may enter a directory


class Command:
    """The command of a daemon, with what it needs to start; no other test uses the same."""

    def __init__(self, program: str, host: Host) -> None:
        self.program = program
        self.directory = host.directory
        self.pid_file = host.directory / "daemon.pid"
        self.log_file = host.directory / "daemon.log"
        self.settings = host.directory / "settings.toml"
        self.settings.touch()
        self.releases = host.directory / "releases"  # what record.lua writes
        self.cgroup = host.base.make("daemon")
        self.scope = host.scope()
        self.address = f"@cm4all-spawn-test-{os.urandom(6).hex()}"
        self.wrapper: list[str] = []
        self.arguments: list[str | Path] = ["--config", self.settings]
        if program == REAPER:
            self.arguments += ["--cgroup-root", host.root, "--scope", host.path_of(self.scope)]
            self.arguments += ["--lua", RECORD]
        else:
            self.arguments += ["--listen", self.address]

    def start(self, *options: str | Path, **how: Any) -> subprocess.Popen[str]:
        """Start the command with its arguments and OPTIONS; HOW is for Popen."""
        script = 'echo 0 >"$1/cgroup.procs"; shift; exec "$@"'
        module = "spawn_reaper" if self.program == REAPER else "spawn_accessory"
        command: list[str | Path] = ["sh", "-c", script, "sh", self.cgroup.directory]
        command += self.wrapper
        command += [sys.executable, "-m", module, *self.arguments, *options]
        environment = {name: os.environ[name] for name in os.environ if name != "NOTIFY_SOCKET"}
        how = {
            "env": environment | {"PYTHONPATH": str(ROOT), "RELEASES": str(self.releases)},
            "cwd": self.directory,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **how,
        }
        return subprocess.Popen(command, **how)

    def run(self, *options: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        with self.start(*options, **how) as process:
            output, errors = process.communicate(timeout=DEADLINE)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def detach(self, *options: str | Path, **how: Any) -> int:
        """Start a daemon in the background, and return its process id."""
        result = self.run("--detach", "--pid-file", self.pid_file, *options, **how)
        assert result.returncode == 0, result.stderr
        return self.pid()

    def pid(self) -> int:
        """Return which process the daemon is; wait until it has said so."""
        wait_for("the process id is there", self.has_pid)
        return int(self.pid_file.read_text())

    def has_pid(self) -> bool:
        """Whether the daemon has written down which process it is."""
        return self.pid_file.exists() and self.pid_file.read_text().endswith("\n")

    def check_that_it_works(self) -> None:
        """Let the daemon do what it is for."""
        if self.program == REAPER:
            job = self.scope.make("job")
            job.run("i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done")
            wait_for("it is reaped", lambda: not job.exists())
            return
        with Client(self.address) as client:
            with client.ask((NAME, b"a"), (IPC, b""), (LEASE, b"")) as answer:
                assert len(answer.fds) == 2, answer
            with client.ask((STATUS, b"")) as answer:
                assert answer.packets[0][0] == STATUS_TEXT

    def end(self, pid: int, number: int) -> None:
        """Send the daemon a signal that ends it, and wait until nothing of it is left."""
        os.kill(pid, number)
        wait_for("all processes have ended", self.is_gone)

    def is_gone(self) -> bool:
        """Whether nothing of it runs."""
        return not self.cgroup.populated()

    def processes(self) -> list[int]:
        """Return all processes that belong to it."""
        return list(map(int, (self.cgroup.directory / "cgroup.procs").read_text().split()))

    def daemon(self) -> int:
        """Return which of them is the daemon: the one whose parent is none of them."""
        processes = self.processes()
        (daemon,) = (pid for pid in processes if int(status(pid)["PPid"]) not in processes)
        return daemon

    def problems(self, text: str) -> list[str]:
        """Return which of the lines of TEXT are problems, without the name of the program."""
        lines = (line.partition(f"{self.program}: ") for line in text.splitlines())
        return [problem for before, name, problem in lines if name and not before]


def status(pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status (proc_pid_status(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capabilities(pid: int) -> dict[str, int]:
    """Return the sets of capabilities of a process: Prm, Eff, Inh, Amb, Bnd."""
    fields = status(pid)
    return {name[3:]: int(fields[name], 16) for name in fields if name.startswith("Cap")}


def readable_to_all() -> list[str]:
    """Return a wrapper in which every user can run Python and our code, wherever they lie.

    What is in the way, such as root's home, is covered there and then only.
    """
    wanted = {Path(path).resolve() for path in (sys.prefix, sys.base_prefix, ROOT)}
    covers: dict[Path, list[Path]] = {}
    for path in sorted(wanted):
        closed = (one for one in reversed(path.parents) if not one.stat().st_mode & _WORLD)
        if cover := next(closed, None):
            covers.setdefault(cover, []).append(path)
    if not covers:
        return []
    lines = [line for cover, paths in covers.items() for line in _cover(cover, paths)]
    return ["unshare", "--mount", "sh", "-ec", "\n".join([*lines, 'exec "$@"']), "sh"]


def _cover(closed: Path, paths: Iterable[Path]) -> Iterable[str]:
    """Yield the shell commands that leave nothing but PATHS in a directory, for everybody."""
    staging = shlex.quote("/mnt")
    yield f"mount -t tmpfs tmpfs {staging}"
    for path in paths:
        inside = shlex.quote(f"/mnt/{path.relative_to(closed)}")
        yield f"mkdir -p {inside}; mount --bind {shlex.quote(str(path))} {inside}"
    yield f"mount --move {staging} {shlex.quote(str(closed))}"
