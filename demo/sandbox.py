"""The demo's own piece of the cgroup tree: making it, running processes in it, removing it.

Owns every cgroup and every process that the demo makes; what is not below the demo's directory is
never touched. Cleaning up does not await anything, so that no signal can come in between.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from spawn_common import linux

KEEPER: Final = "_"
"""The cgroup in the scope where a spawner itself lives: as long as it runs, the scope is in use."""

_CLEANUP: Final = 5.0  # seconds until what does not end is reported
_CONTROLLERS: Final = ("memory", "pids")


class Failed(Exception):
    """The demo cannot run, go on or clean up; the message says why in one line."""


class CgroupGone(Exception):
    """The cgroup was deleted before a process could be placed into it."""


class Sandbox:
    """A directory in the cgroup tree with a scope in it, and the processes that live there."""

    def __init__(self, root: Path, name: str) -> None:
        self.directory = root / name
        self.scope_path = f"/{name}/demo-spawn.scope"  # as in /proc/self/cgroup
        self.scope = root / self.scope_path[1:]
        self._processes: list[subprocess.Popen[bytes]] = []

    def populate(self) -> None:
        """Make what a spawner finds when it starts: the scope, and itself inside."""
        enable_controllers(self.directory)
        self.scope.mkdir()
        enable_controllers(self.scope)
        # Reads until the pipe from the demo is closed: it ends with us, even if we are killed.
        self.spawn(self._make(self.scope / KEEPER), ["cat"], stdin=subprocess.PIPE)

    def spawn_beside(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a process in a cgroup NAME beside the scope; OUTPUT gets all that it says."""
        return self.spawn(
            self._make(self.directory / name),
            command,
            output=output,
            environment=environment,
        )

    def spawn(
        self,
        cgroup: int,
        command: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        output: int | IO[bytes] = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
        enter: Callable[[], None] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run COMMAND in the cgroup whose directory is open as CGROUP, which is closed.

        On return the process is in there, and has called ENTER. CgroupGone: the cgroup is not, so
        there is no process.
        """
        try:
            procs = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup)
        except OSError as error:
            raise CgroupGone(f"no cgroup for {command[0]}: {error.strerror}") from error
        finally:
            os.close(cgroup)

        def begin() -> None:
            os.write(procs, b"0")
            if enter is not None:
                enter()

        try:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=output,
                stderr=output,
                env=environment,
                # Ctrl-C in a terminal goes to all of a group; what ends here we end ourselves.
                start_new_session=True,
                preexec_fn=begin,
            )
        except subprocess.SubprocessError as error:  # all that is known of a failed preexec_fn
            raise CgroupGone(f"the cgroup does not take {command[0]}") from error
        finally:
            os.close(procs)
        self._processes.append(process)
        return process

    @property
    def has_memory(self) -> bool:
        """Whether the cgroups in the scope tell of their memory."""
        return "memory" in (self.scope / "cgroup.subtree_control").read_text().split()

    def names_in_scope(self) -> set[str]:
        """Return the names of the cgroups that are in the scope, the keeper's left out."""
        return {entry.name for entry in os.scandir(self.scope) if entry.is_dir()} - {KEEPER}

    def processes_beside(self, name: str) -> set[int]:
        """Return the processes in the cgroup NAME beside the scope."""
        return {int(pid) for pid in (self.directory / name / "cgroup.procs").read_text().split()}

    def cpu_of_jobs(self) -> int:
        """Return the kernel's count for the scope without the keeper, in microseconds of CPU."""
        return _cpu_usage(self.scope) - _cpu_usage(self.scope / KEEPER)

    def remove(self) -> None:
        """End every process in here and remove every cgroup; Failed if that fails."""
        end = time.monotonic() + _CLEANUP
        with suppress(OSError):  # whatever it is, what can be removed is removed
            (self.directory / "cgroup.kill").write_bytes(b"1")
            _wait_until_empty(self.directory, end)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            if process.stdin:
                process.stdin.close()
        for path, _, _ in os.walk(self.directory, topdown=False):
            with suppress(OSError):  # one that stays does not keep the others
                os.rmdir(path)
        if self.directory.exists():
            raise Failed(f"{self.directory} could not be removed")

    def _make(self, directory: Path) -> int:
        directory.mkdir()
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """Give a sandbox of this process and remove it afterwards; Failed: there can be none."""
    if os.geteuid() != 0:
        raise Failed("needs root, to make cgroups and to place processes into them")
    mount = linux.find_cgroup2_mount()
    if mount is None:
        raise Failed("needs cgroup v2, and no such hierarchy is mounted here")
    root = Path(os.fsdecode(mount.path))
    place = Sandbox(root, f"cm4all-spawn-demo-{os.getpid()}")
    try:
        place.directory.mkdir()
    except OSError as error:
        raise Failed(f"cannot make a cgroup in {root}: {error.strerror}") from None
    try:
        try:
            place.populate()
        except (OSError, CgroupGone) as error:
            raise Failed(f"cannot run a process in a cgroup of its own: {error}") from None
        yield place
    finally:
        place.remove()


def enable_controllers(directory: Path) -> None:
    """Let the cgroups below DIRECTORY have memory and pids, if the host hands these down.

    Whether it does is the business of whoever runs the host: nothing outside is changed.
    """
    for controller in _CONTROLLERS:
        with suppress(OSError):
            (directory / "cgroup.subtree_control").write_text(f"+{controller}")


async def ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a child to end and return its exit status, negative for a signal."""
    if process.returncode is not None:  # already waited for, by somebody else
        return process.returncode
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(process.pid)
    try:
        loop.add_reader(pidfd, event.set)
        await event.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()


def _cpu_usage(directory: Path) -> int:
    lines = (directory / "cpu.stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("usage_usec "))


def _wait_until_empty(directory: Path, end: float) -> None:
    """Wait for the last process to be gone, which the kernel notifies as an exception."""
    with open(directory / "cgroup.events", "rb", buffering=0) as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while not events.read().startswith(b"populated 0") and time.monotonic() < end:
            poll.poll(100)
            events.seek(0)
