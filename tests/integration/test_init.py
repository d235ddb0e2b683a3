"""The first process of a PID namespace: what it holds, what it does, and when it ends."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.tools.harness import DEADLINE, wait_for
from tests.tools.native import ROOT

TARGET = "build/libexec/cm4all-spawn-init"
ADDRESS = "@cm4all-spawn"
CLONE_NEWPID = 0x20000000  # <linux/sched.h>

# The kernel asks no filter about uretprobe and uprobe of x86-64, which harm nobody but their caller
# (kernel/seccomp.c).
CALLS = set(range(480)) - {335, 336}

CAP_KILL = 1 << 5  # <linux/capability.h>

# Each ends when its standard input does, and nobody waits for it.
ORPHANS = """
import os
for _ in range(500):
    if os.fork() == 0:
        if os.fork() == 0:
            os.read(0, 1)
        os._exit(0)
    os.wait()
"""

ALL_SIGNALS_BUT_SIGTERM = """
import os, signal
for number in signal.valid_signals() - {signal.SIGTERM}:
    os.kill(1, number)
"""

# Two children have ended before the program is there to hear of it.
CHILDREN_BEFORE = """
import os, sys
for _ in range(2):
    child = os.fork() or os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
os.execv(sys.argv[1], ["init-late"])
"""

SIGTERM_BEFORE = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(1, signal.SIGTERM)
os.execv(sys.argv[1], ["init-early"])
"""

# The program, but when it is ready it makes the system call whose number, of three digits, is its
# argument.
PROGRAM_THAT_CALLS = """
#define start original
#include "init.c"
#undef start
__attribute__((used)) static void start(long *stack)
{
    char **argv = (char **)(stack + 1);
    CALL(prctl, PR_SET_DUMPABLE, 0); // leave no core files behind
    if (set_up((int)stack[0], argv) == ENDED)
        call5(100 * argv[1][0] + 10 * argv[1][1] + argv[1][2] - 111 * '0', 0, 0, 0, 0, 0);
    CALL(exit_group, 42);
}
"""

libc = ctypes.CDLL(None, use_errno=True)

Start = Callable[..., subprocess.Popen[bytes]]  # command, options of Popen


