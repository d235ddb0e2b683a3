"""Life without a service manager: in the background, with a lock, a log file, and signals."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.tools.harness import DEADLINE, Host, spawn, wait_for
from tests.tools.native import ROOT
from tests.tools.standing import ACCESSORY, REAPER, Command, status
from tests.tools.wire import IPC, NAME, STATUS, Client

BOTH = [REAPER, ACCESSORY]


@pytest.fixture(params=BOTH)
def command(request: pytest.FixtureRequest, host: Host) -> Command:
    """Return each of the daemons' commands."""
    return Command(request.param, host)


@pytest.fixture(name="reaper")
def reaper_command(host: Host) -> Command:
    return Command(REAPER, host)


@pytest.fixture(name="accessory")
def accessory_command(host: Host) -> Command:
    return Command(ACCESSORY, host)


@contextmanager
def starting(command: Command, *options: str | Path, **how: object) -> Iterator[Starting]:
    """Start a daemon whose start does not come to an end by itself."""
    os.mkfifo(fifo := command.directory / "fifo")
    options = (*options, "--pid-file", command.pid_file, "--config", fifo)
    with command.start(*options, **how) as process:
        try:
            yield Starting(command, process, fifo)
        except BaseException:
            process.kill()  # else it would be waited for
            raise


class Starting:
    """A daemon that waits for its settings, and the command that it is or that waits for it."""

    def __init__(self, command: Command, process: subprocess.Popen[str], fifo: Path) -> None:
        self.process = process
        self.pid = command.pid()
        self._command = command
        self._fifo = fifo

    def go_on(self) -> None:
        """Give it its settings, which are empty, unless it has ended."""
        wait_for("it reads its settings", lambda: self._is_fed() or self._command.is_gone())

    def _is_fed(self) -> bool:
        with suppress(OSError):  # it does not read yet
            writer = os.open(self._fifo, os.O_WRONLY | os.O_NONBLOCK)
            self._command.settings.replace(self._fifo)  # what it reads at a reload
            os.close(writer)
            return True
        return False

    def result(self) -> int:
        """Return the exit status of the command."""
        return self.process.wait(DEADLINE)


# In the background


def test_the_command_returns_when_the_daemon_is_ready(command: Command) -> None:
    result = command.run("--detach")
    assert result.returncode == 0, result.stderr
    command.check_that_it_works()


def test_the_command_waits_until_then(command: Command) -> None:
    with starting(command, "--detach") as start:
        assert start.process.poll() is None
        start.go_on()
        assert start.result() == 0
    command.check_that_it_works()


def test_the_daemon_leaves_everything_behind_that_was_the_caller_s(command: Command) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as end:
        with command.start(
            "--detach", "--pid-file", command.pid_file, pass_fds=[writer], umask=0o77
        ) as process:
            os.close(writer)
            assert process.wait(DEADLINE) == 0
            caller = process.pid
        assert end.read() == b""
    pid = command.pid()
    assert parent_of(pid) not in (os.getpid(), caller)
    assert os.getsid(pid) not in (os.getsid(0), pid)  # nor can it get a terminal
    assert terminal_of(pid) == 0
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert status(pid)["Umask"] == "0022"
    assert standard_descriptors(pid) == 3 * ["/dev/null"]


def test_it_detaches_although_the_standard_descriptors_are_closed(command: Command) -> None:
    command.wrapper = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    pid = command.detach()
    assert standard_descriptors(pid) == 3 * ["/dev/null"]
    command.check_that_it_works()


def test_relative_paths_are_those_of_the_caller(command: Command) -> None:
    command.settings.write_text("grace = 0" if command.program == REAPER else "expiry = 5")
    if command.program == REAPER:
        (command.directory / "own.lua").write_text('print("own.lua")')
        command.arguments += ["--lua", "own.lua"]
    result = command.run(
        *("--detach", "--pid-file", "own.pid", "--log-file", "own.log", "--config", "settings.toml")
    )
    assert result.returncode == 0, result.stderr
    pid = int((command.directory / "own.pid").read_text())
    log = str(command.directory / "own.log")
    assert standard_descriptors(pid) == ["/dev/null", log, log]
    os.kill(pid, signal.SIGHUP)  # the accessory reads its settings again
    command.check_that_it_works()
    if command.program == REAPER:
        assert "own.lua" in Path(log).read_text()
    assert command.problems(Path(log).read_text()) == []


