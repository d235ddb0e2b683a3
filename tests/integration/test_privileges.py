"""Daemons that are not root: who they are, which capabilities they have, what they can do."""

from __future__ import annotations

import grp
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tools.harness import DEADLINE, Host, read_releases, wait_for
from tests.tools.standing import (
    ACCESSORY,
    REAPER,
    Command,
    capabilities,
    readable_to_all,
    status,
)
from tests.tools.wire import (
    CGROUP,
    IPC,
    LEASE,
    MOUNT,
    NAME,
    NET,
    PID,
    TIME,
    USER,
    UTS,
    Client,
    Packet,
)

# <linux/capability.h>
CAP_DAC_OVERRIDE = 1 << 1
# CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN, CAP_SETFCAP
NEEDED_FOR_NAMESPACES = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 21 | 1 << 31

NOBODY = pwd.getpwnam("nobody")
OTHER = pwd.getpwuid(1)
GROUP = grp.getgrgid(2)
UNKNOWN = "54321"  # neither a user nor a group
BURN = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"


def unprivileged_command(program: str, host: Host) -> Command:
    """Return the command of a daemon, where every user can run it."""
    command = Command(program, host)
    command.wrapper = readable_to_all()
    command.releases.touch()
    os.chmod(command.releases, 0o666)
    return command


@pytest.fixture(params=[REAPER, ACCESSORY])
def command(request: pytest.FixtureRequest, host: Host) -> Command:
    """Return each of the daemons' commands."""
    return unprivileged_command(request.param, host)


@pytest.fixture(name="reaper")
def reaper_command(host: Host) -> Command:
    return unprivileged_command(REAPER, host)


@pytest.fixture(name="accessory")
def accessory_command(host: Host) -> Command:
    return unprivileged_command(ACCESSORY, host)


def four(number: int) -> str:
    """Return how the kernel shows a user or group that is real, effective, saved and used."""
    return "\t".join(4 * [str(number)])


def groups_of(pid: int) -> set[int]:
    """Return the supplementary groups of a process."""
    return set(map(int, status(pid)["Groups"].split()))


# Who it is


@pytest.mark.parametrize("by", ["name", "number"])
def test_the_daemon_becomes_the_user_with_all_his_groups(command: Command, by: str) -> None:
    pid = command.detach("--user", NOBODY.pw_name if by == "name" else str(NOBODY.pw_uid))
    for process in command.processes():  # the accessory's keeper, too
        assert status(process)["Uid"] == four(NOBODY.pw_uid)
        assert status(process)["Gid"] == four(NOBODY.pw_gid)
        assert groups_of(process) == set(os.getgrouplist(NOBODY.pw_name, NOBODY.pw_gid))
    command.check_that_it_works()
    command.end(pid, signal.SIGTERM)


def test_a_group_replaces_the_user_s_own(command: Command) -> None:
    pid = command.detach("--user", NOBODY.pw_name, "--group", GROUP.gr_name)
    assert status(pid)["Uid"] == four(NOBODY.pw_uid)
    assert status(pid)["Gid"] == four(GROUP.gr_gid)
    assert groups_of(pid) == set(os.getgrouplist(NOBODY.pw_name, GROUP.gr_gid))
    command.check_that_it_works()


def test_a_group_alone_leaves_the_user_as_he_is(command: Command) -> None:
    pid = command.detach("--group", str(GROUP.gr_gid))
    assert status(pid)["Uid"] == four(0)
    assert status(pid)["Gid"] == four(GROUP.gr_gid)
    assert groups_of(pid) == set()
    command.check_that_it_works()


def test_numbers_of_user_and_group_need_not_be_known(command: Command) -> None:
    command.detach("--user", UNKNOWN, "--group", UNKNOWN)
    for process in command.processes():
        assert status(process)["Uid"] == status(process)["Gid"] == four(int(UNKNOWN))
        assert groups_of(process) == {int(UNKNOWN)}
    command.check_that_it_works()


