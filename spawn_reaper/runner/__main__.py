"""The runner's process: puts its parts together, and does what the core says.

Arguments, from the core: descriptor of the channel, descriptor of the page, process id of the core.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import selectors
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from spawn_reaper import page, wire
from spawn_reaper.channel import Channel
from spawn_reaper.page import Page
from spawn_reaper.report import one_line
from spawn_reaper.runner.confinement import confine, end_without_memory, limit_memory
from spawn_reaper.runner.script import Script, ScriptError, new_runtime

_log = logging.getLogger("spawn_reaper")

_FRAME_MAX: Final = (1 << 32) - 1  # the core says nothing that is too long
_OUTPUT: Final = (1, 2)
_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(len(_OUTPUT) * array.array("i").itemsize)


def main() -> None:
    """Run until the core says that it is enough, or is gone."""
    channel, descriptor, core = map(int, sys.argv[1:])
    for fd in (channel, descriptor):
        os.set_inheritable(fd, False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    confine(core)
    own_page = Page(descriptor)
    os.close(descriptor)
    loop = asyncio.SelectorEventLoop(_Selector(own_page))
    loop.set_exception_handler(_fail)
    asyncio.set_event_loop(loop)
    runner = _Runner(socket.socket(fileno=channel), own_page, loop)
    loop.run_forever()
    runner.close()


class _Selector(selectors.EpollSelector):
    """Tells when there is nothing to be done: while it waits."""

    def __init__(self, own_page: Page) -> None:
        super().__init__()
        self._page = own_page

    def select(self, timeout: float | None = None) -> Any:
        """Wait for events."""
        self._page.enter(page.IDLE)
        try:
            return super().select(timeout)
        finally:
            self._page.enter(page.OURS)


def _fail(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Take note of a mistake of ours; without memory there is no going on."""
    if isinstance(context.get("exception"), MemoryError):
        end_without_memory()
    loop.default_exception_handler(context)


class _Runner:
    """The script, and who tells it what to do."""

    def __init__(
        self, plain: socket.socket, own_page: Page, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._socket = plain
        self._page = own_page
        self._loop = loop
        self._descriptors: list[int] = []  # that came along
        self._channel: Channel
        self._script: Script | None = None
        loop.call_soon(self._open)

    def _open(self) -> None:
        self._channel = Channel(
            self._socket, self._receive, _FRAME_MAX, self._received, self._ended
        )

    def close(self) -> None:
        """Close what the script has opened."""
        if self._script is not None:
            self._script.close()

    def _receive(self, size: int) -> bytes:
        data, ancillary, _, _ = self._socket.recvmsg(size, _ANCILLARY_SIZE)
        for _, _, descriptors in ancillary:
            self._descriptors += array.array("i", descriptors)
        return data

    def _ended(self, _: str) -> None:
        self._loop.stop()  # the core is gone

    def _send(self, message: wire.FromRunner) -> None:
        self._channel.send(wire.frame(message))

    def _received(self, body: bytes) -> None:
        message = wire.read_from_core(body)
        if isinstance(message, wire.Run):
            assert self._script is not None
            self._script.handle(message.releases)
        elif isinstance(message, wire.Reload):
            assert self._script is not None
            self._script.reload(lambda: self._send(wire.Reloaded()))
        elif isinstance(message, wire.Reopen):
            self._reopen()
        elif isinstance(message, wire.Ping):
            self._send(wire.Pong())
        elif isinstance(message, wire.Stop):
            self._begin(self._stop(message.seconds))
        else:
            self._begin(self._load(message))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what waits; a mistake in it ends the process, since the core waits for it."""
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(_end_unless_done)

    def _reopen(self) -> None:
        """Write from now on to where the core does."""
        came, self._descriptors = self._descriptors, []
        for output, descriptor in zip(_OUTPUT, came, strict=False):
            os.dup2(descriptor, output)
        for descriptor in came:
            os.close(descriptor)

    async def _load(self, setup: wire.Setup) -> None:
        path = Path(os.fsdecode(setup.script))
        try:
            self._script = Script(
                setup.limits, setup.root, self._page, self._send, _trace if setup.trace else None
            )
            problems = _unknown_names(path) if setup.lint else []
            limit_memory(setup.limits.memory)
            await self._script.load(path)
        except ScriptError as error:
            self._send(wire.Unusable([str(error)]))
            return
        _log.debug("%s was loaded", path)
        self._send(wire.Ready(self._script.handler, problems))

    async def _stop(self, seconds: float) -> None:
        if self._script is not None:
            await self._script.stop(seconds)
        self._loop.stop()


def _end_unless_done(task: asyncio.Task[None]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, MemoryError):
        end_without_memory()
    _log.error("the script's process ends after a mistake of ours", exc_info=error)
    os._exit(1)


def _unknown_names(path: Path) -> list[str]:
    """Return what can be seen to be wrong in a script without running it."""
    from spawn_reaper.runner.bindings.api import api
    from spawn_reaper.runner.lint import Unavailable, lint

    try:
        return lint(new_runtime(), path.read_bytes(), str(path), api())
    except (OSError, ScriptError):
        return []  # whoever loads it says so
    except Unavailable as error:
        _log.warning("%s", error)
        return []


def _trace(place: bytes, name: bytes, arguments: bytes, results: bytes) -> None:
    """Print a line for a call that the script has made."""
    call = place + name + b"(" + arguments + b")"
    print(one_line(call + b" -> " + results if results else call), flush=True)


if __name__ == "__main__":
    main()
