"""Where benchmarks run: cgroups of their own, a temporary folder, the programs that they need."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.interrupts import held
from bench.processes import start
from bench.unusable import Unusable
from spawn_common import linux
from tests.tools.native import ROOT, build

BENCH: Final = ROOT / "bench"
SPAWNER_CGROUP: Final = "_"
_CONTROLLERS: Final = frozenset({"memory", "pids", "io"})  # those that the reaper reads
_PATIENCE: Final = 10.0  # seconds for a killed process to be gone


@dataclass(frozen=True)
class Site:
    """A directory in the cgroup hierarchy mounted at ``mount``, a folder for files, programs."""

    mount: Path
    cgroup: Path
    folder: Path
    spawner: Path
    floor: Path


@contextmanager
def make_site() -> Iterator[Site]:
    """Set up everything, and remove it at the end."""
    if os.geteuid() != 0:
        raise Unusable("must be run as root: it makes cgroups")
    mount = linux.find_cgroup2_mount()
    if mount is None:
        raise Unusable("no cgroup v2 hierarchy is mounted")
    root = Path(os.fsdecode(mount.path))
    name = f"spawn-bench-{os.getpid()}"
    try:
        spawner, floor = build(ROOT / "tests/tools/spawner.c"), build(BENCH / "floor.c")
    except RuntimeError as error:
        raise Unusable(str(error).replace("\n", " ").strip()) from None
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder, _directory(root / name) as base:
        yield Site(root, base, Path(folder), spawner, floor)


@contextmanager
def make_scope(site: Site) -> Iterator[Path]:
    """Make a scope that stays populated, as a real one does in which its spawner lives."""
    with _directory(site.cgroup / "scope") as scope, ExitStack() as stack:
        home = scope / SPAWNER_CGROUP
        home.mkdir()
        # It ends by itself with the pipe, should nobody be left to end it.
        holder = start(stack, ["cat"], stdin=subprocess.PIPE)
        (home / "cgroup.procs").write_text(str(holder.pid))
        yield scope


def population(scope: Path) -> int:
    """Return how many cgroups there are directly below a scope, the spawner's own left out."""
    return os.stat(scope).st_nlink - 3  # a directory has two links and one for each subdirectory


@contextmanager
def _directory(path: Path) -> Iterator[Path]:
    """Make a cgroup in which the controllers are enabled, if there are any."""
    try:
        path.mkdir()
    except OSError as error:
        raise Unusable(f"cannot create {path}: {error.strerror}") from None
    try:
        available = (path / "cgroup.controllers").read_text().split()
        for controller in sorted(_CONTROLLERS.intersection(available)):
            (path / "cgroup.subtree_control").write_text(f"+{controller}")
        yield path
    finally:
        with held():
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a cgroup with everything in it."""
    if _removed(path):
        return
    with suppress(FileNotFoundError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _remove(Path(entry.path))
    end = time.monotonic() + _PATIENCE
    while not _removed(path):
        if time.monotonic() > end:
            raise Unusable(f"{path}: cannot be removed, processes are left in it")
        _kill(path)
        time.sleep(0.01)


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True


def _kill(path: Path) -> None:
    """Kill the processes that are directly in a cgroup; it is ours, so they are, too."""
    with suppress(OSError):
        for pid in (path / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
