"""What a script can do to its own process, and that nothing of it reaches the reaper.

Each mistake happens beside honest jobs: these must be deleted as if it did not, and handled once
its process was replaced.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import pytest

from spawn_common import linux
from tests.tools.extent import extent
from tests.tools.harness import RECORD, Cgroup, Host, Reaper, spawn, spawner_command, wait_for
from tests.tools.standing import readable_to_all

HONEST = 50  # jobs before a mistake, and after it
PREAMBLE = """
local ffi = require("ffi")
ffi.cdef[[
  int close(int);
  int ftruncate(int, long);
  void _exit(int);
  int fork(void);
  void *malloc(size_t);
  int setsid(void);
  int dup2(int, int);
  int raise(int);
  long readlink(const char *, char *, unsigned long);
  long write(int, const void *, unsigned long);
]]

local function endless() while true do end end

-- Calls with descriptor and target of each link of that kind, such as memfd.
local function each_link(kind, call)
  local target = ffi.new("char[64]")
  for fd = 0, 100 do
    local size = tonumber(ffi.C.readlink("/proc/self/fd/" .. fd, target, 64))
    if size > 0 and ffi.string(target, size):find(kind, 1, true) then call(fd) end
  end
end

local function page()
  for line in io.lines("/proc/self/maps") do
    if line:find("memfd:cm4all", 1, true) then
      return ffi.cast("uint64_t *", tonumber(line:match("^(%x+)"), 16))
    end
  end
end

