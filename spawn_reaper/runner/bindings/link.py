"""One link to a PostgreSQL server, driven by the event loop: queries and notifications.

psycopg makes the link; from then on libpq's functions for asynchronous use are called directly (the
chapter of that name in PostgreSQL's manual), which takes half the CPU time of psycopg's cursors.

Queries with parameters are sent in libpq's pipeline mode, each with a synchronisation point of its
own, so that each is a transaction of its own; then the server need not wait for us between them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Protocol

import psycopg
from psycopg.pq import ConnStatus, DiagnosticField, Escaping, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from spawn_reaper.report import one_line
from spawn_reaper.runner.bindings.address import BadAddress, HostName, resolve
from spawn_reaper.runner.bindings.calling import LIMIT, Failure

_CANCEL_LIMIT: Final = 5.0  # seconds for the server to end a query that was cancelled
_DEPTH: Final = 8  # queries under way: each that is when a link breaks has failed
_QUERY_CANCELED: Final = b"57014"  # PostgreSQL manual, appendix A
_COPY: Final = (ExecStatus.COPY_IN, ExecStatus.COPY_OUT, ExecStatus.COPY_BOTH)
_IN_TRANSACTION: Final = (TransactionStatus.INTRANS, TransactionStatus.INERROR)


class Cancelled(Failure):
    """The server has cancelled a query; perhaps not the one that was meant. It had no effect."""


class Owner(Protocol):
    """Who is told what happens on a link."""

    def performed(self, outcome: PGresult | Failure) -> None:
        """Take what came of the query that was sent first of those under way."""

    def may_send_again(self) -> None:
        """Take note that a request to cancel is through."""

    def notified(self, name: bytes) -> None:
        """Take note of a NOTIFY."""

    def lost(self, reason: str) -> None:
        """Take note that the link is closed; all queries that were under way have failed."""


async def connect(parameters: dict[str, Any], schema: bytes | None) -> psycopg.AsyncConnection[Any]:
    """Connect with PARAMETERS, those of libpq, and set the schema; psycopg.Error or OSError."""
    connection = await psycopg.AsyncConnection.connect(
        autocommit=True, **(parameters | await _addresses(parameters))
    )
    try:
        if schema is not None:
            quoted = bytes(Escaping(connection.pgconn).escape_literal(schema))
            async with asyncio.timeout(LIMIT):
                await connection.execute(b"SET SCHEMA " + quoted)
    except BaseException:
        connection.pgconn.finish()
        raise
    return connection


async def _addresses(parameters: dict[str, Any]) -> dict[str, Any]:
    """Look up the host, if it is a single name.

    psycopg would do it in threads that the daemon's end has to wait for.
    """
    host = parameters.get("host")
    if not host or "hostaddr" in parameters or host.startswith(("/", "@")) or "," in host:
        return {}
    try:
        found = await resolve(HostName(host.encode(), b"0"))
    except BadAddress as error:
        raise OSError(str(error)) from None
    names = [address.where[0] for address in found]
    return {"host": ",".join([host] * len(names)), "hostaddr": ",".join(names)}


class Link:
    """A link that is there; lost() of its owner is the last that it calls."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], owner: Owner) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._fd = connection.fileno()
        self._under_way = 0  # queries
        self._pipeline = False
        self._outcome: PGresult | None = None  # the first query's last result, or its first error
        self._cancel: asyncio.Task[None] | None = None
        self._cancel_limit: asyncio.TimerHandle | None = None
        self._suspects = 0  # queries that the request to cancel the first may have hit
        self._loop.add_reader(self._fd, self._readable)

    # For the owner

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction was begun and has not ended."""
        return self._pgconn.transaction_status in _IN_TRANSACTION

    def may_send(self, parameters: Sequence[bytes | None]) -> bool:
        """Whether a query may be sent; its owner is told when that may have changed."""
        if self._cancel is not None:
            return False  # it would be hit if the one that is meant ends by itself
        if self._under_way:
            return self._pipeline and bool(parameters) and self._under_way < _DEPTH
        return self._is_alive()

    def send(self, sql: bytes, parameters: Sequence[bytes | None]) -> None:
        """Send a query; without parameters, SQL may be several, and no other be under way."""
        self._under_way += 1
        try:
            self._set_pipeline(on=bool(parameters))
            if parameters:
                self._pgconn.send_query_params(sql, parameters)
                self._pgconn.pipeline_sync()
            else:
                self._pgconn.send_query(sql)
            self._flush()
        except psycopg.Error as error:
            self._lose(message_of(error))

    def _is_alive(self) -> bool:
        """Find out whether the link is still there, before a query is risked on it."""
        # Before the end there may be a message, and what follows that is seen by the second look.
        self._readable()
        if self._fd >= 0:
            self._readable()
        return self._fd >= 0

    def _set_pipeline(self, *, on: bool) -> None:
        if on != self._pipeline:
            self._pipeline = on
            if on:
                self._pgconn.enter_pipeline_mode()
            else:
                self._pgconn.exit_pipeline_mode()

    def cancel(self) -> None:
        """Let the server end the first query; without an answer to that, the link is lost.

        If that query ends by itself meanwhile, it may be one of the next that the server cancels.
        """
        if self._under_way and self._cancel is None:
            self._suspects = self._under_way
            self._cancel = self._loop.create_task(self._request_cancel())
            self._cancel.add_done_callback(self._cancel_requested)
            self._cancel_limit = self._loop.call_later(
                _CANCEL_LIMIT, self._lose, "the server does not end a query"
            )

    def close(self) -> None:
        """Close the link and tell nobody."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._fd = -1
        self._pgconn.finish()
        if self._cancel is not None:
            self._cancel.cancel()
        if self._cancel_limit is not None:
            self._cancel_limit.cancel()

    # From the event loop

    def _flush(self) -> None:
        """Send what libpq has in its buffer; the rest when there is room."""
        if self._pgconn.flush():
            self._loop.add_writer(self._fd, self._writable)
        else:
            self._loop.remove_writer(self._fd)

    def _writable(self) -> None:
        try:
            self._flush()
        except psycopg.Error as error:
            self._lose(message_of(error))

    def _readable(self) -> None:
        try:
            self._pgconn.consume_input()
            while (notification := self._pgconn.notifies()) is not None:
                self._owner.notified(notification.relname)
            self._take_results()
        except psycopg.Error as error:
            self._lose(message_of(error))

    def _take_results(self) -> None:
        """Take what there is of the queries' results."""
        while self._under_way and self._fd >= 0 and not self._pgconn.is_busy():
            result = self._pgconn.get_result()
            if result is None:  # in a pipeline, what ends a query follows
                if not self._pipeline:
                    self._end_query()
                elif self._outcome is None:
                    return
            elif result.status == ExecStatus.PIPELINE_SYNC:
                self._end_query()
            elif result.status in _COPY:
                self._lose("COPY cannot be used by scripts")
            elif self._outcome is None or self._outcome.status != ExecStatus.FATAL_ERROR:
                self._outcome = result

    async def _request_cancel(self) -> None:
        await self._connection.cancel_safe(timeout=_CANCEL_LIMIT)

    def _cancel_requested(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._fd < 0:
            return
        task.exception()  # it has failed: the limit will show whether that matters
        self._cancel = None
        self._owner.may_send_again()

    def _end_query(self) -> None:
        """Hand over what came of the first query."""
        outcome, self._outcome = self._outcome, None
        if self._pgconn.status != ConnStatus.OK or outcome is None:
            self._lose(_text_of(outcome) if outcome else "the server has left")
            return
        if self._cancel_limit is not None:
            self._cancel_limit.cancel()
            self._cancel_limit = None
        self._under_way -= 1
        suspect, self._suspects = self._suspects > 0, max(0, self._suspects - 1)
        if outcome.status not in (ExecStatus.FATAL_ERROR, ExecStatus.BAD_RESPONSE):
            self._owner.performed(outcome)
        elif suspect and outcome.error_field(DiagnosticField.SQLSTATE) == _QUERY_CANCELED:
            self._owner.performed(Cancelled(_text_of(outcome)))
        else:
            self._owner.performed(Failure(_text_of(outcome)))

    def _lose(self, reason: str) -> None:
        self.close()
        self._owner.lost(reason)


def message_of(error: BaseException) -> str:
    """Return the message of an exception, in one line."""
    message = " ".join(str(error).split())  # libpq's have several
    return one_line(message.encode(errors="surrogateescape"))


def _text_of(result: PGresult) -> str:
    """Return what the server said, in one line."""
    fields = (DiagnosticField.MESSAGE_PRIMARY, DiagnosticField.MESSAGE_DETAIL)
    parts = [part for field in fields if (part := result.error_field(field))]
    return one_line(b": ".join(parts) or result.error_message.strip())
