"""Handlers that wait: how many at once, for how long, and what becomes of the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from spawn_reaper import page, wire
from spawn_reaper.runner.bindings.calling import Misuse, exposed
from spawn_reaper.runner.script import Script, ScriptError
from spawn_reaper.settings import Handlers
from tests.tools.scripts import new_page, release


class Gate:
    """An operation that lasts until the test lets it end."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[bytes]] = []

    def __call__(self) -> Awaitable[bytes]:
        """Begin to wait."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        return future


SCRIPT = Path("test.lua")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the script's path short: Lua cuts it at 60 characters."""
    monkeypatch.chdir(tmp_path)


class Told(list[wire.Ack]):
    """What a script has acknowledged."""

    def __call__(self, ack: wire.Ack) -> None:
        """Take note, and log what failed, as the core does."""
        self.append(ack)
        for message in ack.failed:
            logging.getLogger("spawn_reaper").error("%s", message)

    def done(self) -> list[int]:
        """Return the numbers of the releases that are done."""
        return [number for ack in self for number in ack.done]

    def begun(self) -> int:
        """Return how many were begun."""
        return self[-1].begun if self else 0


class Play:
    """A script, and releases for it."""

    def __init__(self, script: Script, own_page: page.Page, told: Told) -> None:
        self.script = script
        self.page = own_page
        self.told = told
        self._count = 0

    def release(self, *names: str, attempt: int = 1) -> None:
        """Hand over the releases of cgroups that used nothing, together."""
        first = self._count + 1
        self._count += len(names)
        self.script.handle(
            [
                wire.Numbered(number, attempt, wire.fields_of(release(name)))
                for number, name in enumerate(names, first)
            ]
        )

    async def end(self) -> None:
        """Wait until all are done."""
        async with asyncio.timeout(10):
            while len(self.told.done()) < self._count:
                await asyncio.sleep(0.001)


_exits = ExitStack()


@pytest.fixture(autouse=True)
def exits() -> Iterator[None]:
    """Let go of what plays have opened."""
    yield
    _exits.close()


async def load(code: str, limits: Handlers, **operations: Gate) -> Play:
    """Return a script that knows OPERATIONS."""
    SCRIPT.write_text(code)
    own_page, told = new_page(_exits), Told()
    script = Script(limits, b"/nowhere", own_page, told)
    for name, operation in operations.items():
        script.calling.add_function(name, exposed()(operation))
    await script.load(SCRIPT)
    return Play(script, own_page, told)


