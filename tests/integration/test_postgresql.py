"""The database connection of scripts against a real PostgreSQL server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from functools import partial
from typing import Final

import pytest

from spawn_reaper.runner.bindings import database, link
from spawn_reaper.settings import Handlers
from tests.tools.postgresql import WAIT_FOR_LOCK, Postgresql, programs
from tests.tools.scripts import SCRIPT, Outcome, Stage, handling, play, printed, run, waiting


@pytest.fixture
def server(module_server: Postgresql) -> Iterator[Postgresql]:
    """The server, running, with an empty table `line` that numbers what is written to it."""
    if not module_server.running:
        module_server.start()
    module_server.query("DROP TABLE IF EXISTS line")
    module_server.query("CREATE TABLE line (number serial PRIMARY KEY, text text)")
    yield module_server
    if module_server.running:
        module_server.terminate(SCRIPT)


def with_connection(server: Postgresql, code: str, schema: str = "nil") -> str:
    """Return CODE with a connection `db`, show() for queries and write() for the table."""
    return f"""
    db = pg:new("{server.conninfo} application_name={SCRIPT}", {schema})

    function show(columns, ...)
      local result, text = db:execute(...)
      if not result then print("error", text) return end
      local row = result:fetch()
      while row do
        local values = {{}}
        for i = 1, columns do values[i] = tostring(row[i]) end
        print(table.concat(values, "\\t"))
        row = result:fetch()
      end
    end

    function write(text)
      return db:execute("INSERT INTO line (text) VALUES ($1)", {{text}})
    end
    {code}
    """


def with_handler(server: Postgresql, body: str, code: str = "") -> str:
    """Return a script whose handler is BODY, which knows the cgroup's name as `name`."""
    return with_connection(server, handling(body, code))


def unnoticed_end_of_connection(server: Postgresql) -> str:
    """Return code that ends the connections, which the daemon cannot notice meanwhile."""
    sql = (
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        f" WHERE application_name = '{SCRIPT}'"
    )
    psql = f"""{programs() / "psql"} -qAt -d "{server.conninfo}" -c "{sql}" >/dev/null"""
    return f"os.execute([[{psql}]])"


def shown(server: Postgresql, code: str, schema: str = "nil") -> list[str]:
    """Return what CODE prints in the main chunk."""
    return printed(with_connection(server, code, schema))


def written(server: Postgresql) -> list[str]:
    """Return what scripts have written, in order."""
    return [text for (text,) in server.query("SELECT text FROM line ORDER BY number")]


# Queries and parameters


def test_a_query_returns_rows_of_strings_and_nil_for_null(server: Postgresql) -> None:
    code = """
    local result = db:execute("SELECT 1, 'two', NULL, true, 4.50, '{a,b}'::text[], '' UNION ALL "
      .. "SELECT 2, NULL, 'x', false, 0, '{}', 'y' ORDER BY 1")
    for _ = 1, 3 do
      local row = result:fetch()
      if row then
        for i = 1, 7 do print(i, type(row[i]), row[i]) end
      else
        print(row)
      end
    end
    """
    first = ["1\tstring\t1", "2\tstring\ttwo", "3\tnil\tnil", "4\tstring\tt", "5\tstring\t4.50"]
    second = ["1\tstring\t2", "2\tnil\tnil", "3\tstring\tx", "4\tstring\tf", "5\tstring\t0"]
    assert shown(server, code) == [
        *(*first, "6\tstring\t{a,b}", "7\tstring\t"),
        *(*second, "6\tstring\t{}", "7\tstring\ty"),
        "nil",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("nil", "nil"),
        ("true", "1"),
        ("false", "0"),
        ("0", "0"),
        ("-5", "-5"),
        ("0.5", "0.5"),
        ("1e15", "1000000000000000"),
        ("2^53", "9007199254740992"),
        ("-2^63", "-9223372036854775808"),
        ("1e20", "100000000000000000000"),
        ("'text'", "text"),
        ("''", ""),
        ("'NULL'", "NULL"),
        ("'it\\'s \\\\ $1 \\195\\164'", "it's \\ $1 \xe4"),
    ],
)
def test_parameters_arrive_as_their_text(server: Postgresql, value: str, text: str) -> None:
    assert shown(server, f'show(1, "SELECT $1::text", {{{value}, n = 1}})') == [text]


@pytest.mark.parametrize(
    ("value", "type_", "text"),
    [
        *(
            ("42", "integer", "42"),
            ("2^40", "bigint", "1099511627776"),
            ("0.25", "numeric", "0.25"),
        ),
        *(("true", "boolean", "t"), ("false", "boolean", "f"), ("1e15", "bigint", "1" + "0" * 15)),
        *(("0.1", "double precision", "0.1"), ("'2026-02-13'", "date", "2026-02-13")),
        *(("pg:encode_array{'a,b', 'c'}", "text[]", '{"a,b",c}'),),
    ],
)
def test_parameters_are_converted_by_the_server(
    server: Postgresql, value: str, type_: str, text: str
) -> None:
    assert shown(server, f'show(1, "SELECT $1::{type_}", {{{value}}})') == [text]


