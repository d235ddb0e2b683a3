"""That a pid file has one holder, whatever happens to the file."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spawn_common.pidfile import AlreadyLocked, PidFile
from tests.tools.descriptors import nothing_stays_open
from tests.tools.harness import wait_for


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a pid file may be."""
    return tmp_path / "daemon.pid"


def refusal(path: Path) -> str:
    """Return why the file cannot be locked."""
    with pytest.raises(AlreadyLocked) as refused:
        PidFile(path)
    return str(refused.value)


def test_it_holds_the_process_id_while_it_is_open(path: Path) -> None:
    with PidFile(path) as held:
        assert path.read_text() == ""
        held.write()
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_a_second_holder_is_refused_with_the_name_of_the_first(path: Path) -> None:
    with PidFile(path) as held:
        held.write()
        assert refusal(path) == f"{path}: process {os.getpid()} runs already"
        assert path.read_text() == f"{os.getpid()}\n"
    with PidFile(path):
        pass


def test_nobody_is_named_before_the_holder_is_known(path: Path) -> None:
    path.write_text("12345\n")  # of one that was killed
    with PidFile(path):
        assert refusal(path) == f"{path}: process (unknown) runs already"


def test_what_is_left_of_a_longer_number_does_not_show(path: Path) -> None:
    path.write_text("123456789012345\n")
    with PidFile(path) as held:
        held.write()
        assert path.read_text() == f"{os.getpid()}\n"


def test_text_that_is_no_process_id_is_no_reason_to_fail(path: Path) -> None:
    with path.open("wb") as other:
        other.write(b"\xff")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refusal(path) == f"{path}: process \N{REPLACEMENT CHARACTER} runs already"


HOLD = "from spawn_common.pidfile import PidFile; from pathlib import Path; import os, sys, time"


def test_a_lock_ends_with_its_holder_and_not_with_those_it_executes(path: Path) -> None:
    code = f"""{HOLD}
PidFile(Path(sys.argv[1])).write()
if os.fork() == 0:
    os.execvp("sleep", ["sleep", "1000"])
print("held", flush=True)
time.sleep(1000)
"""
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert refusal(path) == f"{path}: process {holder.pid} runs already"
        (child,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        name = Path(f"/proc/{child}/comm")
        wait_for("the program is executed", lambda: name.read_text() == "sleep\n")
        holder.kill()
        holder.wait()
        with PidFile(path) as held:
            held.write()
        os.killpg(holder.pid, signal.SIGKILL)


def test_it_is_held_by_a_process_that_was_forked_until_that_ends(path: Path) -> None:
    reader, writer = os.pipe()
    held = PidFile(path)
    if (child := os.fork()) == 0:
        os.close(writer)
        held.write()
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    os.close(held.fileno())
    try:
        wait_for("the child has written", lambda: path.read_text().endswith("\n"))
        assert refusal(path) == f"{path}: process {child} runs already"
    finally:
        os.close(writer)
        os.waitpid(child, 0)
    with PidFile(path):
        pass


# What others do between two of our system calls


@pytest.fixture
def before_lock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Return a function that has its argument called once, after open and before flock."""

    def arrange(act: Callable[[], object]) -> None:
        flock = fcntl.flock

        def acting(fd: int, operation: int) -> None:
            monkeypatch.setattr(fcntl, "flock", flock)
            act()
            flock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", acting)

    return arrange


def test_a_file_that_was_removed_meanwhile_is_made_again(
    path: Path, before_lock: Callable[[Callable[[], object]], None]
) -> None:
    before_lock(path.unlink)
    with PidFile(path) as held:
        held.write()
        assert path.read_text() == f"{os.getpid()}\n"
        assert refusal(path).endswith(" runs already")


def test_a_file_that_another_has_put_there_meanwhile_is_his(
    path: Path, before_lock: Callable[[Callable[[], object]], None]
) -> None:
    others: list[PidFile] = []

    def replace() -> None:
        path.unlink()
        others.append(PidFile(path))

    before_lock(replace)
    with nothing_stays_open():
        assert refusal(path) == f"{path}: process (unknown) runs already"
        os.close(others[0].fileno())


def test_a_file_that_has_become_somebody_else_s_is_not_removed(path: Path) -> None:
    with PidFile(path):
        path.unlink()
        other = PidFile(path)
        other.write()
    assert path.read_text() == f"{os.getpid()}\n"
    os.close(other.fileno())


def test_a_file_that_was_removed_is_not_missed(path: Path) -> None:
    with PidFile(path):
        path.unlink()
    assert not path.exists()


def test_a_file_that_cannot_be_removed_is_emptied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError

    with PidFile(path) as held:
        held.write()
        monkeypatch.setattr(Path, "unlink", refuse)
    assert path.read_text() == ""


# What is no pid file


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        PidFile(path)
    assert target.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/dev/null", "Invalid argument"),
        ("none/daemon.pid", "No such file or directory"),
        (".", "Is a directory"),
    ],
)
def test_what_cannot_be_a_pid_file_is_an_error_and_stays(
    tmp_path: Path, name: str, reason: str
) -> None:
    before = os.stat("/dev/null").st_ino
    with nothing_stays_open(), pytest.raises(OSError, match=reason):
        PidFile(tmp_path / name)
    assert os.stat("/dev/null").st_ino == before
