"""The accessory's client and its command, against a real daemon and real namespaces."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from spawn_client.accessory import Accessory, AsyncAccessory, Namespaces, Refused
from tests.tools.accessory import KINDS, own_namespaces
from tests.tools.accessory import Accessory as Daemon
from tests.tools.harness import wait_for
from tests.tools.native import ROOT

PROGRAM = str(Path(sys.executable).with_name("cm4all-spawn-client"))
FLAGS = ("ipc", "pid", "net", "uts", "cgroup", "mount", "time")
SHOW = "for kind in ipc pid net uts cgroup mnt time user; do readlink /proc/self/ns/$kind; done"
HOLD = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done"


def run(daemon: Daemon | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    address = daemon if isinstance(daemon, str) else daemon.address
    return subprocess.run(
        [PROGRAM, "--address", address, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def output(daemon: Daemon, *arguments: str) -> list[str]:
    """Return the lines that a command in namespaces wrote, which must succeed."""
    result = run(daemon, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def problem(result: subprocess.CompletedProcess[str], status: int = 125) -> str:
    """Return the one line that a command that failed said, after its own name."""
    assert (result.returncode, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    name, _, reason = line.partition(": ")
    assert name == "cm4all-spawn-client"
    return reason


@contextmanager
def running(daemon: Daemon, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in the background, from its first line of output on."""
    command = [PROGRAM, "--address", daemon.address, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.terminate()  # and the command with it


def links(namespaces: Namespaces, *kinds: str) -> list[str]:
    """Return what the descriptors refer to."""
    return [os.readlink(f"/proc/self/fd/{getattr(namespaces, kind)}") for kind in kinds]


def leases(daemon: Daemon) -> dict[bytes, int]:
    """Return how many leases each name has."""
    with Accessory(daemon.address) as accessory:
        return {one.name: one.leases for one in accessory.list()}


# The library


def test_a_process_that_enters_is_in_all_of_them(accessory: Daemon) -> None:
    code = """if True:
        import os, subprocess, sys
        from spawn_client.accessory import Accessory
        maps = ("0 100000 10", [(0, 100000, 10)])
        kinds = dict.fromkeys(("ipc", "pid", "net", "uts", "cgroup", "mount", "time"), True)
        with Accessory(sys.argv[1]).namespaces("alice", user=maps, **kinds) as namespaces:
            namespaces.enter()
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            for kind in ("ipc", "pid_for_children", "net", "uts", "cgroup", "mnt", "time", "user"):
                print(os.readlink(f"/proc/self/ns/{kind}"))
            subprocess.run(["true"], check=True)
    """
    command = [sys.executable, "-c", code, accessory.address]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    with Accessory(accessory.address) as client:
        maps = ("0 100000 10", "0 100000 10\n")  # the same, but for the line's end
        kinds: dict[str, Any] = dict.fromkeys(FLAGS, True)
        with client.namespaces("alice", user=(maps[0], maps[1]), **kinds) as namespaces:
            assert result.stdout.splitlines() == links(namespaces, *FLAGS, "user"), result.stderr


def test_what_cannot_be_entered_is_named(accessory: Daemon) -> None:
    with Accessory(accessory.address) as client, client.namespaces("a", ipc=True) as namespaces:
        os.dup2(namespaces.lease or -1, namespaces.ipc or -1)
        with pytest.raises(OSError, match="cannot enter the ipc namespace: Invalid argument"):
            namespaces.enter()


def test_a_kind_that_does_not_exist_is_a_value_error_and_nothing_is_entered(
    accessory: Daemon,
) -> None:
    before = own_namespaces(os.getpid())
    with (
        Accessory(accessory.address) as client,
        client.namespaces("a", ipc=True) as namespaces,
        pytest.raises(ValueError, match="'icp' is no kind of namespace"),
    ):
        namespaces.enter("ipc", "icp")
    assert own_namespaces(os.getpid()) == before


def test_what_the_daemon_says_is_the_error(stopped_accessory: Daemon) -> None:
    stopped_accessory.settings.write_text("[limits]\nnames = 1\n")
    with (
        Accessory(stopped_accessory.start().address) as client,
        client.namespaces("alice", ipc=True),
        pytest.raises(Refused, match=r"limits\.names"),
    ):
        client.namespaces("bob", ipc=True)


def test_coroutines_share_a_client(accessory: Daemon) -> None:
    async def ask() -> list[Namespaces]:
        async with AsyncAccessory(accessory.address) as client:
            tasks = [client.namespaces(f"name{n % 5}", uts=True, net=True) for n in range(50)]
            return await asyncio.gather(*tasks)

    found = asyncio.run(ask())
    names = [tuple(links(namespaces, "uts", "net")) for namespaces in found]
    assert names == names[:5] * 10
    assert len(set(names)) == 5
    for namespaces in found:
        namespaces.close()


def test_a_restart_of_the_daemon_is_not_noticed(stopped_accessory: Daemon) -> None:
    daemon = stopped_accessory
    daemon.activate()
    daemon.start()
    with Accessory(daemon.address) as client, client.namespaces("alice", ipc=True) as before:
        for end in (daemon.stop, daemon.kill):
            end()
            found: list[Namespaces] = []
            ask = threading.Thread(
                target=lambda found=found: found.append(client.namespaces("alice", ipc=True))
            )
            ask.start()
            daemon.start()
            ask.join()
            with found[0] as after:
                assert links(after, "ipc") == links(before, "ipc")


# The command: where it runs


@pytest.mark.parametrize("flag", FLAGS)
def test_a_command_is_in_the_namespace_that_was_asked_for(accessory: Daemon, flag: str) -> None:
    inside = output(accessory, "alice", f"--{flag}", "--", "sh", "-c", SHOW)
    kinds: dict[str, Any] = {flag: True}
    with Accessory(accessory.address) as client, client.namespaces("alice", **kinds) as namespaces:
        (expected,) = links(namespaces, flag)
    assert expected in inside
    outside = {os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}
    others = set(inside) - {expected} - outside
    assert len(others) == (flag == "pid")  # whose /proc needs a mount namespace
    assert expected not in outside


def test_proc_shows_the_processes_of_the_pid_namespace_to_the_command_only(
    accessory: Daemon,
) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    show = "echo /proc/[0-9]*; cat /proc/1/comm"
    both = ("--pid", "--mount", "--", "sh", "-c", show)
    for arguments in (("--pid", "--", "sh", "-c", show), both):
        processes, init = output(accessory, "alice", *arguments)
        assert re.fullmatch(r"/proc/1 /proc/\d+", processes)
        assert init == "init-alice"
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert output(accessory, "alice", "--mount", "--", "cat", "/proc/1/comm") != ["init-alice"]


def test_the_working_directory_stays(accessory: Daemon, tmp_path: Path) -> None:
    command = [PROGRAM, "--address", accessory.address, "a", "--mount", "--pid", "--", "pwd"]
    assert subprocess.check_output(command, cwd=tmp_path, text=True) == f"{tmp_path}\n"


def test_the_loopback_interface_is_up(accessory: Daemon) -> None:
    (line,) = output(accessory, "alice", "--net", "--", "ip", "-oneline", "link")
    assert "LOOPBACK,UP" in line


@pytest.mark.parametrize(
    ("maps", "ids"),
    [
        ("0 100000 65536", ["0", "0", "0"]),
        ("5 100005 1,0 100000 5:0 200000 10", ["0", "0", "0"]),
        ("1000 100000 1:100 200000 5", ["1000", "100", "100"]),
        ("7 100000 1:", ["7", "65534", "65534"]),
        (":", ["65534", "65534", "65534"]),
    ],
)
def test_a_command_is_who_the_maps_allow(accessory: Daemon, maps: str, ids: list[str]) -> None:
    show = "id -u; id -g; id -G; cat /proc/self/uid_map"
    lines = output(accessory, "alice", "--user", maps, "--pid", "--", "sh", "-c", show)
    assert lines[:3] == ids
    uid_map = maps.partition(":")[0].split(",")
    assert [line.split() for line in lines[3:]] == [line.split() for line in uid_map if line]


def test_a_shell_is_run_if_there_is_no_command(accessory: Daemon) -> None:
    for shell, status in (("/bin/false", 1), ("/bin/true", 0), ("", 42)):
        result = subprocess.run(
            [PROGRAM, "--address", accessory.address, "alice", "--uts"],
            env={"SHELL": shell},
            input=b"exit 42",
            check=False,
        )
        assert result.returncode == status


# The command: how it ends


@pytest.mark.parametrize("kind", ["--ipc", "--pid"])
def test_the_exit_status_is_that_of_the_command(accessory: Daemon, kind: str) -> None:
    for command, status in (("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill $$", 143)):
        result = run(accessory, "alice", kind, "--", "sh", "-c", command)
        assert (result.returncode, result.stderr) == (status, "")


def test_a_command_that_cannot_be_run_has_a_status_of_its_own(accessory: Daemon) -> None:
    for command, status in (("/nowhere", 127), ("no-such-command", 127), ("/etc/passwd", 126)):
        reason = problem(run(accessory, "alice", "--ipc", "--", command), status)
        assert reason.startswith(f"{command}: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_reach_the_command(accessory: Daemon, number: signal.Signals) -> None:
    script = HOLD.replace("TERM", number.name.removeprefix("SIG"))
    with running(accessory, "alice", "--pid", "--", "sh", "-c", script) as process:
        process.send_signal(number)
        assert process.wait(30) == 3


@pytest.mark.parametrize("session", [[], ["setsid"]])
def test_an_interrupt_from_the_terminal_is_not_passed_on(
    accessory: Daemon, session: list[str]
) -> None:
    """The terminal sends it to the command as well, unless that has a session of its own."""
    script = "trap 'echo came' INT; trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [PROGRAM, "--address", accessory.address, "a", "--ipc", "--", *session, "sh", "-c", script],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown = b""
    try:
        while b"ready" not in shown:
            shown += os.read(ours, 100)
        os.write(ours, b"\x03")
        while b"^C" not in shown or (not session and b"came" not in shown):
            shown += os.read(ours, 100)
        process.terminate()
        with suppress(OSError):  # when all of them have ended
            while data := os.read(ours, 100):
                shown += data
        assert process.wait(30) == 5
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert shown.count(b"came") == (0 if session else 1)


def test_the_name_is_leased_as_long_as_the_command_runs(accessory: Daemon) -> None:
    with running(accessory, "alice", "--ipc", "--", "sh", "-c", HOLD) as process:
        assert leases(accessory) == {b"alice": 1}
        process.terminate()
        assert process.wait(30) == 3
    wait_for("the lease is given back", lambda: leases(accessory) == {b"alice": 0})


def test_the_command_inherits_nothing_of_ours(accessory: Daemon) -> None:
    flags = [f"--{flag}" for flag in FLAGS]
    lines = output(accessory, "alice", *flags, "--user", "0 0 1", "--", "ls", "/proc/self/fd")
    assert lines == ["0", "1", "2", "3"]  # the last one is of ls itself
    show = ("grep", "-E", "Sig(Blk|Ign)", "/proc/self/status")
    plain = subprocess.run(show, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    assert output(accessory, "alice", "--", *show) == plain


# Stops where the command's process, which others in its namespaces see already, is still root.
STOPPING = """
import os, sys
from spawn_client.__main__ import main
set_groups = os.setgroups
def stop(groups):
    print("ready", flush=True)
    sys.stdin.readline()
    set_groups(groups)
os.setgroups = stop
main()
"""
# The link can be read only by those who may trace the process (proc_pid_exe(5), ptrace(2)).
TRACE = 'for n; do readlink "/proc/$n/exe" || echo "not $n"; done'


def test_nobody_inside_can_trace_the_process_before_it_is_the_command(accessory: Daemon) -> None:
    inside = ("alice", "--pid", "--user", "0 100000 65536", "--")
    stopping = [sys.executable, "-c", STOPPING, "--address", accessory.address]
    with (
        running(accessory, *inside, "sh", "-c", HOLD) as traceable,
        subprocess.Popen(
            [*stopping, *inside, "true"], stdin=-1, stdout=-1, text=True, cwd=ROOT
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        pids = [pid_inside(client) for client in (traceable, process)]
        lines = output(accessory, *inside, "sh", "-c", TRACE + " 2>&-", "sh", *pids)
        process.communicate("\n")
    assert process.returncode == 0
    assert lines == [os.path.realpath("/bin/sh"), f"not {pids[1]}"]


def pid_inside(client: subprocess.Popen[str]) -> str:
    """Return which process the command is in its PID namespace."""
    pid = Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().strip()
    status = Path(f"/proc/{pid}/status").read_text()
    return status.partition("\nNSpid:")[2].partition("\n")[0].split()[-1]


def test_a_parent_that_ignores_the_end_of_its_children_is_no_problem(accessory: Daemon) -> None:
    command = [
        PROGRAM,
        "--address",
        accessory.address,
        "alice",
        "--ipc",
        "--",
        "sh",
        "-c",
        "exit 7",
    ]
    result = subprocess.run(["env", "--ignore-signal=CHLD", *command], check=False, timeout=10)
    assert result.returncode == 7


def test_that_the_pid_namespace_has_ended_is_told(accessory: Daemon) -> None:
    code = """if True:
        import sys
        from spawn_client.accessory import Accessory
        from spawn_client.launch import run
        namespaces = Accessory(sys.argv[1]).namespaces("alice", pid=True)
        print("got", flush=True)
        sys.stdin.readline()
        run(namespaces, (None, None), ["true"])
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, accessory.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "got\n"
        (init,) = accessory.inits()
        os.kill(init, signal.SIGKILL)
        wait_for("it is gone", lambda: not accessory.inits())
        _, errors = process.communicate("\n")
    assert "the PID namespace has ended" in errors


# The command: all else


def test_names_are_listed(accessory: Daemon) -> None:
    assert output(accessory, "--list") == ["NAME  NAMESPACES  LEASES  AGE"]
    run(accessory, "bob has a long name", "--ipc", "--uts", "--", "true")
    with running(accessory, "alice", "--user", "0 1 1", "--", "sh", "-c", HOLD):
        lines = output(accessory, "--list")
        records = [json.loads(line) for line in output(accessory, "--list", "--json")]
    assert [re.sub(r"\d+s$", "AGE", line) for line in lines] == [
        "NAME                 NAMESPACES  LEASES  AGE",
        "alice                user        1       AGE",
        "bob has a long name  ipc,uts     0       AGE",
    ]
    assert [(one["name"], one["namespaces"], one["leases"]) for one in records] == [
        ("alice", ["user"], 1),
        ("bob has a long name", ["ipc", "uts"], 0),
    ]
    assert all(0 <= one["age"] < 1000 for one in records)


def test_the_status_is_shown(accessory: Daemon) -> None:
    run(accessory, "alice", "--ipc", "--", "true")
    assert "names=1" in output(accessory, "--status")
    (line,) = output(accessory, "--status", "--json")
    assert json.loads(line)["names"] == "1"


def test_that_nobody_listens_is_told() -> None:
    for arguments in (("--list",), ("--status",), ("alice", "--ipc", "--", "true")):
        told = problem(run("@cm4all-spawn-nobody", *arguments))
        assert told == "nobody listens at @cm4all-spawn-nobody: Connection refused"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "one of NAME, --list and --status is needed"),
        (("alice", "--list"), "one of NAME, --list and --status is needed"),
        (("--list", "--", "true"), "a command needs a NAME"),
        (("alice", "--json"), "--json is for --list and --status"),
        (("alice", "true"), "unrecognized arguments: true"),
        (("alice", "--timeout", "soon"), "argument --timeout: not a number of seconds: 'soon'"),
        (("", "--ipc"), "NAME is empty"),
        (("alice", "--user", "0 0"), "uid map: line 1: three numbers expected"),
        (
            ("alice", "--user", "0 0 1:0 1 1,0 2 1"),
            "gid map: line 2: the ids inside overlap line 1",
        ),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], reason: str) -> None:
    assert problem(run("@cm4all-spawn-nobody", *arguments)) == reason


def test_an_interrupt_ends_it_while_it_waits_for_the_daemon() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{os.urandom(8).hex()}")
        listener.listen()
        address = "@" + listener.getsockname()[1:].decode()
        command = [PROGRAM, "--address", address, "alice", "--ipc"]
        with (
            subprocess.Popen(command, stderr=subprocess.PIPE) as process,
            listener.accept()[0] as connection,
        ):
            connection.recv(100)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
        assert (process.returncode, errors) == (-signal.SIGINT, b"")


def test_what_it_says_cannot_be_written_is_told(accessory: Daemon) -> None:
    command = [PROGRAM, "--address", accessory.address, "--list"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 125
    assert result.stderr == b"cm4all-spawn-client: No space left on device\n"


def test_help_and_version() -> None:
    lines = run("@", "--help").stdout
    for flag in (*FLAGS, "user", "list", "status", "json", "address", "timeout", "version"):
        assert f"--{flag}" in lines
    version = metadata.version("cm4all-spawn")
    assert run("@", "--version").stdout == f"cm4all-spawn-client {version}\n"
