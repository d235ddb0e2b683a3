"""A daemon without a service manager: in the background, locked, as another user, with a log file.

Does what its options ask for, in this order: who started the daemon learns on the terminal why it
did not start, and root's powers are there for as long as files have to be made.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, NoReturn

from spawn_common.command import Unusable, complain, problem
from spawn_common.pidfile import AlreadyLocked, PidFile
from spawn_common.privileges import Account, become, find_account
from spawn_common.signals import Signals

_log = logging.getLogger(__name__)

_UMASK: Final = 0o022
_OUTPUT: Final = (1, 2)
_NOWHERE: Final = Path(os.devnull)
# No link, which could lead elsewhere with root's powers; and no pipe that nobody reads.
_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK
# Between a service manager and whoever starts a daemon that goes into the background.
OF_OTHERS: Final = (
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"),
    *("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"),
)


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

    def __init__(self, signals: Signals, log: _LogFile | None) -> None:
        self.signals = signals
        self._log = log
        self._waiting: int | None = None  # a pipe to who waits in the foreground
        self._terminal: int | None = None  # standard error as it was
        self.reopened: Callable[[], None] = lambda: None
        """To be called when output goes elsewhere: who has inherited ours should know."""

    def started(self) -> None:
        """Let go of the terminal, and of who waits there; Unusable if nobody waits any more."""
        if self._waiting is not None:
            try:
                os.write(self._waiting, b"\0")
            except OSError:  # to him it did not start
                raise Unusable("whoever started it did not wait until it was ready") from None
            if self._log is None:
                _redirect(_NOWHERE, os.O_WRONLY)
                self.reopened()
        for fd in (self._waiting, self._terminal):
            if fd is not None:
                os.close(fd)
        self._waiting = self._terminal = None

    def reopen_log(self) -> None:
        """Open the log file again: the one that was open may have got another name."""
        if self._log is not None:
            self._log.reopen()
            self.reopened()

    def keep_terminal(self) -> None:
        """Be able to tell() there in spite of a log file."""
        if self._log is not None:
            self._terminal = os.dup(2)

    def tell(self, program: str, problems: Iterable[str]) -> None:
        """Tell who started the daemon why it does not run: the log file has it, too."""
        if self._terminal is not None:
            with suppress(OSError), open(self._terminal, "w", closefd=False) as terminal:
                complain(program, problems, terminal)

    def detach(self, keep: list[int]) -> None:
        """Leave the terminal and its session; the process that was started waits for started()."""
        from daemon import DaemonContext

        reader, self._waiting = os.pipe()
        # What we hold is the last child's: no signal must make one of us others give it back.
        with self.signals.held():
            with problem("cannot go into the background"):
                child = os.fork()
            if child:
                os.close(self._waiting)
                self._end_with(reader)
            for name in OF_OTHERS:
                os.environ.pop(name, None)
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

    def _end_with(self, reader: int) -> NoReturn:
        """End as soon as the daemon is ready or has ended, or when we are told to."""
        with suppress(SystemExit):
            self.signals.release()
            if os.read(reader, 1):
                os._exit(0)
        os._exit(1)


@contextmanager
def standing_alone(program: str, arguments: argparse.Namespace) -> Iterator[Standing]:
    """Do what the options ask for; Unusable if that is impossible."""
    signals = Signals()
    account = _account(arguments)
    if arguments.detach:  # the working directory will be another
        for name, value in vars(arguments).items():
            if isinstance(value, Path):
                setattr(arguments, name, value.absolute())
    with ExitStack() as exits:
        pid_file: PidFile | None = None
        if arguments.pid_file:
            with signals.held():
                pid_file = exits.enter_context(_lock(arguments.pid_file))
        log = _LogFile(arguments.log_file, account) if arguments.log_file else None
        # Who waits for it is released when the process has ended: then he has been told why.
        standing = Standing(signals, log)
        standing.keep_terminal()
        if log is not None:
            log.open()
        try:
            if arguments.detach:
                standing.detach([pid_file.fileno()] if pid_file else [])
            if pid_file is not None:
                with problem(str(arguments.pid_file)):  # on a full disk, say
                    pid_file.write()
            if account is not None:
                _become(account, arguments)
            yield standing
        except Unusable as error:
            standing.tell(program, error.problems)
            raise
        except Exception as error:  # a mistake of ours, whose traceback is logged
            standing.tell(program, [f"{type(error).__name__}: {error}"])
            raise


def refuse_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a message about wrong usage if there is one of these options: nothing will run."""
    for name in ("detach", "pid_file", "user", "group", "log_file"):
        if getattr(arguments, name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')} is for running the daemon only")


def _account(arguments: argparse.Namespace) -> Account | None:
    try:
        return find_account(arguments.user, arguments.group)
    except LookupError as error:
        raise Unusable(*error.args) from None


def _become(account: Account, arguments: argparse.Namespace) -> None:
    who = f"user {arguments.user}" if arguments.user else f"a member of {arguments.group}"
    with problem(f"cannot become {who}"):
        become(account)


def _lock(path: Path) -> PidFile:
    try:
        with problem(str(path)):
            return PidFile(path)
    except AlreadyLocked as error:
        raise Unusable(str(error)) from None


class _LogFile:
    """Where output goes; made for the user who has to open it again later."""

    def __init__(self, path: Path, account: Account | None) -> None:
        self._path = path
        self._account = account

    def open(self) -> None:
        """Let output go to the file, or raise Unusable."""
        with problem(str(self._path)):
            self._open()

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
            uid, gid = self._account.uid, self._account.gid
            os.fchown(2, -1 if uid is None else uid, -1 if gid is None else gid)


def _redirect(path: Path, flags: int) -> None:
    """Let standard output and standard error go to the file at PATH."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o640)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) and path != _NOWHERE:
            raise OSError(errno.EINVAL, "not a regular file")
        for output in _OUTPUT:
            os.dup2(fd, output)
    finally:
        os.close(fd)
