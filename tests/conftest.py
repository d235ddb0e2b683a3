"""Gives each run of the tests what it has for itself, and an end."""

from __future__ import annotations

import faulthandler
import time

import pytest

from tests.tools import session as run

_DYING_SECONDS = 5
_THREADS_SECONDS = 60


def pytest_sessionstart() -> None:
    """Begin before anything is collected: some modules try out what the kernel can do."""
    run.begin()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let the run fail if something is left of its tests, though it is about to be removed."""
    end = time.monotonic() + _DYING_SECONDS
    while (left := run.left()) and time.monotonic() < end:
        time.sleep(0.01)
    for one in left:
        session.config.get_terminal_writer().line(f"left: {one}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    """Do not wait for ever for threads that a test has left: no test fails for that any more."""
    faulthandler.dump_traceback_later(_THREADS_SECONDS, exit=True, file=2)
