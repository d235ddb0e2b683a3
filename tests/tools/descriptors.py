"""Whether what runs in the process of the tests closes what it opens.

There it is not alone: another thread may open or close something at any time, and what an earlier
test has left is closed when it is collected as garbage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.tools.harness import wait_for


@contextmanager
def nothing_stays_open() -> Iterator[None]:
    """Check that each descriptor that was opened meanwhile is closed, or soon will be."""
    before = _descriptors()
    yield
    wait_for("all is closed", lambda: _descriptors() <= before)


def _descriptors() -> set[tuple[str, str]]:
    """Return what is open: a number, which may have become another file's, and what that is."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # it was for listing them
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found
