"""Connections to PostgreSQL, which connect by themselves, again and again.

A connection has one queue, which outlives its links to the server: what was asked for while there
was none is done, in order, when there is one again. Only what was already sent when a link broke
has failed, since nobody can know whether the server did it.

A transaction belongs to the task that began it: others wait, and when the task ends, so does the
transaction. If the link broke meanwhile, the task's queries fail until it ends the transaction, as
they do at the server after an error.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import psycopg
from psycopg import conninfo as conninfos
from psycopg.pq.abc import PGresult

from spawn_reaper.runner.bindings.calling import LIMIT, Calling, Failure, Misuse, Queued, exposed
from spawn_reaper.runner.bindings.link import Cancelled, Link, connect, message_of
from spawn_reaper.runner.bindings.pg_text import text_of
from spawn_reaper.runner.bindings.result import Result

_log = logging.getLogger(__name__)

_LONGEST_DELAY: Final = 60.0  # seconds between two attempts to connect
_LASTING: Final = 1.0  # seconds after which a link was not just another failed attempt
_NAME_MAX: Final = 63  # bytes of an identifier (NAMEDATALEN - 1)
_NOBODY: Final = 0  # no task has this number
_END: Final = re.compile(rb"\s*(?:rollback|commit|end|abort)\b", re.IGNORECASE)


class _Query(Queued):
    """A query and, once it is done, its result."""

    __slots__ = ("parameters", "sql", "task")

    def __init__(self, task: int, sql: bytes, parameters: list[bytes | None]) -> None:
        super().__init__()
        self.task = task
        self.sql = sql
        self.parameters = parameters


class _Listener:
    """A function of the script that runs when there was a notification."""

    def __init__(self, function: Any, calling: Calling) -> None:
        self._function = function
        self._calling = calling
        self._running = False
        self._again = False

    def notify(self) -> None:
        """Run the function soon; once more if it is running."""
        asyncio.get_running_loop().call_soon(self._run)

    def notify_after(self, query: asyncio.Future[Any]) -> None:
        """Run the function, if LISTEN worked."""
        if not query.cancelled() and query.exception() is None:
            self.notify()

    def _run(self) -> None:
        if self._running:
            self._again = True
            return
        self._running = True
        self._calling.spawn(self._function, self._ended)

    def _ended(self) -> None:
        self._running = False
        if self._again:
            self._again = False
            self.notify()


class Connection:
    """What pg:new() returns."""

    def __init__(
        self,
        conninfo: bytes,
        schema: bytes | None,
        calling: Calling,
        is_owner: Callable[[int], bool],
    ) -> None:
        """IS_OWNER tells whether a task is within a transaction, on whatever connection."""
        self._conninfo, self._name = _read_conninfo(conninfo)
        if schema is not None and b"\0" in schema:
            raise Misuse("bad argument #3 to 'new' (the schema contains a NUL byte)")
        self._schema = schema
        self._calling = calling
        self._is_owner = is_owner
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Query] = deque()
        self._link: Link | None = None
        self._sent: deque[_Query] = deque()  # what the server works on
        self._connecting: asyncio.Task[None] | None = None
        self._connected = 0.0  # when there was a link last, by the loop's clock; 0 is never
        self._delay = 0.0  # before the next attempt
        self.owner: int | None = None  # the task that is within a transaction
        self._bereft: set[int] = set()  # tasks whose transaction went with a link
        self._listeners: dict[bytes, _Listener] = {}
        self.unused = False
        """Whether the script has no way to use it any more."""
        self._connect()

    def __str__(self) -> str:
        return f"connection ({self._name})"

    # For scripts

    @exposed("string table?", returns="result", waits=True)
    def execute(self, task: int, sql: bytes, parameters: Any = None) -> _Query:
        """Perform SQL, with parameters for $1 and so on."""
        values = [] if parameters is None else _values(self._calling, parameters)
        if b"\0" in sql:
            raise Failure("the SQL contains a NUL byte")
        for position, value in enumerate(values, 1):
            if value is not None and b"\0" in value:
                raise Failure(f"parameter #{position} contains a NUL byte")
        if task in self._bereft:
            if _END.match(sql):
                self._bereft.discard(task)
            raise Failure("the connection was lost in the middle of the transaction")
        query = _Query(task, sql, values)
        if self._is_owner(task):
            query.begin()  # its time counts: others may be waiting for it, and it for them
        self._queue.append(query)
        self._advance()
        return query

    @exposed("string function")
    def listen(self, name: bytes, function: Any) -> None:
        """Call FUNCTION whenever there was a NOTIFY for NAME."""
        if not 0 < len(name) <= _NAME_MAX or b"\0" in name:
            raise Misuse(f"bad argument #2 to 'listen' (not a name of 1 to {_NAME_MAX} bytes)")
        if name in self._listeners:
            raise Misuse(f"already listening on '{name.decode(errors='replace')}'")
        self._listeners[name] = _Listener(function, self._calling)
        if self._link is not None:
            self._send_listen(name)

    # For the runtime

    def dropped(self) -> None:
        """Lua has collected the object: go when all is done, unless the script listens."""
        if not self._listeners:
            self.unused = True
            self._advance()

    def close(self) -> None:
        """Give up the link and everything that was to be done."""
        self.unused = True
        self._queue.clear()
        self._sent.clear()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None

    def task_ended(self, task: int) -> None:
        """Roll back what a task has begun and not ended."""
        self._bereft.discard(task)
        if self.owner == task:
            _log.error("%s: a handler ended in its transaction, which is rolled back", self._name)
            self._execute_first(_Query(task, b"ROLLBACK", []))

    def _send_listen(self, name: bytes) -> _Query:
        quoted = name.replace(b'"', b'""')
        return self._execute_first(_Query(_NOBODY, b'LISTEN "' + quoted + b'"', []))

    def _execute_first(self, query: _Query) -> _Query:
        """Perform a query of our own before those of the script, within a limit."""
        query.begun = partial(self._limit, query)
        query.add_done_callback(self._log_failure)
        self._queue.appendleft(query)
        self._advance()
        return query

    def _limit(self, query: _Query) -> None:
        self._loop.call_later(LIMIT, query.cancel)

    def _log_failure(self, query: asyncio.Future[Any]) -> None:
        if not query.cancelled() and (error := query.exception()) is not None:
            _log.error("%s: %s", self._name, error)

    # Links

    def _connect(self) -> None:
        self._connecting = self._loop.create_task(self._make_link())

    async def _make_link(self) -> None:
        """Try until there is a link: at once, then with growing delay."""
        while not self.unused or self._queue:
            if self._delay:
                await asyncio.sleep(self._delay)
            self._delay = min(_LONGEST_DELAY, max(1.0, 2 * self._delay))
            try:
                self._use(await connect(self._conninfo, self._schema))
                return
            except (psycopg.Error, OSError) as error:
                _log.error("%s: %s", self._name, message_of(error) or "timed out")
            except Exception:
                _log.exception("%s: a mistake of ours", self._name)

    def _use(self, connection: psycopg.AsyncConnection[Any]) -> None:
        again = self._connected > 0
        if again:
            _log.info("%s: connected again", self._name)
        self._connected = self._loop.time()
        self._link, self._connecting = Link(connection, self), None
        for name, listener in self._listeners.items():
            query = self._send_listen(name)
            if again:  # what was notified in between is lost, so the script has to look
                query.add_done_callback(listener.notify_after)
        self._advance()

    def lost(self, reason: str) -> None:
        """Get another link; what was under way has failed."""
        _log.error("%s: %s", self._name, reason)
        self._link = None
        if self._loop.time() - self._connected > _LASTING:
            self._delay = 0.0
        failed = [*self._sent]
        if self.owner is not None:
            failed += self._bereave(self.owner)
            self.owner = None
        self._sent.clear()
        self._connect()
        for query in failed:
            self._settle(query, Failure(reason))

    def _bereave(self, owner: int) -> list[_Query]:
        """Return what OWNER still had in the queue: it must not be done outside its transaction."""
        queued = [query for query in self._queue if query.task == owner]
        for query in queued:
            self._queue.remove(query)
        own = [query for query in (*self._sent, *queued) if query.task == owner]
        if not any(_END.match(query.sql) for query in own):
            self._bereft.add(owner)
        return queued

    # Queries

    def _advance(self) -> None:
        """Send what may be sent now."""
        while self._link is not None:
            query = self._next()
            if query is None or not self._link.may_send(query.parameters):
                break
            self._queue.remove(query)
            self._sent.append(query)
            query.add_done_callback(self._settled)
            self._sent[0].begin()  # the others wait for that one
            self._link.send(query.sql, query.parameters)
        if self._link is not None and self.unused and not self._queue and not self._sent:
            self._link.close()
            self._link = None

    def _next(self) -> _Query | None:
        """Return what is to be sent next; within a transaction, of those who belong to it."""
        while self._queue and self._queue[0].done():
            self._queue.popleft()
        if self.owner is None:
            return self._queue[0] if self._queue else None
        mine = (query for query in self._queue if query.task == self.owner and not query.done())
        return next(mine, None)

    def _settled(self, query: asyncio.Future[Any]) -> None:
        """End at the server what nobody waits for any more."""
        if query.cancelled() and self._link is not None and self._sent and query is self._sent[0]:
            self._link.cancel()

    def performed(self, outcome: PGresult | Failure) -> None:
        """Take the outcome of the query that was sent first."""
        query = self._sent.popleft()
        self._note_transaction(query)
        hit = isinstance(outcome, Cancelled) and not query.cancelled()
        if hit:
            query.wait_again()  # another one was meant, and this one had no effect
            self._queue.appendleft(query)
        self._advance()  # before anybody else does anything: the server shall not wait
        if self._sent:
            self._sent[0].begin()
            self._settled(self._sent[0])
        if not hit:
            self._settle(query, outcome)

    def _note_transaction(self, query: _Query) -> None:
        """Remember whose transaction has begun or ended with QUERY."""
        assert self._link is not None
        if not self._link.in_transaction:
            self.owner = None
        elif self.owner is None:
            self.owner = query.task
            if query.cancelled():  # its task has ended meanwhile
                self.task_ended(query.task)

    def _settle(self, query: _Query, outcome: PGresult | Failure) -> None:
        if query.done():
            return
        if isinstance(outcome, Failure):
            query.set_exception(outcome)
        else:
            query.set_result(Result(outcome, self._calling))

    def may_send_again(self) -> None:
        """Send what had to wait."""
        self._advance()

    def notified(self, name: bytes) -> None:
        """Run the function that listens to NAME."""
        if (listener := self._listeners.get(name)) is not None:
            listener.notify()


def _read_conninfo(text: bytes) -> tuple[dict[str, Any], str]:
    """Return what to connect with, and what to call it in messages: without secrets."""
    if b"\0" in text:
        raise Misuse("bad argument #2 to 'new' (the connection string contains a NUL byte)")
    try:
        given = conninfos.conninfo_to_dict(text.decode(errors="surrogateescape"))
    except (psycopg.Error, UnicodeError) as error:
        raise Misuse(f"bad argument #2 to 'new' ({message_of(error)})") from None
    shown = " ".join(
        f"{key}={given[key]}" for key in ("service", "dbname", "host", "port") if given.get(key)
    )
    given.setdefault("connect_timeout", int(LIMIT))
    given.setdefault("fallback_application_name", "cm4all-spawn-reaper")
    return dict(given), f"PostgreSQL {shown}".strip()


def _values(calling: Calling, table: Any) -> list[bytes | None]:
    """Return the parameters in a script's table; its "n" is their number, if the last are nil."""
    found = dict(table.items())
    size = max((key for key in found if type(key) is int), default=0)
    if isinstance(count := found.get(b"n"), int) and 0 <= count <= 0xFFFF:
        size = count
    if size > 0xFFFF:
        raise Misuse(f"bad argument #3 to 'execute' (more than {0xFFFF} parameters)")
    return [_value(calling, position, found.get(position)) for position in range(1, size + 1)]


def _value(calling: Calling, position: int, value: Any) -> bytes | None:
    text = text_of(value)
    if text is None and value is not None:
        raise Misuse(
            f"bad parameter #{position} (string, number, boolean or nil expected, "
            f"got {calling.type_name(value)})"
        )
    return text


def install(calling: Calling) -> None:
    """Make the objects that pg:new() leads to known to scripts."""
    calling.add_class("result", Result)
    calling.add_class("connection", Connection)
