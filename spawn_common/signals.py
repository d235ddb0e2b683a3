"""The signals of a daemon, from its first step to its last.

SIGTERM, SIGINT and SIGQUIT end it. During the start they do so by an exception, wherever that
waits: opening a file may take for ever, and a pid file has to go. Later an event loop is told of
them. The others are for a daemon that serves, and wait until it does.
"""

from __future__ import annotations

import asyncio
import functools
import operator
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_SERVING: Final = (signal.SIGHUP, signal.SIGUSR1)


class Signals:
    """What they do now; a process has one of these. Its methods are called in their order."""

    def __init__(self) -> None:
        """Let those that end the daemon unwind its start, by SystemExit with status 0.

        Whatever our parent has blocked, or ignores, we do not: a script of a shell without job
        control, for example, ignores SIGINT and SIGQUIT for what it starts in the background.
        """
        self._unwinds = False
        # Ignored, it would keep system(3) from working in whatever we start.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in _ENDING:
            signal.signal(number, self._unwind)
        signal.pthread_sigmask(signal.SIG_SETMASK, _SERVING)

    def _unwind(self, *_: object) -> None:
        if not self._unwinds:  # a second exception would interrupt what the first one cleans up
            self._unwinds = True
            # Finalizers may complain of what it interrupts, such as a loop that is half made.
            warnings.simplefilter("ignore")
            sys.unraisablehook = lambda _: None
            sys.exit(0)

    def hold(self) -> None:
        """Let all wait."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)

    def release(self) -> None:
        """Let them come, those that have waited now."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let none come between something that is made and what would clean it up."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def serve(self, tell: Callable[[Iterable[int]], None]) -> None:
        """Tell of all in the running event loop: of each kind once, however often it came.

        Not by the loop's own handlers: they queue each signal in a pipe, and a storm of one kind
        that fills it would swallow the others. And no Python code in the handler: under a storm it
        would be interrupted by the next signal, and that again, up to a RecursionError in whatever
        was running. So the handler is a C function that notes the signal's number, and the pipe
        only wakes us up.
        """
        self.hold()  # one that has come just now is the last to unwind
        self._tell = tell
        self._came: dict[int, object] = {}
        self._loop = asyncio.get_running_loop()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._loop.add_reader(self._reader, self._wake_up)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (*_ENDING, *_SERVING):
            signal.signal(number, functools.partial(operator.setitem, self._came))
            # Or what is told to the service manager gets lost, interrupted in libsystemd.
            signal.siginterrupt(number, False)
        if self._unwinds:  # something has swallowed the exception, a finalizer for example
            self._loop.call_soon(tell, (signal.SIGTERM,))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):
            self._reader.recv(65536)
        numbers = list(self._came)
        for number in numbers:
            self._came.pop(number)
        self._tell(numbers)

    def ignore(self) -> None:
        """Ignore all from now on: the process is about to end."""
        for number in (*_ENDING, *_SERVING):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._loop.remove_reader(self._reader)
        self._reader.close()
        self._writer.close()
