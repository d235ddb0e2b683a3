"""Gives each run of the tests an end."""

from __future__ import annotations

import faulthandler

_SECONDS = 60


def pytest_unconfigure() -> None:
    """Do not wait for ever for threads that a test has left: no test fails for that any more."""
    faulthandler.dump_traceback_later(_SECONDS, exit=True, file=2)