def test_the_service_manager_of_the_caller_is_left_alone(command: Command) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")  # the kernel chooses an abstract name
        manager.setblocking(False)
        address = "@" + os.fsdecode(manager.getsockname()[1:])
        environment = os.environ | {
            "NOTIFY_SOCKET": address,
            "WATCHDOG_USEC": "20000",
            "PYTHONPATH": str(ROOT),
            "RELEASES": str(command.releases),
        }
        pid = command.detach(env=environment)
        command.check_that_it_works()
        os.kill(pid, signal.SIGHUP)
        command.end(pid, signal.SIGTERM)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


def parent_of(pid: int) -> int:
    """Return the parent of a process."""
    return int(status(pid)["PPid"])


def terminal_of(pid: int) -> int:
    """Return the device number of a process's controlling terminal, 0 if it has none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[4])


def standard_descriptors(pid: int) -> list[str]:
    """Return what the standard descriptors of a process are."""
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]


# A start that fails


def broken_settings(command: Command, exits: ExitStack) -> str:
    """Break the settings, and return the problem."""
    command.settings.write_text("\ncolour = 1")
    return f"{command.settings}:2: colour: unknown setting; "


def broken_script(command: Command, exits: ExitStack) -> str:
    """Break the script, and return the problem."""
    (command.directory / "bad.lua").write_text("x = = 1")
    command.arguments += ["--lua", "bad.lua"]
    return f"{command.directory}/bad.lua:1: " if command.program == REAPER else ""


def two_of_them(command: Command, exits: ExitStack) -> str:
    """Let another one do the same work, and return the problem."""
    first = exits.enter_context(command.start("--pid-file", "first.pid"))
    exits.callback(first.kill)
    if command.program == REAPER:
        what = command.arguments[command.arguments.index("--scope") + 1]
        wait_for("it is ready", lambda: watches(first.pid))
        return f"{what} is already managed by process {first.pid}"
    wait_for("it listens and has its keeper", lambda: len(command.processes()) == 2)
    return f"{command.address} is already in use by process {first.pid}"


def watches(pid: int) -> bool:
    """Whether a process watches something by inotify."""
    with suppress(OSError):
        return any("inotify wd:" in one.read_text() for one in fdinfo(pid))
    return False


def fdinfo(pid: int) -> Iterator[Path]:
    """Yield what the kernel tells of each descriptor of a process."""
    return Path(f"/proc/{pid}/fdinfo").iterdir()


def unwritable_log(command: Command, exits: ExitStack) -> str:
    """Give it a log file that cannot be written, and return the problem."""
    command.log_file = command.directory / "none" / "log"
    command.arguments += ["--log-file", command.log_file]  # also where none is asked for
    return f"{command.log_file}: No such file or directory"


FAILURES = {
    REAPER: [broken_settings, broken_script, two_of_them, unwritable_log],
    ACCESSORY: [broken_settings, two_of_them, unwritable_log],
}


@pytest.mark.parametrize("logged", [False, True], ids=["terminal", "log-file"])
@pytest.mark.parametrize(
    ("program", "failure"),
    [(program, failure) for program in BOTH for failure in FAILURES[program]],
)
def test_a_start_that_fails_says_why_once_and_leaves_nothing(
    host: Host,
    program: str,
    failure: Callable[[Command, ExitStack], str],
    logged: bool,
) -> None:
    command = Command(program, host)
    with ExitStack() as exits:
        problem = failure(command, exits)
        options: list[str | Path] = ["--log-file", command.log_file] if logged else []
        before = command.processes()
        result = command.run("--detach", "--pid-file", command.pid_file, *options)
        assert result.returncode == 1
        (told,) = command.problems(result.stderr)
        assert told.startswith(problem)
        if logged and command.log_file.exists():
            assert command.problems(command.log_file.read_text()) == [told]
        wait_for("nothing of it runs", lambda: command.processes() == before)
        assert not command.pid_file.exists()
    wait_for("all have ended", command.is_gone)


def test_a_full_disk_is_one_line_and_leaves_nothing(command: Command) -> None:
    command.wrapper = ["prlimit", "--fsize=0:0"]  # says EFBIG where a full disk says ENOSPC
    result = command.run("--detach", "--pid-file", command.pid_file)
    assert result.returncode == 1
    assert command.problems(result.stderr) == [f"{command.pid_file}: File too large"]
    assert not command.pid_file.exists()
    wait_for("all have ended", command.is_gone)


def test_who_started_it_is_told_why_it_failed_before_the_command_returns(command: Command) -> None:
    command.settings.write_text("colour = 1")
    reader, writer = os.pipe()
    with open(reader, "rb") as end:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, bytes(4096))  # who writes more has to wait
        with command.start("--detach", stderr=writer) as process:
            os.close(writer)
            writes = partial(waits_in, "pipe_write")
            wait_for("it says why", lambda: any(map(writes, command.processes())))
            assert waits_in("pipe_read", process.pid)  # not woken up yet
            assert b"colour: unknown setting" in end.read()
            assert process.wait(DEADLINE) == 1


def waits_in(function: str, pid: int) -> bool:
    """Whether a process waits in a function of the kernel."""
    with suppress(OSError):
        return function in Path(f"/proc/{pid}/wchan").read_text()
    return False


def test_a_terminal_that_is_gone_is_no_second_problem(command: Command) -> None:
    command.settings.write_text("colour = 1")
    reader, terminal = os.pipe()
    os.close(reader)
    with open(terminal, "wb") as gone:
        result = command.run("--detach", "--log-file", command.log_file, stderr=gone)
    assert result.returncode == 1
    (line,) = command.log_file.read_text().splitlines()
    assert line.startswith(f"{command.program}: {command.settings}:1: colour: unknown setting; ")


MISTAKE = """
from spawn_common import command

