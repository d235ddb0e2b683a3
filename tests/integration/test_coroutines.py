"""Coroutines of scripts together with operations that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

import pytest

from spawn_reaper.settings import Handlers
from tests.tools import servers
from tests.tools.postgresql import WAIT_FOR_LOCK, Postgresql
from tests.tools.scripts import SCOPE, SCRIPT, Stage, handling, play, printed, run, waiting

WAITS: Final = f'db:execute("{WAIT_FOR_LOCK}")'  # until a test lets it end
CANNOT_RESUME: Final = "cannot resume a coroutine that waits for an operation"


@pytest.fixture
def server(module_server: Postgresql) -> Iterator[Postgresql]:
    """The server, without connections of scripts afterwards."""
    yield module_server
    module_server.terminate(SCRIPT)


def with_connection(server: Postgresql, code: str) -> str:
    """Return CODE with a connection `db` and ask(), which asks the server for a value."""
    return f"""
    db = pg:new("{server.conninfo} application_name={SCRIPT}")
    function ask(value) return assert(db:execute("SELECT $1::text", {{value}})):fetch()[1] end
    {code}
    """


def with_handler(server: Postgresql, body: str, code: str = "") -> str:
    """Return a script whose handler is BODY, which knows the cgroup's name as `name`."""
    return with_connection(server, handling(body, code))


def line_of(code: str, part: str) -> int:
    """Return the number of the line of CODE that has PART in it."""
    return code[: code.index(part)].count("\n") + 1


# Parked handlers


def test_a_parked_handler_exchanges_values_with_whoever_resumes_it(server: Postgresql) -> None:
    body = """
    if name == "parked" then
      parked = coroutine.running()
      print(name, select("#", coroutine.yield("ignored")))
      print(coroutine.yield(nil, "out", nil))
      return
    end
    print(coroutine.status(parked), coroutine.resume(parked, nil, nil, nil))
    print(coroutine.status(parked), coroutine.resume(parked, "in"))
    print(coroutine.status(parked), coroutine.resume(parked))
    """
    assert printed(with_handler(server, body), "parked", "later") == [
        "parked\t3",
        "suspended\ttrue\tnil\tout\tnil",
        "in",
        "suspended\ttrue",
        "dead\tfalse\tcannot resume dead coroutine",
    ]


def test_resume_returns_as_soon_as_the_parked_handler_s_query_is_under_way(
    server: Postgresql,
) -> None:
    async def test() -> None:
        body = f"""
        if name == "parked" then
          parked = coroutine.running()
          coroutine.yield()
          print("resumed")
          assert({WAITS})
          print(cgroup.path, ask("answer"))
          error("in the end")
        end
        print(coroutine.resume(parked))
        print(coroutine.resume(parked))
        print(ask("not yet"))
        """
        with server.locked() as unlock:
            async with Stage(with_handler(server, body)) as stage:
                stage.release("parked", "later")
                await waiting(stage, server)
                assert stage.output() == ["resumed", "true", f"false\t{CANNOT_RESUME}"]
                unlock()
                outcome = await stage.end_all()
                assert outcome.output[3:] == ["not yet", f"{SCOPE}parked\tanswer"]
                (line,) = outcome.errors
                assert line.startswith(f"{SCOPE}parked: test.lua:")
                assert line.endswith("in the end")

    run(test)


def test_a_handler_may_park_and_query_in_turns(server: Postgresql) -> None:
    async def test() -> None:
        body = """
        if name == "parked" then
          parked = coroutine.running()
          for i = 1, 3 do
            print(ask("round " .. i))
            coroutine.yield()
          end
          print("end")
        else
          assert(coroutine.resume(parked))
        end
        """
        async with Stage(with_handler(server, body)) as stage:
            stage.release("parked")
            for line in ("round 1", "round 2", "round 3"):
                await stage.printed(line)
                stage.release("later")
            assert (await stage.end())[-1] == "end"

    run(test)


def test_parked_handlers_count_neither_as_running_nor_as_late(server: Postgresql) -> None:
    async def test() -> None:
        body = """
        if name:match("parked") then
          ask("before")
          parked = parked or {}
          parked[#parked + 1] = coroutine.running()
          coroutine.yield()
          print(name, ask("after"))
        elseif name == "last" then
          for _, co in ipairs(parked) do print(coroutine.resume(co)) end
        else
          print(ask(name))
        end
        """
        code = with_handler(server, body)
        names = [f"parked {number}" for number in range(5)]
        async with Stage(code, Handlers(running=1, time=0.3)) as stage:
            stage.release(*names, "quick")
            await stage.printed("quick")
            await asyncio.sleep(0.4)  # longer than handlers may take
            stage.release("last")
            output = await stage.end()
            assert output == ["quick", *["true"] * 5, *(f"{name}\tafter" for name in names)]

    run(test)


