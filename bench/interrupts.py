"""SIGINT, SIGTERM and SIGHUP as one exception, which never comes between a thing and its clean-up.

The first signal raises Interrupted; all that follow are ignored, so that whoever presses Ctrl-C
twice does not keep the clean-up from being finished.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """Somebody wants us to end; ``number`` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _State:
    """What the signal handler knows."""

    told = False
    held = 0
    pending: int | None = None


def install() -> None:
    """Let the signals raise Interrupted in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _handle)


@contextmanager
def held() -> Iterator[None]:
    """Put Interrupted off until the end of the context."""
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
        if _State.held == 0 and _State.pending is not None:
            number, _State.pending = _State.pending, None
            raise Interrupted(number)


def _handle(number: int, _frame: FrameType | None) -> None:
    if _State.told:
        return
    _State.told = True
    if _State.held:
        _State.pending = number
    else:
        raise Interrupted(number)
