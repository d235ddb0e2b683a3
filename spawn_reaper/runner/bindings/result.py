"""What a query returned, row by row."""

from __future__ import annotations

from typing import Any

from psycopg.pq.abc import PGresult

from spawn_reaper.runner.bindings.calling import Calling, Misuse, exposed


class Result:
    """Rows, which are fetched from the first to the last."""

    def __init__(self, result: PGresult, calling: Calling) -> None:
        self._calling = calling
        self._result: PGresult | None = result
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
        keys = self._keys(result) if mode == b"a" else range(1, result.nfields + 1)
        values = (result.get_value(row, column) for column in range(result.nfields))
        return self._calling.filled(table, zip(keys, values, strict=True))

    def _keys(self, result: PGresult) -> list[Any]:
        if self._names is None:
            self._names = [result.fname(column) for column in range(result.nfields)]
        return self._names

    @exposed()
    def close(self) -> None:
        """Free the rows; may be called again."""
        self._result = None