def freeze_memory():
    raise ZeroDivisionError("a mistake of ours")

command.freeze_memory = freeze_memory
"""


@pytest.mark.parametrize("options", [[], ["--detach"]], ids=["foreground", "background"])
def test_a_mistake_of_ours_is_told_in_one_line_and_its_traceback_is_in_the_log(
    command: Command, options: list[str]
) -> None:
    (command.directory / "sitecustomize.py").write_text(MISTAKE)
    path = f"{command.directory}:{ROOT}"
    environment = os.environ | {"PYTHONPATH": path, "RELEASES": str(command.releases)}
    environment.pop("NOTIFY_SOCKET", None)
    options = [*options, "--log-file", str(command.log_file)]
    result = command.run(*options, env=environment)
    problem = "ZeroDivisionError: a mistake of ours"
    assert result.returncode == 1
    assert result.stderr == f"{command.program}: {problem}\n"
    log = command.log_file.read_text().splitlines()
    assert "Traceback (most recent call last):" in log
    assert log.count(problem) == 1
    wait_for("nothing of it runs", command.is_gone)


def test_a_start_that_is_killed_fails_and_the_next_one_does_not(command: Command) -> None:
    with starting(command, "--detach") as start:
        os.kill(start.pid, signal.SIGKILL)
        assert start.result() == 1
    wait_for("nothing of it runs", command.is_gone)
    command.pid_file.unlink()
    command.detach()
    command.check_that_it_works()


def test_ctrl_c_on_the_command_ends_the_start(command: Command) -> None:
    terminal, its = os.openpty()
    command.wrapper = ["setsid", "--ctty"]
    with open(terminal, "rb+", buffering=0) as keyboard:
        with starting(command, "--detach", stdin=its, stdout=its, stderr=its) as start:
            os.close(its)
            keyboard.write(b"\3")
            assert start.result() == 1
            start.go_on()
        wait_for("nothing of it runs", command.is_gone)
    assert not command.pid_file.exists()


# The pid file


def test_the_pid_file_names_the_daemon_and_goes_with_it(command: Command) -> None:
    with command.start("--pid-file", command.pid_file) as process:
        assert command.pid() == process.pid
        assert command.pid_file.read_text() == f"{process.pid}\n"
        wait_for("it is ready", lambda: is_ready(command, process.pid))
        process.terminate()
        assert process.wait(DEADLINE) == 0
    assert not command.pid_file.exists()
    pid = command.detach()
    assert pid in command.processes()
    command.end(pid, signal.SIGTERM)
    assert not command.pid_file.exists()


def is_ready(command: Command, pid: int) -> bool:
    """Whether the daemon listens, or watches its scope: then it heeds signals, too."""
    if command.program == REAPER:
        return watches(pid)
    return command.address in Path("/proc/net/unix").read_text()


@pytest.mark.parametrize("options", [[], ["--detach"]], ids=["foreground", "background"])
def test_a_second_start_names_the_first_and_leaves_it_alone(
    command: Command, options: list[str]
) -> None:
    pid = command.detach()
    result = command.run(*options, "--pid-file", command.pid_file)
    assert result.returncode == 1
    assert result.stderr == f"{command.program}: {command.pid_file}: process {pid} runs already\n"
    assert command.pid() == pid
    command.check_that_it_works()


def test_a_daemon_that_was_killed_leaves_no_lock(command: Command) -> None:
    first = command.detach()
    command.check_that_it_works()
    command.end(first, signal.SIGKILL)
    assert command.pid() == first
    second = command.detach()
    assert second != first
    command.check_that_it_works()


def test_of_twenty_starts_at_once_exactly_one_succeeds(reaper: Command) -> None:
    options = ("--detach", "--pid-file", reaper.pid_file)
    starts = [reaper.start(*options) for _ in range(20)]
    outcomes = Counter[str]()
    for process in starts:
        _, errors = process.communicate(timeout=DEADLINE)
        (problem,) = reaper.problems(errors) if process.returncode else ["none"]
        outcomes[re.sub(r"process (\d+|\(unknown\))", "process N", problem)] += 1
    assert outcomes == {"none": 1, f"{reaper.pid_file}: process N runs already": 19}
    reaper.check_that_it_works()
    reaper.end(reaper.pid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("link", "Too many levels of symbolic links"),
        ("none/file", "No such file or directory"),
        ("folder", "Is a directory"),
    ],
)
def test_a_pid_file_that_cannot_be_is_one_line(host: Host, name: str, reason: str) -> None:
    command = Command(ACCESSORY, host)
    target = command.directory / "target"
    target.write_text("precious")
    (command.directory / "link").symlink_to(target)
    (command.directory / "folder").mkdir()
    result = command.run("--detach", "--pid-file", name)
    assert result.returncode == 1
    assert result.stderr == f"{ACCESSORY}: {command.directory}/{name}: {reason}\n"
    assert target.read_text() == "precious"


# The log file

TALKATIVE = """
print("main chunk")
function cgroup_released(cgroup)
  print("print " .. cgroup.path:match("[^/]+$"))
  if cgroup.path:match("0$") then
    error("error")
  end
