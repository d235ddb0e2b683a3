"""What a script can rely on, and what it cannot do to the daemon."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest

from tests.tools.harness import DEADLINE, Cgroup, Host, Reaper, wait_for


def run_jobs(scope: Cgroup, reaper: Reaper, *names: str) -> None:
    """Run jobs one after the other, each when the one before is gone."""
    for name in names:
        scope.make(name).run()
        wait_for("it is gone", lambda: scope.children() == ["_"])


def complaints(reaper: Reaper) -> list[str]:
    """Return what the daemon said besides releases and scopes."""
    return [line for line in reaper.errors() if re.search(r"\.lua:\d+:", line)]


def has_printed(reaper: Reaper, count: int) -> bool:
    """Whether the script has printed COUNT lines."""
    return len(reaper.output()) >= count


def printed_by(host: Host, scope: Cgroup, script: str, *names: str) -> list[str]:
    """Run jobs NAMES under SCRIPT and return what it printed; it must not fail."""
    reaper = host.reaper(scope, script=script)
    run_jobs(scope, reaper, *(names or ["job"]))
    reaper.stop()
    assert complaints(reaper) == []
    return reaper.output()


def test_every_statistic_of_this_kernel_arrives_and_the_rest_is_nil(
    host: Host, scope: Cgroup
) -> None:
    script = """
    function cgroup_released(c)
      for _, name in ipairs{"cpu_total", "cpu_user", "cpu_system", "age", "btime",
                            "cpu_pressure", "memory_pressure", "io_pressure"} do
        print(name, type(c[name]))
      end
      for _, name in ipairs{"memory_peak", "memory_swap_peak", "memory_events_high",
          "memory_events_max", "memory_events_oom", "memory_events_oom_kill", "pids_peak",
          "pids_forks", "pids_events_max", "io_read_bytes", "io_write_bytes",
          "io_read_operations", "io_write_operations", "cpu_throttled",
          "cpu_throttled_periods", "nonsense"} do
        print(name, c[name] == nil or type(c[name]) == "number")
      end
      print(c.cpu_total == c.own.cpu_total, c.own.memory_peak)
    end
    """
    output = printed_by(host, scope, script)
    assert all(line.endswith(("\tnumber", "\ttrue", "true\tnil")) for line in output), output
    assert len(output) == 25


def test_parents_give_their_own_statistics_up_to_the_top(host: Host, scope: Cgroup) -> None:
    script = """
    function cgroup_released(c)
      local p = c.parent
      while p do
        print(p.path, p.cpu_total >= c.cpu_total, type(p.cpu_pressure), p.nonsense)
        p = p.parent
      end
    end
    """
    output = printed_by(host, scope, script)
    path = host.path_of(scope)
    base = path.rpartition("/")[0]
    assert output == [f"{path}\ttrue\tnumber\tnil", f"{base}\ttrue\tnumber\tnil"]


def test_objects_are_stale_after_the_handler_has_ended(host: Host, scope: Cgroup) -> None:
    script = """
    local kept
    function cgroup_released(c)
      if kept then
        for _, object in ipairs(kept) do print(pcall(function() return object.path end)) end
        print(pcall(tostring, kept[1]))
      else
        kept = {c, c.parent, c.xattr, c.parent.xattr, c.parent.parent}
        own = c.own
      end
      print(own.cpu_total > 0)
    end
    """
    output = printed_by(host, scope, script, "one", "two")
    assert [line.rpartition(" ")[2] for line in output[1:6]] == ["object"] * 5
    assert all("Stale object" in line for line in output[1:7])
    assert output[7] == "true"  # plain numbers stay


def test_objects_cannot_be_changed(host: Host, scope: Cgroup) -> None:
    script = """
    function cgroup_released(c)
      print(pcall(function() c.path = "x" end))
      print(pcall(function() c.xattr.account = "x" end))
      print(pcall(function() c.parent.path = "x" end))
      print(getmetatable(c), type(c))
    end
    """
    output = printed_by(host, scope, script)
    assert ["read-only" in line for line in output] == [True, True, True, False]
    assert output[3] == "cgroup\tuserdata"


def test_an_error_is_logged_with_file_line_and_path_and_stops_nothing(
    host: Host, scope: Cgroup
) -> None:
    script = """
    function cgroup_released(c)
      local nothing
      if c.path:match("one$") then return nothing.field end
      if c.path:match("two$") then error({}) end
      if c.path:match("three$") then error("plain", 0) end
      print("fine")
    end
    """
    reaper = host.reaper(scope, script=script)
    run_jobs(scope, reaper, "one", "two", "three", "four")
    reaper.stop()
    file = host.directory / "reaper.lua"
    path = host.path_of(scope)
    assert complaints(reaper) == [
        f"{path}/one: {file}:4: attempt to index local 'nothing' (a nil value)",
        f"{path}/two: {file}:5: (error object is a table value)",
        f"{path}/three: {file}:6: plain",
    ]
    assert reaper.output() == ["fine"]


def test_a_handler_may_park_itself_and_be_resumed_by_a_later_one(host: Host, scope: Cgroup) -> None:
    script = """
    function cgroup_released(c)
      if not parked then
        parked = coroutine.running()
        local before = c.path
        print(coroutine.yield())
        print(c.path == before)  -- its own object is alive for as long as it is
        error("at the end")
      end
      print(coroutine.resume(parked, "hello"))
      print(coroutine.status(parked))
    end
    """
    reaper = host.reaper(scope, script=script)
    run_jobs(scope, reaper, "one", "two")
    reaper.stop()
    file = host.directory / "reaper.lua"
    assert reaper.output() == ["hello", "true", f"false\t{file}:8: at the end", "dead"]
    assert complaints(reaper) == [f"{host.path_of(scope)}/one: {file}:8: at the end"]


def test_a_handler_that_parked_itself_for_ever_is_collected(host: Host, scope: Cgroup) -> None:
    script = """
    collected = 0
    function cgroup_released(c)
      local sentinel = newproxy(true)
      getmetatable(sentinel).__gc = function() collected = collected + 1 end
      if c.path:match("last$") then
        sentinel = nil
        collectgarbage()
        collectgarbage()
        print(collected)
      else
        coroutine.yield(sentinel)
      end
    end
    """
    output = printed_by(host, scope, script, "one", "two", "three", "last")
    assert int(output[0]) >= 2  # the one before last may still be on a stack


def test_reload_is_called_and_cannot_replace_the_handler(host: Host, scope: Cgroup) -> None:
    script = """
    function cgroup_released() print("first") end
    function reload()
      function cgroup_released() print("second") end
      print("reloaded")
    end
    """
    reaper = host.reaper(scope, script=script)
    reaper.process.send_signal(1)
    wait_for("it is reloaded", partial(has_printed, reaper, 1))
    reaper.wait_notification("READY=1", 2)
    assert any(line.startswith("MONOTONIC_USEC=") for line in reaper.notifications)
    run_jobs(scope, reaper, "job")
    reaper.stop()
    assert reaper.output() == ["reloaded", "first"]


@pytest.mark.parametrize(
    "body",
    [
        "while true do end",
        "while true do pcall(function() while true do end end) end",
        "local function f() return f() end f()",
        "coroutine.wrap(function() while true do end end)()",
        "while true do pcall(debug.sethook) end",
    ],
    ids=["loop", "protected loop", "tail calls", "coroutine", "without the hook"],
)
def test_a_handler_that_spins_is_ended_and_the_next_one_runs(
    host: Host, scope: Cgroup, body: str
) -> None:
    script = f"""
    function cgroup_released(c)
      if c.path:match("one$") then
        {body}
      end
      print("fine")
    end
    """
    reaper = host.reaper(scope, script=script, settings="[handlers]\ncpu = 0.2")
    run_jobs(scope, reaper, "one", "two")
    reaper.stop()
    assert reaper.output() == ["fine"]
    (line,) = complaints(reaper)
    assert line.endswith(":4: used more than 0.2 s of CPU time")


def test_a_handler_that_takes_too_much_memory_is_ended_and_the_next_one_runs(
    host: Host, scope: Cgroup
) -> None:
    script = """
    function cgroup_released(c)
      local hoard = {}
      while c.path:match("one$") do
        hoard[#hoard + 1] = ("x"):rep(100000) .. #hoard
      end
      print("fine")
    end
    """
    reaper = host.reaper(scope, script=script, settings="[handlers]\nmemory = 40")
    run_jobs(scope, reaper, "one", "two")
    reaper.stop()
    assert reaper.output() == ["fine"]
    (line,) = complaints(reaper)
    assert re.search(r":[45]: used more than 40 MB of memory$", line)


def test_a_script_gets_what_debian_s_luajit_offers_and_no_python(host: Host, scope: Cgroup) -> None:
    script = """
    local cjson = require "cjson"
    print(cjson.encode({1, 2}), _VERSION, python, package.loaded.python)
    jit.on()
    print((jit.status()), (pcall(require, "python")))
    """
    reaper = host.reaper(scope, script=script)
    reaper.stop()
    assert reaper.output() == ["[1,2]\tLua 5.1\tnil\tnil", "false\tfalse"]


def test_print_and_write_are_seen_at_once_through_a_pipe(host: Host, scope: Cgroup) -> None:
    pipe = host.directory / "pipe"
    os.mkfifo(pipe)
    reaper = host.start_reaper(
        scope,
        script="print('printed') io.write('written\\n')",
        wrapper=["sh", "-c", f'exec "$@" > {pipe}', "sh"],
    )
    with pipe.open() as reader:
        assert [reader.readline(), reader.readline()] == ["printed\n", "written\n"]
        reaper.wait_ready().stop()


def test_pressure_is_recorded_when_the_settings_ask_for_it(host: Host, scope: Cgroup) -> None:
    script = """
    local waiting = {}
    function cgroup_released(c)
      if #waiting == 1 then coroutine.resume(waiting[1]) end
      waiting[#waiting + 1] = coroutine.running()
      coroutine.yield()  -- until the directory is gone
      print(c.cpu_pressure, c.memory_pressure, c.io_pressure)
    end
    """
    reaper = host.reaper(scope, script=script, settings="pressure = true")
    run_jobs(scope, reaper, "one", "two")
    reaper.stop()
    assert re.fullmatch(r"[\d.e-]+\t[\d.e-]+\t[\d.e-]+", reaper.output()[0])


def test_pressure_is_nil_once_the_directory_is_gone(host: Host, scope: Cgroup) -> None:
    script = """
    function cgroup_released(c)
      if parked then coroutine.resume(parked) end
      parked = coroutine.running()
      coroutine.yield()
      print(c.cpu_pressure, c.cpu_total > 0, c.xattr.account)
    end
    """
    reaper = host.reaper(scope, script=script)
    scope.make("one", account=b"alice")
    run_jobs(scope, reaper, "one", "two")
    reaper.stop()
    assert reaper.output() == ["nil\ttrue\talice"]


def test_nothing_is_read_of_another_cgroup_that_has_got_the_same_name(
    host: Host, scope: Cgroup
) -> None:
    """The handler goes on when both NAME and NAME/job are others than those of its release."""
    script = """
    local parked
    function cgroup_released(c)
      if c.path:match("/name/job$") and not parked then
        parked = coroutine.running()
        print(type(c.cpu_pressure), type(c.parent.cpu_total), c.parent.xattr["user.none"])
        coroutine.yield()
        print(c.cpu_pressure, c.parent.cpu_total, c.parent.xattr["user.account"],
          c.parent.parent.path, type(c.parent.parent.cpu_total))
      elseif c.path:match("/go$") then
        coroutine.resume(parked)
      end
    end
    """
    reaper = host.reaper(scope, script=script)
    scope.make("name", account=b"alice")
    run_jobs(scope, reaper, "name/job")
    scope.make("name", account=b"bob")
    again = scope.make("name/job").start()
    scope.make("go").run()
    wait_for("it went on", partial(has_printed, reaper, 2))
    again.kill()
    again.wait()
    reaper.stop()
    path = host.path_of(scope)
    assert reaper.output() == ["number\tnumber\tnil", f"nil\tnil\talice\t{path}\tnumber"]


@contextmanager
def busy_server() -> Iterator[tuple[str, socket.socket]]:
    """Yield address and socket of a server with no room for one more connection."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind("")  # the kernel chooses an abstract name
        server.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(server.getsockname())
        yield "@" + server.getsockname()[1:].decode(), server


def accept_all(server: socket.socket, stopped: threading.Event) -> None:
    """Accept connections until told to stop."""
    server.settimeout(0.05)
    while not stopped.is_set():
        with suppress(TimeoutError):
            server.accept()[0].close()


CONNECTING = """
local settings = { type = "stream" }
function cgroup_released(cgroup)
  assert(socket:connect("%s", settings))
  print(cgroup.path:match("[^/]+$"))
end
"""


def test_with_a_full_queue_cgroups_stay_until_there_is_room(host: Host, scope: Cgroup) -> None:
    names = [f"job-{number}" for number in range(8)]
    with busy_server() as (address, server), ExitStack() as stack:
        settings = "[handlers]\nrunning = 2\nqueue = 3\n"
        reaper = host.reaper(scope, script=CONNECTING % address, settings=settings)
        run_jobs(scope, reaper, *names[:5])
        for name in names[5:]:
            scope.make(name).run()
        full = "too many releases wait for handlers; cgroups stay until there is room"
        wait_for("it says so", lambda: full in reaper.errors())
        assert scope.children() == ["_", *names[5:]]
        stopped = threading.Event()
        thread = threading.Thread(target=accept_all, args=(server, stopped))
        thread.start()
        stack.callback(thread.join)
        stack.callback(stopped.set)
        wait_for("all are handled", partial(has_printed, reaper, len(names)))
        wait_for("all are gone", lambda: scope.children() == ["_"])
        reaper.stop()
    assert sorted(reaper.output()) == names
    assert "there is room for releases again" in reaper.errors()


def test_a_scope_that_goes_away_is_released_even_with_a_full_queue(
    host: Host, scope: Cgroup
) -> None:
    with busy_server() as (address, _):
        settings = "stop = 0\n[handlers]\nrunning = 1\nqueue = 1\n"
        reaper = host.reaper(scope, script=CONNECTING % address, settings=settings)
        run_jobs(scope, reaper, "one", "two")
        scope.make("three").run()
        wait_for("it is held", lambda: any("too many" in line for line in reaper.errors()))
        (scope.directory / "cgroup.kill").write_text("1")
        wait_for("all are released", lambda: scope.children() == [])
        reaper.stop()
    released = [line.partition(":")[0] for line in reaper.errors() if " since=" in line]
    assert sorted(released) == ["one", "three", "two"]


def test_the_daemon_can_be_ended_while_its_script_waits_at_the_start(
    host: Host, scope: Cgroup
) -> None:
    with busy_server() as (address, _):
        script = f'print("connects") socket:connect("{address}")'
        reaper = host.start_reaper(scope, script=script)
        wait_for("it waits", partial(has_printed, reaper, 1))
        reaper.stop()
    assert "READY=1" not in reaper.notifications


def test_a_start_that_waits_for_a_database_is_bounded(host: Host, scope: Cgroup) -> None:
    script = 'local db = pg:new("host=/nonexistent")\nassert(db:execute("SELECT 1"))\n'
    reaper = host.start_reaper(scope, script=script, settings="[handlers]\ntime = 0.2\n")
    assert reaper.process.wait(DEADLINE) == 1
    assert reaper.errors()[-1].endswith("reaper.lua:2: ran longer than 0.2 s")


def test_endless_recursion_through_functions_of_lua_does_not_crash_the_daemon(
    host: Host, scope: Cgroup
) -> None:
    script = """
    local function through_gsub() return (("x"):gsub(".", through_gsub)) end
    local function through_coroutines() return coroutine.wrap(through_coroutines)() end
    local function through_sort() table.sort({1, 2, 3}, through_sort) end
    function cgroup_released(cgroup)
      print(pcall(through_gsub))
      print(pcall(through_coroutines))
      print(pcall(through_sort))
    end
    """
    reaper = host.reaper(scope, script=script, settings="[handlers]\ncpu = 600")
    run_jobs(scope, reaper, "job")
    reaper.stop()
    assert complaints(reaper) == []
    output = reaper.output()
    assert output == [
        "false\tstack overflow",
        "false\ttoo many coroutines resume each other",
        "false\tstack overflow",
    ]


def test_work_that_is_mostly_ours_counts_for_the_cpu_limit(host: Host, scope: Cgroup) -> None:
    script = """
    function cgroup_released(cgroup)
      local a = 0
      while true do local x = cgroup.own a = a + 1 a = a + 1 a = a + 1 end
    end
    """
    reaper = host.reaper(scope, script=script, settings="[handlers]\ncpu = 0.05\n")
    names = [f"job-{number}" for number in range(10)]
    run_jobs(scope, reaper, *names)
    wait_for("all are ended", lambda: len(complaints(reaper)) == len(names))
    reaper.stop()


def test_releases_are_handled_after_others_that_wait_have_ended(host: Host, scope: Cgroup) -> None:
    with busy_server() as (address, server):
        script = f"""
        function reload() assert(socket:connect("{address}")) end
        function cgroup_released(cgroup) print(cgroup.path:match("[^/]+$")) end
        """
        reaper = host.reaper(scope, script=script, settings="[handlers]\nrunning = 1\n")
        reaper.signal(signal.SIGHUP)
        reaper.wait_notification("RELOADING=1")
        run_jobs(scope, reaper, "job")
        assert reaper.output() == []
        server.accept()[0].close()
        server.accept()[0].close()
        wait_for("it is handled", partial(has_printed, reaper, 1))
        reaper.stop()
