"""What somebody else does between two system calls of the reaper's."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from typing import Final
from unittest.mock import patch

from spawn_common.claims import Claims
from spawn_reaper import reaper
from spawn_reaper.accounts import Accounts
from spawn_reaper.release import Release
from spawn_reaper.scopes import ScopeFinder
from spawn_reaper.usage import local_counters, read_file
from tests.tools.harness import Cgroup, Host, wait_for

EVENTS: Final = b"cgroup.events"
GRACE: Final = 0.02


class Releases(list[bytes]):
    """Hooks that note the paths."""

    def full(self) -> bool:
        """Never."""
        return False

    def hand_over(self, releases: list[Release], begun: Callable[[], None]) -> None:
        """Note them, and keep nobody waiting."""
        self.extend(os.path.basename(release.path) for release in releases)
        begun()

    def fall_behind(self) -> None:
        """Nobody waits."""


def in_process(host: Host, scope: Cgroup, releases: Releases) -> reaper.Reaper:
    """Return a reaper of SCOPE that lives in this process."""
    root = os.fsencode(host.root)
    return reaper.Reaper(
        ScopeFinder(root, [os.fsencode(host.path_of(scope))]),
        Accounts(local_counters(frozenset(), pids_events_local=False), pressure=False),
        Claims(f"test-{scope.directory}"),
        grace=GRACE,
        unclaimed=60.0,
        log_lines=False,
        hooks=releases,
    )


async def until_gone(cgroup: Cgroup) -> None:
    """Wait until the reaper has deleted a cgroup."""
    async with asyncio.timeout(20):
        while cgroup.exists():
            await asyncio.sleep(0.01)


def test_who_enters_directly_after_the_look_is_not_taken_for_gone(
    host: Host, scope: Cgroup
) -> None:
    """The numbers show use already, but by a process that is there."""
    job: list[subprocess.Popen[bytes]] = []
    cgroup = scope.make("job")

    def enter_behind(fd: int, name: bytes) -> bytes:
        data = read_file(fd, name)
        if name == EVENTS and not job and os.path.samestat(os.fstat(fd), cgroup.directory.stat()):
            job.append(cgroup.start("while :; do :; done"))
            wait_for("it shows use", lambda: cgroup.cpu_seconds() > 0.001)
        return data

    async def play() -> list[bytes]:
        releases = Releases()
        with patch.object(reaper, "read_file", enter_behind):
            daemon = in_process(host, scope, releases)
            daemon.start()
            while not job:
                await asyncio.sleep(GRACE)
            early = list(releases)  # the look is over: nothing else has run since
            job[0].kill()
            job[0].wait()
            await until_gone(cgroup)
            daemon.stop()
        assert early == []
        return releases

    assert asyncio.run(play()) == [b"job"]


class Holding(Releases):
    """Hooks that keep everybody waiting for as long as they may."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[Callable[[], None]] = []

    def hand_over(self, releases: list[Release], begun: Callable[[], None]) -> None:
        """Note them, and let the directories be kept."""
        super().hand_over(releases, lambda: None)
        self._waiting.append(begun)

    def fall_behind(self) -> None:
        """Let them go."""
        waiting, self._waiting = self._waiting, []
        for begun in waiting:
            begun()


def test_an_event_between_record_and_deletion_is_no_second_release(
    host: Host, scope: Cgroup
) -> None:
    cgroup = scope.make("job")

    async def play() -> list[bytes]:
        releases = Holding()
        daemon = in_process(host, scope, releases)
        daemon.start()
        cgroup.run()
        async with asyncio.timeout(20):
            while not releases:
                await asyncio.sleep(GRACE / 10)
        for frozen in "10":
            (cgroup.directory / "cgroup.freeze").write_text(frozen)
        await until_gone(cgroup)
        daemon.stop()
        return releases

    assert asyncio.run(play()) == [b"job"]
