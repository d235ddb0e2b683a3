"""What the accessory promises to spawners: same NAME, same real namespaces, while leased."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import select
import shlex
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from spawn_accessory.keeper import Keeper
from spawn_accessory.namespaces import Maker
from spawn_accessory.protocol import Maps, Namespace, Request
from spawn_accessory.registry import Registry
from spawn_accessory.settings import Settings
from spawn_accessory.watch import Watch
from tests.tools.accessory import Accessory, running_accessory
from tests.tools.clock import FakeClock
from tests.tools.harness import DEADLINE, wait_for
from tests.tools.wire import (
    CGROUP,
    ERROR,
    HANDLES,
    IPC,
    LEASE,
    LEASE_PIPE,
    LIST,
    LIST_MORE,
    MOUNT,
    NAME,
    NET,
    PID,
    STATUS,
    STATUS_TEXT,
    TIME,
    USER,
    UTS,
    Answer,
    Client,
    Packet,
    datagram,
    listed,
)

NOP = 0
MAPS = b"0 100000 1000\x000 100000 1000"

# What a request asks for, and the CLONE_* flag of what comes, in the order of an answer.
FLAGS = {
    IPC: 0x08000000,
    PID: 0x20000000,
    USER: 0x10000000,
    NET: 0x40000000,
    UTS: 0x04000000,
    CGROUP: 0x02000000,
    MOUNT: 0x00020000,
    TIME: 0x00000080,
}
FILES = dict(
    zip(FLAGS.values(), ("ipc", "pid", "user", "net", "uts", "cgroup", "mnt", "time"), strict=True)
)
ALL = tuple((kind, MAPS if kind == USER else b"") for kind in FLAGS)
SUITE = ALL[:3]

_NS_GET_NSTYPE = 0xB703  # <linux/nsfs.h>


@pytest.fixture(scope="module", name="shared")
def shared_daemon() -> Iterator[Accessory]:
    with running_accessory("contract") as daemon:
        yield daemon


@pytest.fixture(scope="module", name="hasty")
def shared_hasty_daemon() -> Iterator[Accessory]:
    """A daemon in which names expire soon."""
    with running_accessory("leases", "expiry = 0.3") as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def own_namespaces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Daemons that tests share are in their own namespaces after each of them."""
    yield
    for name in {"shared", "hasty"} & set(request.fixturenames):
        request.getfixturevalue(name).check_own_namespaces()


@pytest.fixture
def name() -> Packet:
    """A NAME that no other test uses."""
    return (NAME, b"test-" + os.urandom(6).hex().encode())


@pytest.fixture
def client(shared: Accessory) -> Iterator[Client]:
    """A connection to the shared daemon; everything was answered in the end."""
    with shared.client() as client:
        yield client
        with client.ask((STATUS, b"")) as answer:
            assert [command for command, _ in answer.packets] == [STATUS_TEXT]


def kind_of(fd: int) -> int:
    """Return the CLONE_* flag of a namespace."""
    return fcntl.ioctl(fd, _NS_GET_NSTYPE)


def entering(answer: Answer, *command: str) -> list[str]:
    """Return what runs COMMAND in all namespaces of ANSWER, whose descriptors it must have."""
    options = [
        f"--{FILES[flag].replace('mnt', 'mount')}=/proc/self/fd/{fd}"
        for flag, fd in zip(answer.flags, answer.fds, strict=False)  # a lease may follow
    ]
    return ["nsenter", *options, "--", *command]


