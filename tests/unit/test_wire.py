"""What core and runner say to each other, and that nothing else passes for it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_reaper import wire
from spawn_reaper.channel import Channel
from spawn_reaper.page import IDLE, OURS, Page, create
from spawn_reaper.release import Pressures, Release
from spawn_reaper.settings import Handlers
from spawn_reaper.usage import Counters, Peaks, Pressure, Usage
from spawn_reaper.wire import Frames, Garbage

FROM_CORE: list[wire.FromCore] = [
    wire.Setup(b"/s.lua", b"/sys/fs/cgroup", Handlers(cpu=1.5), lint=True),
    wire.Run([wire.Numbered(1, 2, [1, None, b"\xff", 1.5, True])]),
    wire.Reload(),
    wire.Reopen(),
    wire.Stop(1.5),
    wire.Ping(),
]
FROM_RUNNER: list[wire.FromRunner] = [
    wire.Ready("s.lua:1", ["a", "b"]),
    wire.Ready(None),
    wire.Unusable(["no"]),
    wire.Ack(3, [1, 2], ["x"]),
    wire.Reloaded(),
    wire.Pong(),
]


def bodies(data: bytes, longest: int = 1 << 20) -> list[bytes]:
    return list(Frames(longest).feed(data))


@pytest.mark.parametrize("message", FROM_CORE, ids=lambda m: type(m).__name__)
def test_what_the_core_says_is_understood(message: wire.FromCore) -> None:
    (body,) = bodies(wire.frame(message))
    assert wire.read_from_core(body) == message


@pytest.mark.parametrize("message", FROM_RUNNER, ids=lambda m: type(m).__name__)
def test_what_the_runner_says_is_understood(message: wire.FromRunner) -> None:
    (body,) = bodies(wire.frame(message))
    assert wire.read_from_runner(body) == message


@given(st.binary(max_size=200))
def test_nothing_else_is_taken_for_a_message(data: bytes) -> None:
    for read in (wire.read_from_core, wire.read_from_runner):
        try:
            message = read(data)
        except Garbage:
            continue
        assert isinstance(message, msgspec.Struct)


@pytest.mark.parametrize(
    "value",
    [[2, "1", [], []], [2, 1, [None], []], [2, 1, [], [b"x"]], [9], [], {}, 1],
)
def test_a_message_of_other_types_is_garbage(value: object) -> None:
    with pytest.raises(Garbage):
        wire.read_from_runner(msgspec.msgpack.encode(value))


@pytest.mark.parametrize("seed", range(10))
def test_frames_may_arrive_in_any_pieces(seed: int) -> None:
    random = Random(seed)
    data = b"".join(wire.frame(message) for message in FROM_RUNNER * 5)
    frames = Frames(1 << 20)
    found: list[bytes] = []
    while data:
        size = random.randrange(1, 20)
        found += frames.feed(data[:size])
        data = data[size:]
    assert [wire.read_from_runner(body) for body in found] == FROM_RUNNER * 5


def test_a_frame_that_is_too_long_is_garbage_before_it_is_there() -> None:
    with pytest.raises(Garbage):
        bodies((1 << 20).to_bytes(4, "little"), longest=1000)


def test_all_that_scripts_can_see_of_a_release_is_on_the_wire() -> None:
    counters = Counters(*range(1, len(Counters.__struct_fields__) + 1))
    release = Release(
        id="boot-1-2",
        path=b"/test.scope/job",
        name=b"job",
        released=5.0,
        born=1.9,
        age=2.5,
        usage=Usage(counters, Peaks(101, 102, 103)),
        own=Counters(cpu_total=7),
        attributes=({b"user.account": b"\xff"}, {b"user.x": b"y"}),
        inodes=(11, 12),
        pressures=Pressures(Pressure(31), Pressure(32), Pressure(None)),
        remainder=True,
    )
    fields = wire.fields_of(release)
    named = dict(zip(wire.FIELDS, fields, strict=False))
    assert named["path"] == fields[wire.PATH] == b"/test.scope/job"
    assert (named["cpu_total"], named["pids_peak"]) == (1, 103)
    assert (named["id"], named["btime"], named["age"], named["remainder"]) == (
        b"boot-1-2",
        1,
        2.5,
        True,
    )
    rest = fields[len(wire.FIELDS) :]
    own, rest = rest[: len(counters.__struct_fields__)], rest[len(counters.__struct_fields__) :]
    assert own[0] == 7
    assert set(own[1:]) == {None}
    assert rest == [31, 32, None, 2, 2, 11, 12, 0, b"user.account", b"\xff", 1, b"user.x", b"y"]


# Channels


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run an asynchronous test."""

    async def main() -> None:
        async with asyncio.timeout(10):
            await test()

    asyncio.run(main())


class End:
    """One end of a channel, and what came."""

    def __init__(self, plain: socket.socket, longest: int = 1 << 24) -> None:
        self.received: list[bytes] = []
        self.ends: list[str] = []
        self.channel = Channel(plain, plain.recv, longest, self.received.append, self.ends.append)


def test_neither_end_waits_for_the_other() -> None:
    async def test() -> None:
        left, right = socket.socketpair()
        one, other = End(left), End(right)
        frame = wire.frame(wire.Unusable(["x" * 100_000]))
        for _ in range(50):  # much more than a socket takes
            one.channel.send(frame)
            other.channel.send(frame)
        while len(one.received) < 50 or len(other.received) < 50:
            await asyncio.sleep(0.001)
        one.channel.close()
        while not other.ends:
            await asyncio.sleep(0.001)
        assert (one.ends, other.ends) == ([], [""])
        other.channel.send(frame)  # to nobody

    run(test)


def test_garbage_ends_a_channel_with_the_reason() -> None:
    async def test() -> None:
        left, right = socket.socketpair()
        end = End(right, longest=100)
        left.send(b"\xff" * 100)
        while not end.ends:
            await asyncio.sleep(0.001)
        assert end.ends == ["a frame of 4294967295 bytes"]
        assert end.received == []
        left.close()

    run(test)


# The page


def test_nobody_can_shorten_a_page() -> None:
    """Who reads it would be ended by SIGBUS."""
    descriptor = create()
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


def test_both_sides_of_a_page_see_the_same() -> None:
    descriptor = create()
    runner, core = Page(descriptor), Page(descriptor)
    assert (core.doing().in_hand, core.begun) == (IDLE, 0)
    runner.begin(5)
    first = core.doing()
    runner.enter(OURS)
    runner.begin(5)
    assert first.in_hand == core.doing().in_hand == 5
    assert first != core.doing()  # it is in hand again, not still
    assert core.begun == 2
    runner.close()
    core.close()
