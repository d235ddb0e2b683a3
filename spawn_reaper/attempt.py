"""Running a script in a runner once, for somebody who waits for what comes of it.

Nothing of it is left when that is known, or when it took too long.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from spawn_common.command import Unusable
from spawn_reaper import wire
from spawn_reaper.process import Runner
from spawn_reaper.report import readable, release_line
from spawn_reaper.trial import Trial

_log = logging.getLogger(__name__)

_MARGIN: Final = 5.0  # seconds for what is not the script's: the start of a process above all


class _Answers:
    """What a runner says."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[wire.FromRunner | str] = asyncio.Queue()

    def received(self, _: Runner, message: wire.FromRunner) -> None:
        """Keep a message."""
        self._messages.put_nowait(message)

    def ended(self, _: Runner, how: str) -> None:
        """Take note that there will be no other."""
        self._messages.put_nowait(how)

    async def next(self, seconds: float) -> wire.FromRunner | str:
        """Return the next message, or why there is none within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                return await self._messages.get()
        except TimeoutError:
            return f"it did not come back for {seconds:g} s"


@asynccontextmanager
async def _loaded(setup: wire.Setup) -> AsyncIterator[tuple[Runner, _Answers, wire.Ready]]:
    """Run the main chunk of a script; Unusable says why that did not work."""
    answers = _Answers()
    try:
        runner = Runner(setup, answers)
    except OSError as error:
        raise Unusable(f"cannot start a process for the script: {error.strerror}") from None
    try:
        answer = await answers.next(setup.limits.time + _MARGIN)
        if not isinstance(answer, wire.Ready):
            raise Unusable(*_problems(answer))
        yield runner, answers, answer
    finally:
        runner.close()


def _problems(answer: wire.FromRunner | str) -> list[str]:
    if isinstance(answer, wire.Unusable) and answer.problems:
        return [readable(problem) for problem in answer.problems]
    return [f"the script's process: {answer}"]


async def check_script(setup: wire.Setup) -> list[str]:
    """Run the main chunk of a script, and return what is wrong with it."""
    try:
        async with _loaded(setup) as (_, _, ready):
            return [readable(problem) for problem in ready.problems]
    except Unusable as error:
        return list(error.problems)


async def try_script(setup: wire.Setup, trial: Trial, tell: Callable[[str], None]) -> bool:
    """Run the script's cgroup_released once, and TELL a line of what happens.

    Returns whether it came to its end without an error; Unusable says why it could not be run.
    """
    async with _loaded(setup) as (runner, answers, ready):
        if ready.handler is None:
            script = setup.script.decode(errors="backslashreplace")
            raise Unusable(f"{script}: does not define cgroup_released")
        tell(f"cgroup_released: {release_line(trial.release).decode(errors='replace').rstrip()}")
        start = time.monotonic()
        fields = wire.fields_of(trial.release)
        runner.send(wire.Run([wire.Numbered(1, trial.attempt, fields)]))
        problem = await _problem_of(answers, start + setup.limits.time)
        ended = ", ended" if problem == _WAITING else ""
        elapsed = time.monotonic() - start
        tell(f"cgroup_released: {problem or 'done'} after {elapsed:.3f} s{ended}")
        return not problem


_WAITING: Final = "still waiting"


async def _problem_of(answers: _Answers, end: float) -> str:
    """Wait for the end of the handler, up to END; return what went wrong, or nothing."""
    while True:
        answer = await answers.next(max(0.0, end - time.monotonic()))
        if isinstance(answer, str):
            return _WAITING if time.monotonic() >= end else f"its process: {answer}"
        if isinstance(answer, wire.Ack):
            for message in answer.failed:
                _log.error("%s", readable(message))
            if answer.done:
                return "failed" if answer.failed else ""