def test_numbers_keep_their_value(server: Postgresql) -> None:
    code = """
    for _, number in ipairs{0.1, 1/3, 1e-300, 1.7976931348623157e308, 123456.789, 2^53 + 2} do
      local result = assert(db:execute("SELECT $1::float8", {number}))
      print(tonumber(result:fetch()[1]) == number)
    end
    """
    assert shown(server, code) == ["true"] * 6


def test_holes_are_null_and_n_gives_the_number_of_parameters(server: Postgresql) -> None:
    code = """
    show(3, "SELECT $1::text, $2::text, $3::text", {nil, "x", nil, n = 3})
    show(3, "SELECT $1::text, $2::text, $3::text", {n = 3})
    show(2, "SELECT $1::text, $2::text", {"x", "y", "z", n = 2})
    show(1, "SELECT 'none'", {n = 0})
    show(1, "SELECT 'none'", {})
    show(1, "SELECT 'none'", nil)
    """
    assert shown(server, code) == ["nil\tx\tnil", "nil\tnil\tnil", "x\ty", *["none"] * 3]


def test_a_wrong_number_of_parameters_is_an_error(server: Postgresql) -> None:
    code = """
    show(1, "SELECT $1::text", {"x", "y"})
    show(1, "SELECT $1::text || $2::text", {"x"})
    show(1, "SELECT $1::text")
    local many = {}
    for i = 1, 70000 do many[i] = i end
    print(pcall(db.execute, db, "SELECT 1", many))
    show(1, "SELECT 'goes on'")
    """
    *errors, too_many, last = shown(server, code)
    assert [line.split("\t")[0] for line in errors] == ["error"] * 3
    assert re.match("false\t.*more than 65535 parameters", too_many)
    assert last == "goes on"


def test_a_nul_is_an_error_and_the_connection_goes_on(server: Postgresql) -> None:
    code = """
    print(pcall(db.execute, db, "SELECT 'a\\0b'"))
    print(pcall(db.execute, db, "SELECT $1::text", {"a\\0b"}))
    show(1, "SELECT 'goes on'")
    """
    first, second, third = shown(server, code)
    assert first.startswith("true\tnil\t")
    assert second.startswith("true\tnil\t")
    assert third == "goes on"


def test_text_that_is_not_utf_8_is_the_server_s_error(server: Postgresql) -> None:
    error, last = shown(server, 'show(1, "SELECT $1::text", {"\\255"}) show(1, "SELECT \'on\'")')
    assert error.startswith("error\tinvalid byte sequence")
    assert last == "on"


def test_an_error_has_the_server_s_message_and_detail_in_one_string(server: Postgresql) -> None:
    code = """
    assert(db:execute("INSERT INTO line VALUES (1, 'x')"))
    show(1, "INSERT INTO line VALUES ($1, 'y')", {1})
    show(1, "SELEC 1")
    show(1, "SELECT 1/0")
    print(type(select(2, db:execute("SELECT no_such_column"))))
    """
    duplicate, syntax, division, kind = shown(server, code)
    assert 'duplicate key value violates unique constraint "line_pkey"' in duplicate
    assert "Key (number)=(1) already exists." in duplicate
    assert syntax.startswith('error\tsyntax error at or near "SELEC"')
    assert division == "error\tdivision by zero"
    assert kind == "string"


def test_statements_without_rows_give_a_result_without_rows(server: Postgresql) -> None:
    code = """
    for _, sql in ipairs{"INSERT INTO line (text) VALUES ('x')", "UPDATE line SET text = 'y'",
        "CREATE TEMPORARY TABLE t (i int)", "SET work_mem = '4MB'", "SELECT 1 WHERE false",
        "DO $$ BEGIN NULL; END $$", "DELETE FROM line"} do
      local result = assert(db:execute(sql))
      print(type(result), result:fetch())
    end
    """
    assert shown(server, code) == ["userdata\tnil"] * 7


def test_of_several_statements_the_last_result_counts(server: Postgresql) -> None:
    code = """
    show(1, "SELECT 'first'; INSERT INTO line (text) VALUES ('x'); SELECT 'last'")
    show(1, "SELECT 'first'; SELECT 1/0; SELECT 'last'")
    show(1, "INSERT INTO line (text) VALUES ('y'); SELECT 1/0")
    show(1, "SELECT 1; SELECT $1::text", {"x"})
    """
    first, second, third, fourth = shown(server, code)
    assert first == "last"
    assert second == third == "error\tdivision by zero"
    assert fourth.startswith("error\tcannot insert multiple commands")
    assert written(server) == ["x"]  # several statements are one transaction


