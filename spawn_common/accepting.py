"""Accepting connections in an event loop, also without descriptors."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Final

_SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE: Final = 1.0  # seconds


def accept(listener: socket.socket, again: Callable[[socket.socket], None]) -> socket.socket | None:
    """Return a connection, None if there is none; AGAIN is the loop's reader of LISTENER.

    Who asks stays in the queue if we have no descriptor for him, and the loop would call us for
    that without end: so it calls us after a pause.
    """
    try:
        return listener.accept()[0]
    except OSError as error:
        if error.errno in _SCARCE:
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_PAUSE, _listen_again, listener, again)
    return None


def _listen_again(listener: socket.socket, again: Callable[[socket.socket], None]) -> None:
    if listener.fileno() >= 0:  # it was not closed meanwhile
        asyncio.get_running_loop().add_reader(listener, again, listener)