ENVIRONMENT = """
for _, name in ipairs{"HOME", "USER", "LOGNAME"} do
  print(name .. "=" .. (os.getenv(name) or ""))
end
os.execute("echo child $HOME $USER $LOGNAME")
"""


@pytest.mark.parametrize(
    ("options", "home", "name"),
    [
        (["--user", str(NOBODY.pw_uid)], NOBODY.pw_dir, NOBODY.pw_name),
        (["--user", OTHER.pw_name, "--group", "0"], OTHER.pw_dir, OTHER.pw_name),
        (["--user", UNKNOWN, "--group", "0"], "/", UNKNOWN),
        (["--group", "0"], "/elsewhere", "somebody"),
    ],
)
def test_home_and_name_are_those_of_the_user(
    reaper: Command, options: list[str], home: str, name: str
) -> None:
    (reaper.directory / "environment.lua").write_text(ENVIRONMENT)
    reaper.wrapper += ["env", "HOME=/elsewhere", "USER=somebody", "LOGNAME=somebody"]
    reaper.detach(*options, "--lua", "environment.lua", "--log-file", reaper.log_file)
    told = reaper.log_file.read_text().splitlines()
    for line in (f"HOME={home}", f"USER={name}", f"LOGNAME={name}", f"child {home} {name} {name}"):
        assert line in told


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--user", ""], "there is no user ''"),  # not root, as without the option
        (["--user", "no-such-one"], "there is no user 'no-such-one'"),
        (["--user", "4294967296"], "there is no user '4294967296'"),
        (["--user", "nobody", "--group", "no-such"], "there is no group 'no-such'"),
    ],
)
def test_who_does_not_exist_is_named(accessory: Command, options: list[str], problem: str) -> None:
    result = accessory.run("--detach", *options)
    assert (result.returncode, result.stderr) == (1, f"{ACCESSORY}: {problem}\n")


@pytest.mark.parametrize(
    ("options", "who"),
    [(["--user", OTHER.pw_name], f"user {OTHER.pw_name}"), (["--group", "0"], "a member of 0")],
)
def test_only_root_can_become_somebody_else(command: Command, options: list[str], who: str) -> None:
    as_nobody(command)
    result = command.run("--detach", *options)
    problem = f"cannot become {who}: Operation not permitted"
    assert (result.returncode, result.stderr) == (1, f"{command.program}: {problem}\n")
    wait_for("nothing of it runs", command.is_gone)


def as_nobody(command: Command, group: int = NOBODY.pw_gid) -> None:
    """Let the command be started by a user who has no capability."""
    command.wrapper += ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={group}"]
    command.wrapper += ["--clear-groups"]


# What it may


def test_the_reaper_has_one_capability_and_the_script_s_process_none(reaper: Command) -> None:
    pid = reaper.detach("--user", NOBODY.pw_name)
    for _ in range(2):
        sets = capabilities(pid)
        assert sets["Prm"] == sets["Eff"] == CAP_DAC_OVERRIDE
        assert sets["Inh"] == sets["Amb"] == 0
        (runner,) = set(reaper.processes()) - {pid}
        sets = capabilities(runner)
        assert sets["Prm"] == sets["Eff"] == sets["Inh"] == sets["Amb"] == 0
        reaper.check_that_it_works()


def test_the_accessory_and_its_keeper_have_what_namespaces_take(accessory: Command) -> None:
    accessory.detach("--user", NOBODY.pw_name)
    processes = accessory.processes()
    assert len(processes) == 2
    for pid in processes:
        sets = capabilities(pid)
        assert all(sets[name] == NEEDED_FOR_NAMESPACES for name in ("Prm", "Eff", "Inh", "Amb"))


def test_a_daemon_whose_user_has_no_capability_gets_none(command: Command) -> None:
    as_nobody(command)
    result = command.run("--detach")
    if command.program == ACCESSORY:  # which can do nothing without
        problem = "cannot enter our own namespaces: setns: Operation not permitted"
        assert command.problems(result.stderr) == [problem]
        return
    assert result.returncode == 0, result.stderr
    for pid in command.processes():
        assert all(capabilities(pid)[name] == 0 for name in ("Prm", "Eff", "Inh", "Amb"))


