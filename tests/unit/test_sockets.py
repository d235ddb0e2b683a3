"""Addresses to listen at, and what a service manager passes and keeps."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from spawn_common.sockets import InUse, address_of, is_listening, listen, passed_sockets, store

# Puts sockets and a file where a service manager does, and shows what is taken of them.
PASSED = """
import os, socket, sys
from contextlib import suppress
from spawn_common.sockets import is_listening, passed_sockets

listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind("")
listener.listen()
one, other = socket.socketpair()
descriptors = [listener.detach(), os.open(os.devnull, os.O_RDONLY), one.detach()]
other.detach()
for number, fd in enumerate(descriptors):
    os.dup2(fd, 100 + number)
os.closerange(3, 100)
for number in range(len(descriptors)):
    os.dup2(100 + number, 3 + number)
os.closerange(100, 103)

environment = dict(item.split("=", 1) for item in sys.argv[1:])
environment.setdefault("LISTEN_PID", str(os.getpid()))
passed = passed_sockets(environment)
for name, end in passed:
    print(repr(name), end.fileno(), is_listening(end), os.get_inheritable(end.fileno()))
still_open = []
for fd in range(10):
    with suppress(OSError):
        os.fstat(fd)
        still_open.append(fd)
print(still_open)
"""

LISTENER = "3 True False"
CONNECTED = "5 False False"


def passed(*environment: str) -> list[str]:
    """Return what a process finds that was passed a listener, a file and a connection."""
    result = subprocess.run(
        [sys.executable, "-c", PASSED, *environment], capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_sockets_are_found_with_their_names_and_all_else_is_closed() -> None:
    assert passed("LISTEN_FDS=3", "LISTEN_FDNAMES=accessory.socket:file:keeper") == [
        f"'accessory.socket' {LISTENER}",
        f"'keeper' {CONNECTED}",
        "[0, 1, 2, 3, 5]",
    ]


@pytest.mark.parametrize(
    ("names", "first", "last"),
    [
        ([], "", ""),
        (["LISTEN_FDNAMES="], "", ""),
        (["LISTEN_FDNAMES=one"], "one", ""),
        (["LISTEN_FDNAMES=one:two:three:four"], "one", "three"),
        (["LISTEN_FDNAMES=::three"], "", "three"),
    ],
)
def test_names_may_be_missing_or_too_many(names: list[str], first: str, last: str) -> None:
    assert passed("LISTEN_FDS=3", *names) == [
        f"{first!r} {LISTENER}",
        f"{last!r} {CONNECTED}",
        "[0, 1, 2, 3, 5]",
    ]


def test_only_as_many_as_were_passed_are_touched() -> None:
    assert passed("LISTEN_FDS=1", "LISTEN_FDNAMES=a:b:c") == [
        f"'a' {LISTENER}",
        "[0, 1, 2, 3, 4, 5]",
    ]


def test_a_number_that_is_too_high_does_no_harm() -> None:
    assert passed("LISTEN_FDS=9", "LISTEN_FDNAMES=a:b:c") == [
        f"'a' {LISTENER}",
        f"'c' {CONNECTED}",
        "[0, 1, 2, 3, 5]",
    ]


@pytest.mark.parametrize(
    "environment",
    [
        ["LISTEN_PID=1", "LISTEN_FDS=3"],
        ["LISTEN_PID=", "LISTEN_FDS=3"],
        ["LISTEN_FDNAMES=a:b:c"],
        ["LISTEN_FDS=0"],
        ["LISTEN_FDS=-1"],
        ["LISTEN_FDS="],
        ["LISTEN_FDS=many"],
    ],
)
def test_what_is_not_for_this_process_is_left_alone(environment: list[str]) -> None:
    assert passed(*environment) == ["[0, 1, 2, 3, 4, 5]"]


def test_without_a_service_manager_nothing_is_passed() -> None:
    assert passed_sockets({}) == []


@pytest.fixture(name="abstract")
def abstract_address() -> str:
    return f"@cm4all-spawn-test-{os.urandom(8).hex()}"


def test_a_name_is_listened_at_and_tells_senders(abstract: str) -> None:
    with (
        listen(abstract) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
    ):
        assert is_listening(listener)
        assert address_of(listener) == abstract
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
        assert not listener.get_inheritable()
        client.connect("\0" + abstract[1:])
        assert not is_listening(client)


def test_a_name_that_is_taken_is_said_with_its_holder(abstract: str) -> None:
    with listen(abstract), pytest.raises(InUse) as refusal:
        listen(abstract)
    assert str(refusal.value) == f"{abstract} is already in use by process {os.getpid()}"
    listen(abstract).close()


def test_a_name_whose_holder_does_not_accept_is_taken_all_the_same(abstract: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as holder:
        holder.bind("\0" + abstract[1:])
        with pytest.raises(InUse, match=r"process \(unknown\)"):
            listen(abstract)


def test_a_path_is_listened_at(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen(str(path)) as listener:
        assert address_of(listener) == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with pytest.raises(InUse, match=f"process {os.getpid()}$"):
            listen(str(path))


@pytest.mark.parametrize("left_behind", [False, True])
def test_anybody_may_connect_to_a_path_whatever_the_umask_which_stays(
    tmp_path: Path, left_behind: bool
) -> None:
    path = tmp_path / "socket"
    if left_behind:
        listen(str(path)).close()
    before = os.umask(0o077)
    try:
        with listen(str(path)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with pytest.raises(FileNotFoundError):
            listen(str(tmp_path / "none" / "socket"))
    finally:
        assert os.umask(before) == 0o077


def test_a_path_that_was_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for _ in range(3):
        listen(str(path)).close()
        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file", "link to a socket"])
def test_what_is_no_socket_is_not_deleted(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "path", tmp_path / "target"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(target)
        if kind == "link to a file":
            target.write_text("precious")
        else:
            listen(str(target)).close()
    with pytest.raises(OSError, match="Address already in use"):
        listen(str(path))
    assert path.lstat()
    assert not stat.S_ISSOCK(path.lstat().st_mode)


def test_what_is_stored_goes_to_the_service_manager_with_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        (tmp_path / "file").open("w") as file,
    ):
        manager.bind("")
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + os.fsdecode(manager.getsockname()[1:]))
        store("keeper", file.fileno())
        data, fds, _, _ = socket.recv_fds(manager, 1000, 10)
        (fd,) = fds
        try:
            assert sorted(data.decode().splitlines()) == ["FDNAME=keeper", "FDSTORE=1"]
            assert os.path.samestat(os.fstat(fd), os.fstat(file.fileno()))
        finally:
            os.close(fd)


def test_without_a_service_manager_nothing_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    store("keeper", -1)
