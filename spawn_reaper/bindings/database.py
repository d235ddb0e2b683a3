"""Connections to PostgreSQL, which connect by themselves, again and again.

A connection has one queue, which outlives its links to the server: what was asked for while there
was none is done, in order, when there is one again. Only what was already sent when a link broke
has failed, since nobody can know whether the server did it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import psycopg
from psycopg import conninfo as conninfos
from psycopg.adapt import Dumper
from psycopg.pq import ConnStatus, Escaping, TransactionStatus
from psycopg.pq.abc import PGresult

from spawn_reaper.bindings.calling import LIMIT, Calling, Failure, Misuse, Queued, exposed
from spawn_reaper.bindings.pg_text import text_of
from spawn_reaper.report import one_line

_log = logging.getLogger(__name__)

_LONGEST_DELAY: Final = 60.0  # seconds between two attempts to connect
_LASTING: Final = 1.0  # seconds after which a link was not just another failed attempt
_CANCEL_LIMIT: Final = 5.0  # seconds for the server to end a query that was cancelled
_NAME_MAX: Final = 63  # bytes of an identifier (NAMEDATALEN - 1)
_IN_TRANSACTION: Final = (TransactionStatus.INTRANS, TransactionStatus.INERROR)


class _Text(Dumper):
    """Parameters are text, whose type the server finds out."""

    def dump(self, obj: Any) -> bytes:
        return bytes(obj)


class _Query(Queued):
    """A query and, once it is done, its result."""

    __slots__ = ("parameters", "sql", "task")

    def __init__(self, task: int, sql: bytes, parameters: list[bytes | None]) -> None:
        super().__init__()
        self.task = task
        self.sql = sql
        self.parameters = parameters


class Result:
    """What a query returned; rows are fetched from the first to the last."""

    def __init__(self, result: PGresult | None, calling: Calling) -> None:
        self._calling = calling
        self._result = result
        self._row = 0
        self._names: list[Any] | None = None

    def __str__(self) -> str:
        return "result (closed)" if self._result is None else f"result ({self._result.ntuples})"

    @exposed("table? string?")
    def fetch(self, table: Any = None, mode: bytes | None = None) -> Any:
        """Fill TABLE with the next row, by "n"umber or n"a"me of the column; nil at the end."""
        if self._result is None:
            raise Misuse("bad argument #1 to 'fetch' (closed result)")
        if mode not in (None, b"n", b"a"):
            raise Misuse('bad argument #3 to \'fetch\' (mode "a" or "n" expected)')
        result, row = self._result, self._row
        if row >= result.ntuples:
            return None
        self._row += 1
        if table is None:
            table = self._calling.new_table()
        for column, key in enumerate(self._keys(result, by_name=mode == b"a")):
            table[key] = result.get_value(row, column)
        return table

    def _keys(self, result: PGresult, *, by_name: bool) -> list[Any] | range:
        if not by_name:
            return range(1, result.nfields + 1)
        if self._names is None:
            self._names = [result.fname(column) for column in range(result.nfields)]
        return self._names

    @exposed()
    def close(self) -> None:
        """Free the rows; may be called again."""
        self._result = None


class _Listener:
    """A function of the script that runs when there was a notification."""

    def __init__(self, function: Any, calling: Calling) -> None:
        self._function = function
        self._calling = calling
        self._running = False
        self._again = False

    def notify(self) -> None:
        """Run the function; once more if it is running."""
        if self._running:
            self._again = True
            return
        self._running = True
        self._calling.spawn(self._function, self._ended)

    def notify_after(self, _: asyncio.Future[Any]) -> None:
        """Run the function: LISTEN has been performed again."""
        self.notify()

    def _ended(self) -> None:
        self._running = False
        if self._again:
            self._again = False
            asyncio.get_running_loop().call_soon(self.notify)


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
        self._queue: deque[_Query] = deque()
        self._link: psycopg.AsyncConnection[Any] | None = None
        self._since = 0.0  # when the link came about, by the loop's clock
        self._delay = 0.0  # before the next attempt
        self._task: asyncio.Task[Any] | None = None  # connects, or performs a query
        self._watched: int | None = None  # descriptor of the idle link that the loop looks at
        self.owner: int | None = None  # the task that has begun a transaction
        self._bereft: int | None = None  # the task whose transaction went with a link
        self._listeners: dict[bytes, _Listener] = {}
        self._unused = False
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
        if self._bereft == task:
            self._bereft = None
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
            self._send_listen(self._link, name)

    # Of the runtime

    def dropped(self) -> None:
        """Lua has collected the object: go when all is done, unless the script listens."""
        if not self._listeners:
            self._unused = True
            self._advance()

    def close(self) -> None:
        """Give up the link and everything that was to be done."""
        self._unused = True
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
        self._close_link()

    def task_ended(self, task: int) -> None:
        """Roll back what a task has begun and not ended."""
        if self._bereft == task:
            self._bereft = None
        if self.owner == task:
            _log.error(
                "%s: a handler ended within its transaction, which is rolled back", self._name
            )
            self._execute_first(_Query(task, b"ROLLBACK", []))

    def _execute_first(self, query: _Query) -> _Query:
        """Perform a query of our own before those of the script."""
        query.add_done_callback(self._log_failure)
        self._queue.appendleft(query)
        self._advance()
        return query

    def _log_failure(self, query: asyncio.Future[Any]) -> None:
        if not query.cancelled() and (error := query.exception()) is not None:
            _log.error("%s: %s", self._name, error)

    # Links

    def _connect(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._make_link())

    async def _make_link(self) -> None:
        """Try until there is a link."""
        while not self._unused or self._queue:
            if self._delay:
                await asyncio.sleep(self._delay)
            self._delay = min(_LONGEST_DELAY, max(1.0, 2 * self._delay))
            try:
                link = await self._attempt()
            except (psycopg.Error, OSError) as error:
                _log.error("%s: %s", self._name, one_line(str(error).strip().encode()))
            except Exception:
                _log.exception("%s: a mistake of ours", self._name)
            else:
                self._use(link)
                return

    async def _attempt(self) -> psycopg.AsyncConnection[Any]:
        link = await psycopg.AsyncConnection.connect(
            self._conninfo, autocommit=True, prepare_threshold=None
        )
        try:
            link.adapters.register_dumper(bytes, _Text)
            link.add_notify_handler(partial(self._notified_while_busy, link))
            if self._schema is not None:
                quoted = bytes(Escaping(link.pgconn).escape_literal(self._schema))
                await link.execute(b"SET SCHEMA " + quoted)
        except BaseException:
            await link.close()
            raise
        return link

    def _use(self, link: psycopg.AsyncConnection[Any]) -> None:
        again = self._since > 0
        if again:
            _log.info("%s: connected again", self._name)
        self._link, self._task = link, None
        self._since = asyncio.get_running_loop().time()
        for name, listener in self._listeners.items():
            query = self._send_listen(link, name)
            if again:  # what was notified in between is lost, so the script has to look
                query.add_done_callback(listener.notify_after)
        self._advance()

    def _send_listen(self, link: psycopg.AsyncConnection[Any], name: bytes) -> _Query:
        quoted = bytes(Escaping(link.pgconn).escape_identifier(name))
        return self._execute_first(_Query(0, b"LISTEN " + quoted, []))

    def _lose(self, reason: str) -> None:
        """Give up the link and try to get another."""
        assert self._link is not None
        _log.error("%s: %s", self._name, reason)
        self._unwatch()
        self._link.pgconn.finish()
        self._link = None
        if asyncio.get_running_loop().time() - self._since > _LASTING:
            self._delay = 0.0
        self._bereft, self.owner = self.owner, None
        self._connect()

    def _close_link(self) -> None:
        if self._link is not None:
            self._unwatch()
            self._link.pgconn.finish()
            self._link = None

    # Queries

    def _advance(self) -> None:
        """Do what is next, unless something is being done."""
        if self._link is None or self._task is not None:
            return
        if self._queue and not self._is_alive():
            return
        query = self._next()
        if query is not None:
            self._unwatch()
            query.begin()
            task = asyncio.get_running_loop().create_task(_execute(self._link, query))
            task.add_done_callback(partial(self._performed, self._link, query))
            query.add_done_callback(partial(self._settled, task))
            self._task = task
        elif self._unused and not self._queue:
            self._close_link()
        else:
            self._watch()

    def _next(self) -> _Query | None:
        """Take the next query; within a transaction, of those who belong to it."""
        while self._queue:
            if self.owner is None:
                query = self._queue.popleft()
            else:
                found = next((query for query in self._queue if query.task == self.owner), None)
                if found is None:
                    return None
                self._queue.remove(found)
                query = found
            if not query.done():
                return query
        return None

    def _settled(self, task: asyncio.Task[Any], query: asyncio.Future[Any]) -> None:
        """End at the server what nobody waits for any more."""
        if query.cancelled():
            task.cancel()  # psycopg then asks the server to cancel
            asyncio.get_running_loop().call_later(_CANCEL_LIMIT, task.cancel)

    def _performed(
        self,
        link: psycopg.AsyncConnection[Any],
        query: _Query,
        task: asyncio.Task[PGresult | None],
    ) -> None:
        """Hand over what came of a query, and look at the state in which it left the link."""
        if self._link is not link or (task.cancelled() and not query.cancelled()):
            return  # closed, since the daemon ends
        self._task = None
        failure = None if task.cancelled() else _failure_of(task.exception())
        status = link.pgconn.transaction_status
        if link.pgconn.status != ConnStatus.OK:
            self._lose(str(failure or "the link was closed"))
        elif status == TransactionStatus.ACTIVE:
            failure = failure and Failure("COPY cannot be used by scripts")
            self._lose(str(failure or "the server did not end a query"))
        else:
            self._note_transaction(query, begun=status in _IN_TRANSACTION)
        if not query.done():
            if failure is not None:
                query.set_exception(failure)
            else:
                query.set_result(Result(task.result(), self._calling))
        self._advance()

    def _note_transaction(self, query: _Query, *, begun: bool) -> None:
        """Remember whose transaction has begun; nobody's, if that task has ended meanwhile."""
        ended = query.cancelled() and self.owner != query.task
        self.owner = query.task if begun else None
        if begun and ended:
            self.task_ended(query.task)

    # Idle links

    def _watch(self) -> None:
        """Look out for notifications and for the end of the link."""
        if self._watched is None and self._link is not None:
            self._watched = self._link.fileno()
            asyncio.get_running_loop().add_reader(self._watched, self._readable)

    def _unwatch(self) -> None:
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = None

    def _is_alive(self) -> bool:
        """Find out whether the link is still there, before a query is risked on it."""
        # Before the end there may be a message, and what follows that is seen by the second look.
        self._readable()
        if self._link is not None:
            self._readable()
        return self._link is not None

    def _readable(self) -> None:
        assert self._link is not None
        pgconn = self._link.pgconn
        try:
            pgconn.consume_input()
        except psycopg.Error as error:
            self._lose(one_line(str(error).encode()))
            return
        while (notification := pgconn.notifies()) is not None:
            self._notified(notification.relname)

    def _notified_while_busy(
        self, link: psycopg.AsyncConnection[Any], notification: psycopg.Notify
    ) -> None:
        self._notified(notification.channel.encode(link.info.encoding, "surrogateescape"))

    def _notified(self, name: bytes) -> None:
        if (listener := self._listeners.get(name)) is not None:
            asyncio.get_running_loop().call_soon(listener.notify)