def start_first(*command: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command as the first process of a new PID namespace."""
    with open("/proc/self/ns/pid") as ours:
        assert libc.unshare(CLONE_NEWPID) == 0
        try:
            return subprocess.Popen(command, **options)
        finally:
            assert libc.setns(ours.fileno(), CLONE_NEWPID) == 0


def run_inside(init: subprocess.Popen[bytes], *command: str) -> None:
    """Run a command to its end in the namespace of INIT."""
    subprocess.run(["nsenter", "-t", str(init.pid), "-p", *command], check=True, timeout=DEADLINE)


def status(init: subprocess.Popen[bytes]) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{init.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children(process: subprocess.Popen[bytes]) -> list[str]:
    """Return the process ids of its children, dead or alive."""
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    """The program as make builds it, where anybody may execute it."""
    subprocess.run(["make", "-s", "-C", ROOT, TARGET], check=True)
    with TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(shutil.copy(ROOT / TARGET, directory))


@pytest.fixture
def start(program: Path) -> Iterator[Start]:
    """Start one that is ready, by default as root does it; it is ended after the test."""
    with ExitStack() as stack:

        def start_ready(*command: str | Path, **options: Any) -> subprocess.Popen[bytes]:
            init = start_first(*(command or (program, ADDRESS)), **options)
            stack.callback(init.wait, DEADLINE)
            stack.callback(init.kill)

            def ready() -> bool:
                assert init.poll() is None, f"it ended with status {init.returncode}"
                return status(init)["Seccomp"] == "2"

            wait_for("it is ready", ready)
            return init

        yield start_ready


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a", "init-a"),
        ("ten-chars1", "init-ten-chars1"),
        ("11-chars-11", "i-11-chars-11"),
        ("13-characters", "i-13-characters"),
        ("with blanks \x7f" + "x" * 4000, "i-with blanks \x7f"),
    ],
)
def test_it_is_known_by_its_name(start: Start, program: Path, name: str, shown: str) -> None:
    init = start(f"init-{name}", ADDRESS, executable=program)
    assert Path(f"/proc/{init.pid}/comm").read_text() == f"{shown}\n"
    assert Path(f"/proc/{init.pid}/cmdline").read_text() == f"init-{name}\0{ADDRESS}\0"


def test_it_holds_nothing_of_who_started_it(start: Start, tmp_path: Path) -> None:
    with open(os.devnull) as first, open(os.devnull) as second:
        init = start(cwd=tmp_path, pass_fds=(first.fileno(), second.fileno()))
    assert os.listdir(f"/proc/{init.pid}/fd") == []
    assert os.readlink(f"/proc/{init.pid}/cwd") == "/"
    assert os.getsid(init.pid) == init.pid


NOBODY = ("setpriv", "--reuid=65534", "--clear-groups")


@pytest.mark.parametrize(
    ("wrapper", "kept"),
    [
        ((), CAP_KILL),
        (("setpriv", "--inh-caps=+chown,+kill", "--ambient-caps=+chown,+kill"), CAP_KILL),
        (("setpriv", "--bounding-set=-setpcap"), CAP_KILL),
        ((*NOBODY, "--inh-caps=+kill", "--ambient-caps=+kill"), CAP_KILL),
        ((*NOBODY, "--inh-caps=+chown", "--ambient-caps=+chown"), 0),
        (NOBODY, 0),
        ((*NOBODY, "unshare", "--user", "--map-root-user"), CAP_KILL),
    ],
)
def test_it_keeps_no_capability_but_kill(
    start: Start, program: Path, wrapper: tuple[str], kept: int
) -> None:
    fields = status(start(*wrapper, program, ADDRESS))
    sets = [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")]
    assert sets == [kept, kept, 0, 0]
    assert fields["NoNewPrivs"] == "1"


@pytest.mark.parametrize("wrapper", [(), (*NOBODY, "unshare", "--user", "--map-root-user")])
def test_it_can_never_get_one_back_where_it_may_decide(
    start: Start, program: Path, wrapper: tuple[str]
) -> None:
    assert int(status(start(*wrapper, program, ADDRESS))["CapBnd"], 16) == CAP_KILL


def test_root_without_ptrace_capability_can_look_after_it(start: Start, program: Path) -> None:
    init = start()
    for path, shown in (("exe", f"{program}"), ("ns/pid", "pid:[")):
        command = ["setpriv", "--bounding-set=-sys_ptrace", "readlink", f"/proc/{init.pid}/{path}"]
        assert subprocess.check_output(command, text=True).startswith(shown)


def test_every_orphan_is_reaped(start: Start) -> None:
    init = start()
    read, write = os.pipe()
    with open(read) as standard_input, open(write, "w"):
        command = ["nsenter", "-t", str(init.pid), "-p", sys.executable, "-c", ORPHANS]
        subprocess.run(command, stdin=standard_input, check=True, timeout=DEADLINE)
        assert len(children(init)) == 500
    wait_for("all are reaped", lambda: children(init) == [])


def test_children_that_ended_before_it_was_ready_are_reaped(start: Start, program: Path) -> None:
    init = start(sys.executable, "-c", CHILDREN_BEFORE, program)
    assert children(init) == []


@pytest.mark.parametrize("inside", [False, True])
def test_sigterm_ends_it_and_everything_in_its_namespace(start: Start, inside: bool) -> None:
    init = start()
    run_inside(init, "sh", "-c", "sleep 1000 &")
    (orphan,) = children(init)
    with subprocess.Popen(["nsenter", "-t", str(init.pid), "-p", "sleep", "1000"]) as member:
        wait_for("it is inside", lambda: len(children(member)) == 1)
        if inside:
            with suppress(subprocess.CalledProcessError):  # it may be among those who are ended
                run_inside(init, "kill", "-TERM", "1")
        else:
            init.terminate()
        assert init.wait(DEADLINE) == 0
        assert member.wait(DEADLINE) == -signal.SIGKILL
    assert not Path("/proc", orphan).exists()


def test_a_sigterm_that_came_before_it_was_ready_ends_it(program: Path) -> None:
    init = start_first(sys.executable, "-c", SIGTERM_BEFORE, program)
    try:
        assert init.wait(DEADLINE) == 0
    finally:
        init.kill()


def test_no_other_signal_from_inside_has_an_effect(start: Start) -> None:
    init = start()
    run_inside(init, sys.executable, "-c", ALL_SIGNALS_BUT_SIGTERM)
    fields = status(init)
    assert (fields["State"], fields["ShdPnd"]) == ("S (sleeping)", "0" * 16)
    init.terminate()
    assert init.wait(DEADLINE) == 0


def test_it_goes_on_after_it_was_stopped(start: Start) -> None:
    init = start()
    init.send_signal(signal.SIGSTOP)
    wait_for("it is stopped", lambda: status(init)["State"].startswith("T"))
    init.send_signal(signal.SIGCONT)
    wait_for("it waits again", lambda: status(init)["State"].startswith("S"))
    init.terminate()
    assert init.wait(DEADLINE) == 0


def test_it_takes_at_most_100_kilobytes(start: Start) -> None:
    lines = Path(f"/proc/{start().pid}/smaps_rollup").read_text().splitlines()
    (size,) = [line.split()[1] for line in lines if line.startswith("Pss:")]
    assert int(size) <= 100


def test_any_other_system_call_ends_it(tmp_path: Path) -> None:
    source, caller = tmp_path / "caller.c", tmp_path / "caller"
    source.write_text(PROGRAM_THAT_CALLS)
    include = f"-I{ROOT / 'spawn_accessory' / 'programs'}"
    flags = ["-static", "-ffreestanding", "-nostdlib", "-fno-stack-protector"]
    subprocess.run(["cc", *flags, include, "-o", caller, source], check=True)
    ends = {number: start_first(caller, f"{number:03}").wait(DEADLINE) for number in CALLS}
    others = {number: end for number, end in ends.items() if end != -signal.SIGSYS}
    assert sorted(others.values()) == [0, 42]  # exit_group, rt_sigtimedwait


def test_it_refuses_to_be_any_other_process(program: Path) -> None:
    assert subprocess.run([program, ADDRESS], check=False, timeout=DEADLINE).returncode == 1
