"""The command cm4all-spawn-reaper: what it accepts, and what it says when it cannot."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.tools.harness import Cgroup, Host, wait_for
from tests.tools.native import ROOT
from tests.tools.standing import REAPER, Command, readable_to_all

PROGRAM = Path(sys.executable).with_name("cm4all-spawn-reaper")


def run(*arguments: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    return subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, check=False, cwd=directory
    )


def problems(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what a command that failed said, after its own name."""
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert all(line.startswith("cm4all-spawn-reaper: ") for line in lines), lines
    return [line.partition(": ")[2] for line in lines]


def test_help_names_every_flag(tmp_path: Path) -> None:
    result = run("--help", directory=tmp_path)
    assert result.returncode == 0
    flags = ("--cgroup-root", "--scope", "--lua", "--config", "--check", "--try", "--version")
    assert all(flag in result.stdout for flag in flags)


def test_version_is_that_of_the_distribution(tmp_path: Path) -> None:
    result = run("--version", directory=tmp_path)
    assert result.stdout == f"cm4all-spawn-reaper {metadata.version('cm4all-spawn')}\n"


def test_the_module_is_the_command(tmp_path: Path) -> None:
    module = [sys.executable, "-m", "spawn_reaper", "--version"]
    result = subprocess.run(module, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == run("--version", directory=tmp_path).stdout


def test_check_accepts_what_is_fine_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.lua").write_text("function cgroup_released(c) end")
    (tmp_path / "s.toml").write_text('scopes = ["/a", "/b/*.scope"]\n[handlers]\ntime = 3\n')
    result = run("--check", "--lua", "s.lua", "--config", "s.toml", directory=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_check_reports_every_problem_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "s.lua").write_text("\nfunction cgroup_released(c)\n  retrun 5\nend\n")
    (tmp_path / "s.toml").write_text('grace = "soon"\n\ncolour = 1\n[handlers]\nrunning = 0\n')
    result = run("--check", "--lua", "s.lua", "--config", "s.toml", directory=tmp_path)
    places = [re.match(r"[^ ]*:\d+", line) for line in problems(result)]
    assert [place and place[0] for place in places] == [
        "s.toml:1",
        "s.toml:3",
        "s.toml:5",
        "s.lua:3",
    ]


def test_check_finds_unknown_names_in_functions_that_it_does_not_run(tmp_path: Path) -> None:
    code = """
    local client = control_client:new("/run/nowhere")
    function cgroup_released(cgroup)
      pritn(cgroup.cpu_totl)
      client:sned(client:build())
    end
    """
    (tmp_path / "s.lua").write_text(code)
    assert problems(run("--check", "--lua", "s.lua", directory=tmp_path)) == [
        "s.lua:4: unknown global 'pritn'; did you mean 'print'?",
        "s.lua:4: cgroup has no field 'cpu_totl'; did you mean 'cpu_total'?",
        "s.lua:5: control_client has no method 'sned'; did you mean 'send'?",
    ]


TRIED = """
local receiver = assert(socket:connect("@RECEIVER", {type = "dgram"}))

function cgroup_released(cgroup)
  if cgroup.remainder then
    error("not this one")
  end
  receiver:send(cgroup.xattr.account .. " " .. cgroup.cpu_total)
end
"""


def test_try_runs_the_script_against_a_release_from_a_file(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")  # the kernel chooses an abstract name
        receiver.settimeout(5)
        name = receiver.getsockname()[1:].decode()
        (tmp_path / "s.lua").write_text(TRIED.replace("RECEIVER", name))
        (tmp_path / "r.json").write_text('{"cpu_total": 1.5, "xattr": {"account": "alice"}}')
        result = run("--try", "r.json", "--lua", "s.lua", directory=tmp_path)
        assert receiver.recv(100) == b"alice 1.5"
    assert (result.returncode, result.stderr) == (0, "")
    lines = re.sub(r"after .* s", "after TIME s", result.stdout).splitlines()
    assert lines == [
        f's.lua:2: socket:connect("@{name}", {{...}}) -> {lines[0].rpartition("-> ")[2]}',
        "cgroup_released: job: cpu=1.5s",
        's.lua:8: socket:send("alice 1.5") -> 9',
        "cgroup_released: done after TIME s",
    ]


def test_try_fails_if_the_handler_fails(tmp_path: Path) -> None:
    code = 'function cgroup_released(cgroup)\n  error("no " .. cgroup.path)\nend'
    (tmp_path / "s.lua").write_text(code)
    result = subprocess.run(
        [PROGRAM, "--try", "-", "--lua", "s.lua"],
        input='{"path": "/x"}',
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert result.stderr == "/x: s.lua:2: no /x\n"
    assert "failed after" in result.stdout


@pytest.mark.parametrize(
    ("code", "release", "problem"),
    [
        ("function cgroup_released() end", "{", "r.json: "),
        ("function cgroup_released() end", '{"cpu": 1}', "r.json: "),
        ("", "{}", "s.lua: does not define cgroup_released"),
        ("x = = 1", "{}", "s.lua:1: "),
    ],
)
def test_what_cannot_be_tried_is_named(
    tmp_path: Path, code: str, release: str, problem: str
) -> None:
    (tmp_path / "s.lua").write_text(code)
    (tmp_path / "r.json").write_text(release)
    result = run("--try", "r.json", "--lua", "s.lua", directory=tmp_path)
    assert problems(result)[0].startswith(problem)


WAITS = """
local db = pg:new("host=/nonexistent")
AT_ONCE
function cgroup_released(cgroup) db:execute("SELECT 1") end
"""


@pytest.mark.parametrize(
    ("code", "option", "said"),
    [
        ('db:execute("SELECT 1")', "--check", ["s.lua:3: ran longer than 0.5 s"]),
        ('db:execute("SELECT 1")', "--try=r.json", ["s.lua:3: ran longer than 0.5 s"]),
        ("", "--check", []),
        ("", "--try=r.json", []),
    ],
    ids=["check, at the start", "try, at the start", "check", "try"],
)
def test_check_and_try_end_while_a_database_is_away_and_leave_no_process(
    host: Host, code: str, option: str, said: list[str]
) -> None:
    command = Command(REAPER, host)
    (command.directory / "s.lua").write_text(WAITS.replace("AT_ONCE", code))
    (command.directory / "r.json").write_text("{}")
    command.settings.write_text("[handlers]\ntime = 0.5\n")
    result = command.run(option, "--lua", "s.lua")
    assert command.problems(result.stderr) == said
    assert (result.returncode == 0) == (option == "--check" and not said)
    if not said and option != "--check":
        assert re.search(r"^cgroup_released: still waiting after .* s, ended$", result.stdout, re.M)
    wait_for("nothing of it runs", command.is_gone)


RUNNING = [
    ["--detach"],
    ["--pid-file", "daemon.pid"],
    ["--user", "nobody"],
    ["--group", "0"],
    ["--log-file", "daemon.log"],
]


@pytest.mark.parametrize("running", RUNNING, ids=lambda options: options[0])
@pytest.mark.parametrize("trying", [["--check"], ["--try", "r.json"]], ids=lambda o: o[0])
def test_options_for_running_the_daemon_are_wrong_usage_where_none_runs(
    tmp_path: Path, trying: list[str], running: list[str]
) -> None:
    (tmp_path / "s.lua").write_text("print('main chunk')")
    result = run(*trying, "--lua", "s.lua", *running, directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]
    assert last == f"cm4all-spawn-reaper: error: {running[0]} is for running the daemon only"
    assert [path.name for path in tmp_path.iterdir()] == ["s.lua"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("grace = -1", "s.toml:1: grace: "),
        ("\nscopes = []", "s.toml:2: scopes: "),
        ('scopes = ["a"]', "s.toml:1: scopes: 'a' must begin with a slash"),
        ('scopes = ["/a/../b"]', "s.toml:1: scopes: '/a/../b' must not contain '.' or '..'"),
        ('scopes = "/a"', "s.toml:1: scopes: "),
        ("log = 1", "s.toml:1: log: "),
        ("x = ", "s.toml:1: "),
        ("handlers = 3", "s.toml:1: handlers: must be a table"),
    ],
)
def test_settings_that_cannot_be_used_end_the_start(
    tmp_path: Path, settings: str, problem: str
) -> None:
    (tmp_path / "s.toml").write_text(settings)
    (line,) = problems(run("--config", "s.toml", directory=tmp_path))
    assert line.startswith(problem)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--scope", "x"], "--scope 'x' must begin with a slash"),
        (["--scope", "/a/../b"], "--scope '/a/../b' must not contain '.' or '..'"),
        (["--lua", "missing.lua"], "missing.lua: No such file or directory"),
        (["--config", "missing.toml"], "missing.toml: No such file or directory"),
        (["--config", "."], ".: Is a directory"),
        (["--cgroup-root", "/proc"], "/proc: not a cgroup v2 directory"),
        (["--lua", "bad.lua"], "bad.lua:1: "),
        (["--lua", "number.lua"], "number.lua: cgroup_released is a number, not a function"),
    ],
)
def test_what_cannot_be_used_ends_the_start_with_one_line(
    tmp_path: Path, arguments: list[str], problem: str
) -> None:
    (tmp_path / "bad.lua").write_text("x = = 1")
    (tmp_path / "number.lua").write_text("cgroup_released = 1")
    (line,) = problems(run(*arguments, directory=tmp_path))
    assert line.startswith(problem)


