"""Running a command inside namespaces, and attending it to its end.

The command is a child: it can be in a PID namespace, and the lease stays with us.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NoReturn

from spawn_accessory.protocol import Namespace
from spawn_client.accessory import Namespaces
from spawn_common import linux

CANNOT: Final = 125  # as env(1) and timeout(1) have them
_NOT_EXECUTABLE: Final = 126
_NOT_FOUND: Final = 127
_KILLED: Final = 128

_ATTENDED: Final = (
    signal.SIGCHLD,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
)

# <linux/sockios.h>, <net/if.h>
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1
_IFREQ: Final = struct.Struct("@16sh22x")

Ids = tuple[int | None, int | None]
"""Which user and group to become; None to stay."""


def run(namespaces: Namespaces, ids: Ids, command: Sequence[str]) -> int:
    """Run COMMAND in NAMESPACES, as IDS if there is a user namespace; return its exit status.

    It is 128 and the number of the signal if one killed it. OSError if it cannot be started.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would never come
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ATTENDED)
    if namespaces.pid is not None:
        namespaces.enter("pid")
    try:
        pid = os.fork()
    except OSError as error:
        if error.errno == errno.ENOMEM and namespaces.pid is not None:
            raise OSError(error.errno, "the PID namespace has ended, or memory is short") from None
        raise
    if pid == 0:
        _become(namespaces, ids, command, mask)
    return _attend(pid)


def _attend(pid: int) -> int:
    """Wait for the end of the child, passing on what signals we get; return its exit status."""
    while True:
        came = signal.sigwaitinfo(_ATTENDED)
        if came.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else _KILLED - code
        elif came.si_code <= 0:  # from a process; what the terminal sends, the child gets as well
            with suppress(OSError):  # it may be another user's by now
                os.kill(pid, came.si_signo)


# In the child


def _become(
    namespaces: Namespaces, ids: Ids, command: Sequence[str], mask: set[int | signal.Signals]
) -> NoReturn:
    """Replace this process by the command."""
    try:
        # In the namespaces we are seen, and are the host's root until we are somebody else: those
        # who are root in there must not get hold of us. Executing the command ends that.
        linux.forbid_tracing()
        _enter(namespaces, ids)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python has ignored them
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _execute(command)
    except OSError as error:
        _end(CANNOT, describe(error))
    except BaseException:
        traceback.print_exc()
    os._exit(CANNOT)


def _execute(command: Sequence[str]) -> NoReturn:
    try:
        os.execvp(command[0], list(command))  # noqa: S606
    except (FileNotFoundError, NotADirectoryError) as error:
        _end(_NOT_FOUND, f"{command[0]}: {error.strerror}")
    except OSError as error:
        _end(_NOT_EXECUTABLE, f"{command[0]}: {error.strerror}")


def _enter(namespaces: Namespaces, ids: Ids) -> None:
    directory = None
    with suppress(OSError):  # it was deleted
        directory = os.getcwd()
    namespaces.enter("ipc", "uts", "net", "cgroup", "time", "mount")
    if namespaces.mount is not None and directory is not None:
        with suppress(OSError):  # there is none of that name: stay at the root
            os.chdir(directory)
    if namespaces.pid is not None:
        _mount_own_proc()
    if namespaces.net is not None:
        _bring_up_loopback()
    if namespaces.user is not None:
        namespaces.enter("user")
        _switch_user(*ids)


def _mount_own_proc() -> None:
    """Give this process a mount namespace of its own, whose /proc shows its PID namespace.

    What others mount or unmount from now on is seen here as well, but not the other way round.
    """
    linux.unshare(Namespace.MOUNT)
    linux.mount(b"none", b"/", None, linux.MS_REC | linux.MS_SLAVE)
    linux.mount(b"proc", b"/proc", b"proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket, suppress(PermissionError):
        request = _IFREQ.pack(b"lo", 0)
        name, flags = _IFREQ.unpack(fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))
        if not flags & _IFF_UP:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(name, flags | _IFF_UP))


def _switch_user(uid: int | None, gid: int | None) -> None:
    with suppress(PermissionError):  # without a map of group ids they stay
        os.setgroups([])
    if gid is not None:
        os.setresgid(gid, gid, gid)
    if uid is not None:
        os.setresuid(uid, uid, uid)


def _end(status: int, problem: str) -> NoReturn:
    with suppress(OSError):
        print(f"cm4all-spawn-client: {problem}", file=sys.stderr, flush=True)
    os._exit(status)


def describe(error: OSError) -> str:
    """Return what is wrong in one line."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return reason
    return f"{os.fsdecode(error.filename)}: {reason}"