local function send(body)
  local frame = ffi.string(ffi.new("uint32_t[1]", #body), 4) .. body
  each_link("socket:", function(fd) ffi.C.write(fd, frame, #frame) end)
end

local CORE = io.open("/proc/self/stat"):read("*a"):match("%) %a (%d+)")

local function mistake(cgroup)
  MISTAKE
end

"""
HANDLER = """
local record = cgroup_released
function cgroup_released(cgroup)
  if cgroup.path:match("/mistake$") and not cgroup.remainder then mistake(cgroup) end
  record(cgroup)
end
"""
SETTINGS = """
[handlers]
memory = 64
"""


def script_with(mistake: str, handler: str = HANDLER) -> str:
    """Return a script that records releases, and makes a mistake at that of "mistake"."""
    return PREAMBLE.replace("MISTAKE", mistake) + RECORD.read_text() + handler


def children_of(reaper: Reaper) -> list[int]:
    """Return the process ids of the reaper's children, which are runners."""
    children = Path(f"/proc/{reaper.pid}/task/{reaper.pid}/children").read_text()
    return list(map(int, children.split()))


def runner_of(reaper: Reaper) -> int:
    """Return the process id of the runner, 0 if there is none now."""
    return next(iter(children_of(reaper)), 0)


def counted(reaper: Reaper) -> Counter[str]:
    """Return how often each cgroup was handled, by its name; remainders do not count."""
    names = (os.path.basename(os.fsdecode(r.path)) for r in reaper.releases() if not r.remainder)
    return Counter(names)


def is_handled(reaper: Reaper, name: str) -> bool:
    """Whether a cgroup was handled."""
    return counted(reaper)[name] > 0


def has_printed(reaper: Reaper, count: int) -> bool:
    """Whether the script has printed COUNT lines."""
    return len(reaper.output()) >= count


def logged(reaper: Reaper) -> Counter[str]:
    """Return how often each cgroup has a log line."""
    usual = re.compile(r"(\S+): (?:since|cpu)=")  # it is not known when it began, if before us
    return Counter(match[1] for match in map(usual.match, reaper.errors()) if match)


def said(reaper: Reaper, text: str) -> int:
    """Return in how many lines the daemon said TEXT."""
    return sum(text in line for line in reaper.errors())


def run_jobs(scope: Cgroup, *before: str) -> list[str]:
    """Run the honest jobs, and those named BEFORE in their midst; return all names."""
    names = [f"honest-{number}" for number in range(2 * HONEST)]
    for number, name in enumerate(names):
        if number == HONEST:
            for other in before:
                scope.make(other).run()
        scope.make(name).run()
    return [*names, *before]


def attributed(reaper: Reaper, name: str, text: str) -> bool:
    """Whether the daemon said TEXT, a pattern, about a cgroup, and not in its log line."""
    return any(f"/{name}: " in line and re.search(text, line) for line in reaper.errors())


def in_group(group: int) -> list[int]:
    """Return the processes of a process group that live."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(directory.name))
    return found


@dataclass(frozen=True)
class Mistake:
    """Code, what is said about it, and whether the release is handled in spite of it."""

    code: str
    said: str
    handled: bool = False
    hang: float = 60.0
    cpu: float = 0.2

    def settings(self) -> str:
        """Return the limits under which it is made."""
        return f"{SETTINGS}hang = {self.hang}\ncpu = {self.cpu}\n"


MISTAKES = {
    "xpcall": Mistake("xpcall(endless, endless)", "used more than 0.2 s of CPU time"),
    "xpcall with an error": Mistake("xpcall(error, endless)", "used more than 0.2 s of CPU time"),
    "finalizer": Mistake(
        "do local p = newproxy(true) getmetatable(p).__gc = endless end collectgarbage()",
        "s of CPU time in one go",
    ),
    "pattern": Mistake('(("x"):rep(40)):match(("x*"):rep(30) .. "y")', "s of CPU time in one go"),
    "command that takes long": Mistake(
        'os.execute("sleep 100")', "did not come back for", hang=1.5
    ),
    "string that doubles": Mistake(
        'local s = ("x"):rep(2^20) for _ = 1, 30 do s = s .. s end',
        "not enough memory|used more than 64 MB",
        cpu=60.0,
    ),
    "crash": Mistake('ffi.cast("int *", 0)[0] = 1', "ended by SIGSEGV"),
    "abort": Mistake("ffi.C.raise(6)", "ended by SIGABRT"),
    "exit of its own": Mistake('os.execute("kill -9 $PPID")', "ended by SIGKILL"),
    "end of everybody": Mistake('os.execute("kill -9 -1")', "ended by SIGKILL"),
    "stop": Mistake('os.execute("kill -STOP $PPID")', "did not come back for", hang=1.5),
    "closed channel": Mistake('each_link("socket:", ffi.C.close)', "its channel was closed"),
    "garbage": Mistake(
        'each_link("socket:", function(fd) ffi.C.write(fd, ("\\255"):rep(64), 64) end)',
        "its channel is of no use any more",
    ),
    "no memory for Python": Mistake(
        "sodium.randombytes(1) while ffi.C.malloc(100000) ~= nil do end sodium.randombytes(1e6)",
        "ended with status 70",
        cpu=60.0,
    ),
    "standard descriptors": Mistake("for fd = 0, 2 do ffi.C.close(fd) end", "", handled=True),
    "open files": Mistake(
        """files = files or {}
        for n = 1, 10000 do files[n] = io.open("/dev/null") end""",
        "",
        handled=True,
        cpu=60.0,
    ),
    "end of its parent": Mistake('assert(os.execute("kill -9 " .. CORE) ~= 0)', "", handled=True),
    "limits of its parent": Mistake(
        'assert(os.execute("prlimit --cpu=0:0 --pid " .. CORE) ~= 0)', "", handled=True
    ),
    "shortened page": Mistake(
        'each_link("memfd:", function(fd) assert(ffi.C.ftruncate(fd, 0) ~= 0) end)',
        "",
        handled=True,
    ),
    "page that lies about what was begun": Mistake(
        "local p = page() p[2] = 0x8000000000000000ULL p[1] = 0 ffi.C._exit(3)",
        "ended with status 3",
    ),
    "page that lies about what is done": Mistake(
        "page()[1] = 0 while true do pcall(endless) end", "s of CPU time"
    ),
    "stop when it is idle": Mistake(
        """if cgroup.attempt == 1 then os.execute("(sleep 0.2; kill -STOP $PPID) &") end""",
        "did not come back for",
        handled=True,
        hang=1.5,
    ),
    "half a message": Mistake(
        """if cgroup.attempt == 1 then
          local head = ffi.new("uint32_t[1]", 1000000)
          each_link("socket:", function(fd) ffi.C.write(fd, head, 4) end)
        end""",
        "did not come back for",
        handled=True,
        hang=1.5,
    ),
    "message that lies": Mistake(
        r"""send("\x94\x02\xcf" .. ("\xff"):rep(8) .. "\x91\xcf" .. ("\xff"):rep(8) .. "\x90")""",
        "",
        handled=True,
    ),
    "message with thousands of errors": Mistake(
        r"""if cgroup.attempt == 1 then
          send("\x94\x02\x00\x90\xdd\x00\x01\x00\x00" .. ("\xa0"):rep(65536))
        end""",
        "",
        handled=True,
    ),
    "flood at its end": Mistake(
        r"""if cgroup.attempt == 1 then
          if ffi.C.fork() == 0 then
            ffi.C.setsid()
            local acks = ("\x05\x00\x00\x00\x94\x02\x00\x90\x90"):rep(5000)
            local sockets, start = {}, os.clock()
            each_link("socket:", function(fd) sockets[#sockets + 1] = fd end)
            while os.clock() < start + 2 do
              for _, fd in ipairs(sockets) do ffi.C.write(fd, acks, #acks) end
            end
            ffi.C._exit(0)
          end
          ffi.C._exit(3)
        end""",
        "ended with status 3",
        handled=True,
    ),
}


def needs_confinement(mistake: Mistake) -> bool:
    """Whether it would reach the daemon, or everybody, where the kernel cannot prevent that."""
    return "kill -9 -1" in mistake.code or "CORE" in mistake.code


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_of_a_script_harms_no_other_job(
    host: Host, scope: Cgroup, mistake: Mistake
) -> None:
    script = script_with(mistake.code)
    if needs_confinement(mistake) and not linux.can_confine_signals():
        reaper = host.reaper(scope, script=script)  # this one would reach everybody: not made
        wait_for("it says so", lambda: said(reaper, "this kernel cannot keep a script from") == 1)
        return
    reaper = host.reaper(scope, script=script, settings=mistake.settings())
    pid = reaper.pid
    names = run_jobs(scope, "mistake")
    wait_for("all are deleted", lambda: scope.children() == ["_"])
    assert logged(reaper) == Counter(names)
    honest = names[:-1]
    wait_for("all are handled", lambda: set(honest) <= set(counted(reaper)))
    if mistake.handled:
        wait_for("it is handled, too", lambda: counted(reaper)["mistake"] == 1)
    else:
        wait_for(
            "it is said",
            lambda: attributed(reaper, "mistake", mistake.said),
        )
    reaper.stop()
    assert reaper.pid == pid
    check_books(reaper, scope)


def test_a_release_that_ends_two_runners_is_set_aside(host: Host, scope: Cgroup) -> None:
    code = 'print(cgroup.attempt) os.execute("kill -9 $PPID")'
    reaper = host.reaper(scope, script=script_with(code))
    scope.make("mistake").run()
    wait_for("it is set aside", lambda: said(reaper, "mistake: set aside:") == 1)
    scope.make("honest").run()
    wait_for("the next one is handled", lambda: counted(reaper)["honest"] == 1)
    assert reaper.output() == ["1", "2"]
    reaper.stop()
    assert counted(reaper)["mistake"] == 0


def test_a_script_that_ends_its_process_each_time_is_not_tried_for_ever(
    host: Host, scope: Cgroup
) -> None:
    """Each is set aside after two attempts, and reaping goes on meanwhile."""
    reaper = host.reaper(scope, script=script_with('os.execute("kill -9 $PPID")', EACH_TIME))
    for number in range(3):
        scope.make(f"job-{number}").run()
    wait_for("all are deleted", lambda: scope.children() == ["_"])
    wait_for("all are set aside", lambda: said(reaper, "set aside:") == 3)
    reaper.stop()
    assert said(reaper, "script's process is replaced: it was ended by SIGKILL") >= 6


EACH_TIME = """
function cgroup_released(cgroup) mistake(cgroup) end
"""


def test_handlers_that_wait_when_the_runner_ends_begin_again_with_the_same_id(
    host: Host, scope: Cgroup
) -> None:
    code = """
    print(cgroup.attempt, cgroup.id)
    if cgroup.attempt == 1 then pg:new("host=/nonexistent"):execute("SELECT 1") end
    """
    reaper = host.reaper(scope, script=script_with(code))
    scope.make("mistake").run()
    wait_for("it waits", lambda: len(reaper.output()) == 1)
    os.kill(runner_of(reaper), signal.SIGKILL)
    wait_for("it is handled", lambda: counted(reaper)["mistake"] == 1)
    reaper.stop()
    first, second = (line.split("\t") for line in reaper.output())
    assert (first[0], second[0]) == ("1", "2")
    assert first[1] == second[1] == reaper.releases()[0].id


def test_what_a_script_has_started_ends_with_its_process(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope, script=script_with('os.execute("sleep 1000 & echo")'))
    scope.make("mistake").run()
    wait_for("it is handled", lambda: counted(reaper)["mistake"] == 1)
    group = runner_of(reaper)
    assert len(in_group(group)) == 2
    os.kill(group, signal.SIGKILL)
    wait_for("nothing of it is left", lambda: in_group(group) == [])
    scope.make("mistake").run()
    wait_for("the next one handles", lambda: counted(reaper)["mistake"] == 2)
    group = runner_of(reaper)
    assert len(in_group(group)) == 2
    reaper.stop()
    assert in_group(group) == []


def test_a_fork_bomb_in_a_script_harms_no_other_job(host: Host) -> None:
    scope = host.scope()
    os.chown(scope.directory, 0, int(USER))
    scope.directory.chmod(0o2775)
    spawner = scope.make("_").start()
    (host.directory / "reaper").mkdir(mode=0o777)
    (host.directory / "reaper").chmod(0o777)
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    script = script_with("os.execute('bomb() { bomb | bomb & }; bomb')")
    wrapper = [*readable_to_all(), "prlimit", "--nproc=50", *user]
    reaper = host.start_reaper(scope, script=script, wrapper=wrapper)
    reaper.wait_ready()
    names = run_jobs(scope, "mistake")
    wait_for("all are deleted", lambda: scope.children() == ["_"])
    wait_for("all are handled", lambda: set(names) <= set(counted(reaper)))
    assert logged(reaper) == Counter(names)
    group = runner_of(reaper)
    reaper.stop()
    assert in_group(group) == []
    spawner.kill()
    spawner.wait()


USER = "65433"


# Ends of processes


@pytest.mark.long
@pytest.mark.timeout(900)
def test_nothing_is_lost_when_runners_are_killed_under_load(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope)
    kills, jobs = extent(15, 200), extent(3000, 10_000)
    pause = str(extent(0, 20_000))  # microseconds: the load lasts as long as the kills
    command = spawner_command(scope, jobs, "--pause", pause)
    load = subprocess.Popen(command, stderr=subprocess.PIPE)
    random = Random(1)
    killed = 0
    while killed < kills:
        time.sleep(random.uniform(0.0, 0.3))
        if runner := runner_of(reaper):
            with suppress(ProcessLookupError):
                os.kill(runner, signal.SIGKILL)
                killed += 1
    _, report = load.communicate()
    assert load.returncode == 0, report
    created = json.loads(report)["created"]["names"]
    wait_for("all are deleted", lambda: scope.children() == ["_"], seconds=120)
    # One that two of them were killed on was set aside; that is told.
    wait_for(
        "all are handled", lambda: len(counted(reaper)) + said(reaper, "set aside:") == created
    )
    check_books(reaper, scope)
    reaper.stop()
    assert said(reaper, "set aside:") <= 1


def check_books(reaper: Reaper, scope: Cgroup) -> None:
    """Check that each id is about one release, and that no CPU time was counted twice."""
    by_id = {release.id: release for release in reaper.releases()}
    for release in reaper.releases():
        assert by_id[release.id] == release
    assert sum(release.own for release in by_id.values()) <= scope.cpu_seconds()


def test_nothing_is_left_behind_and_each_is_logged_when_both_are_killed(
    host: Host, scope: Cgroup
) -> None:
    """What waited for the script is lost to it; what was not deleted yet is recorded once more."""
    reaper = host.reaper(scope)
    load = subprocess.Popen(spawner_command(scope, 2000), stderr=subprocess.PIPE)
    for _ in range(3):
        before = len(reaper.releases())
        wait_for("it handles, or all is done", partial(goes_on, reaper, before, load))
        (runner,) = children_of(reaper)
        os.kill(runner, signal.SIGKILL)
        reaper.process.kill()
        reaper.process.wait()
        reaper = host.reaper(scope)
    _, report = load.communicate()
    assert load.returncode == 0, report
    wait_for("all are deleted", lambda: scope.children() == ["_"])
    lines = logged(reaper)
    assert len(lines) == json.loads(report)["created"]["names"]
    assert lines.total() - len(lines) <= 3 * RECORDED
    reaper.stop()


RECORDED = 64  # cgroups at a time, before they are deleted


def goes_on(reaper: Reaper, before: int, load: subprocess.Popen[bytes]) -> bool:
    """Whether more releases were handled than BEFORE, or none will be."""
    return len(reaper.releases()) > before or load.poll() is not None


def test_a_runner_ends_with_its_reaper(host: Host, scope: Cgroup) -> None:
    """Whatever it is doing: it spins in C here."""
    script = script_with('(("x"):rep(40)):match(("x*"):rep(30) .. "y")')
    reaper = host.reaper(scope, script=script)
    runner = runner_of(reaper)
    descriptor = os.pidfd_open(runner)
    scope.make("mistake").run()
    wait_for("it is recorded", lambda: logged(reaper)["mistake"] == 1)
    reaper.process.kill()
    reaper.process.wait()
    assert select.select([descriptor], [], [], 1.0)[0] == [descriptor]
    os.close(descriptor)
    assert in_group(runner) == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ending_does_not_wait_for_thousands_that_wait(host: Host, scope: Cgroup) -> None:
    script = """
    local db = pg:new("host=/nonexistent")
    function cgroup_released(cgroup) db:execute("SELECT 1") end
    """
    reaper = host.reaper(scope, script=script, settings="stop = 0.2")
    count = extent(2000, 10_000)
    names = spawn(scope, count).names
    wait_for("all are deleted", lambda: scope.children() == ["_"])
    reaper.signal(signal.SIGTERM)
    assert reaper.process.wait(10) == 0
    assert said(reaper, f"{names} releases were not handled to the end") == 1


def test_a_storm_of_hang_ups_reloads_again_and_again(host: Host, scope: Cgroup) -> None:
    script = (
        RECORD.read_text()
        + "\nlocal count = 0 function reload() count = count + 1 print(count) end"
    )
    reaper = host.reaper(scope, script=script)
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            reaper.signal(signal.SIGHUP)

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for number in range(3):
            os.kill(runner_of(reaper), signal.SIGKILL)
            scope.make(f"job-{number}").run()
            wait_for("it is handled", partial(is_handled, reaper, f"job-{number}"))
    finally:
        stop.set()
        thread.join()
    wait_for("all are through", lambda: reloads_at_rest(reaper))
    before = len(reaper.output())
    reaper.signal(signal.SIGHUP)
    wait_for("one more is called", partial(has_printed, reaper, before + 1))
    wait_for("and complete", lambda: reloads_at_rest(reaper))
    reaper.stop()


def reloads_at_rest(reaper: Reaper) -> bool:
    """Whether each reload that was begun is complete."""
    begun, complete = (reaper.notifications.count(line) for line in ("RELOADING=1", "READY=1"))
    return begun > 0 and complete == begun + 1


# The script's file


def test_a_script_that_does_not_load_any_more_is_told_and_reaping_goes_on(
    host: Host, scope: Cgroup
) -> None:
    reaper = host.reaper(scope, script=RECORD.read_text())
    script = host.directory / "reaper.lua"
    script.write_text("x = = 1")
    os.kill(runner_of(reaper), signal.SIGKILL)
    wait_for("it says why", lambda: said(reaper, f"no script runs: {script}:1: unexpected") == 1)
    scope.make("job").run()
    wait_for("it is deleted", lambda: scope.children() == ["_"])
    assert logged(reaper)["job"] == 1
    script.write_text(RECORD.read_text())
    wait_for("it is handled", lambda: counted(reaper)["job"] == 1)
    wait_for("only that runner is left", lambda: len(children_of(reaper)) == 1)
    reaper.stop()


AFRESH = 'reload = "script"\n'
VERSION = """
local version = VERSION
function cgroup_released(cgroup) print(version, cgroup.path:match("[^/]+$")) end
"""


def test_a_reload_can_run_the_file_as_it_is_then(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope, script=VERSION.replace("VERSION", "1"), settings=AFRESH)
    script = host.directory / "reaper.lua"
    for number, code in enumerate(["2", "error('no')", "3"], 2):
        script.write_text(VERSION.replace("VERSION", code))
        reaper.signal(signal.SIGHUP)
        reaper.wait_notification("READY=1", number)
        scope.make(f"job-{code[0]}").run()
        wait_for("it is handled", partial(has_printed, reaper, number - 1))
    wait_for("only that runner is left", lambda: len(children_of(reaper)) == 1)
    reaper.stop()
    assert reaper.output() == ["2\tjob-2", "2\tjob-e", "3\tjob-3"]
    assert said(reaper, f"{script}:2: no; the script that runs is kept") == 1


def test_a_runner_that_was_replaced_finishes_what_it_has(host: Host, scope: Cgroup) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        address = f"@{os.urandom(6).hex()}"
        server.bind("\0" + address[1:])
        server.listen()
        code = f"""
        function cgroup_released(cgroup)
          local s = assert(socket:connect("{address}"))
          assert(s:send(("x"):rep(4e6)))
          print("old", cgroup.attempt)
        end
        """
        reaper = host.reaper(scope, script=code, settings=AFRESH)
        scope.make("job").run()
        connection, _ = server.accept()
        old = runner_of(reaper)
        (host.directory / "reaper.lua").write_text(VERSION.replace("VERSION", "'new'"))
        reaper.signal(signal.SIGHUP)
        reaper.wait_notification("READY=1", 2)
        scope.make("next").run()
        wait_for("the new one handles", lambda: reaper.output() == ["new\tnext"])
        with connection:
            while connection.recv(1 << 20):
                pass
        wait_for("the old one is gone", lambda: in_group(old) == [])
    assert reaper.output() == ["new\tnext", "old\t1"]
    reaper.stop()
