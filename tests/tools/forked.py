"""Accessory daemons that start within milliseconds, and die at a chosen step of a request.

A test that kills hundreds of daemons cannot wait for Python each time: here a process that has
imported everything forks for each of them. Everything else is as with a daemon that was executed.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from contextlib import suppress
from types import FrameType
from typing import Any, Self

from tests.tools.accessory import Accessory
from tests.tools.harness import wait_for
from tests.tools.native import ROOT


class Forked:
    """A daemon that was forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, or does so within SECONDS."""
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(seconds * 1000):
                return False
            os.close(self._pidfd)
            self._pidfd = -1
        return True

    def kill(self) -> None:
        """End it at once."""
        if not self.ended():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            assert self.ended(10)


class Forks:
    """Starts daemons for an Accessory, whose own process stays out of it meanwhile."""

    def __init__(self, accessory: Accessory) -> None:
        self._accessory = accessory
        self._daemon: Forked | None = None
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its, accessory.error_file.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.tools.forked"],
                stdin=its.fileno(),
                stdout=errors,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd="/",
            )

    def begin(self, die_at: int = 0, patience: float = 10.0) -> Forked:
        """Start a daemon.

        DIE_AT is the step of its first request at which it kills itself, PATIENCE how many seconds
        it waits for the keeper.
        """
        accessory = self._accessory
        accessory.manager.notifications.clear()
        names, fds = accessory.passed()
        order = {
            "arguments": ["--listen", accessory.address, "--config", str(accessory.settings)],
            "cgroup": str(accessory.cgroup.directory / "cgroup.procs"),
            "manager": accessory.manager.address,
            "names": names,
            "die_at": die_at,
            "patience": patience,
        }
        socket.send_fds(self._socket, [json.dumps(order).encode()], fds)
        self._daemon = Forked(int(self._socket.recv(100)))
        return self._daemon

    def start(self, die_at: int = 0, patience: float = 10.0) -> Forked:
        """Start a daemon, and wait until it is ready."""
        daemon = self.begin(die_at, patience)

        def ready() -> bool:
            assert not daemon.ended(), self._accessory.errors()
            return "READY=1" in self._accessory.manager.notifications

        wait_for("the daemon is ready", ready)
        return daemon

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemon is not None:
            self._daemon.kill()
        self._socket.close()
        self._process.wait()


def _run(order: dict[str, Any], fds: list[int]) -> None:
    """Become the daemon."""
    from spawn_accessory import __main__, keeper

    with open(order["cgroup"], "w") as procs:
        procs.write("0")
    for fd in fds:  # out of the way first
        os.dup2(fd, fd + 100)
    for n, fd in enumerate(fds):
        os.dup2(fd + 100, 3 + n)
    os.closerange(3 + len(fds), 200)
    os.environ |= {
        "NOTIFY_SOCKET": order["manager"],
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(fds)),
        "LISTEN_FDNAMES": ":".join(order["names"]),
    }
    sys.argv[1:] = order["arguments"]
    seconds = order["patience"]
    keeper._TIMEOUT = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))  # type: ignore[misc]
    if order["die_at"]:
        _die_at(order["die_at"])
    __main__.main()


def _die_at(step: int) -> None:
    """End this process at a step of the first request that it serves.

    Steps are before each call of a C function that may make a system call, and after each that is
    made by ctypes: nothing that others can see of the process happens in between.
    """
    from spawn_accessory.server import Server
    from spawn_common import linux

    serve = Server._serve.__code__
    visible = (socket.socket, select.epoll, type(select.poll()))
    left, began = step, False

    def count(frame: FrameType, event: str, function: object) -> None:
        nonlocal left, began
        began = began or frame.f_code is serve
        if began and (
            (event == "c_call" and getattr(function, "__module__", None) == "posix")
            or (event == "c_call" and isinstance(getattr(function, "__self__", None), visible))
            or (event == "return" and frame.f_code.co_filename == linux.__file__)
            or (event == "return" and frame.f_code is serve)
        ):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "return" and frame.f_code is serve:
            sys.setprofile(None)

    sys.setprofile(count)


def _main() -> None:
    import pystemd.daemon  # noqa: F401  what the daemon would import when it is ready

    import spawn_accessory.__main__  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as orders:
        while True:
            data, fds, _, _ = socket.recv_fds(orders, 65536, 64)
            if not data:
                return
            if (pid := os.fork()) == 0:
                try:
                    os.closerange(orders.fileno(), orders.fileno() + 1)
                    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                    _run(json.loads(data), fds)
                except SystemExit as error:
                    os._exit(error.code if isinstance(error.code, int) else 1)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            for fd in fds:
                os.close(fd)
            orders.send(str(pid).encode())


if __name__ == "__main__":
    _main()
