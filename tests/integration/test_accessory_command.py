"""The command cm4all-spawn-accessory: what it accepts, what it says, and where it listens."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.tools.accessory import Accessory
from tests.tools.harness import DEADLINE, wait_for
from tests.tools.peers import Who, ask_as
from tests.tools.wire import ERROR, IPC, LEASE, NAME, STATUS, STATUS_TEXT, Client

NAME_OF_PROGRAM = "cm4all-spawn-accessory"
PROGRAM = Path(sys.executable).with_name(NAME_OF_PROGRAM)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    return subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=DEADLINE
    )


def problems(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what a command that failed said, after its own name."""
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert all(line.startswith(f"{NAME_OF_PROGRAM}: ") for line in lines), lines
    return [line.partition(": ")[2] for line in lines]


def is_served(address: str) -> bool:
    """Whether a daemon answers at ADDRESS."""
    with Client(address) as client, client.ask((STATUS, b"")) as answer:
        return answer.packets[0][0] == STATUS_TEXT


def listens(address: str) -> bool:
    """Whether a socket is bound to ADDRESS, which is abstract."""
    return f"{address}\n" in Path("/proc/net/unix").read_text()


@pytest.fixture(name="settings")
def settings_file(tmp_path: Path) -> Path:
    return tmp_path / "accessory.toml"


def test_help_names_every_flag() -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert all(flag in result.stdout for flag in ("--listen", "--config", "--check", "--version"))


def test_version_is_that_of_the_distribution() -> None:
    version = metadata.version("cm4all-spawn")
    assert run("--version").stdout == f"{NAME_OF_PROGRAM} {version}\n"


def test_check_accepts_what_is_fine_and_starts_nothing(settings: Path) -> None:
    settings.write_text('expiry = 5.5\n[limits]\nnames = 7\n[[allow]]\nusers = ["root", 7]\n')
    listen = f"@cm4all-spawn-test-{os.urandom(6).hex()}"
    result = run("--check", "--config", settings, "--listen", listen)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_check_reports_every_problem_with_file_and_line(settings: Path) -> None:
    settings.write_text('expiry = "soon"\n\ncolour = 1\n[limits]\nnames = 0\ncolour = 2\n')
    lines = problems(run("--check", "--config", settings))
    assert [line.split(" ")[0:2] for line in lines] == [
        [f"{settings}:1:", "expiry:"],
        [f"{settings}:3:", "colour:"],
        [f"{settings}:5:", "limits.names:"],
        [f"{settings}:6:", "limits.colour:"],
    ]


def test_check_knows_the_users_and_groups_of_this_host(settings: Path) -> None:
    settings.write_text('[[allow]]\nusers = ["no-such-user"]\ngroups = ["root", "no-such-group"]\n')
    assert problems(run("--check", "--config", settings)) == [
        f"{settings}:1: allow: there is no user 'no-such-user'",
        f"{settings}:1: allow: there is no group 'no-such-group'",
    ]


@pytest.mark.parametrize(
    "running",
    [
        ["--detach"],
        ["--pid-file", "daemon.pid"],
        ["--user", "nobody"],
        ["--group", "0"],
        ["--log-file", "daemon.log"],
    ],
    ids=lambda options: options[0],
)
def test_options_for_running_the_daemon_are_wrong_usage_in_a_check(running: list[str]) -> None:
    result = run("--check", *running)
    assert (result.returncode, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]
    assert last == f"{NAME_OF_PROGRAM}: error: {running[0]} is for running the daemon only"
    assert not Path(running[-1]).exists()


def test_a_file_that_is_asked_for_must_exist(settings: Path) -> None:
    assert problems(run("--config", settings)) == [f"{settings}: No such file or directory"]


def test_broken_settings_end_the_start(settings: Path) -> None:
    settings.write_text("expiry = -1")
    (line,) = problems(run("--config", settings))
    assert line.startswith(f"{settings}:1: expiry: ")


@pytest.mark.parametrize("address", ["", "@", "/", "cm4all-spawn", "./socket", "127.0.0.1:1"])
def test_what_is_no_address_is_wrong_usage(address: str) -> None:
    result = run("--listen", address)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last == f"{NAME_OF_PROGRAM}: error: --listen {address!r}: @NAME or /PATH expected"


def test_a_problem_with_an_address_is_one_line_that_says_why(tmp_path: Path) -> None:
    for address, reason in (
        (f"{tmp_path}/none/socket", "No such file or directory"),
        (f"{tmp_path}/{'x' * 108}", "AF_UNIX path too long"),
        (f"@{'x' * 108}", "AF_UNIX path too long"),
    ):
        assert problems(run("--listen", address)) == [f"cannot listen at {address}: {reason}"]


# Where it listens


def test_a_second_daemon_at_one_address_names_the_first_and_leaves_it_alone(
    accessory: Accessory,
) -> None:
    with accessory.client() as client, client.ask((NAME, b"a"), (IPC, b""), (LEASE, b"")) as before:
        (line,) = problems(run("--listen", accessory.address))
        assert line == f"{accessory.address} is already in use by process {accessory.pid}"
        with client.ask((NAME, b"a"), (IPC, b"")) as after:
            assert after.inodes() == before.inodes()[:1]
    assert is_served(accessory.address)


