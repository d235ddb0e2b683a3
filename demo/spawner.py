"""A process spawner as the daemons meet them: makes cgroups, runs jobs in them, deletes nothing.

Namespaces that jobs share it gets from the accessory.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo.jobs import USER_MAP, Job
from demo.namespaces import KINDS, Where, start
from demo.sandbox import CgroupGone, Sandbox, enable_controllers, ended
from spawn_client.accessory import AsyncAccessory, Namespaces

_PARALLEL: Final = 6
_ATTEMPTS: Final = 100


@dataclass(slots=True)
class Made:
    """A cgroup that the spawner made. ``uses`` counts the processes placed in it or below it."""

    cgroup: str
    account: str | None
    what: str = "held the sessions"
    shared: str = ""
    uses: int = 0


class Spawner:
    """Runs jobs, and remembers how often each cgroup was used; by inode, since names come back."""

    def __init__(self, place: Sandbox, accessory: AsyncAccessory) -> None:
        self.made: dict[int, Made] = {}
        self.runs: dict[str | None, int] = {}  # jobs that were run, by account
        self.surprises: list[str] = []  # jobs that did not end as they should
        self.seen: list[tuple[Job, Where]] = []  # by jobs in shared namespaces
        self._place = place
        self._accessory = accessory
        self._ended: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._limit = asyncio.Semaphore(_PARALLEL)

    async def run(self, jobs: Iterable[Job]) -> None:
        """Run all jobs, some of them at the same time, until the last one has ended."""
        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                namespaces = await self._obtain(job)
                tasks.create_task(self._run(job, namespaces))

    async def _run(self, job: Job, namespaces: Namespaces) -> None:
        with namespaces:
            if job.after is not None:
                await self._ended[job.after].wait()
            await self._run_inside(job, namespaces)
        self._ended[job.cgroup].set()

    async def _obtain(self, job: Job) -> Namespaces:
        """Return what a job is to run in, with a lease: its NAME lives until the job has ended."""
        if job.shared is None:
            return Namespaces({})
        kinds = {kind: kind in job.shared.kinds for kind in KINDS if kind != "user"}
        user = (USER_MAP, USER_MAP) if "user" in job.shared.kinds else None
        return await self._accessory.namespaces(job.shared.name, user=user, **kinds)

    async def _run_inside(self, job: Job, namespaces: Namespaces) -> None:
        async with self._limit:
            for _ in range(job.times):
                status = await ended(self._start(job, namespaces))
                self.runs[job.account] = self.runs.get(job.account, 0) + 1
                if status != job.status:
                    self.surprises.append(f"{job.cgroup!a} ended with {status}")

    def _start(self, job: Job, namespaces: Namespaces) -> subprocess.Popen[bytes]:
        """Start a job; anew if the reaper deletes its cgroup of the time before under our hands."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._try_to_start(job, namespaces)
            except CgroupGone:
                pass
        return self._try_to_start(job, namespaces)

    def _try_to_start(self, job: Job, namespaces: Namespaces) -> subprocess.Popen[bytes]:
        try:
            directory, used = self._make(job)
        except FileNotFoundError as error:
            raise CgroupGone(f"{job.cgroup!a}: {error.strerror}") from error
        if job.shared is None:
            process = self._place.spawn(directory, job.command)
        else:
            process, where = start(
                namespaces, lambda enter: self._place.spawn(directory, job.command, enter=enter)
            )
            self.seen.append((job, where))
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
        used[-1].shared = str(job.shared or "")
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