async def settle() -> None:
    """Let everything happen that can happen now."""
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run an asynchronous test."""

    async def main() -> None:
        await test()

    asyncio.run(main())


def test_an_operation_suspends_the_handler_and_returns_its_result(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c) print('before') print(wait(), c.path) end"
        play = await load(code, Handlers(), wait=gate)
        play.release("job")
        await settle()
        gate.waiting[0].set_result(b"done")
        await play.end()

    run(test)
    assert capfd.readouterr().out == "before\ndone\t/test.scope/job\n"


def test_only_so_many_handlers_run_at_once_and_the_rest_in_order(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c) wait() print(c.path) end"
        play = await load(code, Handlers(running=2), wait=gate)
        for number in range(5):
            play.release(f"job-{number}")
        for done in range(5):
            await settle()
            assert len(gate.waiting) == min(done + 2, 5)
            gate.waiting[done].set_result(b"")
        await play.end()

    run(test)
    assert capfd.readouterr().out == "".join(f"/test.scope/job-{n}\n" for n in range(5))


def test_parked_handlers_do_not_count() -> None:
    async def test() -> None:
        gate = Gate()
        code = """
        function cgroup_released(c)
          if c.path:match("parked") then coroutine.yield() end
          wait()
        end
        """
        play = await load(code, Handlers(running=1), wait=gate)
        for name in ("parked-1", "parked-2", "job"):
            play.release(name)
        await settle()
        assert len(gate.waiting) == 1
        gate.waiting[0].set_result(b"")
        await play.end()

    run(test)


def test_a_handler_that_waits_too_long_gets_an_error_where_it_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c)\n  wait()\nend"
        play = await load(code, Handlers(time=0.05), wait=gate)
        play.release("job")
        await play.end()
        assert gate.waiting[0].cancelled()

    run(test)
    assert caplog.messages == ["/test.scope/job: test.lua:2: ran longer than 0.05 s"]


def test_a_handler_that_catches_that_and_goes_on_waiting_is_abandoned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c) while true do pcall(wait) end end"
        play = await load(code, Handlers(time=0.05, running=1), wait=gate)
        play.release("one")
        play.release("two")
        await play.end()

    run(test)
    text = "went on after its time was over"
    assert caplog.messages == [f"/test.scope/{name}: {text}" for name in ("one", "two")]


def test_an_operation_that_fails_raises_in_lua_with_the_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c)\n  print(pcall(function()\n wait() end))\nend"
        play = await load(code, Handlers(), wait=gate)
        play.release("job")
        await settle()
        gate.waiting[0].set_exception(Misuse("no luck"))
        await play.end()

    run(test)
    assert capfd.readouterr().out == "false\ttest.lua:3: no luck\n"


def test_what_waits_when_the_script_is_stopped_gets_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        play = await load(
            "function cgroup_released(c) wait() end", Handlers(running=2), wait=Gate()
        )
        play.release("one", "two", "three")
        await play.script.stop(0)
        assert play.told.begun() == 2

    run(test)
    assert caplog.messages == [
        f"/test.scope/{name}: test.lua:1: the daemon ends" for name in ("one", "two")
    ]


def test_what_is_begun_is_told_before_it_is_done() -> None:
    async def test() -> None:
        gate = Gate()
        play = await load("function cgroup_released(c) wait() end", Handlers(running=2), wait=gate)
        play.release("one", "two", "three")
        assert (play.told.begun(), play.told.done()) == (2, [])
        gate.waiting[1].set_result(b"")
        await settle()
        assert (play.told.begun(), play.told.done()) == (3, [2])

    run(test)


def test_parked_and_failed_handlers_are_done() -> None:
    async def test() -> None:
        code = """
        function cgroup_released(c)
          if c.path:match("parked") then coroutine.yield() else error("no") end
        end
        """
        play = await load(code, Handlers())
        play.release("parked", "failed")
        assert play.told == [wire.Ack(2, [1, 2], ["/test.scope/failed: test.lua:3: no"])]

    run(test)


def test_a_mistake_of_ours_in_one_handler_keeps_no_other_waiting(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        play = await load("function cgroup_released(c) end", Handlers())
        begin = play.script._begin

        def fail_first(number: int, *fields: object) -> int:
            if number == 1:
                raise RuntimeError
            state: int = begin(number, *fields)
            return state

        monkeypatch.setattr(play.script, "_begin", fail_first)
        play.release("one", "two")
        assert (play.told.begun(), play.told.done()) == (2, [1, 2])

    run(test)
    assert caplog.messages == ["/test.scope/one: a mistake of ours"]


def test_the_page_shows_which_release_is_in_hand() -> None:
    async def test() -> None:
        seen: list[int] = []

        def look() -> None:
            seen.append(play.page.doing().in_hand)

        gate = Gate()
        SCRIPT.write_text("look()\nfunction cgroup_released(c) look() wait() look() end")
        own_page, told = new_page(_exits), Told()
        script = Script(Handlers(), b"/nowhere", own_page, told)
        play = Play(script, own_page, told)
        script.calling.add_function("look", exposed()(look))
        script.calling.add_function("wait", exposed()(gate))
        await script.load(SCRIPT)
        play.release("one", "two")
        for waiting in reversed(gate.waiting):
            waiting.set_result(b"")
            await settle()
        assert seen == [page.IDLE, 1, 2, 2, 1]
        assert play.page.begun == 2

    run(test)


def test_a_script_sees_which_attempt_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        play = await load("function cgroup_released(c) print(c.attempt) end", Handlers())
        play.release("one")
        play.release("two", attempt=2)

    run(test)
    assert capfd.readouterr().out == "1\n2\n"


def test_the_main_chunk_may_wait() -> None:
    async def test() -> None:
        async def soon() -> bytes:
            return b"answer"

        SCRIPT.write_text("assert(wait() == 'answer')\nfunction cgroup_released() end")
        script = Script(Handlers(), b"/nowhere", new_page(_exits), Told())
        script.calling.add_function("wait", exposed()(soon))
        await script.load(SCRIPT)
        assert script.handler == "test.lua:2"

    run(test)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("x = = 1", ":1: unexpected symbol near '='"),
        ("\n\nerror('no')", ":3: no"),
        ("error({})", ":1: (error object is a table value)"),
        ("cgroup_released = 5", ": cgroup_released is a number, not a function"),
        ("while true do end", ":1: used more than 0.2 s of CPU time"),
        ("\x1bLJ\x02garbage", ": cannot load"),
    ],
)
def test_a_script_that_cannot_be_used_is_refused_with_file_and_line(code: str, reason: str) -> None:
    async def test() -> None:
        with pytest.raises(ScriptError) as caught:
            await load(code, Handlers(cpu=0.2))
        assert reason in str(caught.value)
        assert str(caught.value).startswith("test.lua:")
        assert "\n" not in str(caught.value)

    run(test)


def test_an_error_of_the_script_has_no_traceback_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        play = await load("function cgroup_released() error('x\\ny') end", Handlers())
        play.release("job")

    run(test)
    assert caplog.messages == ["/test.scope/job: test.lua:1: x\\x0ay"]


def test_handlers_leave_nothing_in_memory(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        code = """
        function cgroup_released(c)
          local x = c.xattr.account, c.own.cpu_total, c.parent.path, c.cpu_pressure
          if c.path:match("print") then
            collectgarbage()
            collectgarbage()
            print(collectgarbage("count"))
          end
        end
        """
        play = await load(code, Handlers())
        for count in (2000, 20_000):
            for _ in range(count):
                play.release("job")
                await asyncio.sleep(0)
            play.release("print")
            await play.end()

    run(test)
    before, after = map(float, capfd.readouterr().out.split())
    assert after - before < 20  # kilobytes, for twenty thousand