def test_it_listens_at_all_addresses_and_their_clients_share_the_namespaces(
    stopped_accessory: Accessory, tmp_path: Path
) -> None:
    second, third = f"{stopped_accessory.address}-2", str(tmp_path / "socket")
    stopped_accessory.arguments += ["--listen", second, "--listen", third]
    stopped_accessory.start()
    inodes = []
    for address in (stopped_accessory.address, second, third):
        with Client(address) as client, client.ask((NAME, b"a"), (IPC, b"")) as answer:
            inodes += answer.inodes()
    assert len(inodes) == 3
    assert len(set(inodes)) == 1


def test_if_one_of_several_addresses_is_taken_none_is_kept(
    accessory: Accessory, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    (line,) = problems(run("--listen", str(path), "--listen", accessory.address))
    assert accessory.address in line
    assert not path.exists()


@pytest.fixture(name="path")
def accessory_path(stopped_accessory: Accessory, tmp_path: Path) -> Path:
    """Where the accessory of the test listens, too."""
    path = tmp_path / "socket"
    stopped_accessory.arguments += ["--listen", str(path)]
    return path


@pytest.mark.parametrize("umask", ["022", "077"])
def test_a_path_is_there_for_all_and_gone_after_the_end(
    stopped_accessory: Accessory, path: Path, umask: str
) -> None:
    stopped_accessory.wrapper = ["sh", "-c", f'umask {umask}; exec "$@"', "sh"]
    stopped_accessory.start()
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert is_served(str(path))
    stopped_accessory.stop()
    assert not path.exists()


def test_who_is_not_allowed_can_reach_a_path_but_is_told_so(stopped_accessory: Accessory) -> None:
    path = stopped_accessory.settings.parent / "socket"  # in a directory for all
    stopped_accessory.arguments += ["--listen", str(path)]
    stopped_accessory.start()
    asked = ask_as(Who(65534), str(path), ((NAME, b"a"), (IPC, b"")))
    assert asked.answers == [([(ERROR, b"permission denied")], [])]


def test_the_path_of_a_daemon_that_was_killed_is_taken_over(
    stopped_accessory: Accessory, path: Path
) -> None:
    stopped_accessory.start()
    stopped_accessory.kill()
    assert path.exists()
    stopped_accessory.start()
    assert is_served(str(path))


def test_the_path_of_a_daemon_that_lives_is_not_taken_over(
    stopped_accessory: Accessory, path: Path
) -> None:
    stopped_accessory.start()
    (line,) = problems(run("--listen", str(path)))
    assert line == f"{path} is already in use by process {stopped_accessory.pid}"
    assert is_served(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_the_path_of_another_kind_of_socket_is_not_taken_over(
    tmp_path: Path, kind: socket.SocketKind
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind == socket.SOCK_STREAM:
            other.listen()
        (line,) = problems(run("--listen", str(path)))
        assert line == f"{path} is already in use by process (unknown)"
        assert path.exists()


def test_a_file_is_not_taken_for_a_socket_that_was_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    (line,) = problems(run("--listen", str(path)))
    assert line == f"cannot listen at {path}: Address already in use"
    assert path.read_text() == "precious"


def test_sockets_of_the_service_manager_are_used_instead(
    stopped_accessory: Accessory, path: Path
) -> None:
    stopped_accessory.activate()  # at the address that is given as --listen, too
    stopped_accessory.start()
    assert is_served(stopped_accessory.address)
    assert not path.exists()


def test_who_connected_before_the_start_is_served(stopped_accessory: Accessory) -> None:
    stopped_accessory.activate()
    with stopped_accessory.client() as client:
        client.send((NAME, b"a"), (IPC, b""))
        stopped_accessory.start()
        answer = client.receive()
        assert answer is not None
        with answer:
            assert len(answer.fds) == 1


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_is_a_good_end(
    stopped_accessory: Accessory, number: signal.Signals
) -> None:
    stopped_accessory.start()
    stopped_accessory.signal(number)
    assert stopped_accessory.process is not None
    assert stopped_accessory.process.wait(DEADLINE) == 0
    assert stopped_accessory.errors() == []


def test_hang_ups_at_any_moment_after_the_daemon_listens_do_not_end_it(
    stopped_accessory: Accessory,
) -> None:
    accessory = stopped_accessory
    for _ in range(5):
        accessory.begin()
        wait_for("it listens", lambda: listens(accessory.address))
        process = accessory.process
        assert process is not None

        def is_ready(process: subprocess.Popen[bytes] = process) -> bool:
            process.send_signal(signal.SIGHUP)
            assert process.poll() is None, accessory.errors()
            return "READY=1" in accessory.manager.notifications

        wait_for("it is ready", is_ready)
        assert is_served(accessory.address)
        accessory.stop()
    assert accessory.errors() == []


def test_without_a_service_manager_everything_ends_with_the_daemon() -> None:
    address = f"@cm4all-spawn-test-{os.urandom(6).hex()}"
    environment = {name: os.environ[name] for name in os.environ if name != "NOTIFY_SOCKET"}
    with subprocess.Popen([PROGRAM, "--listen", address], env=environment) as process:
        wait_for("it listens", lambda: listens(address))
        with Client(address) as client, client.ask((NAME, b"a"), (3, b"")) as answer:
            assert len(answer.fds) == 1
            namespace = f"pid:[{answer.inodes()[0]}]"
        assert processes_in(namespace)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    wait_for("its init has ended", lambda: processes_in(namespace) == [])


def processes_in(namespace: str) -> list[str]:
    """Return the processes of this host in a PID namespace."""
    found = []
    for path in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            if os.readlink(path) == namespace:
                found.append(path.parts[2])
        except OSError:
            continue  # it has ended
    return found
