"""What a run of the tests has for itself, so that nothing outlives it, however it ends.

All processes that it starts are in cgroups with its pid in their names: those that tests make, and
one for all others. All temporary files are in one directory. The guardian removes that; it is
outside of it all.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from spawn_common import linux

_GUARDIAN = Path(__file__).with_name("guardian.py")


def begin() -> None:
    """Let this process be the first of a run of the tests, before it starts anything."""
    have_default_signals()
    pid = os.getpid()
    # Its path is short: addresses of Unix sockets have to be.
    directory = Path(tempfile.gettempdir()) / f"spawn-{pid}-{os.urandom(2).hex()}"
    root = _cgroup_root()
    _start_guardian(directory, root)
    directory.mkdir()
    directory.chmod(0o1777)
    tempfile.tempdir = os.environ["TMPDIR"] = str(directory)
    if root is not None:
        with suppress(OSError):  # whoever needs cgroups will tell; others can do without
            _enter(root / f"cm4all-spawn-test-{pid}-")


def left() -> list[str]:
    """Return what tests have left that are over; the guardian does not tell."""
    root, own = _cgroup_root(), f"cm4all-spawn-test-{os.getpid()}-"
    if root is None or not (root / own).exists():
        return []
    pids = (root / own / "cgroup.procs").read_text().split()
    return [
        *(one.name for one in root.glob(f"{own}?*")),
        *(_command(pid) for pid in pids if int(pid) != os.getpid()),
    ]


def _enter(cgroup: Path) -> None:
    cgroup.mkdir()
    (cgroup / "cgroup.procs").write_text("0")


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return f"process {pid}"


def have_default_signals() -> None:
    """Let signals do to what we start what they do by default, whatever our parent has set.

    A shell without job control, for example, lets its background processes ignore SIGINT. What is
    ignored stays without effect on us: nohup(1) has its reasons.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Those that Python itself ignores, subprocess sets back.
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _do_nothing)  # which a program that is executed does not inherit


def _do_nothing(*_: object) -> None:
    pass


def _cgroup_root() -> Path | None:
    """Return where cgroups can be made, if that is possible."""
    mount = linux.find_cgroup2_mount()
    if mount is None or os.geteuid() != 0:
        return None
    return Path(os.fsdecode(mount.path))


def _start_guardian(directory: Path, root: Path | None) -> None:
    pidfd = os.pidfd_open(os.getpid())
    os.set_inheritable(pidfd, True)
    arguments = [str(pidfd), str(os.getpid()), str(directory), str(root or "")]
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", str(_GUARDIAN), *arguments],
        os.environ,
        setsid=True,  # what the terminal sends is not for it
    )
    os.close(pidfd)