end
function reload()
  print("reload")
end
"""
LINE = re.compile(r"(job-\d+):( (?:since|cpu)=.*)|print (job-\d+)|/\S+/(job-\d+): \S+:6: error")


def talkative(reaper: Command) -> None:
    """Let the script print, and fail for each tenth cgroup."""
    (reaper.directory / "talkative.lua").write_text(TALKATIVE)
    reaper.arguments += ["--lua", "talkative.lua"]


def test_everything_goes_to_the_log_file(reaper: Command) -> None:
    talkative(reaper)
    result = reaper.run("--detach", "--pid-file", reaper.pid_file, "--log-file", reaper.log_file)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    pid = reaper.pid()
    reaper.scope.make("job-0").run()
    wait_for("it failed", lambda: "error" in reaper.log_file.read_text())
    os.kill(pid, signal.SIGHUP)
    wait_for("it reloads", lambda: "reload\n" in reaper.log_file.read_text())
    reaper.end(pid, signal.SIGTERM)
    log = reaper.log_file.read_text()
    path = f"{reaper.arguments[reaper.arguments.index('--scope') + 1]}/job-0"
    log, released = re.subn("^job-0: .*\n", "", log, flags=re.MULTILINE)
    assert released == 1
    assert sorted(log.splitlines()) == [
        f"{path}: {reaper.directory}/talkative.lua:6: error",
        "calling the script's function reload; its file is not read again",
        "main chunk",
        "print job-0",
        "reload",
        f"watching scope {path.removesuffix('/job-0')}",
    ]


def test_the_log_file_is_appended_to_and_is_not_for_all_to_read(accessory: Command) -> None:
    for _ in range(2):
        with accessory.start("--log-file", accessory.log_file) as process:
            wait_for("it is ready", lambda: is_ready(accessory, process.pid))
            process.send_signal(signal.SIGHUP)
            accessory.settings.write_text("colour = 1")
            process.send_signal(signal.SIGHUP)
            wait_for("it has read it", lambda: "colour" in accessory.log_file.read_text())
            accessory.settings.write_text("")
            process.terminate()
            assert process.wait(DEADLINE) == 0
        text = accessory.log_file.read_text()
        accessory.log_file.write_text(f"before\n{text}")
    assert text.startswith("before\n")
    assert accessory.log_file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("options", [[], ["--detach"]], ids=["foreground", "background"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("link", "Too many levels of symbolic links"),
        ("link-to-nothing", "Too many levels of symbolic links"),
        ("fifo", "No such device or address"),
        ("fifo-with-a-reader", "not a regular file"),
        ("folder", "Is a directory"),
        ("/dev/full", "not a regular file"),
    ],
)
def test_what_is_no_log_file_is_one_line_and_stays(
    command: Command, options: list[str], name: str, reason: str
) -> None:
    folder = command.directory
    target, nothing = folder / "target", folder / "nothing"
    target.write_text("precious")
    (folder / "link").symlink_to(target)
    (folder / "link-to-nothing").symlink_to(nothing)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    os.mkfifo(folder / "fifo-with-a-reader")
    # Who opens a pipe may wait for ever.
    command.wrapper = ["timeout", "--signal=KILL", str(DEADLINE)]
    reader = os.open(folder / "fifo-with-a-reader", os.O_RDONLY | os.O_NONBLOCK)
    with open(reader, "rb"):
        result = command.run(*options, "--log-file", folder / name)
    assert result.returncode == 1
    assert result.stderr == f"{command.program}: {folder / name}: {reason}\n"
    assert target.read_text() == "precious"
    assert not nothing.exists()


def test_the_log_file_may_be_dev_null(command: Command) -> None:
    pid = command.detach("--log-file", "/dev/null")
    os.kill(pid, signal.SIGUSR1)
    command.check_that_it_works()
    assert standard_descriptors(pid) == 3 * ["/dev/null"]


def test_no_line_is_lost_or_torn_when_the_log_is_rotated_under_load(reaper: Command) -> None:
    talkative(reaper)
    pid = reaper.detach("--log-file", reaper.log_file)
    load = threading.Thread(target=spawn, args=(reaper.scope, 2000))
    load.start()
    rotated: list[Path] = []
    while load.is_alive() or len(rotated) < 5:
        rotated.append(reaper.directory / f"log.{len(rotated)}")
        grown = partial(says_more, reaper.log_file, reaper.log_file.stat().st_size, load)
        wait_for("it says more", grown)
        reaper.log_file.rename(rotated[-1])
        os.kill(pid, signal.SIGUSR1)
        wait_for("there is a new file", reaper.log_file.exists)
    load.join()
    wait_for("all are reaped", lambda: reaper.scope.children() == [])
    reaper.end(pid, signal.SIGTERM)
    texts = [file.read_text() for file in (*rotated, reaper.log_file)]
    assert all(text.endswith("\n") or not text for text in texts)
    lines = "".join(texts).splitlines()
    matches = [match for match in map(LINE.fullmatch, lines) if match]
    others = [line for line in lines if not LINE.fullmatch(line)]
    assert [line.partition(" ")[0] for line in others] == ["main", "watching"]
    jobs = [f"job-{number}" for number in range(2000)]
    assert Counter(match[1] for match in matches if match[1]) == Counter(jobs)
    assert Counter(match[3] for match in matches if match[3]) == Counter(jobs)
    failed = [job for job in jobs if job.endswith("0")]
    assert Counter(match[4] for match in matches if match[4]) == Counter(failed)
    others = [
        line for line, match in zip(lines, map(LINE.fullmatch, lines), strict=True) if not match
    ]
    assert [re.sub(" .*", "", line) for line in others] == ["main", "watching"]


def says_more(file: Path, size: int, load: threading.Thread) -> bool:
    """Whether a file is longer than SIZE, or never will be."""
    return file.stat().st_size > size or not load.is_alive()


def test_a_log_file_that_cannot_be_opened_again_is_kept_and_the_reason_told(
    command: Command,
) -> None:
    folder = command.directory / "log"
    folder.mkdir()
    log = folder / "daemon.log"
    pid = command.detach("--log-file", log)
    moved = folder.rename(command.directory / "moved")
    os.kill(pid, signal.SIGUSR1)
    problem = f"cannot open the log file again: {log}: No such file or directory\n"
    wait_for("it says so", lambda: problem in (moved / "daemon.log").read_text())
    command.check_that_it_works()
    folder.mkdir()
    os.kill(pid, signal.SIGUSR1)
    wait_for("it is open again", log.exists)


def test_a_pipe_in_the_place_of_the_log_file_is_not_written_to(command: Command) -> None:
    pid = command.detach("--log-file", command.log_file)
    old = command.log_file.rename(command.directory / "daemon.log.1")
    os.mkfifo(command.log_file)
    os.kill(pid, signal.SIGUSR1)
    problem = f"cannot open the log file again: {command.log_file}: No such device or address"
    wait_for("it says so", lambda: problem in old.read_text().splitlines())
    command.check_that_it_works()
    assert standard_descriptors(pid) == ["/dev/null", str(old), str(old)]


def test_sigusr1_without_a_log_file_does_nothing(command: Command) -> None:
    pid = command.detach()
    os.kill(pid, signal.SIGUSR1)
    command.check_that_it_works()
    assert standard_descriptors(pid) == 3 * ["/dev/null"]
    assert command.pid() == pid


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_as_soon_as_the_pid_file_is_there_does_not_end_the_start(
    command: Command, number: signal.Signals
) -> None:
    with starting(command, "--detach") as start:
        os.kill(start.pid, number)
        start.go_on()
        assert start.result() == 0
    command.check_that_it_works()


# The end

ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT]


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("options", [[], ["--detach"]], ids=["foreground", "background"])
def test_a_signal_to_end_as_soon_as_the_pid_file_is_there_is_a_good_end(
    command: Command, options: list[str], number: signal.Signals
) -> None:
    with starting(command, *options) as start:
        os.kill(start.pid, number)
        start.go_on()
        result = start.result()
        if not options:  # else it may or may not have been ready
            assert result == 0
        assert start.process.stderr is not None
        assert command.problems(start.process.stderr.read()) == []
    wait_for("nothing of it runs", command.is_gone)
    assert not command.pid_file.exists()


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize(
    ("options", "expected"), [([], 0), (["--detach"], 1)], ids=["foreground", "background"]
)
def test_a_signal_to_end_ends_a_start_that_would_wait_for_ever(
    command: Command, options: list[str], expected: int, number: signal.Signals
) -> None:
    with starting(command, *options) as start:
        wait_for("it waits", partial(waits_in, "wait_for_partner", start.pid))  # fifo(7)
        os.kill(start.pid, number)
        assert start.result() == expected
        assert start.process.stderr is not None
        assert start.process.stderr.read() == ""
    wait_for("nothing of it runs", command.is_gone)
    assert not command.pid_file.exists()


@pytest.mark.parametrize("waits", [False, True], ids=["at-once", "waiting"])
def test_several_signals_to_end_do_not_disturb_each_other(command: Command, waits: bool) -> None:
    with starting(command) as start:
        if waits:
            wait_for("it waits", partial(waits_in, "wait_for_partner", start.pid))
        for number in (signal.SIGSTOP, *ENDING, signal.SIGCONT):
            os.kill(start.pid, number)
        assert start.result() == 0
        assert start.process.stderr is not None
        assert start.process.stderr.read() == ""
    assert not command.pid_file.exists()


def test_a_start_whose_waiting_command_is_told_to_end_fails(command: Command) -> None:
    with starting(command, "--detach") as start:
        start.process.terminate()
        assert start.result() == 1
        start.go_on()
    wait_for("nothing of it runs", command.is_gone)
    assert not command.pid_file.exists()


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("how", ["ignore", "block"])
def test_what_the_caller_ignores_or_blocks_the_daemon_does_not(
    command: Command, how: str, number: signal.Signals
) -> None:
    command.wrapper = ["env", f"--{how}-signal"]  # all that can be
    if command.program == REAPER:
        (command.directory / "system.lua").write_text('print("true: " .. os.execute("true"))')
        command.arguments += ["--lua", "system.lua"]
    pid = command.detach("--log-file", command.log_file)
    command.check_that_it_works()
    command.log_file.rename(command.directory / "daemon.log.1")
    os.kill(pid, signal.SIGUSR1)
    wait_for("it opens its log again", command.log_file.exists)
    command.end(pid, number)
    assert not command.pid_file.exists()
    if command.program == REAPER:
        assert "true: 0\n" in (command.directory / "daemon.log.1").read_text()


WAITING = """
local settings = { type = "stream" }
function cgroup_released(cgroup)
  print("begins")
  assert(socket:connect("%s", settings))
  print("is through")
