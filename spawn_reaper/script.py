"""The Lua runtime: loading the script, running its functions as coroutines, ending them.

Owns the interpreter and the limits on handlers. Which objects and functions a script finds is the
business of ``bindings``; what a release is, of the reaper. LuaJIT is asked for by name, because
``import lupa`` may give another Lua.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from spawn_reaper import bindings
from spawn_reaper.bindings.calling import Calling, Outcome, Runtime, Trace
from spawn_reaper.bindings.cgroup import CgroupBinding, fields_of
from spawn_reaper.release import Release
from spawn_reaper.report import one_line, printable
from spawn_reaper.settings import Handlers
from spawn_reaper.tasks import Tasks

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
_TURN: Final = 0.1  # seconds for which handlers may begin before the daemon looks at its events


class ScriptError(Exception):
    """The script cannot be used; the message names file and line."""


class Script:
    """A Lua interpreter with (after load()) the administrator's script in it."""

    def __init__(self, limits: Handlers, root: bytes, trace: Trace | None = None) -> None:
        """Make the interpreter; ROOT is the path of the cgroup root directory."""
        self._limits = limits
        self._lua = new_runtime()
        load = self._lua.eval(b"loadstring")
        code = Path(__file__).with_name("script.lua").read_bytes()
        functions = load(code, b"=script.lua")(
            limits.cpu, limits.memory * 1e6, self._failed, self._suspended
        )
        self._starter, self._compile = functions[b"starter"], functions[b"compile"]
        self._global, self._close_lua = functions[b"global"], functions[b"close"]
        self.resume, self.abandon = functions[b"continue"], functions[b"abandon"]
        self._tasks = Tasks(limits.time, self, self._outcome, self._failed)
        self._tasks.ended.append(self._task_ended)
        runtime = Runtime(self._lua, functions, self._run, self._tasks.ended)
        self.calling = Calling(runtime, trace)
        bindings.install(self.calling)
        self._cgroups = CgroupBinding(load, functions[b"guarded"], root)
        self._begin: Any = None  # starts cgroup_released
        self._load_error: str | None = None
        self._queue: deque[Release] = deque()
        self._full = False
        self._one_ended: asyncio.Future[None] | None = None
        self._turn: asyncio.Handle | None = None
        self._turn_end = 0.0  # monotonic time until which handlers may begin in this turn
        self._reloading = False
        self._reload_waiting: list[Callable[[], None]] = []
        self.failed_count = 0

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

    @property
    def handles_releases(self) -> bool:
        """Whether the script defined ``cgroup_released``."""
        return self._begin is not None

    def reload(self, done: Callable[[], None]) -> None:
        """Call the script's ``reload`` and DONE after it; once more if it is running now."""
        self._reload_waiting.append(done)
        if not self._reloading:
            self._reload_again()

    def _reload_again(self) -> None:
        """Run ``reload`` for all who have asked for it until now."""
        function, kind = self._global(b"reload")
        waiting, self._reload_waiting = self._reload_waiting, []
        if kind == b"function":
            self._reloading = True
            self._run(function, lambda: self._reloaded(waiting))
        else:
            self._reloaded(waiting)

    def _reloaded(self, waiting: list[Callable[[], None]]) -> None:
        self._reloading = False
        for done in waiting:
            done()
        if self._reload_waiting:
            asyncio.get_running_loop().call_soon(self._reload_again)

    async def finish(self, seconds: float) -> int:
        """Let handlers finish for so long at most; return how many releases were not handled."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (self._tasks or self._queue) and loop.time() < end:
            if self._tasks:
                self._one_ended = loop.create_future()
                await asyncio.wait([self._one_ended], timeout=max(0.0, end - loop.time()))
            await asyncio.sleep(0)  # let what follows from that happen
        left = self._tasks.handler_count() + len(self._queue)
        self._queue.clear()
        self._tasks.expire_all("the daemon ends")
        for _ in range(_LAST_ROUNDS):  # they get that error, and have to be through with it
            await asyncio.sleep(0)
        return left

    def close(self) -> None:
        """Close what the script has opened; nothing of it may run after this."""
        self.calling.exits.close()
        self._close_lua()

    # Handlers

    def busy(self) -> bool:
        """Whether functions of the script wait, or wait to be called."""
        return bool(self._tasks or self._queue)

    def full(self) -> bool:
        """Whether as many releases wait for their handler as may."""
        room_again = self._limits.queue * 9 // 10  # or it would be full again at once
        self._full = len(self._queue) > (room_again if self._full else self._limits.queue - 1)
        return self._full

    @property
    def waiting_count(self) -> int:
        """How many functions of the script wait, or wait to be called."""
        return len(self._tasks) + len(self._queue)

    def released(self, release: Release, directory: int | None) -> None:
        """Call ``cgroup_released``: now, or if there is too much to do, in its turn.

        While deleted() has not been called, the handler may read from DIRECTORY.
        """
        if self._queue or not self._may_begin():
            self._queue.append(release)
            self._take_turn_soon()
            return
        if directory is not None:
            self._cgroups.directories[release.id.encode()] = directory
        self._handle(release)

    def deleted(self, release: Release) -> None:
        """Forget the directory of a release."""
        self._cgroups.directories.pop(release.id.encode(), None)

    def _may_begin(self) -> bool:
        """Whether one more handler may begin without holding up the daemon's other work."""
        if len(self._tasks) >= self._limits.running:
            return False
        now = time.monotonic()
        if self._turn is None:
            # The first since the loop came round: the turn begins, and ends when it does again.
            self._turn_end = now + _TURN
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)
        return now < self._turn_end

    def _take_turn_soon(self) -> None:
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Begin the handlers that had to wait, until the turn is over."""
        self._turn = None
        self.calling.drop_collected()
        while self._queue and self._may_begin():
            self._handle(self._queue.popleft())

    def _handle(self, release: Release) -> None:
        self._begin(release.path, *fields_of(release))

    def _run(self, function: Any, ended: Callable[[], None], path: bytes | None = None) -> None:
        """Run a function of the script that is not about a release; then call ENDED."""
        self._tasks.after(self._starter(function)(path), ended)

    def _task_ended(self, _: int) -> None:
        if self._one_ended is not None and not self._one_ended.done():
            self._one_ended.set_result(None)
        self._take_turn_soon()

    def _suspended(self, number: int, path: bytes | None, operation: int) -> None:
        self._tasks.suspended(number, path, self.calling.take(operation))

    def _outcome(self, operation: asyncio.Future[Any]) -> Outcome:
        return self.calling.outcome(operation)

    def _failed(self, path: bytes | None, message: bytes) -> None:
        """Report an error of the script; called by Lua where it happened."""
        self.failed_count += 1
        text = one_line(message)
        if path == _MAIN_CHUNK:
            self._load_error = text
        elif path is not None:
            _log.error("%s: %s", printable(path).decode(), text)
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
