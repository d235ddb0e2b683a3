"""The table "pg" of scripts: arrays, and connections, which are the business of database.py."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from spawn_reaper.runner.bindings.calling import Calling, Misuse, exposed
from spawn_reaper.runner.bindings.pg_text import NotAnArray, join_array, split_array, text_of

if TYPE_CHECKING:
    from spawn_reaper.runner.bindings.database import Connection


_CONNECTIONS_MAX: Final = 50  # a server allows 100 by default, and has other clients
_CONNECTIONS_FEW: Final = 8  # that many are no reason to look for some that nobody uses any more


class Pg:
    """The table "pg"."""

    def __init__(self, calling: Calling) -> None:
        self._calling = calling
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._collect_at = _CONNECTIONS_FEW
        calling.task_ended.append(self._task_ended)
        calling.exits.callback(self._close)

    def _close(self) -> None:
        for connection in list(self._connections):
            connection.close()

    def _is_owner(self, task: int) -> bool:
        return any(connection.owner == task for connection in self._connections)

    def _task_ended(self, task: int) -> None:
        for connection in self._connections:
            connection.task_ended(task)

    @exposed("string string?", returns="connection")
    def new(self, conninfo: bytes, schema: bytes | None = None) -> Connection:
        """Return a connection that connects by itself, again and again."""
        from spawn_reaper.runner.bindings import (
            database,  # psycopg is large, and few scripts need it
        )

        database.install(self._calling)
        self._make_room()
        connection = database.Connection(conninfo, schema, self._calling, self._is_owner)
        self._connections.add(connection)
        return connection

    def _make_room(self) -> None:
        """Close connections that the script has forgotten: to Lua they are small, to others not."""
        if self._count() >= self._collect_at:
            self._calling.collect_garbage()
            self._collect_at = max(_CONNECTIONS_FEW, min(_CONNECTIONS_MAX, 2 * self._count()))
        if (count := self._count()) >= _CONNECTIONS_MAX:
            raise Misuse(f"the script has {count} connections, no more are allowed")

    def _count(self) -> int:
        return sum(not connection.unused for connection in self._connections)

    @exposed("table")
    def encode_array(self, table: Any) -> bytes:
        """Return the text of a PostgreSQL array."""
        return join_array(self._elements(table))

    def _elements(self, table: Any) -> Iterator[bytes]:
        found = dict(table.items())
        for position in range(1, len(table) + 1):
            element = text_of(found.get(position))
            if element is None:
                raise Misuse(
                    f"bad element #{position} (string, number or boolean expected, "
                    f"got {self._calling.type_name(found.get(position))})"
                )
            yield element

    @exposed("string")
    def decode_array(self, text: bytes) -> Any:
        """Return the elements of a PostgreSQL array, as strings."""
        try:
            elements = list(split_array(text))
        except NotAnArray as error:
            raise Misuse(f"bad argument #2 to 'decode_array' (not an array: {error})") from None
        return self._calling.new_table(elements)


def install(calling: Calling) -> None:
    """Give scripts the table "pg"."""
    calling.add_module("pg", Pg(calling))
