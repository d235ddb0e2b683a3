"""Handlers that wait: how many at once, for how long, and what becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from spawn_reaper.bindings.calling import Misuse, exposed
from spawn_reaper.release import Release
from spawn_reaper.script import Script, ScriptError
from spawn_reaper.settings import Handlers
from spawn_reaper.usage import NO_COUNTERS, NO_PEAKS, Usage


def release(name: str) -> Release:
    """Return the release of a cgroup that used nothing."""
    usage = Usage(NO_COUNTERS, NO_PEAKS)
    path = f"/test.scope/{name}".encode()
    return Release(name, path, name.encode(), 0.0, None, None, usage, NO_COUNTERS, ({},))


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


async def load(code: str, limits: Handlers, **operations: Gate) -> Script:
    """Return a script that knows OPERATIONS."""
    SCRIPT.write_text(code)
    script = Script(limits, b"/nowhere")
    for name, operation in operations.items():
        script.calling.add_function(name, exposed()(operation))
    await script.load(SCRIPT)
    return script


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
        script = await load(code, Handlers(), wait=gate)
        script.released(release("job"), None)
        await settle()
        gate.waiting[0].set_result(b"done")
        assert await script.finish(10) == 0

    run(test)
    assert capfd.readouterr().out == "before\ndone\t/test.scope/job\n"


def test_only_so_many_handlers_run_at_once_and_the_rest_in_order(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c) wait() print(c.path) end"
        script = await load(code, Handlers(running=2), wait=gate)
        for number in range(5):
            script.released(release(f"job-{number}"), None)
        for done in range(5):
            await settle()
            assert len(gate.waiting) == min(done + 2, 5)
            gate.waiting[done].set_result(b"")
        assert await script.finish(10) == 0

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
        script = await load(code, Handlers(running=1), wait=gate)
        for name in ("parked-1", "parked-2", "job"):
            script.released(release(name), None)
        await settle()
        assert len(gate.waiting) == 1
        gate.waiting[0].set_result(b"")
        assert await script.finish(10) == 0

    run(test)


def test_a_handler_that_waits_too_long_gets_an_error_where_it_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c)\n  wait()\nend"
        script = await load(code, Handlers(time=0.05), wait=gate)
        script.released(release("job"), None)
        assert await script.finish(10) == 0
        assert gate.waiting[0].cancelled()

    run(test)
    assert caplog.messages == ["/test.scope/job: test.lua:2: ran longer than 0.05 s"]


def test_a_handler_that_catches_that_and_goes_on_waiting_is_abandoned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c) while true do pcall(wait) end end"
        script = await load(code, Handlers(time=0.05, running=1), wait=gate)
        script.released(release("one"), None)
        script.released(release("two"), None)
        assert await script.finish(10) == 0

    run(test)
    text = "went on after its time was over"
    assert caplog.messages == [f"/test.scope/{name}: {text}" for name in ("one", "two")]


def test_an_operation_that_fails_raises_in_lua_with_the_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function cgroup_released(c)\n  print(pcall(function()\n wait() end))\nend"
        script = await load(code, Handlers(), wait=gate)
        script.released(release("job"), None)
        await settle()
        gate.waiting[0].set_exception(Misuse("no luck"))
        assert await script.finish(10) == 0

    run(test)
    assert capfd.readouterr().out == "false\ttest.lua:3: no luck\n"


def test_stopping_waits_a_bounded_time_and_tells_what_was_not_handled() -> None:
    async def test() -> None:
        code = "function cgroup_released(c) wait() end"
        script = await load(code, Handlers(running=2), wait=Gate())
        for number in range(5):
            script.released(release(f"job-{number}"), None)
        assert await script.finish(0.05) == 5

    run(test)


def test_reload_runs_once_more_if_it_was_asked_for_while_busy(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        gate = Gate()
        code = "function reload() print('reload') wait() end"
        script = await load(code, Handlers(), wait=gate)
        complete: list[int] = []
        for number in range(4):
            script.reload(partial(complete.append, number))
        await settle()
        assert complete == []
        gate.waiting[0].set_result(b"")
        await settle()
        assert complete == [0]
        gate.waiting[1].set_result(b"")
        assert await script.finish(10) == 0
        assert complete == [0, 1, 2, 3]
        assert len(gate.waiting) == 2

    run(test)
    assert capfd.readouterr().out == "reload\n" * 2


def test_the_main_chunk_may_wait() -> None:
    async def test() -> None:
        async def soon() -> bytes:
            return b"answer"

        SCRIPT.write_text("assert(wait() == 'answer')\nfunction cgroup_released() end")
        script = Script(Handlers(), b"/nowhere")
        script.calling.add_function("wait", exposed()(soon))
        await script.load(SCRIPT)
        assert script.handles_releases

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
        script = await load("function cgroup_released() error('x\\ny') end", Handlers())
        script.released(release("job"), None)

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
        script = await load(code, Handlers())
        for count in (2000, 20_000):
            for _ in range(count):
                script.released(release("job"), None)
                await asyncio.sleep(0)
            script.released(release("print"), None)
            assert await script.finish(10) == 0

    run(test)
    before, after = map(float, capfd.readouterr().out.split())
    assert after - before < 20  # kilobytes, for twenty thousand