@pytest.mark.parametrize(
    "sql",
    [
        "",
        ";",
        "-- nothing",
        "COPY line FROM STDIN",
        "COPY line TO STDOUT",
        "BEGIN; SELECT 1; COMMIT",
    ],
)
def test_no_statement_wedges_the_connection(server: Postgresql, sql: str) -> None:
    code = f"""
    local result, text = db:execute("{sql}")
    print(type(result), type(text))
    show(1, "SELECT 'goes on'")
    """
    kinds, last = play(with_connection(server, code)).output
    assert kinds in ("userdata\tnil", "nil\tstring")
    assert last == "goes on"


# Results


def test_fetch_has_two_modes_and_fills_the_table_that_it_gets(server: Postgresql) -> None:
    code = """
    local result = db:execute(
      "SELECT i AS a, NULLIF(i, 2) AS \\"B b\\" FROM generate_series(1, 4) AS i")
    local row = {"old", "old", "old", a = "old", other = "kept"}
    local again = result:fetch(row, "a")
    print(again == row, row.a, row["B b"], row[1])
    again = result:fetch(row, "a")
    print(again == row, row.a, row["B b"])
    again = result:fetch(row, "n")
    print(again == row, row[1], row[2])
    again = result:fetch(nil, "a")
    print(again == row, again.a, again["B b"], again[1])
    print(result:fetch(row), result:fetch(), result:fetch({}, "a"))
    """
    output = shown(server, code)
    assert output[0].startswith("true\t1\t1\t")
    assert output[1:] == ["true\t2\tnil", "true\t3\t3", "false\t4\t4\tnil", "nil\tnil\tnil"]


def test_a_table_that_is_used_again_loses_what_is_null_now(server: Postgresql) -> None:
    code = """
    local result = db:execute("SELECT 1, 'x' UNION ALL SELECT 2, NULL ORDER BY 1")
    local row = {}
    while result:fetch(row) do print(row[1], row[2]) end
    """
    assert shown(server, code) == ["1\tx", "2\tnil"]


@pytest.mark.parametrize("mode", ["'x'", "''", "'an'", "1", "'N'"])
def test_an_unknown_mode_raises(server: Postgresql, mode: str) -> None:
    code = f"""
    local result = db:execute("SELECT 1")
    print(pcall(function() result:fetch({{}}, {mode}) end))
    """
    (line,) = shown(server, code)
    assert line.startswith("false\ttest.lua:")
    assert "bad argument #3 to 'fetch' (" in line


def test_fetch_checks_its_arguments(server: Postgresql) -> None:
    code = """
    local result = db:execute("SELECT 1")
    local function try(...)
      local _, text = pcall(...)
      print((text:gsub("^.-test.lua:%d+: ", "")))
    end
    try(function() result:fetch("x") end)
    try(function() result:fetch({}, {}) end)
    try(function() result:fetch({}, "n", nil) end)
    try(function() result.fetch({}) end)
    try(function() result:close(1) end)
    """
    assert shown(server, code) == [
        "bad argument #2 to 'fetch' (table expected, got string)",
        "bad argument #3 to 'fetch' (string expected, got table)",
        "too many arguments to 'fetch' (3 expected, got 4)",
        "bad argument #1 to 'fetch' (result expected, got table)",
        "too many arguments to 'close' (1 expected, got 2)",
    ]


def test_fetching_from_a_closed_result_raises(server: Postgresql) -> None:
    code = """
    local result = db:execute("SELECT 1")
    result:close()
    result:close()
    print(pcall(function() return (result:fetch()) end))
    print(tostring(result))
    """
    first, second = shown(server, code)
    assert first.startswith("false\ttest.lua:")
    assert "closed result" in first
    assert second.startswith("result")


def test_a_result_outlives_its_connection(server: Postgresql) -> None:
    code = """
    local result = assert(db:execute("SELECT 'x'"))
    db = nil
    collectgarbage()
    collectgarbage()
    print(result:fetch()[1])
    """
    assert shown(server, code) == ["x"]


def test_many_rows_and_many_columns_arrive(server: Postgresql) -> None:
    code = """
    local result = assert(db:execute("SELECT i, repeat('x', 100) FROM generate_series(1, 10000) i"))
    local row, count, right = {}, 0, true
    while result:fetch(row) do
      count = count + 1
      right = right and row[1] == tostring(count) and #row[2] == 100
    end
    print(count, right)
    local columns = {}
    for i = 1, 1600 do columns[i] = i .. " AS c" .. i end
    local wide = assert(db:execute("SELECT " .. table.concat(columns, ", "))):fetch({}, "a")
    right = true
    for i = 1, 1600 do right = right and wide["c" .. i] == tostring(i) end
    print(right)
    print(#db:execute("SELECT repeat('x', 20000000)"):fetch()[1])
    """
    assert shown(server, code) == ["10000\ttrue", "true", "20000000"]


