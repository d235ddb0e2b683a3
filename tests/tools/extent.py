"""How much a test does: little in ``make test``, more in ``make test-long``."""

from __future__ import annotations

import os


def extent(little: int, much: int) -> int:
    """Return MUCH where there is time for it."""
    return much if os.environ.get("LONG") == "1" else little
