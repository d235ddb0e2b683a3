"""One runner, seen from the core: its process group, the channel to it, the page that it writes.

Knows how to start, watch and end one. When that is to be done is the business of ``supervisor``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple, Protocol

from spawn_common import linux
from spawn_common.standalone import OF_OTHERS
from spawn_reaper import page, wire
from spawn_reaper.channel import Channel
from spawn_reaper.page import Doing, Page

_MODULE: Final = "spawn_reaper.runner"
# Unbuffered, each line that a script prints would be several writes, between which others write.
_NOT_FOR_RUNNERS: Final = frozenset({*OF_OTHERS, "PYTHONUNBUFFERED"})
_MOMENT: Final = 0.2  # seconds
_PATIENCE: Final = 2.0  # seconds for the kernel to end what was killed
_LAST_READS: Final = 16  # more than a socket holds


class Owner(Protocol):
    """Who is told of a runner."""

    def received(self, runner: Runner, message: wire.FromRunner) -> None:
        """Take what it says."""

    def ended(self, runner: Runner, how: str) -> None:
        """Take note that it is gone, with all processes of its group; nothing more will come."""


class Runner:
    """A process that runs a script."""

    def __init__(self, setup: wire.Setup, owner: Owner) -> None:
        """Start it; OSError if that is impossible. Needs a running event loop."""
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._how = ""  # it came to be killed
        with ExitStack() as exits:
            ours, theirs = socket.socketpair()
            exits.callback(ours.close)
            descriptor = -1
            try:
                descriptor = page.create()
                self._page = Page(descriptor)
                self._process = _start(theirs.fileno(), descriptor)
            finally:
                theirs.close()
                if descriptor >= 0:
                    os.close(descriptor)
            exits.callback(self._kill_group)
            linux.refuse_descriptors(ours)  # closing one can take as long as its sender likes
            self._pidfd = os.pidfd_open(self._process.pid)
            exits.callback(os.close, self._pidfd)
            self._loop.add_reader(self._pidfd, self._exited)
            exits.callback(self._loop.remove_reader, self._pidfd)
            self._channel = Channel(
                ours, ours.recv, wire.RUNNER_FRAME_MAX, self._received, self._channel_ended
            )
            exits.pop_all()
        self._since = _Since(self._page.doing(), time.monotonic(), 0.0)
        self._asked = 0.0  # when it was asked for an answer that it owes; 0 if it owes none
        self.send(setup)

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    @property
    def begun(self) -> int:
        """How many releases it has begun."""
        return self._page.begun

    @property
    def in_hand(self) -> int:
        """What it is doing; see Doing."""
        return self._page.doing().in_hand

    def send(self, message: wire.FromCore, descriptors: Sequence[int] = ()) -> None:
        """Tell it something; DESCRIPTORS must stay open for as long as it lives."""
        self._channel.send(wire.frame(message), descriptors)

    def look(self) -> tuple[float, float]:
        """Return for how many seconds of time and of CPU time it has been doing the same thing.

        Since the first look that saw it do that; zero if it does nothing, and owes no answer.
        """
        doing, now, cpu = self._page.doing(), time.monotonic(), self._cpu()
        if doing != self._since.doing or (doing.in_hand == page.IDLE and not self._asked):
            self._since = _Since(doing, now, cpu)
        return now - self._since.time, cpu - self._since.cpu

    def ask(self) -> None:
        """Let it show that it is alive, if it owes no answer; answered() is for when it has."""
        if not self._asked:
            self._asked = time.monotonic()
            self.send(wire.Ping())

    def answered(self) -> None:
        """Take note of the answer."""
        self._asked = 0.0

    def _cpu(self) -> float:
        """Return the CPU time of all its threads, in seconds."""
        # clock_getcpuclockid(3), which the standard library does not have
        with suppress(OSError):  # it has just ended
            return time.clock_gettime((~self.pid << 3) | 2)
        return 0.0

    def kill(self, how: str) -> None:
        """End it and its children; the owner will be told that it ended and HOW."""
        if not self._how:
            self._how = how
            self._loop.call_later(_PATIENCE, self._exited)  # even if somebody traces it
        self._kill_group()

    def _kill_group(self) -> None:
        # It is the leader, whose number nobody else has for as long as it was not waited for.
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it, and tell nobody."""
        if self._pidfd >= 0:
            self._kill_group()
            with suppress(subprocess.TimeoutExpired):  # the kernel does not let it go: its business
                self._process.wait(_MOMENT)
            self._release()
            self._page.close()

    # From the event loop

    def _received(self, body: bytes) -> None:
        self._owner.received(self, wire.read_from_runner(body))

    def _channel_ended(self, what: str) -> None:
        """The script has closed our end's peer, or written into it; or the process has ended."""
        if what:
            self.kill(f"its channel is of no use any more: {what}")
        else:
            # It may have a moment to end by itself, and to leave a status that tells more.
            self._loop.call_later(_MOMENT, self.kill, "its channel was closed")

    def _exited(self) -> None:
        """Take note that it has ended, or does not although it was killed."""
        if self._pidfd < 0:
            return
        self._kill_group()
        for _ in range(_LAST_READS):  # what it said last; others may still write
            if not self._channel.read():
                break
        if self._pidfd < 0:
            return  # that was the end for our owner
        # Never wait: its end may be somebody else's to see first, who traces it.
        status = self._process.poll()
        self._release()
        self._owner.ended(self, self._how or _describe(status))
        self._page.close()

    def _release(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._channel.close()


class _Since(NamedTuple):
    """What a look has found, and when one found that first: time and CPU time in seconds."""

    doing: Doing
    time: float
    cpu: float


def _start(channel: int, descriptor: int) -> subprocess.Popen[bytes]:
    """Start a process that has these two descriptors and the standard ones, no others."""
    environment = {
        name: value for name, value in os.environ.items() if name not in _NOT_FOR_RUNNERS
    }
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        # Not from the working directory: whoever may write there must not give us modules.
        [*(sys.executable, "-P", "-m", _MODULE), *map(str, (channel, descriptor, os.getpid()))],
        env=environment,
        pass_fds=(channel, descriptor),
        start_new_session=True,
        umask=0o022,
    )


def _describe(status: int | None) -> str:
    if status is None:
        return "it ended, and somebody traces it"
    if status >= 0:
        return f"it ended with status {status}"
    try:
        return f"it was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was ended by signal {-status}"