def test_large_queries_arrive(server: Postgresql) -> None:
    code = """
    local text = ("x"):rep(5000000)
    show(1, "SELECT length('" .. text .. "')")
    show(1, "SELECT length($1)", {text})
    """
    assert shown(server, code) == ["5000000"] * 2


@pytest.mark.parametrize(
    "elements", ["{}", '{"foo", "b\\"ar", "", "NULL", "a\\\\b", "{x,y}", " "}']
)
def test_arrays_go_there_and_back(server: Postgresql, elements: str) -> None:
    code = f"""
    local elements = {elements}
    local row = assert(db:execute("SELECT $1::text[]", {{pg:encode_array(elements)}})):fetch()
    local again = pg:decode_array(row[1])
    print(#again == #elements)
    for i = 1, #elements do print(again[i] == elements[i]) end
    """
    assert set(shown(server, code)) == {"true"}


# Order, and who waits for whom


def test_queries_of_one_connection_run_in_order(server: Postgresql) -> None:
    names = [str(number) for number in range(100)]
    body = 'assert(write(name .. "a")) assert(write(name .. "b"))'
    printed(with_handler(server, body), *names, limits=Handlers(running=1000))
    texts = written(server)
    assert [text for text in texts if text.endswith("a")] == [f"{name}a" for name in names]
    assert [text for text in texts if text.endswith("b")] == [f"{name}b" for name in names]


def test_a_query_suspends_its_handler_and_nothing_else(server: Postgresql) -> None:
    async def test() -> None:
        with server.locked() as unlock:
            body = f"""
            if name == "slow" then
              print(assert(db:execute("{WAIT_FOR_LOCK}")) and "got it")
            elseif name == "other" then
              local other = pg:new("{server.conninfo} application_name={SCRIPT}")
              print(other:execute("SELECT 1"):fetch()[1])
            else
              print(name)
            end
            """
            async with Stage(with_handler(server, body)) as stage:
                stage.release("slow")
                await waiting(stage, server)
                stage.release("quick", "other")
                await stage.printed("quick", "1")
                assert "got it" not in stage.output()
                unlock()
                assert (await stage.end())[-1] == "got it"

    run(test)


def test_waiting_in_the_queue_is_not_counted_as_the_handler_s_time(server: Postgresql) -> None:
    names = [str(number) for number in range(6)]
    body = 'assert(db:execute("SELECT pg_sleep(0.15)")) print(name)'
    assert printed(with_handler(server, body), *names, limits=Handlers(time=0.5)) == names


def test_a_handler_whose_query_takes_too_long_gets_an_error_with_the_line(
    server: Postgresql,
) -> None:
    with server.locked():
        code = with_handler(server, f'db:execute("{WAIT_FOR_LOCK}")')
        line = code[: code.index(WAIT_FOR_LOCK)].count("\n") + 1
        outcome = play(code, limits=Handlers(time=0.2))
    assert outcome.errors == [f"/test.scope/job: test.lua:{line}: ran longer than 0.2 s"]


def test_a_query_that_nobody_waits_for_any_more_does_not_hold_up_the_next(
    server: Postgresql,
) -> None:
    async def test() -> None:
        body = f"""
        if name == "stuck" then
          db:execute("{WAIT_FOR_LOCK}")
        else
          print(write(name) ~= nil)
        end
        """
        with server.locked():
            async with Stage(with_handler(server, body), Handlers(time=0.3)) as stage:
                stage.release("stuck", "next")
                outcome = await stage.end_all()
                assert "ran longer than 0.3 s" in outcome.errors[0]
                assert outcome.output == ["true"]
        assert written(server) == ["next"]

    run(test)


# Transactions


def test_a_transaction_belongs_to_the_handler_that_began_it(server: Postgresql) -> None:
    async def test() -> None:
        body = f"""
        if name ~= "owner" then assert(write(name)) return end
        assert(db:execute("BEGIN"))
        assert(write("owner 1"))
        assert(db:execute("{WAIT_FOR_LOCK}"))
        assert(write("owner 2"))
        assert(db:execute("COMMIT"))
        """
        with server.locked() as unlock:
            async with Stage(with_handler(server, body)) as stage:
                stage.release("owner", "one", "two")
                await waiting(stage, server)
                assert written(server) == []
                unlock()
                await stage.end()
        assert written(server) == ["owner 1", "owner 2", "one", "two"]

    run(test)


def test_a_transaction_reaches_into_the_coroutines_of_its_handler(server: Postgresql) -> None:
    body = """
    assert(db:execute("BEGIN"))
    coroutine.wrap(function() assert(write("inner")) end)()
    for text in coroutine.wrap(function()
      for i = 1, 2 do assert(write("step")) coroutine.yield("text " .. i) end
    end) do assert(write(text)) end
    assert(db:execute("COMMIT"))
    """
    assert printed(with_handler(server, body)) == []
    assert written(server) == ["inner", "step", "text 1", "step", "text 2"]


