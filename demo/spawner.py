"""A process spawner as the reaper meets them: makes cgroups, runs jobs in them, deletes nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo.jobs import Job
from demo.sandbox import CgroupGone, Sandbox, enable_controllers, ended

_PARALLEL: Final = 6
_ATTEMPTS: Final = 100


@dataclass(slots=True)
class Made:
    """A cgroup that the spawner made. ``uses`` counts the processes placed in it or below it."""

    cgroup: str
    account: str | None
    what: str = "held the sessions"
    uses: int = 0


class Spawner:
    """Runs jobs, and remembers how often each cgroup was used; by inode, since names come back."""

    def __init__(self, place: Sandbox) -> None:
        self.made: dict[int, Made] = {}
        self.runs: dict[str | None, int] = {}  # jobs that were run, by account
        self.surprises: list[str] = []  # jobs that did not end as they should
        self._place = place
        self._limit = asyncio.Semaphore(_PARALLEL)

    async def run(self, jobs: Iterable[Job]) -> None:
        """Run all jobs, some of them at the same time, until the last one has ended."""
        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                tasks.create_task(self._run(job))

    async def _run(self, job: Job) -> None:
        async with self._limit:
            for _ in range(job.times):
                status = await ended(self._start(job))
                self.runs[job.account] = self.runs.get(job.account, 0) + 1
                if status != job.status:
                    self.surprises.append(f"{job.cgroup!a} ended with {status}")

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        """Start a job; anew if the reaper deletes its cgroup of the time before under our hands."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._try_to_start(job)
            except CgroupGone:
                pass
        return self._try_to_start(job)

    def _try_to_start(self, job: Job) -> subprocess.Popen[bytes]:
        try:
            directory, used = self._make(job)
        except FileNotFoundError as error:
            raise CgroupGone(f"{job.cgroup!a}: {error.strerror}") from error
        process = self._place.spawn(directory, job.command)
        for cgroup in used:
            cgroup.uses += 1
        return process

    def _make(self, job: Job) -> tuple[int, list[Made]]:
        """Make NAME, and SESSION in it, unless they are there; return the last one, open."""
        path = self._place.scope
        used: list[Made] = []
        for name in job.cgroup.split("/"):
            if used:
                enable_controllers(path)
            path /= name
            used.append(self._make_one(path, job))
        used[-1].what = job.what if job.times == 1 else f"{job.what}, {job.times} times in a row"
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), used

    def _make_one(self, path: Path, job: Job) -> Made:
        try:
            path.mkdir()
        except FileExistsError:
            return self.made[path.stat().st_ino]
        if job.account is not None and path.parent == self._place.scope:
            os.setxattr(path, "user.account", job.account.encode())
        cgroup = Made(str(path.relative_to(self._place.scope)), job.account)
        self.made[path.stat().st_ino] = cgroup
        return cgroup
