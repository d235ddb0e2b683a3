"""Runs a script in this process: its text, the releases that it gets, what came of it.

The script's output goes where C writes it, descriptor 1; it is kept in a file as long as a Stage is
open. Time-outs are around everything, so that a test fails instead of hanging.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Final, Self, TypeVar

from spawn_reaper import page, wire
from spawn_reaper.release import Release
from spawn_reaper.runner.script import Script
from spawn_reaper.settings import Handlers
from spawn_reaper.usage import NO_COUNTERS, NO_PEAKS, Counters, Peaks, Usage
from tests.tools.postgresql import Postgresql

SECONDS: Final = 25.0  # for one test in the event loop
SCOPE: Final = "/test.scope/"
SCRIPT: Final = "script"  # what the scripts' connections are called in a server

T = TypeVar("T")


def release(
    name: str | bytes,
    account: bytes | None = None,
    *,
    identity: str | None = None,
    own: Counters = NO_COUNTERS,
    peaks: Peaks = NO_PEAKS,
    remainder: bool = False,
) -> Release:
    """Return a release of NAME or NAME/SESSION, where NAME is what has the attribute."""
    relative = os.fsencode(name)
    names = [{b"user.account": account} if account is not None else {}]
    return Release(
        id=identity or relative.decode("latin-1"),
        path=SCOPE.encode() + relative,
        name=relative,
        released=0.0,
        born=None,
        age=None,
        usage=Usage(own, peaks),
        own=own,
        attributes=(*({} for _ in range(relative.count(b"/"))), *names),
        remainder=remainder,
    )


@dataclass(frozen=True)
class Outcome:
    """What a script printed and what the daemon would have logged; lines, without our directory."""

    output: list[str]
    errors: list[str]


class Stage:
    """A script that has been loaded, and what it does."""

    def __init__(self, code: str, limits: Handlers | None = None) -> None:
        self._code = code
        self._limits = limits or Handlers()
        self._exits = ExitStack()
        self._printed: IO[bytes]
        self._logged: _Log
        self._directory = ""
        self._waiting: set[int] = set()  # numbers of releases that are not done
        self._last = 0  # number
        self.script: Script

    async def __aenter__(self) -> Self:
        with ExitStack() as exits:
            self._directory = exits.enter_context(TemporaryDirectory(prefix="st-"))
            self._printed = exits.enter_context(_captured_output())
            self._logged = exits.enter_context(_captured_log())
            path = Path(self._directory, "test.lua")
            path.write_text(self._code, errors="surrogateescape")
            self.script = Script(self._limits, b"/nowhere", new_page(exits), self._acknowledged)
            exits.callback(self.script.close)
            await self.script.load(path)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._exits.close()

    def release(self, *releases: str | Release) -> None:
        """Hand over releases, or those of cgroups with these names that used nothing."""
        for each in releases:
            self._last += 1
            self._waiting.add(self._last)
            fields = wire.fields_of(release(each) if isinstance(each, str) else each)
            self.script.handle([wire.Numbered(self._last, 1, fields)])

    def _acknowledged(self, ack: wire.Ack) -> None:
        """Do as the core does."""
        self._waiting.difference_update(ack.done)
        for message in ack.failed:
            logging.getLogger("spawn_reaper").error("%s", message)

    async def finish(self, seconds: float) -> int:
        """Let handlers end for so long at most, then end them; return how many did not."""
        end = time.monotonic() + seconds
        while self._waiting and time.monotonic() < end:
            await asyncio.sleep(0.001)
        left = len(self._waiting)
        await self.script.stop(max(0.0, end - time.monotonic()))
        return left

    def outcome(self) -> Outcome:
        """Return what came of the script until now."""
        assert self._logged.complaints == [], self._logged.complaints
        self._printed.seek(0)
        printed = self._printed.read().decode(errors="surrogateescape")
        return Outcome(
            self._clean(printed).splitlines(), [self._clean(line) for line in self._logged.lines]
        )

    def output(self) -> list[str]:
        """Return the lines that it has printed until now."""
        return self.outcome().output

    def errors(self) -> list[str]:
        """Return the lines that were logged until now."""
        return self.outcome().errors

    async def printed(self, *lines: str) -> None:
        """Return as soon as each of LINES has been printed."""
        await self.until(f"it prints {lines}", lambda: set(lines) <= set(self.output()))

    async def logged(self, text: str) -> None:
        """Return as soon as a line with TEXT in it has been logged."""
        await self.until(f"{text!r} is logged", lambda: any(text in line for line in self.errors()))

    async def until(self, what: str, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Return as soon as CONDITION holds; the event loop goes on meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(f"not within {seconds:g} s: {what}; {self.outcome()}") from None

    async def end(self, seconds: float = 15) -> list[str]:
        """Let the handlers end without an error, which they must, and return the output."""
        outcome = await self.end_all(seconds)
        assert outcome.errors == [], outcome
        return outcome.output

    async def end_all(self, seconds: float = 15) -> Outcome:
        """Let the handlers end, which they must, and return all that came of it."""
        left = await self.finish(seconds)
        assert left == 0, f"{left} handlers did not end; {self.outcome()}"
        return self.outcome()

    def _clean(self, text: str) -> str:
        return text.replace(f"{self._directory}/", "")


def run(test: Callable[[], Awaitable[T]], seconds: float = SECONDS) -> T:
    """Run an asynchronous test."""

    async def main() -> T:
        async with asyncio.timeout(seconds):
            return await test()

    return asyncio.run(main())


def play(code: str, *names: str, limits: Handlers | None = None) -> Outcome:
    """Run a script, with a release for each name if it takes them, to the end of its handlers."""

    async def test() -> Outcome:
        async with Stage(code, limits) as stage:
            if stage.script.handler is not None:
                stage.release(*(names or ["job"]))
            return await stage.end_all()

    return run(test)


def printed(code: str, *names: str, limits: Handlers | None = None) -> list[str]:
    """Do the same with a script of which nothing may be logged; return the lines it printed."""
    outcome = play(code, *names, limits=limits)
    assert outcome.errors == [], outcome
    return outcome.output


def evaluated(expression: str, before: str = "") -> str:
    """Return the values of EXPRESSION, evaluated in the main chunk after BEFORE.

    An error that it raises is given as `raises TEXT`, if it is a string that begins with the
    position in the script.
    """
    code = f"""{before}
    local function results(...)
      local list = {{...}}
      for i = 1, select("#", ...) do list[i] = tostring(list[i]) end
      return table.concat(list, ", ")
    end
    local ok, text = pcall(function()
      return results({expression})
    end)
    print(ok and text or type(text) .. " " .. tostring(text))
    """
    line = before.count("\n") + 8
    (printed_line,) = play(code).output
    position = f"string test.lua:{line}: "
    return printed_line.replace(position, "raises ", 1)


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def leaked(before: int) -> int:
    """Return how many descriptors are open that were not BEFORE, without those of garbage."""
    if descriptors() > before:
        gc.collect()  # takes long, and is rarely necessary
    return max(0, descriptors() - before)


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.complaints: list[str] = []  # about us: of asyncio, above all

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.startswith(("spawn_reaper", "spawn_common"))
        (self.lines if ours else self.complaints).append(self.format(record))


def new_page(exits: ExitStack) -> page.Page:
    """Return a page that nobody else sees."""
    descriptor = page.create()
    try:
        own = page.Page(descriptor)
    finally:
        os.close(descriptor)
    exits.callback(own.close)
    return own


@contextmanager
def _captured_log() -> Iterator[_Log]:
    """Keep warnings and errors."""
    log = _Log()
    root = logging.getLogger()
    root.addHandler(log)
    try:
        yield log
    finally:
        root.removeHandler(log)


@contextmanager
def _captured_output() -> Iterator[IO[bytes]]:
    """Let descriptor 1 lead into a file, which is returned for reading."""
    with TemporaryFile() as file, ExitStack() as stack:
        before = os.dup(1)
        stack.callback(os.close, before)
        os.dup2(file.fileno(), 1)
        stack.callback(os.dup2, before, 1)
        # A description of its own: reading must not move the position that is written at.
        yield stack.enter_context(open(f"/proc/self/fd/{file.fileno()}", "rb", buffering=0))


def handling(body: str, code: str = "") -> str:
    """Return CODE and a handler, which is BODY and knows the cgroup's name as `name`."""
    return f"""
    {code}
    function cgroup_released(cgroup)
      local name = cgroup.path:match("[^/]+$")
      {body}
    end
    """


async def waiting(stage: Stage, server: Postgresql) -> None:
    """Return as soon as WAIT_FOR_LOCK is in flight."""
    await stage.until("the query is in flight", lambda: server.waiting_count() == 1)
