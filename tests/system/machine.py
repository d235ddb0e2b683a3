"""The quick machine: systemd as PID 1 in namespaces of its own, booted in about a second.

Everything but the controllers of cgroup v2 is as on a real one. The script `boot` mounts and starts
it, and cleans up; this module talks to what runs in it.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from spawn_common import linux

BOOT = Path(__file__).with_name("boot")
BOOT_SECONDS = 60.0

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}

_CREDENTIALS = struct.Struct("iII")  # struct ucred, <sys/socket.h>
_CREDENTIALS_SPACE = socket.CMSG_SPACE(_CREDENTIALS.size)
_serial = itertools.count()


class Failed(Exception):
    """A machine did not boot, or does not run any more."""


class Host(Protocol):
    """What scripts can be run on."""

    def run(
        self, *command: str, stdin: bytes = b"", seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine to its end.

        Raises subprocess.TimeoutExpired after SECONDS (it may run on until the machine is closed)
        and Failed if the machine itself ended.
        """

    def console(self) -> str:
        """Return what the machine wrote to its console."""


class Machine:
    """A booted machine, which leaves nothing behind when it is closed, or when we are killed."""

    def __init__(self, root: Path, *, seconds: float = BOOT_SECONDS) -> None:
        """Boot from the folder ROOT, which is only read; wait for it at most SECONDS."""
        mount = linux.find_cgroup2_mount()
        if mount is None:
            raise Failed("there is no cgroup v2 hierarchy")
        name = f"cm4all-spawn-machine-{os.getpid()}-{next(_serial)}"
        self.cgroup = Path(os.fsdecode(mount.path)) / name
        self._console = tempfile.TemporaryFile()  # noqa: SIM115 - for console()
        # The script removes the directory: it still can when we are killed.
        directory = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
            notifications.bind(str(directory / "notify"))
            notifications.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._process = subprocess.Popen(
                ["sh", str(BOOT), str(root), str(self.cgroup), str(directory)],
                stdin=subprocess.PIPE,
                stdout=self._console,
                stderr=self._console,
                start_new_session=True,  # Ctrl-C is for us
            )
            try:
                self._init = self._wait_ready(notifications, time.monotonic() + seconds)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, *command: str, stdin: bytes = b"", seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine to its end; see Host."""
        result = subprocess.run(
            self._entering(command), input=stdin, capture_output=True, timeout=seconds, check=False
        )
        if self._process.poll() is not None:
            raise Failed(f"the machine has ended\n{self.console()}")
        return subprocess.CompletedProcess(
            list(command), result.returncode, _text(result.stdout), _text(result.stderr)
        )

    def shell(self) -> int:
        """Run a shell in the machine, on our terminal; return its status."""
        return subprocess.run(self._entering(["bash", "--login"]), check=False).returncode

    def console(self) -> str:
        """Return what the machine wrote to its console."""
        size = os.fstat(self._console.fileno()).st_size
        return _text(os.pread(self._console.fileno(), size, 0))

    def close(self) -> None:
        """End it at once, and wait until nothing is left of it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _entering(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs COMMAND in the machine, in a cgroup of its own there."""
        script = 'echo 0 >"$1/cgroup.procs" && shift && exec "$@"'
        environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        return [
            *("sh", "-c", script, "sh", str(self.cgroup / "commands")),
            *("nsenter", "--target", str(self._init), "--all", "--root"),
            *("env", "--ignore-environment", *environment, "--chdir=/root", *command),
        ]

    def _wait_ready(self, notifications: socket.socket, deadline: float) -> int:
        """Return the process id of PID 1 when it says that it has booted."""
        pidfd = os.pidfd_open(self._process.pid)
        try:
            while (left := deadline - time.monotonic()) > 0:
                readable, _, _ = select.select([notifications.fileno(), pidfd], [], [], left)
                if notifications.fileno() in readable:
                    data, ancillary, _, _ = notifications.recvmsg(4096, _CREDENTIALS_SPACE)
                    if b"READY=1" in data.splitlines():
                        sender: int = _CREDENTIALS.unpack(ancillary[0][2])[0]
                        return sender
                elif pidfd in readable:
                    break
        finally:
            os.close(pidfd)
        raise Failed(f"the machine did not boot\n{self.console()}")


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