@pytest.mark.parametrize("before", ["", 'ask("something")'], ids=["at once", "after a query"])
def test_handlers_that_are_parked_for_ever_leave_nothing_in_memory(
    before: str, server: Postgresql
) -> None:
    async def test() -> None:
        body = f"""
        if name == "print" then
          collectgarbage()
          collectgarbage()
          print(collectgarbage("count"))
        else
          {before}
          coroutine.yield()
        end
        """
        async with Stage(with_handler(server, body)) as stage:
            for _ in range(3):
                stage.release(*["job"] * 1000)
                await stage.end()
                stage.release("print")
            _, second, third = map(float, await stage.end())  # the first makes tables grow
            assert third - second < 100  # kilobytes; a coroutine is one, and there were a thousand

    run(test)


def test_what_a_parked_handler_holds_is_collected_with_it(server: Postgresql) -> None:
    async def test() -> None:
        body = f"""
        if name == "parked" then
          local own = pg:new("{server.conninfo} application_name={SCRIPT}")
          print(own:execute("SELECT 'connected'"):fetch()[1])
          coroutine.yield(own)
        else
          collectgarbage()
          collectgarbage()
        end
        """
        async with Stage(with_handler(server, body)) as stage:
            stage.release("parked")
            await stage.printed("connected")
            await stage.until("both are connected", lambda: len(server.backends(SCRIPT)) == 2)
            stage.release("collect", "collect")
            await stage.until("one is left", lambda: len(server.backends(SCRIPT)) == 1)
            await stage.end()

    run(test)


# Coroutines inside a handler


def test_an_iterator_may_execute_queries(server: Postgresql) -> None:
    body = """
    local function numbers(count)
      return coroutine.wrap(function()
        for i = 1, count do coroutine.yield(ask(i), nil, "rest") end
      end)
    end
    for number, nothing, rest in numbers(3) do
      print(number, nothing, rest, ask("in between"))
    end
    """
    expected = [f"{number}\tnil\trest\tin between" for number in (1, 2, 3)]
    assert printed(with_handler(server, body)) == expected


def test_iterators_of_several_handlers_do_not_get_mixed_up(server: Postgresql) -> None:
    body = """
    local list = {}
    for value in coroutine.wrap(function()
      for i = 1, 5 do coroutine.yield(ask(name .. i)) end
    end) do list[#list + 1] = value end
    print(name, table.concat(list, " "))
    """
    names = [f"job{number}-" for number in range(20)]
    output = printed(with_handler(server, body), *names)
    expected = [f"{name}\t" + " ".join(f"{name}{i}" for i in range(1, 6)) for name in names]
    assert sorted(output) == sorted(expected)


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_an_operation_suspends_every_caller_of_its_coroutine(
    depth: int, server: Postgresql
) -> None:
    body = f"""
    local function nested(depth)
      if depth == 0 then return ask("bottom") end
      local value = coroutine.wrap(nested)(depth - 1)
      local co = coroutine.create(function(...) return ask("again"), ... end)
      local ok, again = coroutine.resume(co, 1)
      return ok and again == "again" and coroutine.status(co) == "dead" and value
    end
    print(nested({depth}))
    """
    assert printed(with_handler(server, body)) == ["bottom"]


def test_resume_gives_what_plain_lua_gives_after_an_operation(server: Postgresql) -> None:
    body = """
    local co = coroutine.create(function(...)
      print(ask("first"), ...)
      print(coroutine.yield(nil, ask("second"), nil))
      error({ask("third")})
    end)
    print(coroutine.resume(co, nil, 1))
    print(coroutine.status(co))
    local ok, value = coroutine.resume(co, "in", nil)
    print(ok, type(value), value[1], coroutine.status(co))
    print(coroutine.resume(co))

    local failing = coroutine.wrap(function() ask("x") error("on purpose") end)
    print(pcall(failing))
    print(pcall(failing))
    print(xpcall(function() ask("x") error("caught", 0) end, function(text)
      return "handled: " .. text
    end))
    """
    output = printed(with_handler(server, body))
    assert output[:6] == [
        "first\tnil\t1",
        "true\tnil\tsecond\tnil",
        "suspended",
        "in\tnil",
        "false\ttable\tthird\tdead",
        "false\tcannot resume dead coroutine",
    ]
    assert output[6].startswith("false\ttest.lua:")
    assert output[6].endswith(": on purpose")
    assert output[7].endswith("cannot resume dead coroutine")
    assert output[8] == "false\thandled: caught"


