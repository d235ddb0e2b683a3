"""Starting and ending processes, and taking what they write."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Final

from bench.interrupts import held
from tests.tools.native import ROOT

_PATIENCE: Final = 20.0  # seconds for a process to end before it is killed
_PIPE_SIZE: Final = 1 << 20
_PAUSE: Final = 0.005
_KEPT: Final = 2000


def start(
    stack: ExitStack,
    command: Sequence[str | os.PathLike[str]],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process that STACK ends.

    It gets a process group of its own: Ctrl-C on the terminal is for us, and we end it in order.
    """
    with held():
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=ROOT,
            process_group=0,
        )
        stack.callback(end, process)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process if it runs; kill it if it does not mind."""
    with held():
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class Drain:
    """A pipe that is read by a thread, so that whoever writes never has to wait.

    Reads at most every few milliseconds: a reader that waits is woken by each write, and it is the
    writer who pays for that.
    """

    def __init__(self, stack: ExitStack, *phrases: bytes) -> None:
        """Count lines and those in which one of PHRASES occurs; STACK closes the pipe."""
        self.lines = 0
        self.occurrences = dict.fromkeys(phrases, 0)
        self.first_seen: dict[bytes, float] = {}
        self._rest = b""
        self._kept = b""
        with held():
            self._reader, self._writer = os.pipe()
            stack.callback(self._close)
        fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def give_away(self) -> int:
        """Return the writing end for start(); to be followed by given()."""
        return self._writer

    def given(self) -> None:
        """Close our writing end: the pipe now ends with the process that has it."""
        os.close(self._writer)
        self._writer = -1

    def last_line(self) -> str:
        """Return the last line that is not empty."""
        lines = (self._kept + self._rest).split(b"\n")
        return next((line.decode(errors="replace") for line in reversed(lines) if line), "")

    def _close(self) -> None:
        if self._writer >= 0:
            self.given()
        self._thread.join(_PATIENCE)
        os.close(self._reader)

    def _read(self) -> None:
        while data := os.read(self._reader, _PIPE_SIZE):
            self._take(self._rest + data)
            time.sleep(_PAUSE)

    def _take(self, data: bytes) -> None:
        complete, newline, self._rest = data.rpartition(b"\n")
        complete += newline
        self.lines += complete.count(b"\n")
        for phrase in self.occurrences:
            if found := complete.count(phrase):
                self.occurrences[phrase] += found
                self.first_seen.setdefault(phrase, time.monotonic())
        self._kept = (self._kept + complete)[-_KEPT:]
