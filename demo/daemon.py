"""A daemon as a child process: started as a service manager does, followed, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final

from demo.sandbox import Failed, Sandbox, ended

SCRIPT: Final = Path(__file__).parents[1] / "lua/examples/accounts.lua"
SETTINGS: Final = Path(__file__).with_name("accessory.toml")

ACCESSORY: Final = "accessory"  # how the daemons and their cgroups are called
_REAPER: Final = "reaper"

# Variables of a service manager that are about the demo, should it run under one.
_NOT_INHERITED: Final = ("WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")

_ANSWER: Final = 20.0  # seconds for whatever the daemon is told to do


class Daemon:
    """A running daemon. ``follow`` must run as long as it does."""

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        output: asyncio.StreamReader,
        notices: socket.socket,
    ) -> None:
        self._name = name
        self._process = process
        self._output = output
        self._notices = notices
        self._stopping = False

    async def follow(self, said: Callable[[str], None]) -> int:
        """Hand over each line as it is printed; at the end, return the exit status."""
        async for line in self._output:
            said(line.decode(errors="backslashreplace").rstrip("\n"))
        status = await ended(self._process)
        if not self._stopping:
            raise Failed(f"the {self._name} ended by itself with status {status}")
        return status

    async def notified(self, assignment: str) -> None:
        """Wait for a notification, see sd_notify(3), that contains ASSIGNMENT."""
        loop = asyncio.get_running_loop()
        notice = ""
        async with self._in_time(f"did not say {assignment}"):
            while assignment not in notice.split("\n"):
                notice = (await loop.sock_recv(self._notices, 4096)).decode()

    async def reload(self) -> None:
        """Let the script's ``reload`` run, and wait until it has."""
        self._process.send_signal(signal.SIGHUP)
        await self.notified("RELOADING=1")
        await self.notified("READY=1")

    async def stop(self) -> None:
        """Tell it to end, and wait until it has; follow() returns its status."""
        self._stopping = True
        self._process.terminate()
        async with self._in_time("did not end"):
            await ended(self._process)

    @asynccontextmanager
    async def _in_time(self, failure: str) -> AsyncIterator[None]:
        """Limit how long the daemon may take for something; Failed says what it did not do."""
        try:
            async with asyncio.timeout(_ANSWER):
                yield
        except TimeoutError:
            raise Failed(f"the {self._name} {failure} within {_ANSWER:g} seconds") from None


def reaper(place: Sandbox) -> AbstractAsyncContextManager[Daemon]:
    """Start a reaper for the scope of PLACE."""
    # The settings of this host, should it have any, are not for the demo: nothing is all default.
    options = ("--scope", place.scope_path, "--lua", str(SCRIPT), "--config", os.devnull)
    return _daemon(place, _REAPER, "spawn_reaper", *options)


def accessory(place: Sandbox, address: str) -> AbstractAsyncContextManager[Daemon]:
    """Start an accessory that listens at ADDRESS."""
    options = ("--listen", address, "--config", str(SETTINGS))
    return _daemon(place, ACCESSORY, "spawn_accessory", *options)


@asynccontextmanager
async def _daemon(place: Sandbox, name: str, module: str, *options: str) -> AsyncIterator[Daemon]:
    """Start a daemon in a cgroup NAME of PLACE, whose cleanup ends it at the latest."""
    address = f"cm4all-spawn-demo-{os.getpid()}-{name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.setblocking(False)
        notices.bind(f"\0{address}")
        ours, theirs = os.pipe()
        with open(theirs, "wb", buffering=0) as output:
            environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
            environment["NOTIFY_SOCKET"] = f"@{address}"
            command = (sys.executable, "-m", module, *options)
            process = place.spawn_beside(name, command, environment, output)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
        )
        try:
            yield Daemon(name, process, reader, notices)
        finally:
            transport.close()