def test_status_and_running_say_what_plain_lua_says(server: Postgresql) -> None:
    body = """
    local outer = coroutine.running()
    local inner
    inner = coroutine.create(function()
      print(coroutine.status(outer), coroutine.status(inner), coroutine.running() == inner)
      print(coroutine.resume(outer))
      print(coroutine.resume(inner))
      ask("x")
      print(coroutine.status(outer), coroutine.status(inner), coroutine.running() == inner)
    end)
    print(coroutine.status(inner), coroutine.resume(inner))
    print(coroutine.status(inner), coroutine.status(outer), coroutine.running() == outer)
    """
    assert printed(with_handler(server, body)) == [
        "normal\trunning\ttrue",
        "false\tcannot resume running coroutine",
        "false\tcannot resume running coroutine",
        "normal\trunning\ttrue",
        "suspended\ttrue",
        "dead\trunning\ttrue",
    ]


def test_a_coroutine_that_waits_cannot_be_resumed_by_another_handler(server: Postgresql) -> None:
    async def test() -> None:
        body = f"""
        if name == "first" then
          outer = coroutine.running()
          inner = coroutine.create(function()
            wrapped = coroutine.wrap(function() assert({WAITS}) return "got it" end)
            return wrapped()
          end)
          print(coroutine.resume(inner))
        else
          print(coroutine.resume(outer))
          print(coroutine.resume(inner, "x"))
          print(pcall(wrapped))
        end
        """
        with server.locked() as unlock:
            async with Stage(with_handler(server, body)) as stage:
                stage.release("first")
                await waiting(stage, server)
                stage.release("second")
                await stage.until("it has tried", lambda: len(stage.output()) == 3)
                assert all(line.startswith("false\t") for line in stage.output())
                assert all(line.endswith(CANNOT_RESUME) for line in stage.output())
                unlock()
                assert (await stage.end())[3:] == ["true\tgot it"]

    run(test)


def test_a_coroutine_may_go_on_in_another_handler_than_it_began_in(server: Postgresql) -> None:
    body = """
    if not shared then
      shared = coroutine.wrap(function()
        while true do coroutine.yield(ask("query for " .. coroutine.yield())) end
      end)
      shared()
    end
    print(name, shared(name))
    shared()
    """
    code = with_handler(server, body)
    names = ["a", "b", "c"]
    expected = [f"{name}\tquery for {name}" for name in names]
    assert printed(code, *names, limits=Handlers(running=1)) == expected


def test_an_iterator_that_is_left_early_harms_nothing(server: Postgresql) -> None:
    body = """
    for value in coroutine.wrap(function()
      while true do coroutine.yield(ask("value")) end
    end) do
      print(value)
      break
    end
    collectgarbage()
    print(ask("after"))
    """
    assert printed(with_handler(server, body)) == ["value", "after"]


# Where no yield is possible

