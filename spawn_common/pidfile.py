"""A file that says which process a daemon is, and that only one daemon can hold."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Self


class AlreadyLocked(Exception):
    """Another process holds the file; the text says which."""


class PidFile:
    """The lock is the kernel's, so that a daemon that was killed leaves none (flock(2)).

    It goes over to a process that we fork, for as long as that lives.
    """

    def __init__(self, path: Path) -> None:
        """Lock the file, or raise AlreadyLocked; OSError if that cannot be done."""
        self._path = path
        self._fd = self._open()
        while not self._is_there():  # who held it has removed it while we waited for nothing
            os.close(self._fd)
            self._fd = self._open()

    def fileno(self) -> int:
        """Return the descriptor that must stay open."""
        return self._fd

    def write(self) -> None:
        """Write down that it is this process."""
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the file; empty it if its directory is closed to the user that we have become."""
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
            if self._is_there():  # else it has become somebody else's
                self._path.unlink()
        os.close(self._fd)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._path, flags, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)  # or a second start would be told of who was killed before us
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            raise AlreadyLocked(
                f"{self._path}: process {pid or '(unknown)'} runs already"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self._path))
        except FileNotFoundError:
            return False