def install(calling: Calling) -> None:
    """Make the objects that pg:new() leads to known to scripts."""
    calling.add_class("result", Result)
    calling.add_class("connection", Connection)


def _read_conninfo(text: bytes) -> tuple[str, str]:
    """Return what to connect with, and what to call it in messages: without secrets."""
    if b"\0" in text:
        raise Misuse("bad argument #2 to 'new' (the connection string contains a NUL byte)")
    try:
        given = conninfos.conninfo_to_dict(text.decode(errors="surrogateescape"))
    except (psycopg.Error, UnicodeError) as error:
        reason = one_line(str(error).strip().encode(errors="surrogateescape"))
        raise Misuse(f"bad argument #2 to 'new' ({reason})") from None
    shown = " ".join(
        f"{key}={given[key]}" for key in ("service", "dbname", "host", "port") if given.get(key)
    )
    given.setdefault("connect_timeout", int(LIMIT))
    given.setdefault("fallback_application_name", "cm4all-spawn-reaper")
    return conninfos.make_conninfo("", **given), f"PostgreSQL {shown}".strip()


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


async def _execute(link: psycopg.AsyncConnection[Any], query: _Query) -> PGresult | None:
    cursor = psycopg.AsyncRawCursor(link)
    await cursor.execute(query.sql, query.parameters or None)
    while cursor.nextset():
        pass
    return cursor.pgresult


def _failure_of(error: BaseException | None) -> Failure | None:
    if error is None:
        return None
    if isinstance(error, psycopg.Error):
        return Failure(_message(error))
    _log.error("a mistake of ours", exc_info=error)
    return Failure("internal error; the log has its traceback")


def _message(error: psycopg.Error) -> str:
    """Return what the server said, in one line."""
    parts = [error.diag.message_primary or one_line(str(error).encode()), error.diag.message_detail]
    return one_line(": ".join(part for part in parts if part).encode())