def run_in(answer: Answer, script: str) -> str:
    """Run a shell script in all namespaces of ANSWER, and return what it printed."""
    command = entering(answer, "sh", "-ec", script)
    result = subprocess.run(
        command, pass_fds=answer.fds, capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def start_in(answer: Answer, stack: ExitStack) -> subprocess.Popen[bytes]:
    """Start a process that stays in all namespaces of ANSWER, and wait until it is there."""
    process = subprocess.Popen(
        entering(answer, "sh", "-c", "echo; exec sleep 1000"),
        pass_fds=answer.fds[: len(answer.flags)],  # not the lease
        stdout=subprocess.PIPE,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    stack.callback(process.stdout.close)
    assert process.stdout.readline() == b"\n"
    return process


def init_of(daemon: Accessory) -> int:
    """Return the pid of the only init there is, as soon as it has its name."""
    wait_for("there is one init", lambda: len(daemon.inits()) == 1)
    (pid,) = daemon.inits()
    return pid


def is_gone(pid: int) -> bool:
    """Whether there is no process of this number any more, not even a zombie."""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


# What is asked, and what comes


def test_a_request_and_its_answer_byte_by_byte(shared: Accessory) -> None:
    """As a packet dump of the C++ suite's client would show it."""
    request = bytes.fromhex(
        "73610463 fb0b1378"  # magic, CRC-32 of the rest
        "0400 0100 66697665"  # NAME "five"
        "0000 0500"  # LEASE_PIPE
        "0000 0200"  # IPC_NAMESPACE
        "1b00 0400 30203130303030302031303030 00 30203130303030302031303030 00"  # USER_NAMESPACE
    )
    with shared.client() as client:
        client.socket.send(request)
        raw, fds, _, _ = socket.recv_fds(client.socket, 8192, 64)
    with Answer([], list(fds)):
        assert raw == bytes.fromhex(
            "73610463 7462a9eb"
            "0800 0100 00000008 00000010"  # NAMESPACE_HANDLES: CLONE_NEWIPC, CLONE_NEWUSER
            "0000 0200"  # LEASE_PIPE
        )
        assert [kind_of(fd) for fd in fds[:2]] == [0x08000000, 0x10000000]
        assert stat.S_ISFIFO(os.fstat(fds[2]).st_mode)
        assert len(fds) == 3


def test_every_selection_in_any_order_has_its_descriptors_in_the_order_of_an_answer(
    client: Client, name: Packet
) -> None:
    with client.ask(name, *ALL) as reference:
        assert reference.flags == list(FLAGS.values())
        inodes = dict(zip(reference.flags, reference.inodes(), strict=True))
        for size in range(1, len(ALL) + 1):
            for selection in itertools.combinations(ALL, size):
                packets = [name, *selection]
                random.shuffle(packets)
                with client.ask(*packets) as answer:
                    flags = [FLAGS[kind] for kind, _ in selection]
                    assert answer.packets == [(HANDLES, struct.pack(f"={size}I", *flags))]
                    assert answer.inodes() == [inodes[flag] for flag in flags]
                    assert [kind_of(fd) for fd in answer.fds] == flags


@pytest.mark.parametrize("kinds", [(), SUITE[:1], SUITE, ALL])
def test_a_lease_comes_last(client: Client, name: Packet, kinds: tuple[Packet, ...]) -> None:
    with client.ask((LEASE, b""), *kinds, name) as answer:
        assert answer.packets[-1] == (LEASE_PIPE, b"")
        assert len(answer.packets) == 1 + bool(kinds)
        assert len(answer.fds) == len(kinds) + 1
        assert stat.S_ISFIFO(os.fstat(answer.lease).st_mode)
        assert fcntl.fcntl(answer.lease, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY


def test_what_asks_for_nothing_is_not_answered(shared: Accessory, name: Packet) -> None:
    with shared.client() as client:
        for packets in ((), ((NOP, b""),), ((NOP, b"anything"), (NOP, b"")), (name,)):
            client.send(*packets)
        client.send(name, (0x7FFF, b"of a newer client"))
        with client.ask((STATUS, b"")) as answer:
            assert [command for command, _ in answer.packets] == [STATUS_TEXT]
        assert name[1] not in client.names()


def test_commands_of_newer_clients_are_passed_over(client: Client, name: Packet) -> None:
    unknown = [(6, b""), (0x1234, b"abc"), (0x7FFF, bytes(100)), (0x1234, b""), (0xFFFF, b"x")]
    with client.ask(*unknown[:2], name, *unknown[2:4], (IPC, b""), *unknown[4:]) as answer:
        assert answer.flags == [FLAGS[IPC]]


@pytest.mark.parametrize("packets", [*((one,) for one in ALL), ((LEASE, b""),), ALL])
def test_a_request_without_a_name_is_an_error_and_the_connection_lives_on(
    client: Client, packets: tuple[Packet, ...], name: Packet
) -> None:
    with client.ask(*packets) as answer:
        assert answer.packets == [(ERROR, b"NAME is missing")]
        assert answer.fds == []
    with client.ask(name, (IPC, b"")) as answer:
        assert answer.flags == [FLAGS[IPC]]


def test_requests_that_are_sent_ahead_are_answered_in_their_order(
    client: Client, name: Packet
) -> None:
    for kind in FLAGS:
        client.send(name, (kind, MAPS if kind == USER else b""))
    for flag in FLAGS.values():
        answer = client.receive()
        assert answer is not None
        with answer:
            assert answer.flags == [flag]


@pytest.mark.parametrize("name_bytes", [b" ", b"\x7f", bytes(range(0x20, 0x80)), b"n" * 4064])
def test_every_name_of_the_contract_is_taken(client: Client, name_bytes: bytes) -> None:
    with client.ask((NAME, name_bytes), (IPC, b"")) as answer:
        assert answer.flags == [FLAGS[IPC]]
        assert name_bytes in client.names()


# Same and other namespaces


def test_the_same_name_has_the_same_namespaces_on_every_connection(
    shared: Accessory, name: Packet
) -> None:
    with (
        shared.client() as one,
        shared.client() as other,
        one.ask(name, *ALL) as first,
        other.ask(name, *ALL) as second,
    ):
        assert first.inodes() == second.inodes()


def test_another_name_has_other_namespaces_and_none_are_the_hosts(
    client: Client, name: Packet
) -> None:
    with client.ask(name, *ALL) as one, client.ask((NAME, name[1] + b"2"), *ALL) as other:
        ours = {os.stat(f"/proc/self/ns/{kind}").st_ino for kind in FILES.values()}
        assert len(ours | set(one.inodes()) | set(other.inodes())) == 3 * len(ALL)


def test_each_distinct_map_has_a_user_namespace_of_its_own(client: Client, name: Packet) -> None:
    maps = [
        MAPS,
        b"0 100000 1000\x000 100000 999",
        b"0 200000 1000\x000 100000 1000",
        b"0 100000 1000\n\x000 100000 1000\n",
        b"0 100000 10\n10 200000 10\x000 100000 10",
    ]
    with ExitStack() as stack:
        answers = [stack.enter_context(client.ask(name, (USER, one))) for one in maps]
        again = [stack.enter_context(client.ask(name, (USER, one))) for one in reversed(maps)]
        inodes = [answer.inodes() for answer in answers]
        assert len({inode for (inode,) in inodes}) == len(maps)
        assert [answer.inodes() for answer in reversed(again)] == inodes
        for text, answer in zip(maps, answers, strict=True):
            shown = run_in(answer, "cat /proc/self/uid_map")
            assert shown.split() == text.partition(b"\0")[0].decode().split()


@pytest.mark.parametrize("maps", [b"\0", b"0 100000 1\0", b"\x000 100000 1"])
def test_either_map_may_be_empty(client: Client, name: Packet, maps: bytes) -> None:
    uid_map, gid_map = (part.split() for part in maps.split(b"\0"))
    with client.ask(name, (USER, maps)) as answer:
        assert answer.flags == [FLAGS[USER]]
        program = "import os; print([open(f'/proc/self/{m}_map').read().split() for m in 'ug'])"
        program = program.replace("'ug'", "('uid', 'gid')")
        command = entering(answer, sys.executable, "-c", program)
        command.insert(1, "--preserve-credentials")  # there may be no 0 inside
        shown = subprocess.run(command, pass_fds=answer.fds, capture_output=True, check=True)
        expected = [[part.decode() for part in one] for one in (uid_map, gid_map)]
        assert shown.stdout.decode().strip() == repr(expected)


@pytest.mark.parametrize(
    ("maps", "reason"),
    [
        (b"0 1\0", "uid_map: line 1: three numbers expected"),
        (b"0 1 1\n5 1 1\0", "uid_map: line 2: the ids outside overlap line 1"),
        (b"\x000 5 0", "gid_map: line 1: the length is zero"),
    ],
)
def test_a_bad_map_is_an_error_that_says_where_and_leaves_nothing(
    client: Client, name: Packet, maps: bytes, reason: str
) -> None:
    with client.ask(name, (IPC, b""), (PID, b""), (USER, maps), (LEASE, b"")) as answer:
        assert answer.packets == [(ERROR, reason.encode())]
    assert name[1] not in client.names()


# What processes see that joined


def test_processes_that_joined_are_in_these_very_namespaces(client: Client, name: Packet) -> None:
    with client.ask(name, *ALL) as answer:
        shown = run_in(answer, "cd /proc/self/ns; readlink ipc pid user net uts cgroup mnt time")
        kinds = zip(FILES.values(), answer.inodes(), strict=True)
        assert shown.split() == [f"{kind}:[{inode}]" for kind, inode in kinds]


def test_message_queues_are_seen_under_the_same_name_only(client: Client, name: Packet) -> None:
    def queues(text: str) -> set[str]:
        return {line.split()[0] for line in text.splitlines()[1:]}

    shown = "cat /proc/sysvipc/msg"
    with client.ask(name, (IPC, b"")) as one, client.ask(name, (IPC, b"")) as same:
        run_in(one, "ipcmk -Q")
        (key,) = queues(run_in(same, shown))
        with client.ask((NAME, name[1] + b"2"), (IPC, b"")) as other:
            assert queues(run_in(other, shown)) == set()
        assert key not in queues(Path("/proc/sysvipc/msg").read_text())


def test_a_process_in_the_pid_namespace_sees_init_and_its_siblings_only(
    client: Client, name: Packet
) -> None:
    with client.ask(name, (PID, b""), (MOUNT, b"")) as answer, ExitStack() as stack:
        start_in(answer, stack)
        mount = "mount -t proc proc /proc; "
        shown = run_in(answer, mount + "echo $$; cd /proc; ls -d [0-9]*; cat 1/cmdline")
        own, *pids, arguments = shown.splitlines()
        assert sorted(map(int, pids))[0] == 1
        assert own in pids
        assert all(int(pid) < 100 for pid in pids)
        assert arguments.split("\0")[0] == f"init-{name[1].decode()}"
        assert len(pids) <= 4  # init, sleep, the shell and ls


def test_processes_in_the_pid_namespace_do_not_see_the_host(client: Client, name: Packet) -> None:
    with client.ask(name, (PID, b"")) as answer:
        # A signal to a process of ours cannot even be addressed.
        assert run_in(answer, f"kill -0 {os.getpid()} 2>/dev/null || echo no") == "no\n"


def test_ids_are_mapped_in_the_user_namespace(client: Client, name: Packet) -> None:
    maps = b"0 100000 1000\n5000 200000 1\x000 300000 1000"
    with client.ask(name, (USER, maps)) as answer, ExitStack() as stack:
        assert run_in(answer, "id -u; id -g").split() == ["0", "0"]
        shown = run_in(answer, "cat /proc/self/uid_map; echo; cat /proc/self/gid_map")
        uid_map, gid_map = shown.split("\n\n")
        assert uid_map.split() == ["0", "100000", "1000", "5000", "200000", "1"]
        assert gid_map.split() == ["0", "300000", "1000"]
        process = start_in(answer, stack)
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        assert "Uid:\t" + "\t".join(["100000"] * 4) in status
        assert "Gid:\t" + "\t".join(["300000"] * 4) in status


def test_root_in_the_user_namespace_is_nobody_outside(client: Client, name: Packet) -> None:
    with client.ask(name, *ALL) as answer, TemporaryDirectory() as directory:
        denied = f"touch {shlex.quote(directory)}/file 2>/dev/null || echo denied"
        assert run_in(answer, denied) == "denied\n"


def test_a_network_namespace_has_only_a_loopback_interface(client: Client, name: Packet) -> None:
    with client.ask(name, (NET, b"")) as answer:
        lines = run_in(answer, "cat /proc/net/dev").splitlines()[2:]
        assert [line.split(":")[0].strip() for line in lines] == ["lo"]
        run_in(answer, "ip link set lo up")
    with client.ask(name, (NET, b"")) as answer:
        assert "LOOPBACK,UP" in run_in(answer, "ip link show lo")


def test_a_host_name_is_set_under_one_name_only(client: Client, name: Packet) -> None:
    before = os.uname().nodename
    with client.ask(name, (UTS, b"")) as one, client.ask(name, (UTS, b"")) as same:
        assert run_in(one, "hostname") == f"{before}\n"
        run_in(one, "hostname renamed")
        assert run_in(same, "hostname") == "renamed\n"
    assert os.uname().nodename == before


def test_a_cgroup_namespace_hides_what_is_above_the_daemons_cgroup(
    shared: Accessory, name: Packet
) -> None:
    with shared.client() as client, client.ask(name, (CGROUP, b"")) as answer:
        move = f"echo 0 >{shlex.quote(str(shared.cgroup.directory))}/cgroup.procs; "
        shown = run_in(answer, move + "grep ^0:: /proc/self/cgroup")
        assert shown == "0::/\n"


def test_mounts_are_seen_under_the_same_name_and_nowhere_else(
    client: Client, name: Packet, tmp_path: Path
) -> None:
    place = shlex.quote(str(tmp_path))
    with client.ask(name, (MOUNT, b"")) as one, client.ask(name, (MOUNT, b"")) as same:
        run_in(one, f"mount -t tmpfs test {place}; touch {place}/inside")
        assert run_in(same, f"ls {place}") == "inside\n"
        with client.ask((NAME, name[1] + b"2"), (MOUNT, b"")) as other:
            assert run_in(other, f"ls {place}") == ""
    assert list(tmp_path.iterdir()) == []


def test_mounts_do_not_propagate_where_the_hosts_are_shared(
    stopped_accessory: Accessory, tmp_path: Path, name: Packet
) -> None:
    stopped_accessory.wrapper = ["unshare", "--mount", "--propagation", "shared"]
    stopped_accessory.start()
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()

    def on_host(*command: str | Path) -> str:
        enter = ["nsenter", "-t", str(stopped_accessory.pid), "-m", "--"]
        return subprocess.run([*enter, *command], check=True, capture_output=True, text=True).stdout

    with stopped_accessory.client() as client, client.ask(name, (MOUNT, b"")) as answer:
        on_host("mount", "-t", "tmpfs", "test", outside)
        run_in(answer, f"mount -t tmpfs test {shlex.quote(str(inside))}")
        host, namespace = on_host("cat", "/proc/self/mounts"), run_in(answer, "cat /proc/mounts")
    assert (str(outside) in host, str(inside) in host) == (True, False)
    assert (str(outside) in namespace, str(inside) in namespace) == (False, True)


def test_a_time_namespace_can_be_entered_and_has_the_hosts_time(
    client: Client, name: Packet
) -> None:
    with client.ask(name, (TIME, b"")) as answer:
        (inode,) = answer.inodes()
        assert run_in(answer, "readlink /proc/self/ns/time") == f"time:[{inode}]\n"
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        inside = float(run_in(answer, "cat /proc/uptime").split()[0])
        assert before - 0.02 <= inside <= time.clock_gettime(time.CLOCK_BOOTTIME)


# Inits of PID namespaces


def test_inits_are_named_after_what_they_serve(accessory: Accessory) -> None:
    names = {
        b"a": "init-a",
        b"with space": "init-with space",
        b"ten-bytes!": "init-ten-bytes!",
        b"eleven-byte": "i-eleven-byte",
        b"thirteen-byte": "i-thirteen-byte",
        b"longer-than-thirteen": "i-longer-than-t",
        b"%s/../$(x)": "init-%s/../$(x)",
        b"n" * 4064: "i-nnnnnnnnnnnnn",
    }
    with accessory.client() as client:
        for name_bytes in names:
            client.ask((NAME, name_bytes), (PID, b"")).close()
    wait_for("all have their names", lambda: len(accessory.inits()) == len(names))
    inits = accessory.inits()
    assert sorted(inits.values()) == sorted(names.values())
    for pid, short in inits.items():
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert names[arguments[0].removeprefix(b"init-")] == short
        assert arguments[1:] == [accessory.address.encode(), b""]
        assert os.listdir(f"/proc/{pid}/fd") == []


def test_a_pid_namespace_is_made_anew_after_its_init_ended(
    accessory: Accessory, name: Packet
) -> None:
    with accessory.client() as client, client.ask(name, *SUITE) as before, ExitStack() as stack:
        inhabitant = start_in(before, stack)
        pid = init_of(accessory)
        os.kill(pid, signal.SIGTERM)
        wait_for("the init has ended", lambda: is_gone(pid))
        assert inhabitant.wait(DEADLINE) == -signal.SIGKILL
        assert client.names()[name[1]].flags == FLAGS[IPC] | FLAGS[USER]
        with client.ask(name, *SUITE) as after:
            assert after.flags == before.flags
            same = [new == old for new, old in zip(after.inodes(), before.inodes(), strict=True)]
            assert same == [True, False, True]
            assert int(run_in(after, "echo $$")) < 100
        assert init_of(accessory) != pid


# Leases and expiry


def wait_until_expired(client: Client, name_bytes: bytes) -> None:
    wait_for("the name has expired", lambda: name_bytes not in client.names())


def let_a_moment_pass(client: Client) -> None:
    """Return when whatever began to expire before this call has expired."""
    witness = b"witness-" + os.urandom(6).hex().encode()
    client.ask((NAME, witness), (IPC, b"")).close()
    wait_until_expired(client, witness)


def test_a_name_lives_while_one_of_several_leases_is_held(hasty: Accessory, name: Packet) -> None:
    with hasty.client() as client, client.ask(name, (IPC, b""), (LEASE, b"")) as last:
        for _ in range(3):
            client.ask(name, (LEASE, b"")).close()
        let_a_moment_pass(client)
        with client.ask(name, (IPC, b"")) as again:
            assert again.inodes() == last.inodes()[:1]
        let_a_moment_pass(client)
        assert name[1] in client.names()
        last.close()
        wait_until_expired(client, name[1])


def test_a_lease_lives_on_in_a_process_that_inherited_it(hasty: Accessory, name: Packet) -> None:
    with hasty.client() as client:
        with client.ask(name, (IPC, b""), (LEASE, b"")) as answer:
            child = subprocess.Popen(["sleep", "1000"], pass_fds=[answer.lease])
        try:
            let_a_moment_pass(client)
            assert name[1] in client.names()
        finally:
            child.kill()
            child.wait()
        wait_until_expired(client, name[1])


def test_a_lease_lives_on_with_whom_it_was_sent_to(hasty: Accessory, name: Packet) -> None:
    one, other = socket.socketpair()
    with hasty.client() as client, one, other:
        with client.ask(name, (IPC, b""), (LEASE, b"")) as answer:
            socket.send_fds(one, [b"x"], [answer.lease])
        let_a_moment_pass(client)
        assert name[1] in client.names()
        other.close()
        wait_until_expired(client, name[1])


def test_a_lease_outlives_the_connection_it_came_from(hasty: Accessory, name: Packet) -> None:
    with hasty.client() as client:
        answer = client.ask(name, (LEASE, b""))
    with hasty.client() as client:
        let_a_moment_pass(client)
        assert client.names()[name[1]].leases == 1
        answer.close()
        wait_until_expired(client, name[1])


def test_a_name_does_not_end_before_its_time(hasty: Accessory, name: Packet) -> None:
    with hasty.client() as client:
        with client.ask(name, (LEASE, b"")):
            began = time.monotonic()
        wait_until_expired(client, name[1])
        assert time.monotonic() - began >= 0.3


def test_a_name_without_any_lease_expires_after_its_request(hasty: Accessory, name: Packet) -> None:
    with hasty.client() as client:
        began = time.monotonic()
        client.ask(name, *ALL).close()
        wait_until_expired(client, name[1])
        assert time.monotonic() - began >= 0.3


def test_nothing_is_left_of_a_name_that_expired(accessory: Accessory, name: Packet) -> None:
    accessory.stop()
    accessory.settings.write_text("expiry = 0.1")
    accessory.start()
    with accessory.client() as client:
        client.names()  # now the daemon has what it takes for a connection
        before = accessory.descriptors(), accessory.keeper_descriptors()
        with client.ask(name, *ALL, (LEASE, b"")) as answer, ExitStack() as stack:
            inhabitant = start_in(answer, stack)
            os.close(answer.fds.pop())  # the lease
            assert inhabitant.wait(DEADLINE) == -signal.SIGKILL
            wait_until_expired(client, name[1])
            wait_for("the init has ended", lambda: accessory.inits() == {})
            # The old ones are still held here, so their inodes are not used again.
            with client.ask(name, *ALL) as after:
                assert after.flags == answer.flags
                assert not set(after.inodes()) & set(answer.inodes())
        wait_until_expired(client, name[1])
        wait_for("the init has ended", lambda: accessory.inits() == {})
        wait_for(
            "all descriptors are closed",
            lambda: (accessory.descriptors(), accessory.keeper_descriptors()) == before,
        )


def test_what_is_written_to_a_lease_changes_nothing(hasty: Accessory, name: Packet) -> None:
    with hasty.client() as client, client.ask(name, (IPC, b""), (LEASE, b"")) as answer:
        os.set_blocking(answer.lease, False)
        with suppress(BlockingIOError):
            while True:
                os.write(answer.lease, bytes(4096))
        let_a_moment_pass(client)
        with client.ask(name, (IPC, b""), (LEASE, b"")) as another:
            assert another.inodes()[:1] == answer.inodes()[:1]
            answer.close()
            let_a_moment_pass(client)
            assert name[1] in client.names()
        wait_until_expired(client, name[1])


def test_a_lease_cannot_be_read(client: Client, name: Packet) -> None:
    with (
        client.ask(name, (LEASE, b"")) as answer,
        pytest.raises(OSError, match=f"Errno {errno.EBADF}"),
    ):
        os.read(answer.lease, 1)


def test_a_lease_in_flight_to_a_client_that_died_counts_as_closed(
    hasty: Accessory, name: Packet
) -> None:
    with hasty.client() as client:
        client.send(name, (IPC, b""), (LEASE, b""))
        assert select.select([client.socket], [], [], DEADLINE)[0]  # the answer is there, unread
    with hasty.client() as client:
        wait_until_expired(client, name[1])


def test_leases_are_counted_until_nobody_holds_one(hasty: Accessory, name: Packet) -> None:
    with hasty.client() as client:
        assert name[1] not in client.names()
        with client.ask(name, (LEASE, b"")), client.ask(name, (LEASE, b"")):
            assert client.names()[name[1]].leases == 2
        # It is gone soon.
        wait_for("no lease is counted", lambda: not leases(client, name[1]))
        with client.ask(name, (LEASE, b"")):
            assert client.names()[name[1]].leases == 1
        wait_until_expired(client, name[1])


def leases(client: Client, name_bytes: bytes) -> int:
    """Return how many leases are counted, 0 if there is no such name."""
    found = client.names().get(name_bytes)
    return 0 if found is None else found.leases


@pytest.mark.slow
def test_without_a_setting_names_expire_after_a_minute(real_minute: subprocess.Popen[str]) -> None:
    _, problem = real_minute.communicate()
    assert real_minute.returncode == 0, problem


# In a time that the test makes


@pytest.fixture(name="clock")
def fake_clock() -> FakeClock:
    return FakeClock()


class Minutes:
    """A registry with a real keeper and real namespaces, in a time of its own."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.watch = Watch()
        self.keeper = Keeper(f"@test-{os.urandom(6).hex()}", self.watch, lambda _: None)
        self.maker = Maker()
        self.registry = Registry(Settings(), self.keeper, self.maker, self.watch, clock)

    def ask(self, name_bytes: bytes) -> int:
        """Request namespaces, and return the inode of one of them."""
        kinds = (Namespace.IPC, Namespace.PID, Namespace.USER)
        maps = Maps(b"0 100000 1", b"0 100000 1")
        rights, lease = self.registry.obtain(Request(name_bytes, kinds, maps))
        assert lease == -1
        descriptors = struct.unpack("=3i", rights)
        assert [kind_of(fd) for fd in descriptors] == list(kinds)
        return os.fstat(descriptors[0]).st_ino

    def lease(self, name_bytes: bytes) -> int:
        """Request a lease."""
        rights, lease = self.registry.obtain(Request(name_bytes, lease=True))
        assert rights == b""
        return lease

    def pass_by(self, seconds: float) -> list[bytes]:
        """Let time pass, and return the names that there are then."""
        self.watch.look()
        self.clock.advance(seconds)
        return [one.name for one in self.registry.listing(b"")]

    def close(self) -> None:
        """End everything."""
        self.registry.close()
        self.maker.close()
        self.keeper.close()
        self.watch.close()


@pytest.fixture
def minutes(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Minutes]:
    started = []
    spawn = os.posix_spawn

    def noting_spawn(*arguments: Any, **options: Any) -> int:
        started.append(spawn(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(os, "posix_spawn", noting_spawn)
    minutes = Minutes(clock)
    yield minutes
    minutes.close()
    for pid in started:  # the keeper, which ends when nobody holds its socket
        os.waitpid(pid, 0)


def test_a_name_ends_a_minute_after_its_last_request(minutes: Minutes) -> None:
    first = minutes.ask(b"a")
    assert minutes.pass_by(59) == [b"a"]
    assert minutes.ask(b"a") == first
    assert minutes.pass_by(59.75) == [b"a"]
    assert minutes.pass_by(0.25) == []


def test_a_name_ends_a_minute_after_its_last_lease(minutes: Minutes) -> None:
    one, other = minutes.lease(b"a"), minutes.lease(b"a")
    assert minutes.pass_by(1000) == [b"a"]
    os.close(one)
    assert minutes.pass_by(1000) == [b"a"]
    os.close(other)
    assert minutes.pass_by(59.75) == [b"a"]
    assert minutes.pass_by(0.25) == []


def test_a_lease_keeps_a_name_that_was_about_to_end(minutes: Minutes) -> None:
    first = minutes.ask(b"a")
    minutes.pass_by(59.75)
    lease = minutes.lease(b"a")
    assert minutes.pass_by(1000) == [b"a"]
    os.close(lease)
    assert minutes.pass_by(59.75) == [b"a"]
    lease = minutes.lease(b"a")
    assert minutes.pass_by(1000) == [b"a"]
    os.close(lease)
    assert minutes.ask(b"a") == first
    assert minutes.pass_by(60) == []


def test_a_request_without_a_lease_does_not_end_a_name_that_is_leased(minutes: Minutes) -> None:
    lease = minutes.lease(b"a")
    minutes.ask(b"a")
    assert minutes.pass_by(1000) == [b"a"]
    os.close(lease)
    assert minutes.pass_by(60) == []


def test_a_lease_that_is_closed_and_given_out_at_once_leaves_no_gap(minutes: Minutes) -> None:
    lease = minutes.lease(b"a")
    for _ in range(5):
        minutes.pass_by(30)
        os.close(lease)
        lease = minutes.lease(b"a")
    assert minutes.pass_by(1000) == [b"a"]
    os.close(lease)
    assert minutes.pass_by(60) == []


def test_names_end_each_at_its_time(minutes: Minutes) -> None:
    lease = minutes.lease(b"d")
    for name_bytes in (b"c", b"a", b"b"):
        minutes.ask(name_bytes)
        minutes.pass_by(10)
    os.close(lease)
    assert minutes.pass_by(29.75) == [b"a", b"b", b"c", b"d"]
    assert minutes.pass_by(0.25) == [b"a", b"b", b"d"]
    assert minutes.pass_by(10) == [b"b", b"d"]
    assert minutes.pass_by(10) == [b"d"]
    assert minutes.pass_by(9.75) == [b"d"]
    assert minutes.pass_by(0.25) == []


def test_another_expiry_holds_for_names_that_are_expiring(minutes: Minutes) -> None:
    minutes.ask(b"a")
    minutes.pass_by(10)
    minutes.ask(b"b")
    minutes.registry.use(Settings(expiry=30))
    assert minutes.pass_by(19.75) == [b"a", b"b"]
    assert minutes.pass_by(0.25) == [b"b"]
    assert minutes.pass_by(10) == []


# What there is


def test_a_list_of_many_names_comes_in_pages_and_is_complete(accessory: Accessory) -> None:
    names = [b"%s-%d" % (b"x" * random.randrange(60), n) for n in range(298)]
    names += [b"y" * 4064, b"\x7f" * 4064]  # each fills a page
    random.shuffle(names)
    with accessory.client() as client:
        for name_bytes in names:
            client.ask((NAME, name_bytes), (UTS, b"")).close()
        found: list[bytes] = []
        pages = 0
        more = True
        while more:
            page = client.ask((LIST, found[-1] if found else b""))
            assert len(datagram(*page.packets)) <= 4096
            assert listed(page)
            found += listed(page)
            more = (LIST_MORE, b"") in page.packets
            pages += 1
        assert found == sorted(names)
        assert pages < 15
        assert list(listed(client.ask((LIST, found[-2])))) == found[-1:]
        assert client.ask((LIST, found[-1])).packets == []


def test_a_list_tells_kinds_leases_and_age(accessory: Accessory) -> None:
    with accessory.client() as client:
        assert client.names() == {}
        with client.ask((NAME, b"b"), *ALL, (LEASE, b"")), client.ask((NAME, b"b"), (LEASE, b"")):
            client.ask((NAME, b"c"), (PID, b"")).close()
            wait_for("a second has passed", lambda: client.names()[b"c"].age == 1)
            client.ask((NAME, b"a"), (LEASE, b"")).close()
            wait_for("its lease is closed", lambda: not leases(client, b"a"))
            found = client.names()
            assert list(found) == [b"a", b"b", b"c"]
            assert [one.flags for one in found.values()] == [0, sum(FLAGS.values()), FLAGS[PID]]
            assert [one.leases for one in found.values()] == [0, 2, 0]
            assert found[b"a"].age == 0
            assert found[b"b"].age >= found[b"c"].age >= 1


def test_the_status_counts_what_there_is(accessory: Accessory) -> None:
    with accessory.client() as client, accessory.client():
        client.ask((NAME, b"a"), (USER, MAPS), (IPC, b"")).close()
        client.ask((NAME, b"a"), (USER, b"\0")).close()
        with client.ask((NAME, b"b"), (PID, b""), (LEASE, b"")):
            ((command, text),) = client.ask((STATUS, b"")).packets
    assert command == STATUS_TEXT
    status = dict(line.split("=") for line in text.decode().splitlines())
    assert int(status.pop("uptime")) < DEADLINE
    assert status.pop("version")
    counts = {kind.name.lower(): 0 for kind in Namespace} | {"ipc": 1, "pid": 1, "user": 2}
    expected = {"connections": 2, "names": 2, "leased": 1, "namespaces": 4}
    expected |= {f"namespaces.{kind}": count for kind, count in counts.items()}
    assert {key: int(value) for key, value in status.items()} == expected
