"""The PostgreSQL server into which the daemon and a bare loop insert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from bench.daemon import Reaper, wait_for_progress, wait_until
from bench.interrupts import held
from bench.site import BENCH, Site
from bench.unusable import Unusable
from tests.tools.postgresql import Postgresql, Unavailable, server_directory

SCRIPT: Final = BENCH / "insert.lua"

IMPLEMENTATION: Final = psycopg.pq.__impl__
"""Which of its implementations psycopg uses: "python", "c", or "binary", which is "c" ready-made.

The bare loop and the daemon run under the same interpreter, hence with the same one.
"""

# When a row was inserted, the server writes down itself: to ask it meanwhile would disturb it.
_TABLE: Final = """
    CREATE TABLE release (
        id text, path text, account text, cpu_total double precision, memory_peak bigint,
        inserted timestamptz NOT NULL DEFAULT clock_timestamp()
    )"""
_INSERT: Final = (  # the same statement as in insert.lua
    b"INSERT INTO release (id, path, account, cpu_total, memory_peak) VALUES (%s, %s, %s, %s, %s)"
)
_APPLICATION: Final = "cm4all-spawn-reaper"
_COUNT: Final = "SELECT count(*), count(DISTINCT id), count(DISTINCT path) FROM release"
_TIMES: Final = (
    "SELECT count(*), extract(epoch FROM max(inserted) - min(inserted))::float8 "
    "FROM release WHERE inserted >= to_timestamp(%s)"
)

# Ids and paths as long as real ones.
_ID: Final = "0fbd0cf1-96f4-4de6-a3fb-0d5a2b1f2cd8-{0}-{0:014}"
_PATH: Final = "/spawn-bench-12345/scope/job-{0}"


@dataclass(frozen=True)
class Rows:
    """What is in the table."""

    rows: int
    ids: int
    paths: int

    def missing(self, count: int) -> int:
        """How many of COUNT releases have no row."""
        return max(0, count - min(self.ids, self.paths))

    @property
    def surplus(self) -> int:
        """How many rows there are of releases that have another."""
        return self.rows - min(self.ids, self.paths)


class Database:
    """A server and its table."""

    def __init__(self, server: Postgresql, records: Path) -> None:
        self.server = server
        self.records = records
        self.environment: Mapping[str, str] = {
            "BENCH_DATABASE": server.conninfo,
            "BENCH_RECORDS": str(records),
        }
        """For a reaper with insert.lua."""
        server.query(_TABLE)

    def clear(self) -> None:
        """Make the table empty, and leave the server nothing to do later."""
        self.server.query("TRUNCATE release")
        self.server.query("CHECKPOINT")

    def count(self) -> Rows:
        """Return what is in the table."""
        ((rows, ids, paths),) = self.server.query(_COUNT)
        return Rows(rows, ids, paths)

    def rate(self, since: float = 0.0) -> float:
        """Return how many rows per second came, from the first SINCE a time (epoch) to the last."""
        ((rows, seconds),) = self.server.query(_TIMES, [since])
        return (rows - 1) / seconds if rows > 1 and seconds else 0.0

    def insert(self, count: int) -> None:
        """Insert rows as fast as psycopg can without anything else to do."""
        with psycopg.connect(self.server.conninfo, autocommit=True) as connection:
            for i in range(count):
                values = (_ID.format(i), _PATH.format(i), None, 0.000123, None)
                connection.execute(_INSERT, values)


@contextmanager
def make_database(site: Site) -> Iterator[Database]:
    """Start a server, and remove it at the end."""
    try:
        with ExitStack() as stack:
            with held():
                directory = Path(stack.enter_context(server_directory()))
                server = Postgresql(directory)
                stack.callback(_close, server)
                server.start()
            yield Database(server, site.folder / "records")
    except Unavailable:
        raise Unusable("PostgreSQL's server is not installed (Debian: postgresql)") from None
    except (AssertionError, psycopg.Error) as error:
        raise Unusable(f"PostgreSQL: {str(error).strip().splitlines()[-1]}") from None


def wait_for_connection(reaper: Reaper, database: Database) -> None:
    """Wait until the script's connection is there."""
    wait_until(reaper, "connected", lambda: bool(database.server.backends(_APPLICATION)))


def wait_for_rows(reaper: Reaper, database: Database, count: int) -> Rows:
    """Wait until COUNT rows are in the table and the reaper is at rest, or nothing changes."""
    wait_for_progress(reaper, lambda: database.count().rows, count)
    return database.count()


def _close(server: Postgresql) -> None:
    with held():
        server.close()