@pytest.mark.parametrize("flag", ["--lua", "--config"])
def test_an_unreadable_file_ends_the_start_with_one_line(host: Host, flag: str) -> None:
    file = host.directory / "file"
    file.touch(mode=0o600)
    result = subprocess.run(
        [*readable_to_all(), "setpriv", "--reuid=65432", "--clear-groups", PROGRAM, flag, file],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert problems(result) == [f"{file}: Permission denied"]


def test_without_a_default_script_the_reaper_says_so_and_runs(host: Host, scope: Cgroup) -> None:
    assert not Path("/etc/cm4all/spawn/reaper.lua").exists()
    reaper = host.start_reaper(scope, script=None).wait_ready()
    scope.make("job").run()
    wait_for("it is gone", lambda: scope.children() == ["_"])
    reaper.stop()
    text = "/etc/cm4all/spawn/reaper.lua does not exist, running without a script"
    assert text in reaper.errors()


def test_a_scope_that_is_given_twice_is_managed_once(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope, scope)
    scope.make("job").run()
    wait_for("it is gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert len(reaper.releases()) == 1
    assert reaper.errors().count(f"watching scope {host.path_of(scope)}") == 1


def test_the_log_line_can_be_turned_off(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope, settings="log = false")
    scope.make("job").run()
    wait_for("it is gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert reaper.errors() == [f"watching scope {host.path_of(scope)}"]


def test_a_reaper_whose_standard_error_is_gone_goes_on(host: Host, scope: Cgroup) -> None:
    pipe = host.directory / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    reaper = host.start_reaper(scope, wrapper=["sh", "-c", f'exec "$@" 2>{pipe}', "sh"])
    reaper.wait_ready()
    os.close(reader)
    scope.make("job").run()
    wait_for("it is gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert len(reaper.releases()) == 1


@pytest.mark.parametrize("number", [2, 15], ids=["SIGINT", "SIGTERM"])
def test_signals_end_it_with_status_zero(host: Host, scope: Cgroup, number: int) -> None:
    reaper = host.reaper(scope)
    reaper.process.send_signal(number)
    assert reaper.process.wait(30) == 0
    assert "STOPPING=1" in reaper.notifications
    assert not any("Traceback" in line for line in reaper.errors())


def test_the_watchdog_is_fed_while_the_daemon_works(host: Host, scope: Cgroup) -> None:
    reaper = host.start_reaper(scope, wrapper=["env", "WATCHDOG_USEC=40000"])
    reaper.wait_notification("WATCHDOG=1", 5)
    reaper.stop()
