"""The Lua runtime: loading the script, running its functions as coroutines, ending them.

Owns the interpreter and the limits on handlers. Which objects and functions a script finds is the
business of ``bindings``; what a release is, of the core. LuaJIT is asked for by name, because
``import lupa`` may give another Lua.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from spawn_reaper.page import OURS, Page
from spawn_reaper.report import one_line, printable
from spawn_reaper.runner import bindings
from spawn_reaper.runner.bindings.calling import Calling, Outcome, Runtime, Trace
from spawn_reaper.runner.bindings.cgroup import CgroupBinding
from spawn_reaper.runner.tasks import NOT_WAITING, Tasks
from spawn_reaper.settings import Handlers
from spawn_reaper.wire import FAILURES_MAX, MESSAGE_MAX, PATH, Ack, Numbered

_log = logging.getLogger(__name__)

_RUNTIMES: Final = ("lupa.luajit21", "lupa.lua")  # PyPI's lupa; Debian's, built against LuaJIT
_MULTIARCH: Final = getattr(sys.implementation, "_multiarch", f"{os.uname().machine}-linux-gnu")

# Where Debian's LuaJIT looks, whichever build of it we run in.
_PATH: Final = (
    "./?.lua;/usr/share/luajit-2.1/?.lua;/usr/local/share/lua/5.1/?.lua;"
    "/usr/local/share/lua/5.1/?/init.lua;/usr/share/lua/5.1/?.lua;/usr/share/lua/5.1/?/init.lua"
)
_CPATH: Final = (
    f"./?.so;/usr/local/lib/lua/5.1/?.so;/usr/lib/{_MULTIARCH}/lua/5.1/?.so;"
    "/usr/local/lib/lua/5.1/loadall.so"
)

_MAIN_CHUNK: Final = b""  # in place of the path of a cgroup
_LAST_ROUNDS: Final = 10  # of the event loop
_DONE_MAX: Final = 10_000  # in a message
_TURN: Final = 64  # handlers that may begin before those that wait have a turn


class ScriptError(Exception):
    """The script cannot be used; the message names file and line."""


class Script:
    """A Lua interpreter with (after load()) the administrator's script in it."""

    def __init__(
        self,
        limits: Handlers,
        root: bytes,
        page: Page,
        acknowledge: Callable[[Ack], None],
        trace: Trace | None = None,
    ) -> None:
        """Make the interpreter; ROOT is the path of the cgroup root directory.

        PAGE shows what is being done. ACKNOWLEDGE is told how far the releases are.
        """
        self._limits = limits
        self._page = page
        self._acknowledge = acknowledge
        self._lua = new_runtime()
        load = self._lua.eval(b"loadstring")
        code = Path(__file__).with_name("script.lua").read_bytes()
        functions = load(code, b"=script.lua")(
            limits.cpu, limits.memory * 1e6, self._failed, self._suspended
        )
        self._starter, self._compile = functions[b"starter"], functions[b"compile"]
        self._global, self._close_lua = functions[b"global"], functions[b"close"]
        self._defined = functions[b"defined"]
        self._continue, self.abandon = functions[b"continue"], functions[b"abandon"]
        self._tasks = Tasks(limits.time, self, self._outcome, self._failed)
        self._tasks.ended.append(self._task_ended)
        runtime = Runtime(self._lua, functions, self._run, self._tasks.ended)
        self.calling = Calling(runtime, trace)
        bindings.install(self.calling)
        self._cgroups = CgroupBinding(load, functions[b"guarded"], root)
        self._begin: Any = None  # starts cgroup_released
        self._load_error: str | None = None
        self.handler: str | None = None
        """Where ``cgroup_released`` is defined, as FILE:LINE; None if it is not."""
        self._queue: deque[Numbered] = deque()
        self._turn: asyncio.Handle | None = None
        self._one_ended: asyncio.Future[None] | None = None
        self._begun = self._told = 0  # releases; how many of them were acknowledged
        self._done: list[int] = []  # since the last acknowledgement
        self._failures: list[str] = []

    # The script as a whole

    async def load(self, path: Path) -> None:
        """Run the script at PATH; ScriptError says with file and line why it cannot be used."""
        try:
            code = path.read_bytes()
        except OSError as error:
            raise ScriptError(f"{path}: {error.strerror}") from None
        chunk = self._compile(code, os.fsencode(path))
        if isinstance(chunk, tuple):
            raise ScriptError(one_line(chunk[1]))
        ended = asyncio.get_running_loop().create_future()
        self._run(chunk, lambda: ended.set_result(None), _MAIN_CHUNK)
        # At the start, waiting for a database counts: a daemon that never gets ready helps nobody.
        await asyncio.wait([ended], timeout=self._limits.time)
        if not ended.done():
            self._tasks.expire_all(f"ran longer than {self._limits.time:g} s")
            await ended
        if self._load_error is not None:
            raise ScriptError(self._load_error)
        function, kind = self._global(b"cgroup_released")
        if kind not in (b"function", b"nil"):
            raise ScriptError(f"{path}: cgroup_released is a {kind.decode()}, not a function")
        if kind == b"function":
            self._begin = self._starter(function, self._cgroups.new, self._cgroups.close)
            line = self._defined(function)
            self.handler = f"{printable(os.fsencode(path)).decode()}:{line}"

    def reload(self, done: Callable[[], None]) -> None:
        """Call the script's ``reload``, if there is one, and DONE when it has come to its end."""
        function, kind = self._global(b"reload")
        if kind == b"function":
            self._run(function, done)
        else:
            done()

    async def stop(self, seconds: float) -> None:
        """Let what waits end for so long at most; then it gets an error, and a moment for that."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._tasks and loop.time() < end:
            self._one_ended = loop.create_future()
            await asyncio.wait([self._one_ended], timeout=max(0.0, end - loop.time()))
        self._queue.clear()
        self._tasks.expire_all("the daemon ends")
        for _ in range(_LAST_ROUNDS):
            await asyncio.sleep(0)
        self._tell()

    def close(self) -> None:
        """Close what the script has opened; nothing of it may run after this."""
        self.calling.exits.close()
        self._close_lua()

    # Handlers

    def handle(self, releases: list[Numbered]) -> None:
        """Call ``cgroup_released`` for each: now, or if too many wait, in its turn."""
        self._queue.extend(releases)
        if self._turn is None:
            self._take_turn()

    def _take_turn(self) -> None:
        """Begin handlers, as long as not too many wait; go on later if there are many."""
        self._turn = None
        for _ in range(min(_TURN, len(self._queue))):
            if len(self._tasks) >= self._limits.running:
                break
            self._handle(self._queue.popleft())
        else:
            if self._queue:
                self._take_turn_soon()
        self._tell()

    def _take_turn_soon(self) -> None:
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _handle(self, release: Numbered) -> None:
        number, fields = release.number, release.fields
        self._begun += 1
        self._page.begin(number)
        try:
            state = self._begin(number, fields[PATH], release.attempt, *fields)
        except MemoryError:
            raise  # ends the process
        except Exception:
            # Nothing else may wait for it, and the core not for its end.
            _log.exception("%s: a mistake of ours", printable(fields[PATH]).decode())
            state = NOT_WAITING[0]
        finally:
            self._page.enter(OURS)
        if state in NOT_WAITING:
            self._done.append(number)
        else:
            self._tasks.after(state, lambda: self._done.append(number))

    def _tell(self) -> None:
        """Say how far the releases are, if there is something to be said."""
        self.calling.drop_collected()
        while self._begun != self._told or self._done or self._failures:
            self._told = self._begun
            self._acknowledge(
                Ack(self._begun, self._done[:_DONE_MAX], self._failures[:FAILURES_MAX])
            )
            del self._done[:_DONE_MAX], self._failures[:FAILURES_MAX]

    def _run(self, function: Any, ended: Callable[[], None], path: bytes | None = None) -> None:
        """Run a function of the script that is not about a release; then call ENDED."""
        self._tasks.after(self._starter(function)(OURS, path), ended)

    def resume(self, number: int, release: int, *outcome: Any) -> int:
        """Run the next slice of a task, which is about a RELEASE, or OURS."""
        self._page.enter(release)
        try:
            state: int = self._continue(number, *outcome)
        finally:
            self._page.enter(OURS)
        return state

    def _task_ended(self, _: int) -> None:
        if self._one_ended is not None and not self._one_ended.done():
            self._one_ended.set_result(None)
        self._take_turn_soon()

    def _suspended(self, number: int, path: bytes | None, release: int, operation: int) -> None:
        self._tasks.suspended(number, path, release, self.calling.take(operation))

    def _outcome(self, operation: asyncio.Future[Any]) -> Outcome:
        return self.calling.outcome(operation)

    def _failed(self, path: bytes | None, message: bytes) -> None:
        """Report an error of the script; called by Lua where it happened."""
        text = one_line(message[:MESSAGE_MAX])
        if path == _MAIN_CHUNK:
            self._load_error = text
        elif path is not None:
            self._failures.append(f"{printable(path).decode()}: {text}"[:MESSAGE_MAX])
        else:
            _log.error("%s", text)


def new_runtime() -> Any:
    """Return a LuaJIT interpreter that has no way into Python."""
    for name in _RUNTIMES:
        try:
            with _global_symbols():
                module = importlib.import_module(name)
        except ImportError:
            continue
        runtime = module.LuaRuntime(
            encoding=None,
            unpack_returned_tuples=True,
            register_eval=False,
            register_builtins=False,
            attribute_filter=_no_attributes,
        )
        if runtime.eval(b"jit") is None:
            continue
        package = runtime.globals()[b"package"]
        package[b"path"], package[b"cpath"] = _PATH.encode(), _CPATH.encode()
        return runtime
    raise ScriptError(f"no LuaJIT found; none of {', '.join(_RUNTIMES)} can be imported")


@contextmanager
def _global_symbols() -> Iterator[None]:
    """Load libraries so that C modules of Lua find the interpreter's symbols."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        yield
    finally:
        sys.setdlopenflags(flags)


def _no_attributes(_object: object, _name: object, _is_setting: bool) -> str:
    raise AttributeError("not for scripts")
