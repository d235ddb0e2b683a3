"""Removes what a run of the tests left behind, as soon as the run has ended, be it by SIGKILL.

A program of its own, whose arguments are: a pidfd of the run's first process, the pid of that, the
directory of its temporary files, and the cgroup v2 root or nothing. There it takes the cgroups that
have the pid in their names, with all processes in them; see session.py.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

KINDS = ("test", "machine")
SECONDS = 20.0


def main() -> None:
    """Run the program."""
    run, pid, directory, root = sys.argv[1:]
    if root:
        with suppress(OSError):  # be in no cgroup that another guardian may look after
            (Path(root) / "cgroup.procs").write_text("0")
    select.select([int(run)], [], [])
    if root:
        _remove_all(Path(root), pid)
    shutil.rmtree(directory, ignore_errors=True)


def _remove_all(root: Path, pid: str) -> None:
    end = time.monotonic() + SECONDS
    while left := [one for kind in KINDS for one in root.glob(f"cm4all-spawn-{kind}-{pid}-*")]:
        if time.monotonic() > end:
            print("the tests leave", *left, file=sys.stderr)
            return
        for cgroup in left:
            _remove(cgroup)
        time.sleep(0.01)


def _remove(cgroup: Path) -> None:
    """Kill what is in a cgroup or below, and remove what of it is empty now."""
    with suppress(OSError):
        (cgroup / "cgroup.kill").write_text("1")
    for directory, _, _ in os.walk(cgroup, topdown=False):
        with suppress(OSError):
            os.rmdir(directory)


if __name__ == "__main__":
    main()
