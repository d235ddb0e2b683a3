"""A real PostgreSQL server that a test can stop, kill and start again.

It needs root, since it is somebody else's: PostgreSQL insists on that. It listens on a Unix socket
only and ends with the process that started it, however that ends. Its shared memory is in an IPC
namespace of its own, so that nothing is left of that either, be all its processes killed.
"""

from __future__ import annotations

import atexit
import functools
import os
import pwd
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Self

import psycopg

from tests.tools.harness import DEADLINE, wait_for

# The lines of postmaster.pid that are of interest, counted from 0.
_PID, _STATUS = 0, 7

_INITDB = [
    *("--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8"),
    *("--wal-segsize=1", "--no-sync"),  # small and quick
]
_SETTINGS = {
    "listen_addresses": "",
    "dynamic_shared_memory_type": "mmap",  # in the data directory, which is removed in the end
    "max_connections": "40",
    "shared_buffers": "16MB",
    "log_line_prefix": "%m [%p] %q%a ",
}


WAIT_FOR_LOCK = "SELECT pg_advisory_xact_lock(4711)"
"""A query that is in flight for as long as a test wants; see Postgresql.locked()."""


class Unavailable(Exception):
    """There is no PostgreSQL on this host."""


def programs() -> Path:
    """Return the directory of the newest server's programs."""
    found = list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise Unavailable("there is no PostgreSQL server (Debian: postgresql)")
    return max(found, key=lambda path: float(path.parts[-3])).parent


class Postgresql:
    """A server with a data directory of its own."""

    def __init__(self, directory: Path, **settings: str) -> None:
        """Make the server's directories in DIRECTORY, whose path must be short."""
        self.directory = directory
        self.log = directory / "log"
        self._data = directory / "data"
        self._settings = _SETTINGS | {"unix_socket_directories": str(directory)} | settings
        self._process: subprocess.Popen[bytes] | None = None
        self._alive = -1  # the end of a pipe whose other end each of its processes holds
        account = _account()
        os.chown(directory, account.pw_uid, account.pw_gid)
        directory.chmod(0o755)  # scripts connect without root's capabilities
        subprocess.run(["cp", "-a", "--reflink=auto", _template(), self._data], check=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def conninfo(self) -> str:
        """How to connect to it."""
        return f"host={self.directory} user=postgres dbname=postgres"

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement in a connection of its own; return its rows, if it has any."""
        with psycopg.connect(self.conninfo, autocommit=True, connect_timeout=10) as connection:
            # The tests' own statements; nothing in them comes from outside.
            cursor = connection.execute(sql.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        assert self._process is None, "it runs already"
        options = [f"--{name}={value}" for name, value in self._settings.items()]
        command = [str(programs() / "postgres"), "-D", str(self._data), *options]
        self._alive, inherited = os.pipe()
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    _isolated(*command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[inherited],
                    cwd=self.directory,
                )
        finally:
            os.close(inherited)
        wait_for("PostgreSQL is ready", self._ready)

    def stop(self) -> None:
        """Shut it down; connections are told and closed."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill its first process, whereupon the others end by themselves."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """End it, and leave nothing behind; its directory is for the caller to remove."""
        self._end(signal.SIGQUIT)

    @property
    def running(self) -> bool:
        """Whether it has been started and not stopped."""
        return self._process is not None

    def backends(self, application: str) -> list[int]:
        """Return the process ids of the connections of APPLICATION, in the order of their start."""
        rows = self.query(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s ORDER BY backend_start",
            [application],
        )
        return [pid for (pid,) in rows]

    def terminate(self, application: str) -> None:
        """End the connections of APPLICATION, as an administrator can, and wait until they have."""
        self.query(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE application_name = %s",
            [application],
        )

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """Keep WAIT_FOR_LOCK in flight, whoever sends it; yield a function that lets it go."""
        with psycopg.connect(self.conninfo, autocommit=True) as holder:
            holder.execute("SELECT pg_advisory_lock(4711)")
            yield holder.close

    def waiting_count(self) -> int:
        """Return how many connections wait for the lock."""
        sql = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        return len(self.query(sql))

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(DEADLINE)
            ready, _, _ = select.select([self._alive], [], [], DEADLINE)
            assert ready, "some process of PostgreSQL has not ended"
        finally:
            process.kill()
            process.wait()
            os.close(self._alive)

    def _ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"PostgreSQL did not start:\n{self.log.read_text()}")
        with suppress(OSError, IndexError):
            lines = self._lock_file()
            return int(lines[_PID]) == self._process.pid and lines[_STATUS].strip() == "ready"
        return False

    def _lock_file(self) -> list[str]:
        return (self._data / "postmaster.pid").read_text().splitlines()


def server_directory() -> TemporaryDirectory[str]:
    """Return a directory for a server: its path is short, since it gets a Unix socket."""
    return TemporaryDirectory(prefix="pg-")


@contextmanager
def running_server() -> Iterator[Postgresql]:
    """Start a server for tests."""
    with server_directory() as directory, Postgresql(Path(directory)) as server:
        yield server


def _account() -> pwd.struct_passwd:
    """Whom the server runs as: root may not."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _isolated(*command: str) -> list[str]:
    """Return a command that is that account's, and has an immediate shutdown when we die."""
    account = _account()
    return [
        *("unshare", "--ipc", "setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}"),
        *("--clear-groups", "--pdeathsig=QUIT", *command),
    ]


@functools.cache
def _template() -> Path:
    """Return a data directory to copy from, made once: that takes longer than a start."""
    account = _account()
    directory = Path(mkdtemp(prefix="pg-template-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.chown(directory, account.pw_uid, account.pw_gid)
    result = subprocess.run(
        _isolated(str(programs() / "initdb"), "-D", str(directory / "data"), *_INITDB),
        capture_output=True,
        text=True,
        cwd=directory,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return directory / "data"
