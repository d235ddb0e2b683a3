"""A daemon without a service manager: in the background, locked, as another user, with a log file.

Does what its options ask for, in this order: who started the daemon learns on the terminal why it
did not start, and root's powers are there for as long as files have to be made.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from spawn_common.command import Unusable, complain
from spawn_common.pidfile import AlreadyLocked, PidFile
from spawn_common.privileges import Account, become, find_account

_log = logging.getLogger(__name__)

_UMASK: Final = 0o022
_OUTPUT: Final = (1, 2)
_NOWHERE: Final = Path(os.devnull)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a daemon that runs without a service manager."""
    group = parser.add_argument_group("without a service manager")
    group.add_argument(
        "--detach",
        action="store_true",
        help="go on in the background; the command ends with status 0 as soon as the daemon is "
        "ready, or with 1 if it did not start",
    )
    group.add_argument(
        "--pid-file",
        metavar="FILE",
        type=Path,
        help="write the process id there, and refuse to start while another daemon holds the file",
    )
    group.add_argument(
        "--user",
        metavar="NAME",
        help="become this user, with his groups and with only those capabilities that are needed",
    )
    group.add_argument(
        "--group", metavar="NAME", help="become a member of this group, not of the user's own"
    )
    group.add_argument(
        "--log-file",
        metavar="FILE",
        type=Path,
        help="append to this file what would go to standard output and standard error; SIGUSR1 "
        "opens it again",
    )


class Standing:
    """What was arranged for a daemon; without an option, nothing."""

    def __init__(self, log: _LogFile | None) -> None:
        self._log = log
        self._waiting: int | None = None  # a pipe to who waits in the foreground
        self._terminal: int | None = None  # standard error as it was

    def started(self) -> None:
        """Let go of the terminal, and of who waits there; Unusable if nobody waits any more."""
        if self._waiting is not None:
            try:
                os.write(self._waiting, b"\0")
            except OSError:  # to him it did not start
                raise Unusable("whoever started it did not wait until it was ready") from None
            if self._log is None:
                _redirect(_NOWHERE, os.O_WRONLY)
        for fd in (self._waiting, self._terminal):
            if fd is not None:
                os.close(fd)
        self._waiting = self._terminal = None

    def reopen_log(self) -> None:
        """Open the log file again: the one that was open may have got another name."""
        if self._log is not None:
            self._log.reopen()

    def keep_terminal(self) -> None:
        """Be able to tell() there in spite of a log file."""
        if self._log is not None:
            self._terminal = os.dup(2)

    def tell(self, program: str, problems: Iterable[str]) -> None:
        """Tell who started the daemon why it does not run: the log file has it, too."""
        if self._terminal is not None:
            with open(self._terminal, "w", closefd=False) as terminal:
                complain(program, problems, terminal)

    def detach(self, keep: list[int]) -> None:
        """Leave the terminal and its session; the process that was started waits for started()."""
        from daemon import DaemonContext

        reader, self._waiting = os.pipe()
        signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGINT,)
        )  # what we hold is the child's now
        if os.fork():
            os.close(self._waiting)
            with suppress(KeyboardInterrupt):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
                if os.read(reader, 1):
                    os._exit(0)
            os._exit(1)
        if self._terminal is not None:
            keep = [*keep, self._terminal]
        DaemonContext(
            detach_process=True,
            files_preserve=[*keep, self._waiting],
            stdout=sys.stdout,
            stderr=sys.stderr,
            umask=_UMASK,
            working_directory="/",
            prevent_core=False,
            signal_map={},
        ).open()


@contextmanager
def standing_alone(program: str, arguments: argparse.Namespace) -> Iterator[Standing]:
    """Do what the options ask for; Unusable if that is impossible."""
    # A signal may come before there is a handler, from who has read the pid file. Service unblocks.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1))
    account = _account(arguments)
    if arguments.detach:  # the working directory will be another
        for name, value in vars(arguments).items():
            if isinstance(value, Path):
                setattr(arguments, name, value.absolute())
    with ExitStack() as exits:
        pid_file = exits.enter_context(_lock(arguments.pid_file)) if arguments.pid_file else None
        log = _LogFile(arguments.log_file, account) if arguments.log_file else None
        # Who waits for it is released when the process has ended: then he has been told why.
        standing = Standing(log)
        standing.keep_terminal()
        if log is not None:
            log.open()
        try:
            if arguments.detach:
                standing.detach([pid_file.fileno()] if pid_file else [])
            if pid_file is not None:
                _write(pid_file, arguments.pid_file)
            if account is not None:
                _become(account, arguments)
            yield standing
        except Unusable as error:
            standing.tell(program, error.problems)
            raise


def _account(arguments: argparse.Namespace) -> Account | None:
    try:
        return find_account(arguments.user, arguments.group)
    except LookupError as error:
        raise Unusable(*error.args) from None


def _become(account: Account, arguments: argparse.Namespace) -> None:
    try:
        become(account)
    except OSError as error:
        who = f"user {arguments.user}" if arguments.user else f"a member of {arguments.group}"
        raise Unusable(f"cannot become {who}: {error.strerror}") from None


def _lock(path: Path) -> PidFile:
    try:
        return PidFile(path)
    except AlreadyLocked as error:
        raise Unusable(str(error)) from None
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None


def _write(pid_file: PidFile, path: Path) -> None:
    try:
        pid_file.write()
    except OSError as error:  # a full disk, say
        raise Unusable(f"{path}: {error.strerror}") from None


class _LogFile:
    """Where output goes; made for the user who has to open it again later."""

    def __init__(self, path: Path, account: Account | None) -> None:
        self._path = path
        self._account = account

    def open(self) -> None:
        """Let output go to the file, or raise Unusable."""
        try:
            self._open()
        except OSError as error:
            raise Unusable(f"{self._path}: {error.strerror}") from None

    def reopen(self) -> None:
        """Do so again; if that is impossible, output goes on to where it goes now."""
        try:
            self._open()
        except OSError as error:
            _log.error("cannot open the log file again: %s: %s", self._path, error.strerror)

    def _open(self) -> None:
        try:
            _redirect(self._path, _APPEND | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            _redirect(self._path, _APPEND)
            return
        if self._account is not None and os.geteuid() == 0:
            uid, gid, _ = self._account
            os.fchown(2, -1 if uid is None else uid, -1 if gid is None else gid)


_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY


def _redirect(path: Path, flags: int) -> None:
    """Let standard output and standard error go to the file at PATH."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o640)
    for output in _OUTPUT:
        os.dup2(fd, output)
    os.close(fd)
