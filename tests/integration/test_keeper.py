"""The daemon's side of the keeper, when the keeper dies or hangs at the worst moment."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from spawn_accessory import keeper as module
from spawn_accessory.keeper import Keeper
from spawn_accessory.protocol import Namespace
from spawn_accessory.records import Record
from spawn_accessory.watch import Watch
from tests.tools.harness import DEADLINE


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", struct.pack("@ll", 0, 500_000))
    monkeypatch.setattr(module, "_PAUSE", 0.05)


class Place:
    """A keeper in this process, and the process that it is about."""

    def __init__(self, watch: Watch) -> None:
        self.keeper = Keeper(f"@test-{os.urandom(6).hex()}", watch, lambda _: None)
        self._program = self.keeper._keeper

    def pids(self) -> list[int]:
        """Return the processes that are keepers and live."""
        found = []
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            state = Path(f"/proc/{pid}/stat").read_text()
            if "(spawn-keeper)" in state and ") Z " not in state:
                found.append(int(pid))
        return found

    def pid(self) -> int:
        """Return the process that is the keeper."""
        (pid,) = self.pids()
        return pid

    def end(self) -> None:
        """Kill the keeper, so that there is nothing of it."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def allow(self, possible: bool) -> None:
        """Say whether another keeper can be started."""
        self.keeper._keeper = self._program if possible else Path("/nonexistent")

    def hold(self, name: bytes = b"x") -> Record:
        """Have the keeper keep a namespace."""
        fd = os.open("/proc/self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
        return self.keeper.hold(Namespace.IPC, name, None, (fd,))

    def fill(self) -> None:
        """Have it keep more and more, until there is no room."""
        while True:
            self.hold()

    def held(self) -> dict[int, tuple[bytes, int]]:
        """Return what the keeper has: name and inode by slot."""
        assert self.keeper._socket is not None
        records, queue, _ = module._take_over(self.keeper._socket)
        queue.close()
        found = {slot: described(record) for slot, record in records.items()}
        for record in records.values():
            for fd in record.descriptors:
                os.close(fd)
        return found


def described(record: Record) -> tuple[bytes, int]:
    return record.name, os.fstat(record.descriptors[0]).st_ino


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    watch, loop = Watch(), asyncio.get_running_loop()
    made = Place(watch)
    loop.add_reader(watch, watch.run)
    try:
        yield made
    finally:
        loop.remove_reader(watch)
        last = made.pids()
        made.keeper.close()
        watch.close()
        for pid in last:
            os.kill(pid, signal.SIGCONT)
            os.waitpid(pid, 0)


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Let a test run in an event loop."""

    def run() -> None:
        asyncio.run(test())

    return run


async def until(what: str, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.01)


@in_loop
async def test_what_is_ordered_when_a_keeper_comes_back_is_made_once() -> None:
    async with place() as here:
        record = here.hold()
        here.allow(False)
        here.end()
        here.keeper.drop(record)  # cannot be told
        here.allow(True)
        ordered = [here.keeper.order(kind, b"p") for kind in (Namespace.PID, Namespace.MOUNT)]
        made = [here.keeper.collect(one) for one in ordered]
        assert here.held() == {one.slot: described(one) for one in made}
        signal.pidfd_send_signal(made[0].descriptors[1], 0)  # it lives
        for one in made:
            here.keeper.drop(one)


@in_loop
async def test_a_record_that_was_refused_is_not_told_later() -> None:
    async with place() as here:
        for _ in range(600):
            here.hold()
        start = here.keeper._start

        def start_slow_one() -> None:
            start()
            os.kill(here.pid(), signal.SIGSTOP)

        with patch.object(here.keeper, "_start", start_slow_one):
            here.end()
            with pytest.raises(OSError, match="the keeper does not answer"):
                here.hold(b"refused")
            os.kill(here.pid(), signal.SIGCONT)
        await until("it is told the rest", lambda: not here.keeper._untold)
        assert here.held() == {one.slot: described(one) for one in here.keeper.records}
        assert len(here.held()) == 600


@in_loop
async def test_nobody_waits_twice_for_a_keeper_that_makes_no_room() -> None:
    async with place() as here:
        os.kill(here.pid(), signal.SIGSTOP)
        with pytest.raises(OSError, match="the keeper does not answer"):
            here.fill()
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(OSError, match="the keeper does not answer"):
                here.hold()
        assert time.monotonic() - began < 0.5
        os.kill(here.pid(), signal.SIGCONT)
        made: list[Record] = []

        def works() -> bool:
            with suppress(OSError):
                made.append(here.hold())
            return bool(made)

        await until("there is room again", works)
        assert here.held() == {one.slot: described(one) for one in here.keeper.records}


@in_loop
async def test_another_keeper_is_tried_although_nobody_asks() -> None:
    async with place() as here:
        record = here.hold()
        here.allow(False)
        here.end()
        with pytest.raises(OSError, match="No such file"):
            here.hold(b"notices")
        here.allow(True)
        await until("there is another keeper", lambda: here.keeper._socket is not None)
        assert here.held() == {record.slot: described(record)}