PLACES: Final = {
    "gsub": 'string.gsub("x", ".", function() {work} end)',
    "sort": "table.sort({{2, 1}}, function(a, b) {work} return a < b end)",
    "require": 'package.preload.m = function() {work} end require "m" package.loaded.m = nil',
    "dofile": 'dofile("{file}")',
    "inside a coroutine": (
        'coroutine.wrap(function() string.gsub("x", ".", function() {work} end) end)()'
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", ["handler", "main chunk"])
def test_execute_raises_where_no_yield_is_possible(
    place: str, where: str, server: Postgresql
) -> None:
    work = 'print(pcall(function() db:execute("SELECT 1") end))'
    with servers.short_directory() as directory:
        file = directory / "work.lua"
        file.write_text(work)
        text = PLACES[place].format(work=work, file=file) + ' print(ask("goes on"))'
        code = with_handler(server, text) if where == "handler" else with_connection(server, text)
        first, second = printed(code)
    assert first.startswith("false\t")
    assert ".lua:" in first
    assert "cannot wait here" in first
    assert second == "goes on"


def test_coroutines_inside_such_places_work_as_far_as_they_do_not_wait(server: Postgresql) -> None:
    body = """
    print((string.gsub("abc", ".", function(letter)
      local upper = coroutine.wrap(function(x) coroutine.yield(x:upper()) end)
      return upper(letter)
    end)))
    print((string.gsub("a", ".", function()
      local ok, text = coroutine.resume(coroutine.create(function() return ask("x") end))
      return tostring(ok) .. tostring(text):match("cannot wait here")
    end)))
    """
    assert printed(with_handler(server, body)) == ["ABC", "falsecannot wait here"]


def test_the_main_chunk_may_wait_like_a_handler(server: Postgresql) -> None:
    code = """
    for value in coroutine.wrap(function()
      for i = 1, 2 do coroutine.yield(ask(i)) end
    end) do print(value) end
    print(coroutine.resume(coroutine.create(function() return ask("created") end)))
    print(pcall(function() return ask("protected") end))
    """
    expected = ["1", "2", "true\tcreated", "true\tprotected"]
    assert printed(with_connection(server, code)) == expected


# Limits


def test_only_so_many_handlers_wait_at_once(server: Postgresql) -> None:
    async def test() -> None:
        body = f'print(name) assert({WAITS}) print(name .. " has ended")'
        with server.locked() as unlock:
            async with Stage(with_handler(server, body), Handlers(running=2)) as stage:
                stage.release("a", "b", "c", "d")
                await waiting(stage, server)
                assert stage.output() == ["a", "b"]
                unlock()
                output = await stage.end()
                assert [line for line in output if "ended" not in line] == ["a", "b", "c", "d"]
                assert output.index("c") > output.index("a has ended")
                assert output.index("d") > output.index("b has ended")

    run(test)


@pytest.mark.parametrize(
    "wrapped",
    [
        "{work}",
        "coroutine.wrap(function()\n {work} end)()",
        "for x in coroutine.wrap(function()\n coroutine.yield(1)\n {work} end) do end",
        "assert(coroutine.resume(coroutine.create(function()\n {work}\n end)))",
        "local function deep(n)\n if n == 0 then\n {work}\n else deep(n - 1) end\n end deep(5)",
    ],
    ids=["plain", "wrap", "iterator", "resume", "deep"],
)
def test_the_time_limit_names_file_and_line_of_the_operation(
    wrapped: str, server: Postgresql
) -> None:
    code = with_handler(server, wrapped.format(work=f"local r = {WAITS}"))
    with server.locked():
        outcome = play(code, limits=Handlers(time=0.15))
    line = line_of(code, WAITS)
    (error,) = outcome.errors
    assert f"test.lua:{line}: ran longer than 0.15 s" in error
    assert error.startswith(f"{SCOPE}job: ")


def test_time_that_is_spent_in_many_short_waits_counts(server: Postgresql) -> None:
    body = 'while true do assert(db:execute("SELECT pg_sleep(0.05)")) end'
    outcome = play(with_handler(server, body), limits=Handlers(time=0.3))
    (error,) = outcome.errors
    assert error.endswith(": ran longer than 0.3 s")


def test_the_limit_goes_on_for_a_handler_that_was_resumed(server: Postgresql) -> None:
    body = f"""
    if name == "parked" then
      parked = coroutine.running()
      coroutine.yield()
      {WAITS}
    else
      coroutine.resume(parked)
    end
    """
    with server.locked():
        code = with_handler(server, body)
        outcome = play(code, "parked", "later", limits=Handlers(time=0.2))
    line = line_of(code, WAITS)
    assert outcome.errors == [f"{SCOPE}parked: test.lua:{line}: ran longer than 0.2 s"]


def test_a_coroutine_that_spins_after_an_operation_is_ended(server: Postgresql) -> None:
    body = """
    if name == "spins" then
      coroutine.wrap(function() ask("x") while true do end end)()
    end
    print(ask(name))
    """
    code = with_handler(server, body)
    outcome = play(code, "spins", "next", limits=Handlers(cpu=0.2))
    assert outcome.output == ["next"]
    (error,) = outcome.errors
    assert error.startswith(f"{SCOPE}spins: ")
    assert f"test.lua:{line_of(code, 'while true')}: used more than 0.2 s of CPU time" in error


def test_os_exit_and_debug_sethook_are_refused() -> None:
    for call in ("os.exit(0)", "os.exit()", "debug.sethook()", "debug.sethook(print, 'l')"):
        (line,) = printed(f"print(pcall(function() {call} end))")
        assert line.startswith("false\t")
        assert "not available" in line
