"""How a script calls what we give it: arguments, results, errors, waiting, objects.

Owns Lua's calling conventions, so that the other bindings are ordinary classes and functions. These
take and return bytes, numbers, booleans, None and objects of exposed classes. One that returns an
awaitable makes its caller in Lua wait. Failure and Misuse are the errors of Lua's two kinds.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future as ThreadFuture
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from spawn_reaper.runner.confinement import end_without_memory

_log = logging.getLogger(__name__)

LIMIT: Final = 10.0
"""Seconds after which an operation on the network has failed."""

_BLOCK_LIMIT: Final = LIMIT + 1  # for operations that end by themselves after LIMIT

# How a call ended; the same numbers as in calling.lua.
_RETURN, _FAIL, _RAISE, _WAIT, _NEW, _SELF = range(6)

Outcome = tuple[Any, ...]
"""One of the numbers above, and what belongs to it."""

Trace = Callable[[bytes, bytes, bytes, bytes], None]
"""Is told of a call: place in the script, name, arguments, results."""


def raising(message: str) -> Outcome:
    """Return the outcome that raises an error in the script."""
    return (_RAISE, message.encode(errors="surrogateescape"))


_Function = TypeVar("_Function", bound=Callable[..., Any])


class Failure(Exception):
    """What was asked for did not work: the script gets nil and this message."""


class Misuse(Exception):
    """A mistake of the script: an error is raised in it with this message."""


class Queued(asyncio.Future[Any]):
    """An operation that waits in a queue, which does not count as the caller's time."""

    __slots__ = ("begun", "put_back", "waiting")

    def __init__(self) -> None:
        super().__init__()
        self.waiting = True
        """Whether it is in the queue."""
        self.begun: Callable[[], None] | None = None
        """To be called when the operation leaves the queue."""
        self.put_back: Callable[[], None] | None = None
        """To be called when the operation is in the queue again."""

    def begin(self) -> None:
        """Leave the queue, if it is still in it."""
        if self.waiting:
            self.waiting = False
            if self.begun is not None:
                self.begun()

    def wait_again(self) -> None:
        """Get back into the queue."""
        self.waiting = True
        if self.put_back is not None:
            self.put_back()


class Signature(NamedTuple):
    """What a script may pass, and what it gets."""

    kinds: str
    """A list in one string, such as "string integer? string...": calling.lua knows the kinds."""
    returns: str | None
    """The class of the object that is returned, if it is one."""
    waits: bool
    """Whether it cannot work without making its caller wait; it takes the caller's task first."""


_signatures: dict[Callable[..., Any], Signature] = {}


def exposed(
    kinds: str = "", *, returns: str | None = None, waits: bool = False
) -> Callable[[_Function], _Function]:
    """Make a function or method one that scripts can call; see Signature."""

    def remember(function: _Function) -> _Function:
        _signatures[function] = Signature(kinds, returns, waits)
        return function

    return remember


def signatures_of(owner: object) -> dict[str, Signature]:
    """Return what OWNER, a class, has exposed, by name."""
    return {
        name: _signatures[member]
        for name, member in vars(owner).items()
        if callable(member) and member in _signatures
    }


class Runtime(NamedTuple):
    """What calling needs of the Lua runtime."""

    lua: Any
    functions: Any
    """The table that script.lua returns."""
    spawn: Callable[[Any, Callable[[], None]], None]
    """Runs a function of Lua as a task, and calls the other one when that has ended."""
    task_ended: list[Callable[[int], None]]
    """To be called with the number of a task that has waited and is done or parked."""