# Others on the host


def test_somebody_who_is_not_trusted_cannot_keep_a_reaper_from_starting(
    host: Host, reaper: Command
) -> None:
    squatter = unprivileged_command(REAPER, host)
    as_nobody(squatter)
    result = squatter.run("--detach")
    assert result.returncode == 0, result.stderr
    other = squatter.daemon()
    reaper.detach("--log-file", reaper.log_file)
    what = reaper.arguments[reaper.arguments.index("--scope") + 1]
    who = f"process {other} of user {NOBODY.pw_uid}"
    told = {line for line in reaper.log_file.read_text().splitlines() if "claimed" in line}
    assert told == {f"{what} is claimed by {who}, too, which is ignored"}
    os.kill(other, signal.SIGKILL)
    wait_for("it has ended", lambda: other not in reaper.processes())
    reaper.check_that_it_works()


EXHAUST = """
import ctypes, errno, os, resource
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
libc = ctypes.CDLL(None, use_errno=True)
while libc.inotify_init1(os.O_CLOEXEC) >= 0:
    pass
assert ctypes.get_errno() == errno.EMFILE
print("that was the last one", flush=True)
input()
"""


@contextmanager
def exhausted_inotify(uid: str) -> Iterator[None]:
    """Leave a user no inotify instance, as fs.inotify.max_user_instances has it."""
    command = [*readable_to_all(), "setpriv", f"--reuid={uid}", "--clear-groups"]
    command += [sys.executable, "-c", EXHAUST]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"that was the last one\n"
        try:
            yield
        finally:
            process.stdin.write(b"\n")
            process.stdin.close()
            assert process.wait(DEADLINE) == 0


def test_where_nothing_can_be_watched_the_reaper_says_so_and_ends(reaper: Command) -> None:
    with exhausted_inotify(UNKNOWN):
        result = reaper.run("--detach", "--user", UNKNOWN, "--group", UNKNOWN)
    problem = "cannot watch cgroups: inotify_init1: Too many open files"
    assert (result.returncode, result.stderr) == (1, f"{REAPER}: {problem}\n")
    wait_for("nothing of it runs", reaper.is_gone)


# Files


def test_a_pid_file_in_a_folder_that_is_closed_to_the_user_is_emptied(accessory: Command) -> None:
    for _ in range(2):
        pid = accessory.detach("--user", NOBODY.pw_name)
        accessory.end(pid, signal.SIGTERM)
        assert accessory.pid_file.read_text() == ""


def test_the_reaper_s_capability_is_enough_to_remove_its_pid_file(reaper: Command) -> None:
    pid = reaper.detach("--user", NOBODY.pw_name)
    reaper.end(pid, signal.SIGTERM)
    assert not reaper.pid_file.exists()


def test_the_log_file_belongs_to_the_user_who_opens_it_again(command: Command) -> None:
    folder = command.directory / "log"
    folder.mkdir()
    os.chown(folder, NOBODY.pw_uid, NOBODY.pw_gid)
    log = folder / "daemon.log"
    pid = command.detach("--user", NOBODY.pw_name, "--log-file", log)
    check_owner(log)
    log.rename(folder / "daemon.log.1")
    os.kill(pid, signal.SIGUSR1)
    wait_for("it is opened again", log.exists)
    check_owner(log)