end
"""


@pytest.mark.parametrize("number", ENDING)
def test_handlers_in_flight_are_finished_before_the_end(
    reaper: Command, number: signal.Signals
) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind("")  # the kernel chooses an abstract name
        server.listen(0)
        first.connect(server.getsockname())  # there is no room for one more
        address = "@" + server.getsockname()[1:].decode()
        (reaper.directory / "waiting.lua").write_text(WAITING % address)
        pid = reaper.detach("--log-file", reaper.log_file, "--lua", "waiting.lua")
        reaper.scope.make("job").run()
        wait_for("it waits", lambda: "begins" in reaper.log_file.read_text())
        os.kill(pid, number)
        wait_for("it has heard", lambda: not watches(pid))
        assert "is through" not in reaper.log_file.read_text()
        server.accept()[0].close()
        wait_for("it has ended", reaper.is_gone)
    assert "is through\n" in reaper.log_file.read_text()
    assert not reaper.pid_file.exists()


@pytest.mark.parametrize("number", ENDING)
def test_what_was_asked_before_the_end_is_answered(
    accessory: Command, number: signal.Signals
) -> None:
    pid = accessory.detach()
    with Client(accessory.address) as client:
        client.ask((STATUS, b"")).close()  # the connection is accepted
        os.kill(pid, signal.SIGSTOP)
        client.send((NAME, b"a"), (IPC, b""))
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
        answer = client.receive()
        assert answer is not None
        with answer:
            assert len(answer.fds) == 1
        assert client.dropped()
    wait_for("it has ended", accessory.is_gone)
    assert not accessory.pid_file.exists()
