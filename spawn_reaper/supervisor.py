"""Starts, watches and replaces the process that the script runs in.

Decides when a runner is ended: when it does not come back from the script, or does not behave. No
more than one gets new releases; one that a reload has replaced may finish what it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from spawn_reaper import page, wire
from spawn_reaper.delivery import Delivery, Line
from spawn_reaper.process import Runner
from spawn_reaper.report import readable
from spawn_reaper.settings import Handlers

_log = logging.getLogger(__name__)

_LOOK: Final = 0.5  # seconds between two looks at what runners do
_CPU_FACTOR: Final = 2  # a handler that is over its limit by that much was not ended by its hook
_PROBLEMS_MAX: Final = 100  # lines
_LEAVE: Final = 1.0  # seconds in which a runner that was told to stop must end
_OUTPUT: Final = (1, 2)
_OFTEN: Final = 4  # runners that may end in a row, having done little, before the next has to wait
_LITTLE: Final = 10  # releases
_FIRST_DELAY: Final = 0.25  # seconds
_LONGEST_DELAY: Final = 5.0

Done = Callable[[str], None]
"""Is called when a reload is complete, with what is wrong, or nothing."""


class CannotRun(Exception):
    """The script cannot be used; ``problems`` says why, one line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems


@dataclass(eq=False)
class _Running:
    """A runner, and how far it is."""

    process: Runner
    line: Line | None = None  # once its script handles releases
    stopping: bool = False
    dismissed: bool = False  # it was ended for no fault of its own
    handler: str | None = None  # where cgroup_released is defined
    loaded: asyncio.Future[str] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """What is wrong with the script, or nothing."""
    ended: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Supervisor:
    """The one runner that handles releases, and whoever takes its place."""

    def __init__(self, setup: wire.Setup, delivery: Delivery, *, afresh: bool) -> None:
        """AFRESH: a reload runs the script as its file is then, in a new process."""
        self._setup = setup
        self._limits: Handlers = setup.limits
        self._delivery = delivery
        self._afresh = afresh
        self._loop = asyncio.get_running_loop()
        self._current: _Running | None = None
        self._others: dict[Runner, _Running] = {}  # that load the script, or finish
        self._closed = False
        self._problem = ""  # why there is no runner
        self._ends = 0  # runners in a row that have ended, and had done little
        self._attempts: asyncio.Task[None] | None = None  # to get another runner
        self._look_timer = self._loop.call_later(_LOOK, self._look)
        self._reload_wanted: list[Done] = []
        self._reloading: list[Done] = []

    # The start

    async def start(self) -> None:
        """Run the script's main chunk; CannotRun says why it cannot be used."""
        running, problem = await self._load()
        if running is None:
            raise CannotRun(*problem.splitlines())
        self._use(running)

    def close(self) -> None:
        """End all runners at once."""
        self._closed = True
        self._look_timer.cancel()
        if self._attempts is not None:
            self._attempts.cancel()
        for running in self._all():
            running.process.close()

    async def finish(self, seconds: float) -> int:
        """Let the script finish for so long at most; return how many releases are not handled."""
        end = self._loop.time() + seconds
        left = await self._delivery.finish(0 if self._problem else seconds)
        self._closed = True  # from now on a runner that ends is not replaced
        for running in self._all():
            self._stop(running, max(0.0, end - self._loop.time()))
        if all_ended := [running.ended for running in self._all()]:
            await asyncio.wait(all_ended, timeout=max(0.0, end - self._loop.time()) + 2 * _LEAVE)
        return left

    def status(self) -> list[str]:
        """Say in a few words what does not work, or did not."""
        parts = []
        if self._problem:
            parts.append(f"no script runs: {self._problem}")
        if self._delivery.set_aside_count:
            parts.append(f"{self._delivery.set_aside_count} releases set aside")
        return parts

    # What is asked for

    def reload(self, done: Done) -> None:
        """Reload, and call DONE after it; once more if that is being done now."""
        self._reload_wanted.append(done)
        self._reload_again()

    def reopen_output(self) -> None:
        """Let runners write to where our standard output and standard error go now."""
        for running in self._all():
            running.process.send(wire.Reopen(), _OUTPUT)

    def _reload_again(self) -> None:
        """Reload for all who have asked for it until now, unless that is being done."""
        if self._reloading or not self._reload_wanted or self._closed:
            return
        self._reloading, self._reload_wanted = self._reload_wanted, []
        if self._afresh:
            self._loop.create_task(self._reload_afresh())
        elif self._current is not None:
            _log.info("calling the script's function reload; its file is not read again")
            self._current.process.send(wire.Reload())
        else:
            self._reloaded("")  # the next runner begins with the file as it is

    async def _reload_afresh(self) -> None:
        _log.info("loading the script again")
        running, problem = await self._load()
        if running is None:
            _log.error("%s; the script that runs is kept", problem)
        elif not self._closed:
            self._replace(running)
        self._reloaded(problem)

    def _reloaded(self, problem: str) -> None:
        done, self._reloading = self._reloading, []
        for each in done:
            each(problem)
        self._loop.call_soon(self._reload_again)

    # Runners

    def _all(self) -> list[_Running]:
        return [*([self._current] if self._current else ()), *self._others.values()]

    async def _load(self) -> tuple[_Running | None, str]:
        """Start a runner and let it load the script; return it, or why that did not work."""
        try:
            process = Runner(self._setup, self)
        except OSError as error:
            return None, f"cannot start a process for the script: {error.strerror}"
        running = self._others[process] = _Running(process)
        problem = await self._loaded(running)
        if not problem and running.ended.done():
            problem = "the script's process ended at once"
        if problem:
            process.kill("its script cannot be used")
            return None, problem
        return running, ""

    async def _loaded(self, running: _Running) -> str:
        """Wait until a script is loaded; return what is wrong with it, or nothing."""
        limit = self._limits.time + self._limits.hang
        await asyncio.wait([running.loaded], timeout=limit)
        return running.loaded.result() if running.loaded.done() else f"not ready after {limit:g} s"

    def _use(self, running: _Running) -> None:
        """Let a runner have the releases."""
        self._others.pop(running.process, None)
        self._current = running
        self._problem = ""
        if running.handler is not None:
            running.line = self._delivery.connect(
                lambda releases: running.process.send(wire.Run(releases)), running.handler
            )
        else:
            self._delivery.refuse()

    def _replace(self, running: _Running) -> None:
        """Let a runner take the place of the current one, which finishes what it has."""
        for other in self._others.values():
            if other.line is not None:  # was replaced before: what it has not done goes to others
                self._dismiss(other, "it was replaced twice")
        old, self._current = self._current, None
        self._use(running)
        if old is not None:
            self._others[old.process] = old
            self._loop.call_later(self._limits.time, self._end_of_time, old)
            self._leave(old)

    def _end_of_time(self, old: _Running) -> None:
        if old.process in self._others:
            self._dismiss(old, "it was replaced, and did not finish")

    def _dismiss(self, running: _Running, why: str) -> None:
        """End a runner for no fault of its own."""
        running.dismissed = True
        running.process.kill(why)

    def _leave(self, old: _Running) -> None:
        """Let a runner that was replaced go as soon as it has nothing left."""
        if old is not self._current and not self._delivery.has_some(old.line):
            self._stop(old, self._limits.time)

    def _stop(self, running: _Running, seconds: float) -> None:
        """Let a runner end, and what it still does, for so long at most."""
        if not running.stopping:
            running.stopping = True
            running.process.send(wire.Stop(seconds))
            self._loop.call_later(seconds + _LEAVE, self._dismiss, running, "it did not stop")

    # What runners tell

    def received(self, runner: Runner, message: wire.FromRunner) -> None:
        """Take what a runner says."""
        running = self._find(runner)
        if isinstance(message, wire.Ack):
            if running.line is not None:
                self._delivery.acknowledge(running.line, message)
                self._leave(running)
        elif isinstance(message, wire.Reloaded):
            if self._reloading and not self._afresh:
                self._reloaded("")
        elif isinstance(message, wire.Pong):
            runner.answered()
        elif not running.loaded.done():
            if isinstance(message, wire.Ready):
                running.handler = message.handler and readable(message.handler)
                running.loaded.set_result("")
            else:
                problems = map(readable, message.problems[:_PROBLEMS_MAX])
                running.loaded.set_result("\n".join(problems) or "the script cannot be used")

    def _find(self, runner: Runner) -> _Running:
        if self._current is not None and self._current.process is runner:
            return self._current
        return self._others[runner]

    def ended(self, runner: Runner, how: str) -> None:
        """Replace a runner that was needed."""
        running = self._find(runner)
        running.ended.set_result(None)
        is_current = running is self._current
        if is_current:
            self._current = None
        else:
            del self._others[runner]
        place = ""  # which release was to blame
        if running.line is not None and running.dismissed:
            self._delivery.take_back(running.line, runner.begun)
        elif running.line is not None:
            place = self._delivery.lost(running.line, runner.begun, runner.in_hand)
        if not running.loaded.done():
            running.loaded.set_result(f"the script's process: {how}")
        if self._closed:
            return
        if not is_current:
            if running.line is not None and not running.stopping:
                _log.error("a replaced process of the script has ended: %s", how)
            return
        _log.error("%sthe script's process is replaced: %s", f"{place}: " if place else "", how)
        if self._reloading and not self._afresh:
            self._reloaded("")  # the next one begins from the start
        # What ended it while it did nothing was not the script.
        harmless = place or runner.begun >= _LITTLE or runner.in_hand == page.IDLE
        self._ends = 0 if harmless else self._ends + 1
        self._attempts = self._loop.create_task(self._get_another(self._pause()))

    def _pause(self) -> float:
        """Return for how many seconds to wait: none, unless the script ends runner after runner."""
        over = min(self._ends - _OFTEN, 10)
        return min(_LONGEST_DELAY, _FIRST_DELAY * 2**over) if over > 0 else 0.0

    async def _get_another(self, pause: float) -> None:
        """Try to load the script until that works."""
        delay = 0.0
        await asyncio.sleep(pause)
        while self._current is None and not self._closed:
            running, problem = await self._load()
            if running is not None:
                if self._current is None and not self._closed:
                    self._use(running)
                else:  # a reload was faster, or we are about to end
                    running.process.kill("it is not needed")
                return
            if problem != self._problem:
                _log.error("no script runs: %s", problem)
                self._problem = problem
            delay = min(_LONGEST_DELAY, 2 * delay or _FIRST_DELAY)
            await asyncio.sleep(delay)

    # Looks

    def _look(self) -> None:
        """Find out whether a runner is stuck; it need not do anything for that."""
        for running in self._all():
            if len(self._delivery) or self._reloading:
                running.process.ask()
            seconds, cpu = running.process.look()
            if cpu > _CPU_FACTOR * self._limits.cpu:
                self._end_stuck(running, f"used {cpu:.1f} s of CPU time in one go")
            elif seconds > self._limits.hang:
                self._end_stuck(running, f"did not come back for {seconds:.0f} s")
        self._look_timer = self._loop.call_later(_LOOK, self._look)

    def _end_stuck(self, running: _Running, what: str) -> None:
        where = f" (cgroup_released is at {running.handler})" if running.handler else ""
        running.process.kill(f"the script {what}{where}")