def check_owner(log: Path) -> None:
    """Check that a log file is nobody's, and not for all to read."""
    found = log.stat()
    assert (found.st_uid, found.st_gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert found.st_mode & 0o777 == 0o640


def test_a_log_file_that_the_user_cannot_open_again_is_kept(accessory: Command) -> None:
    pid = accessory.detach("--user", NOBODY.pw_name, "--log-file", accessory.log_file)
    old = accessory.log_file.rename(accessory.directory / "daemon.log.1")
    os.kill(pid, signal.SIGUSR1)
    problem = f"cannot open the log file again: {accessory.log_file}: Permission denied"
    wait_for("it says so", lambda: problem in old.read_text().splitlines())
    accessory.check_that_it_works()


def test_what_a_script_prints_goes_to_the_log_file_that_was_opened_again(reaper: Command) -> None:
    script = reaper.directory / "script.lua"
    script.write_text("function cgroup_released(cgroup) print('printed', cgroup.path) end")
    options = ("--lua", script, "--log-file", reaper.log_file)
    pid = reaper.detach("--user", NOBODY.pw_name, *options)
    old = reaper.log_file.rename(reaper.directory / "daemon.log.1")
    os.kill(pid, signal.SIGUSR1)
    wait_for("it is opened again", reaper.log_file.exists)
    reaper.check_that_it_works()
    wait_for("it is there", lambda: "\nprinted\t" in reaper.log_file.read_text())
    assert "printed" not in old.read_text()


# Namespaces


@pytest.fixture
def all_kinds() -> tuple[Packet, ...]:
    """Return what asks for every kind of namespace, with root among the users."""
    maps = (USER, b"0 0 1\n1 100000 1000\x000 0 1\n1 100000 1000")
    return (maps, *((kind, b"") for kind in (IPC, PID, NET, UTS, CGROUP, MOUNT, TIME)))


def test_an_accessory_that_is_not_root_makes_all_kinds_of_namespaces(
    accessory: Command, all_kinds: tuple[Packet, ...]
) -> None:
    accessory.settings.write_text("expiry = 0.2")
    accessory.detach("--user", NOBODY.pw_name)
    daemon = set(accessory.processes())
    with Client(accessory.address) as client:
        with client.ask((NAME, b"a"), *all_kinds, (LEASE, b"")) as answer:
            assert answer.error is None
            assert len(answer.fds) == 9
            wait_for("there is an init", lambda: len(accessory.processes()) == len(daemon) + 1)
        wait_for("the name has expired", lambda: client.names() == {})
    wait_for("the init has ended", lambda: set(accessory.processes()) == daemon)


# Cgroups


def belongs_to_root(reaper: Command) -> None:
    """Leave the scope to root, and let the reaper be somebody with root's help."""
    reaper.arguments += ["--user", NOBODY.pw_name]


def belongs_to_another(reaper: Command) -> None:
    """Give the scope to another user, as a spawner's is that is not root."""
    belongs_to_root(reaper)
    for directory, _, _ in os.walk(reaper.scope.directory):
        os.chown(directory, OTHER.pw_uid, OTHER.pw_gid)


def belongs_to_a_group(reaper: Command) -> None:
    """Let a group write to the scope; the reaper is in it, and has nothing else."""
    as_nobody(reaper, GROUP.gr_gid)
    for directory, _, _ in os.walk(reaper.scope.directory):
        os.chown(directory, 0, GROUP.gr_gid)
        os.chmod(directory, 0o2775)


@pytest.mark.parametrize("owned", [belongs_to_root, belongs_to_another, belongs_to_a_group])
def test_a_reaper_that_is_not_root_empties_and_counts_the_scope(
    reaper: Command, owned: Callable[[Command], None]
) -> None:
    reaper.scope.make("name/session").run(BURN)
    owned(reaper)
    result = reaper.run("--detach")
    assert result.returncode == 0, result.stderr
    for name in ("job", "other"):
        reaper.scope.make(name).run(BURN)
    wait_for("the scope is empty", lambda: reaper.scope.children() == [])
    reaper.end(reaper.daemon(), signal.SIGTERM)
    found = read_releases(reaper.releases)
    assert sum(release.own for release in found) == pytest.approx(
        reaper.scope.cpu_seconds(), abs=1e-5
    )
    names = [release.path.partition(b"test.scope/")[2] for release in found]
    assert sorted(names) == [b"job", b"name", b"name/session", b"other"]


def test_a_spawner_s_own_cgroup_that_cannot_be_read_is_left_alone(
    reaper: Command,
) -> None:
    belongs_to_a_group(reaper)
    spawner = reaper.scope.make("_")
    os.chown(spawner.directory, 0, 0)
    os.chmod(spawner.directory, 0o770)
    inside = spawner.make("inside")
    with inside.start() as process:
        wait_for("it runs", inside.populated)
        reaper.log_file.touch(mode=0o666)
        reaper.log_file.chmod(0o666)
        result = reaper.run("--detach", "--log-file", reaper.log_file)
        assert result.returncode == 0, result.stderr
        reaper.scope.make("job").run(BURN)
        wait_for("the others are released", lambda: reaper.scope.children() == ["_"])
        process.kill()
    reaper.scope.make("job").run(BURN)
    wait_for("the others are released", lambda: reaper.scope.children() == ["_"])
    assert inside.exists()
    log = reaper.log_file.read_text().splitlines()
    assert [line for line in log if "/_" in line] == []
    assert len([line for line in log if line.startswith("job: ")]) == 2


@pytest.mark.parametrize("closed", ["name/sub", "name/sub/cgroup.events", "name/sub/cpu.stat"])
def test_what_a_customer_has_closed_is_released_and_counted(reaper: Command, closed: str) -> None:
    belongs_to_root(reaper)
    pid = reaper.detach()
    with reaper.scope.make("_").start() as spawner:  # so that the grace time applies
        reaper.scope.make("name/sub").run(f"{BURN}; chmod 000 {reaper.scope.directory}/{closed}")
        wait_for("it is deleted", lambda: reaper.scope.children() == ["_"])
        spawner.kill()
    reaper.end(pid, signal.SIGTERM)
    found = read_releases(reaper.releases)
    names = {release.path.partition(b"test.scope/")[2] for release in found}
    assert {b"name", b"name/sub"} <= names
    assert sum(release.own for release in found) == pytest.approx(
        reaper.scope.cpu_seconds(), abs=0.02
    )


CAPABILITIES = """
local function tell(when)
  for line in io.lines("/proc/self/status") do
    if line:match("^CapEff:") then
      print(when, line)
    end
  end
  os.execute("grep -v CapBnd /proc/self/status | sed -n 's/^Cap/" .. when .. ", child: &/p'")
end

tell("main chunk")
function reload()
  tell("reload")
end
function cgroup_released(cgroup)
  tell("release")
end
"""


def test_nothing_that_a_script_does_is_done_with_capabilities(reaper: Command) -> None:
    script = reaper.directory / "script.lua"
    script.write_text(CAPABILITIES)
    pid = reaper.detach("--user", "nobody", "--lua", script, "--log-file", reaper.log_file)
    reaper.scope.make("job").run()
    wait_for("it is told", lambda: "release, child: CapAmb" in reaper.log_file.read_text())
    os.kill(pid, signal.SIGHUP)
    wait_for("it reloads", lambda: "reload, child: CapAmb" in reaper.log_file.read_text())
    reaper.end(pid, signal.SIGTERM)
    lines = reaper.log_file.read_text().splitlines()
    for when in ("main chunk", "release", "reload"):
        assert [line for line in lines if line.startswith(when)] == effective_nowhere(when)


@pytest.mark.parametrize("options", [["--check"], ["--try", "release.json"]], ids=["check", "try"])
def test_a_script_that_is_tried_has_no_capabilities_either(
    reaper: Command, options: list[str]
) -> None:
    (reaper.directory / "script.lua").write_text(CAPABILITIES)
    (reaper.directory / "release.json").write_text("{}")
    reaper.wrapper += ["setpriv", f"--reuid={NOBODY.pw_uid}", "--clear-groups"]
    reaper.wrapper += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    result = reaper.run(*options, "--lua", "script.lua")
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stdout.splitlines() if "Cap" in line]
    for when in ("main chunk", "release") if "--try" in options else ("main chunk",):
        assert [line for line in told if line.startswith(when)] == effective_nowhere(when)


def effective_nowhere(when: str) -> list[str]:
    """Return what a script tells in which no capability is effective, nor passed on."""
    children = (f"{when}, child: {name}:" for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
    return [f"{name}\t{0:016x}" for name in (f"{when}\tCapEff:", *children)]
