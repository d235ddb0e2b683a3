"""Asking a running daemon to reload, and learning what came of it: a signal has no answer.

A service manager that runs this as its command for reloading can say that it failed. The socket is
in the directory that it makes for the daemon; without one there is only the signal.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from spawn_common import linux
from spawn_common.accepting import accept
from spawn_common.command import Unusable, problem

_NAME: Final = "reload"
_DIRECTORY: Final = "/run/cm4all-spawn-reaper"
_END: Final = b"\0"  # of an answer; without it the daemon has ended before
_LONGEST: Final = 65536  # bytes


def _path() -> Path:
    return Path(os.environ.get("RUNTIME_DIRECTORY", _DIRECTORY).partition(":")[0], _NAME)


class ReloadSocket:
    """Where root, or who has the daemon's user, can ask for a reload."""

    def __init__(self, reload: Callable[[Callable[[str], None]], None]) -> None:
        """RELOAD is called for each who asks, with what takes the answer."""
        self._reload = reload
        self._trusted = {0, os.geteuid()}
        self._loop = asyncio.get_running_loop()
        self._path = _path()
        self._socket: socket.socket | None = None
        if "RUNTIME_DIRECTORY" in os.environ:
            with problem(str(self._path)):
                self._open()

    def _open(self) -> None:
        self._path.unlink(missing_ok=True)  # of a daemon that was killed
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(str(self._path))
        listener.listen()
        self._loop.add_reader(listener, self._accept, listener)
        self._socket = listener

    def close(self) -> None:
        """Answer nobody any more."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._path.unlink(missing_ok=True)

    def _accept(self, listener: socket.socket) -> None:
        asking = accept(listener, self._accept)
        if asking is None:
            return
        if linux.peer_credentials(asking)[1] not in self._trusted:
            asking.close()
            return
        self._reload(lambda text: _answer(asking, text))


def _answer(asking: socket.socket, text: str) -> None:
    with asking, suppress(OSError):  # who asked may have left
        asking.setblocking(False)
        asking.send(text.encode(errors="replace")[: _LONGEST - 1] + _END, socket.MSG_NOSIGNAL)


def ask() -> None:
    """Let the running daemon reload; Unusable says why that was not possible, or what is wrong."""
    path = _path()
    with problem(str(path)), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as plain:
        plain.connect(str(path))
        answer = plain.recv(_LONGEST)
    if not answer.endswith(_END):
        raise Unusable("the daemon has ended")
    if text := answer.removesuffix(_END).decode(errors="replace"):
        raise Unusable(*text.splitlines())