class Calling:
    """Gives a script functions, modules and classes."""

    def __init__(self, runtime: Runtime, trace: Trace | None = None) -> None:
        self._lua = runtime.lua
        self.spawn = runtime.spawn
        self._numbers = itertools.count(1)
        self._objects: dict[int, Any] = {}
        self._operations: dict[int, Awaitable[Any]] = {}
        self._names: dict[type, bytes] = {}
        self._module_count = 0
        code = Path(__file__).with_name("calling.lua").read_bytes()
        functions = self._lua.eval(b"loadstring")(code, b"=calling.lua")(
            runtime.functions, self._drop, self._block, self._describe, trace
        )
        self._bind, self._module = functions[b"bind"], functions[b"module"]
        self._class, self._fill = functions[b"class"], functions[b"fill"]
        self._type_name = functions[b"type_name"]
        self._drop_collected = functions[b"drop_collected"]
        self._collect = self._lua.eval(b"collectgarbage")
        self.task_ended = runtime.task_ended
        self.exits = ExitStack()
        """What is to be called when no script will run any more."""

    # What bindings offer

    def add_function(self, name: str, function: Callable[..., Any]) -> None:
        """Give the script a global function."""
        self._lua.globals()[name.encode()] = self._bound(name, function, name)

    def add_functions(self, name: str, functions: dict[str, Callable[..., Any]]) -> None:
        """Give the script a global table of functions."""
        bound = {
            key.encode(): self._bound(key, function, f"{name}.{key}")
            for key, function in functions.items()
        }
        self._lua.globals()[name.encode()] = self._lua.table_from(bound)

    def add_module(self, name: str, owner: object) -> None:
        """Give the script a global table whose functions are OWNER's exposed methods."""
        number = self._keep(owner)
        self._module_count += 1
        table, add = self._module(name.encode(), number)
        self._add_methods(add, type(owner))
        self._lua.globals()[name.encode()] = table

    def add_class(self, name: str, class_: type) -> None:
        """Make objects of CLASS_ known to scripts; str() of one is what Lua's tostring() gives."""
        if class_ in self._names:
            return
        self._names[class_] = name.encode()
        self._add_methods(self._class(name.encode()), class_)

    def _add_methods(self, add: Any, class_: type) -> None:
        for name, signature in signatures_of(class_).items():
            call = self._caller(getattr(class_, name), signature)
            add(name.encode(), signature.kinds.encode(), call, signature.waits)

    def _bound(self, name: str, function: Callable[..., Any], shown: str) -> Any:
        signature = _signatures[function]

        def call(*arguments: Any) -> Outcome:
            return self._outcome_of(function, arguments)

        return self._bind(name.encode(), signature.kinds.encode(), call, shown.encode())

    def _caller(self, function: Callable[..., Any], signature: Signature) -> Callable[..., Outcome]:
        objects = self._objects
        classes = {name.decode() for name in self._names.values()}
        offset = 2 if signature.waits else 1
        # Arguments that may be objects, and then arrive as their numbers.
        positions = [
            offset + i
            for i, kind in enumerate(signature.kinds.split())
            if kind.rstrip("?.").split("|")[0] in classes
        ]

        def call(number: int, *arguments: Any) -> Outcome:
            return self._outcome_of(function, (objects[number], *arguments))

        def call_with_objects(*arguments: Any) -> Outcome:
            resolved = list(arguments)
            for i in positions:
                if type(resolved[i]) is int:
                    resolved[i] = objects[resolved[i]]
            return call(*resolved)

        return call_with_objects if positions else call

    # Results

    def _outcome_of(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
        try:
            result = function(*arguments)
        except Exception as error:
            return self._outcome_of_error(error)
        if arguments and result is arguments[0] and type(result) in self._names:
            return (_SELF,)
        return self._outcome_of_result(result)

    def _outcome_of_result(self, result: Any) -> Outcome:
        if type(result) is tuple:
            return (_RETURN, *result)
        if (name := self._names.get(type(result))) is not None:
            return (_NEW, name, self._keep(result))
        if isinstance(result, Awaitable):
            number = next(self._numbers)
            self._operations[number] = result
            return (_WAIT, number)
        return (_RETURN, result)

    def _outcome_of_error(self, error: BaseException) -> Outcome:
        if isinstance(error, Failure):
            return (_FAIL, str(error).encode(errors="surrogateescape"))
        if isinstance(error, Misuse):
            return raising(str(error))
        if isinstance(error, MemoryError):
            end_without_memory()
        _log.error("a mistake of ours", exc_info=error)
        return raising("internal error; the log has its traceback")

    # Waiting

    def take(self, number: int) -> Awaitable[Any]:
        """Return the operation that a task begins to wait for."""
        return self._operations.pop(number)

    def outcome(self, operation: asyncio.Future[Any]) -> Outcome:
        """Return what a task gets that has waited for OPERATION."""
        if (error := operation.exception()) is not None:
            return self._outcome_of_error(error)
        return self._outcome_of_result(operation.result())

    def _block(self, number: int) -> Outcome:
        """Run an operation where Lua cannot suspend its caller: everything waits for it."""
        operation = self._operations.pop(number)
        assert isinstance(operation, Coroutine)
        try:
            return self._outcome_of_result(_run_in_thread(operation))
        except Exception as error:
            return self._outcome_of_error(error)

    # Objects

    def _keep(self, owner: object) -> int:
        number = next(self._numbers)
        self._objects[number] = owner
        return number

    def _drop(self, number: int) -> None:
        """Forget an object that Lua has collected."""
        dropped = self._objects.pop(number)
        try:
            if hasattr(dropped, "dropped"):
                dropped.dropped()
        except Exception:
            _log.exception("a mistake of ours")

    def _describe(self, number: int) -> bytes:
        return str(self._objects[number]).encode(errors="surrogateescape")

    def drop_collected(self) -> None:
        """Forget the objects that Lua has collected."""
        if len(self._objects) > self._module_count:  # the script has made some
            self._drop_collected()

    def collect_garbage(self) -> None:
        """Let Lua drop the objects that the script does not refer to any more."""
        self._collect()
        self.drop_collected()

    def type_name(self, value: Any) -> str:
        """Return Lua's name for the type of a value that came from Lua."""
        name: bytes = self._type_name(value)
        return name.decode()

    def new_table(self, elements: list[bytes]) -> Any:
        """Return a new table of Lua with ELEMENTS."""
        return self._lua.table_from(elements)

    def filled(self, table: Any, items: Iterable[tuple[Any, Any]]) -> Any:
        """Return TABLE, or a new one, with ITEMS set in it, whatever its metatable says."""
        return self._fill(table, *itertools.chain.from_iterable(items))


def _run_in_thread(operation: Coroutine[Any, Any, Any]) -> Any:
    """Run OPERATION on a loop of its own; this thread's is already running."""
    done: ThreadFuture[Any] = ThreadFuture()

    def run() -> None:
        try:
            done.set_result(asyncio.run(operation))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="operation", daemon=True).start()
    try:
        return done.result(_BLOCK_LIMIT)
    except TimeoutError:
        raise Failure("timed out") from None