def test_a_transaction_may_be_rolled_back_and_survives_errors(server: Postgresql) -> None:
    body = """
    assert(db:execute("START TRANSACTION"))
    assert(write("lost"))
    print(db:execute("SELECT 1/0"))
    print(write("refused"))
    assert(db:execute("ROLLBACK"))
    assert(db:execute("begin; select 1"))
    assert(write("kept"))
    assert(db:execute("SAVEPOINT here"))
    assert(write("lost, too"))
    assert(db:execute("ROLLBACK TO here"))
    assert(db:execute("END"))
    """
    first, second = printed(with_handler(server, body))
    assert first == "nil\tdivision by zero"
    assert second.startswith("nil\tcurrent transaction is aborted")
    assert written(server) == ["kept"]


ENDS: Final = {
    "ends": ("", []),
    "raises": ('error("on purpose")', ["on purpose"]),
    "parks": ("coroutine.yield()", []),
    "runs too long": (f'db:execute("{WAIT_FOR_LOCK}")', ["ran longer than 0.4 s"]),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_transaction_that_its_handler_leaves_open_is_rolled_back_and_that_is_logged(
    how: str, server: Postgresql
) -> None:
    code, reasons = ENDS[how]
    body = f"""
    if name == "other" then assert(write(name)) return end
    assert(db:execute("BEGIN"))
    assert(write("lost"))
    {code}
    """
    with server.locked():
        outcome = play(with_handler(server, body), "owner", "other", limits=Handlers(time=0.4))
    assert written(server) == ["other"]
    rest = [line for line in outcome.errors if not any(reason in line for reason in reasons)]
    assert len(rest) == len(outcome.errors) - len(reasons) == 1
    assert "rolled back" in rest[0]


def test_a_transaction_that_the_main_chunk_leaves_open_is_rolled_back(server: Postgresql) -> None:
    code = """
    assert(db:execute("BEGIN"))
    assert(write("lost"))
    function cgroup_released() assert(write("kept")) end
    """
    outcome = play(with_connection(server, code))
    assert written(server) == ["kept"]
    assert len(outcome.errors) == 1
    assert "rolled back" in outcome.errors[0]


def test_a_transaction_does_not_go_on_in_another_connection(server: Postgresql) -> None:
    async def test() -> None:
        body = f"""
        if name == "other" then assert(write(name)) return end
        assert(db:execute("BEGIN"))
        assert(write("lost"))
        local control = pg:new("{server.conninfo}")
        print("ready")
        assert(control:execute("{WAIT_FOR_LOCK}"))
        print(write("half"))
        print(db:execute("COMMIT"))
        """
        with server.locked() as unlock:
            async with Stage(with_handler(server, body)) as stage:
                stage.release("owner")
                await stage.printed("ready")
                await waiting(stage, server)
                server.terminate(SCRIPT)
                stage.release("other")
                unlock()
                outcome = await stage.end_all()
                assert outcome.output[1].startswith("nil\t")
        assert written(server) == ["other"]

    run(test)


def test_a_query_that_finds_its_transaction_s_connection_lost_is_not_done_outside_it(
    server: Postgresql,
) -> None:
    body = f"""
    assert(db:execute("BEGIN"))
    assert(write("lost"))
    {unnoticed_end_of_connection(server)}
    print(write("half"))
    print(db:execute("COMMIT"))
    assert(write("after"))
    """
    outcome = play(with_handler(server, body), "owner")
    assert [line.startswith("nil\t") for line in outcome.output] == [True, True]
    assert written(server) == ["after"]


def test_a_transaction_whose_end_was_lost_with_the_connection_does_not_go_on(
    server: Postgresql,
) -> None:
    body = f"""
    assert(db:execute("BEGIN"))
    {unnoticed_end_of_connection(server)}
    print(db:execute("COMMIT"))
    assert(db:execute("BEGIN"))
    assert(write("second try"))
    assert(db:execute("COMMIT"))
    """
    outcome = play(with_handler(server, body), "owner")
    assert [line.startswith("nil\t") for line in outcome.output] == [True]
    assert written(server) == ["second try"]


# A server that is away


def test_a_server_that_is_absent_at_start_is_waited_for(server: Postgresql) -> None:
    async def test() -> None:
        server.stop()
        code = with_handler(server, "print(write(name) ~= nil)")
        async with Stage(code, Handlers(time=0.2)) as stage:
            stage.release("a", "b", "c")
            await stage.logged("No such file or directory")
            await asyncio.sleep(0.3)  # longer than handlers may take otherwise
            assert stage.output() == []
            server.start()
            await stage.until("all is written", lambda: len(stage.output()) == 3, 15)
            assert (await stage.end_all()).output == ["true"] * 3
        assert written(server) == ["a", "b", "c"]

    run(test, 40)


def test_the_main_chunk_waits_for_a_server_that_is_absent(server: Postgresql) -> None:
    async def test() -> None:
        server.stop()
        code = with_connection(server, "show(1, \"SELECT 'there'\")")
        starting = asyncio.get_running_loop().call_later(0.2, server.start)
        async with Stage(code) as stage:
            assert starting.when() < asyncio.get_running_loop().time()
            assert stage.output() == ["there"]

    run(test)


def test_a_killed_server_fails_the_query_in_flight_and_the_others_wait_for_its_return(
    server: Postgresql,
) -> None:
    async def test() -> None:
        body = f"""
        if name == "in flight" then
          local result, text = db:execute("{WAIT_FOR_LOCK}")
          print(result, type(text))
        else
          assert(write(name))
        end
        """
        with server.locked():
            async with Stage(with_handler(server, body), Handlers(time=0.6)) as stage:
                stage.release("in flight")
                await waiting(stage, server)
                stage.release("queued 1", "queued 2")
                server.kill()
                await stage.printed("nil\tstring")
                stage.release("later 1", "later 2")
                await asyncio.sleep(0.7)  # longer than handlers may take otherwise
                server.start()
                await stage.until("all is written", lambda: len(written(server)) == 4, 15)
                outcome = await stage.end_all()
                assert not [line for line in outcome.errors if "ran longer" in line]
        assert written(server) == ["queued 1", "queued 2", "later 1", "later 2"]

    run(test, 40)


def test_after_an_idle_connection_was_ended_the_next_query_works(server: Postgresql) -> None:
    async def test() -> None:
        async with Stage(with_handler(server, "print(name, write(name))")) as stage:
            for name in ("one", "two", "three"):
                stage.release(name)  # before the event loop sees that the connection is gone
                await stage.until("it is done", partial(has_printed, stage, name))
                server.terminate(SCRIPT)
            lines = (await stage.end_all()).output
            assert [line.split()[:2] for line in lines] == [
                *(["one", "result"], ["two", "result"], ["three", "result"]),
            ]
        assert written(server) == ["one", "two", "three"]

    def has_printed(stage: Stage, name: str) -> bool:
        return any(line.startswith(name) for line in stage.output())

    run(test)


def test_a_lost_connection_is_made_again_at_once_the_first_time(server: Postgresql) -> None:
    async def test() -> None:
        async with Stage(with_connection(server, "")) as stage:
            await stage.until("it connects", lambda: server.backends(SCRIPT) != [])
            (before,) = server.backends(SCRIPT)
            await asyncio.sleep(1.1)  # one that ends sooner counts as a failed attempt
            server.terminate(SCRIPT)
            await stage.until("it connects again", lambda: server.backends(SCRIPT) != [], 1)
            assert server.backends(SCRIPT) != [before]

    run(test)


def test_a_connection_in_flight_that_is_ended_gives_an_error(server: Postgresql) -> None:
    async def test() -> None:
        body = f'print(db:execute("{WAIT_FOR_LOCK}")) print(write("after") ~= nil)'
        with server.locked():
            async with Stage(with_handler(server, body)) as stage:
                stage.release("job")
                await waiting(stage, server)
                server.terminate(SCRIPT)
                first, second = (await stage.end_all()).output
                assert first.startswith("nil\t")
                assert "terminating connection due to administrator command" in first
                assert second == "true"

    run(test)


@pytest.mark.parametrize(
    ("conninfo", "reason"),
    [
        ("host=/nonexistent password=geheim", "No such file or directory"),
        ("{conninfo} dbname=absent password=geheim", 'database "absent" does not exist'),
        ("postgresql://x:geheim@%2Fnonexistent/x", "No such file or directory"),
    ],
)
def test_a_failure_to_connect_is_logged_with_the_reason_and_without_the_password(
    server: Postgresql, conninfo: str, reason: str
) -> None:
    async def test() -> None:
        async with Stage(f'db = pg:new("{conninfo.format(conninfo=server.conninfo)}")') as stage:
            await stage.logged(reason)
            assert not [line for line in stage.errors() if "geheim" in line]

    run(test)


def test_the_schema_is_set_after_each_connect(server: Postgresql) -> None:
    server.query('CREATE SCHEMA IF NOT EXISTS "we""ird Schema"')

    async def test() -> None:
        code = """
        function cgroup_released() show(1, "SELECT current_schema()") end
        """
        async with Stage(with_connection(server, code, "'we\"ird Schema'")) as stage:
            stage.release("one")
            await stage.printed('we"ird Schema')
            server.terminate(SCRIPT)
            stage.release("two")
            assert (await stage.end_all()).output == ['we"ird Schema'] * 2

    run(test)


def test_a_connection_that_is_collected_is_closed(server: Postgresql) -> None:
    async def test() -> None:
        body = """
        if name == "query" then
          show(1, "SELECT 1")
          db = nil
        else
          collectgarbage()
          collectgarbage()
        end
        """
        async with Stage(with_handler(server, body)) as stage:
            stage.release("query")
            await stage.printed("1")
            assert len(server.backends(SCRIPT)) == 1
            stage.release("collect", "collect")
            await stage.until("it is closed", lambda: server.backends(SCRIPT) == [])
            await stage.end()

    run(test)


# LISTEN


async def notified(stage: Stage, server: Postgresql, name: str, line: str) -> None:
    """Notify NAME until its function has printed LINE: it may not be listened to yet."""

    def heard() -> bool:
        server.query("SELECT pg_notify(%s, '')", [name])
        return line in stage.output()

    await stage.until(f"{name} is heard", heard)


@pytest.mark.parametrize("name", ["simple", 'Wei"rd Näme; --', "x" * 63])
def test_a_notification_runs_the_function(server: Postgresql, name: str) -> None:
    async def test() -> None:
        quoted = name.replace('"', '\\"')
        code = f"""
        db:listen("{quoted}", function()
          print("heard")
          show(1, "SELECT 'asked'")
          coroutine.yield()
        end)
        """
        async with Stage(with_connection(server, code)) as stage:
            await notified(stage, server, name, "heard")
            await stage.printed("asked")
            await stage.end()

    run(test)


def test_notifications_that_come_while_the_function_runs_make_it_run_once_more(
    server: Postgresql,
) -> None:
    async def test() -> None:
        code = f"""
        local other = pg:new("{server.conninfo} application_name={SCRIPT}")
        db:listen("work", function()
          print("begin")
          other:execute("{WAIT_FOR_LOCK}")
          print("end")
        end)
        db:listen("marker", function() print("marker") end)
        """

        def notify(name: str) -> None:
            server.query("SELECT pg_notify(%s, '')", [name])

        with server.locked() as unlock:
            async with Stage(with_connection(server, code)) as stage:
                await notified(stage, server, "marker", "marker")
                notify("work")
                await stage.printed("begin")
                for _ in range(3):
                    notify("work")
                count = stage.output().count("marker")
                notify("marker")  # comes after all the others
                await stage.until("it has come", lambda: stage.output().count("marker") > count)
                assert stage.output().count("begin") == 1
                unlock()
                await stage.until("it ran again", lambda: stage.output().count("end") == 2)
                count = stage.output().count("marker")
                notify("marker")
                await stage.until("it has come", lambda: stage.output().count("marker") > count)
                runs = [line for line in await stage.end() if line != "marker"]
                assert runs == ["begin", "end"] * 2

    run(test)


def test_listening_goes_on_after_a_restart(server: Postgresql) -> None:
    async def test() -> None:
        code = """
        local count = 0
        db:listen("news", function() count = count + 1 print("news " .. count) end)
        """
        async with Stage(with_connection(server, code)) as stage:
            await notified(stage, server, "news", "news 1")
            server.kill()
            server.start()
            count = len(stage.output())
            await stage.until("it connects again", lambda: server.backends(SCRIPT) != [], 15)
            await notified(stage, server, "news", f"news {count + 1}")
            await stage.end_all()

    run(test, 40)


def test_a_connection_that_listens_is_never_collected(server: Postgresql) -> None:
    async def test() -> None:
        code = """
        do
          local own = db
          db = nil
          own:listen("news", function() print("heard") end)
        end
        collectgarbage()
        collectgarbage()
        """
        async with Stage(with_connection(server, code)) as stage:
            await notified(stage, server, "news", "heard")

    run(test)


def test_a_function_that_fails_is_logged_and_called_again(server: Postgresql) -> None:
    async def test() -> None:
        code = """
        local count = 0
        db:listen("news", function()
          count = count + 1
          if count == 1 then error("on purpose") end
          print("again")
        end)
        """
        async with Stage(with_connection(server, code)) as stage:
            await notified(stage, server, "news", "again")
            (line,) = stage.errors()
            assert "test.lua:" in line
            assert line.endswith(": on purpose")

    run(test)


def test_notifications_arrive_while_the_connection_is_busy_and_idle(server: Postgresql) -> None:
    async def test() -> None:
        code = f"""
        db:listen("news", function() print("heard") end)
        function cgroup_released() db:execute("{WAIT_FOR_LOCK}") print("done") end
        """
        with server.locked() as unlock:
            async with Stage(with_connection(server, code)) as stage:
                await notified(stage, server, "news", "heard")
                stage.release("job")
                await waiting(stage, server)
                count = stage.output().count("heard")
                server.query("NOTIFY news")
                unlock()
                await stage.printed("done")
                await stage.until("it is heard", lambda: stage.output().count("heard") > count)
                await stage.end()

    run(test)


# The daemon


def test_stopping_does_not_wait_for_a_query_for_ever(server: Postgresql) -> None:
    async def test() -> Outcome:
        with server.locked():
            code = with_handler(server, f'db:execute("{WAIT_FOR_LOCK}")')
            async with Stage(code) as stage:
                stage.release("job")
                await waiting(stage, server)
                assert await stage.finish(0.1) == 1
                return stage.outcome()

    assert run(test).output == []


def test_handlers_whose_transactions_wait_for_each_other_are_ended(server: Postgresql) -> None:
    code = f"""
    local one, other = pg:new("{server.conninfo}"), pg:new("{server.conninfo}")
    local function transaction(mine, others, name)
      assert(mine:execute("BEGIN"))
      assert(mine:execute("SELECT pg_sleep(0.1)"))
      print(name, others:execute("SELECT 1"))
    end
    function cgroup_released(cgroup)
      if cgroup.path:match("one$") then
        transaction(one, other, "one")
      elseif cgroup.path:match("other$") then
        transaction(other, one, "other")
      else
        print("after", one:execute("SELECT 1"):fetch()[1], other:execute("SELECT 1"):fetch()[1])
      end
    end
    """

    async def test() -> None:
        async with Stage(code, Handlers(time=0.5)) as stage:
            stage.release("one", "other")
            await stage.until("they are ended", lambda: "rolled back" in "".join(stage.errors()))
            stage.release("after")
            await stage.printed("after\t1\t1")
            assert "ran longer than 0.5 s" in "".join(stage.errors())
            await stage.finish(5)

    run(test)


def test_rows_go_into_tables_whatever_their_metatables_say(server: Postgresql) -> None:
    body = """
    local result = db:execute("SELECT 1 AS a")
    local refusing = setmetatable({}, {__newindex = function() error("refused") end})
    print(result:fetch(refusing, "a") == refusing, rawget(refusing, "a"))
    """
    assert printed(with_handler(server, body)) == ["true\t1"]


def test_a_transaction_that_is_lost_stays_lost_until_its_handler_ends_it(
    server: Postgresql,
) -> None:
    body = f"""
    db:execute("BEGIN")
    print(db:execute("{WAIT_FOR_LOCK}"))
    for _, sql in ipairs{{"SELECT 1", "SELECT 1", "COMMIT", "SELECT 1"}} do
      print(db:execute(sql) ~= nil)
    end
    """

    async def test() -> None:
        with server.locked():
            async with Stage(with_handler(server, body)) as stage:
                stage.release("job")
                await waiting(stage, server)
                server.terminate(SCRIPT)
                output = (await stage.end_all()).output
                assert output[1:] == ["false", "false", "false", "true"]

    run(test)


def test_a_server_that_does_not_answer_what_we_ask_of_our_own_is_given_up(
    server: Postgresql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LIMIT", 0.2)
    monkeypatch.setattr(link, "_CANCEL_LIMIT", 0.2)
    body = """
    if name == "first" then
      print(db:execute("SELECT pg_backend_pid()"):fetch()[1])
    else
      db:listen("silence", function() end)
      print(db:execute("SELECT 1"):fetch()[1])
    end
    """

    async def test() -> None:
        async with Stage(with_handler(server, body)) as stage:
            stage.release("first")
            await stage.until("it has a connection", lambda: bool(stage.output()))
            pid = int(stage.output()[0])
            os.kill(pid, signal.SIGSTOP)
            try:
                stage.release("second")
                await stage.printed("1")
            finally:
                os.kill(pid, signal.SIGCONT)
            assert "the server does not end a query" in "".join((await stage.end_all()).errors)

    run(test)


def test_connections_that_nobody_uses_any_more_do_not_add_up(server: Postgresql) -> None:
    code = f"""
    function cgroup_released(cgroup)
      local db = pg:new("{server.conninfo}")
      print(db:execute("SELECT count(*) < 30 FROM pg_stat_activity"):fetch()[1])
    end
    """
    names = [f"job-{number}" for number in range(120)]
    assert printed(code, *names, limits=Handlers(running=5)) == ["t"] * len(names)


def test_ending_a_query_for_its_time_does_not_end_those_of_others(server: Postgresql) -> None:
    body = """
    local seconds = name:match("^slow") and 30 or 0.001
    print(name, db:execute("SELECT $1::text, pg_sleep($2)", {name, seconds}) ~= nil)
    """
    names = [f"slow-{n}" if n % 3 == 0 else f"quick-{n}" for n in range(24)]
    outcome = play(with_handler(server, body), *names, limits=Handlers(time=0.5))
    quick = [f"{name}\ttrue" for name in names if name.startswith("quick")]
    assert sorted(outcome.output) == sorted(quick)
    assert len(outcome.errors) == 8
    assert all("ran longer than 0.5 s" in line for line in outcome.errors)
