"""The accessory daemon between clients that do all wrong and a kernel that has no more."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.tools.accessory import INIT, KEEPER, Accessory, make_accessory, running_accessory
from tests.tools.harness import host as make_host
from tests.tools.harness import many_descriptors, wait_for
from tests.tools.peers import CAP_SYS_ADMIN, Who, ask_as
from tests.tools.wire import (
    CGROUP,
    ERROR,
    IPC,
    LEASE,
    LIST,
    MAGIC,
    MOUNT,
    NAME,
    NET,
    PID,
    STATUS,
    TIME,
    USER,
    UTS,
    Answer,
    Client,
    datagram,
)

ALICE = (NAME, b"alice")
MAPS = (USER, b"0 0 1\x000 0 1")
WANTED = (ALICE, (IPC, b""), (PID, b""), MAPS)
KINDS = {
    "ipc": (IPC, b""),
    "pid": (PID, b""),
    "user": MAPS,
    "net": (NET, b""),
    "uts": (UTS, b""),
    "cgroup": (CGROUP, b""),
    "mnt": (MOUNT, b""),
    "time": (TIME, b""),
}
EVERYTHING = (ALICE, *KINDS.values(), (LEASE, b""))
EXPIRY = 0.1
SIOCOUTQ = 0x5411  # sockios.h: what was sent and not yet read
SO_PASSRIGHTS = 83  # asm-generic/socket.h


@pytest.fixture(scope="module")
def running() -> Iterator[Accessory]:
    with running_accessory("faults", f"expiry = {EXPIRY}") as accessory:
        yield accessory


@pytest.fixture
def shared(running: Accessory) -> Iterator[Accessory]:
    """A daemon that other tests have used, and that gets rid of all that a test left."""
    before = descriptors(running)
    yield running
    check_clean(running, before)


def descriptors(accessory: Accessory) -> tuple[int, int]:
    """Return how many descriptors daemon and keeper have open."""
    return accessory.descriptors(), accessory.keeper_descriptors()


def check_clean(accessory: Accessory, before: tuple[int, int]) -> None:
    """Check that soon there are as many descriptors as BEFORE, that no init lives, and no bug."""
    names(accessory)  # who connected before, has been accepted
    wait_for("descriptors are closed", lambda: descriptors(accessory) == before)
    wait_for("inits have ended", lambda: not accessory.inits())
    accessory.check_own_namespaces()
    assert not [line for line in accessory.errors() if "Traceback" in line]


def names(accessory: Accessory) -> list[bytes]:
    with accessory.client() as client:
        return list(client.names())


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Let a process do nothing for as long as the context lasts."""
    os.kill(pid, signal.SIGSTOP)
    wait_for("it is stopped", lambda: process_state(pid)[0] == "T")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def process_state(pid: int) -> list[str]:
    """Return the fields of proc_pid_stat(5) from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def cpu_seconds(pid: int) -> float:
    """Return how long a process has run so far."""
    user, system = process_state(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Return how many bytes of memory a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def unread(client: Client) -> int:
    """Return how much memory takes what the daemon has not yet taken from a client."""
    (size,) = struct.unpack("i", fcntl.ioctl(client.socket, SIOCOUTQ, bytes(4)))
    return int(size)


def is_hung_up(client: Client) -> bool:
    """Whether the daemon has closed the connection."""
    poll = select.poll()
    poll.register(client.socket, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def received(client: Client) -> Answer:
    """Return the next answer."""
    answer = client.receive()
    assert answer is not None, "the connection was closed"
    return answer


def fails(client: Client, *packets: tuple[int, bytes]) -> str:
    """Send a request that cannot be met, and return the reason."""
    with client.ask(*packets) as answer:
        assert answer.error, "it is met"
        assert len(answer.packets) == 1
        assert not answer.fds
        return answer.error


def works(client: Client, *packets: tuple[int, bytes]) -> list[int]:
    """Send a request that is met, and return what its descriptors refer to."""
    with client.ask(*packets) as answer:
        assert answer.error is None
        assert answer.fds
        return answer.inodes()


# Datagrams that break the protocol


def raw(body: bytes) -> bytes:
    """Return a datagram with a right header over anything."""
    return struct.pack("=II", MAGIC, zlib.crc32(body)) + body


MALFORMED = {
    "empty": (b"", "0 bytes are too short"),
    "one byte": (b"x", "1 bytes are too short"),
    "half a header": (datagram()[:7], "7 bytes are too short"),
    "wrong magic": (datagram(*WANTED, magic=0x01020304), "wrong magic number 0x01020304"),
    "magic of the other byte order": (datagram(*WANTED, magic=0x73610463), "wrong magic number"),
    "wrong checksum": (datagram(*WANTED, crc=0), "wrong checksum"),
    "cut off": (datagram(*WANTED)[:-4], "wrong checksum"),
    "longer than told": (datagram(*WANTED) + bytes(4), "wrong checksum"),
    "half a packet header": (raw(b"\0\0"), "truncated packet header"),
    "half a payload": (raw(b"\x08\0\x01\0abcd"), "truncated payload of command 1"),
    "no padding": (raw(b"\x02\0\x01\0ab"), "truncated payload of command 1"),
    "size beyond the end": (raw(b"\xff\xff\x02\0"), "truncated payload of command 2"),
    "a byte too long": (datagram((77, bytes(4085))), "at most 4096 bytes"),
    "far too long": (datagram((77, bytes(60_000))), "at most 4096 bytes"),
    "empty name": (datagram((NAME, b""), KINDS["ipc"]), "NAME is empty"),
    "long name": (datagram((NAME, b"x" * 4065), KINDS["ipc"]), "NAME is longer than 4064 bytes"),
    "control character": (datagram((NAME, b"a\x1f"), KINDS["ipc"]), "plain ASCII"),
    "NUL in the name": (datagram((NAME, b"a\0"), KINDS["ipc"]), "plain ASCII"),
    "UTF-8": (datagram((NAME, "ä".encode()), KINDS["ipc"]), "plain ASCII"),
    "two names": (datagram(ALICE, ALICE, KINDS["ipc"]), "NAME is there twice"),
    "one map": (datagram(ALICE, (USER, b"0 0 1")), "needs two maps"),
    "no map": (datagram(ALICE, (USER, b"")), "needs two maps"),
    "three maps": (datagram(ALICE, (USER, b"\0\0")), "needs two maps"),
    "user twice": (datagram(ALICE, MAPS, MAPS), "USER_NAMESPACE is there twice"),
    "lease twice": (datagram(ALICE, (LEASE, b""), (LEASE, b"")), "LEASE_PIPE is there twice"),
    "lease with a payload": (datagram(ALICE, (LEASE, b"x")), "LEASE_PIPE takes no payload"),
    "status with a payload": (datagram((STATUS, b"x")), "STATUS takes no payload"),
    "list twice": (datagram((LIST, b""), (LIST, b"")), "LIST is there twice"),
} | {
    f"{kind} {what}": (datagram(ALICE, *packets), reason)
    for kind, (command, payload) in KINDS.items()
    if kind != "user"
    for what, packets, reason in (
        ("twice", ((command, payload),) * 2, "is there twice"),
        ("with a payload", ((command, b"\0"),), "takes no payload"),
    )
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_requests_are_answered_with_the_reason_before_the_connection_ends(
    shared: Accessory, what: str
) -> None:
    wrong, reason = MALFORMED[what]
    with shared.client() as bystander, shared.client() as client:
        client.socket.send(wrong)
        error = received(client).error or ""
        assert error.startswith("malformed request: ")
        assert reason in error
        assert client.dropped()
        assert not bystander.names()


@pytest.mark.parametrize("what", ["empty", "wrong magic", "user twice"])
def test_the_reason_comes_even_if_more_requests_were_sent_already(
    shared: Accessory, what: str
) -> None:
    wrong, reason = MALFORMED[what]
    with shared.client() as client:
        with frozen(shared.pid):
            client.send(ALICE, KINDS["ipc"])
            client.socket.send(wrong)
            for _ in range(50):
                client.send(ALICE, KINDS["net"])
        with received(client) as answer:
            assert answer.flags == [0x08000000]
        assert reason in (received(client).error or "")
        assert client.dropped()
        with pytest.raises(BrokenPipeError):
            client.send(ALICE, KINDS["net"])


# Descriptors


def kernel_refuses_descriptors() -> bool:
    """Whether there is SO_PASSRIGHTS, from Linux 6.16 on."""
    with socket.socket(socket.AF_UNIX) as any_socket:
        try:
            return bool(any_socket.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS))
        except OSError:
            return False


def sends_descriptors(client: Client, data: bytes, fds: list[int]) -> bool:
    """Whether descriptors could be sent; if not, nothing was."""
    try:
        socket.send_fds(client.socket, [data], fds)
    except PermissionError:
        assert KERNEL_REFUSES_DESCRIPTORS
        return False
    assert not KERNEL_REFUSES_DESCRIPTORS
    return True


KERNEL_REFUSES_DESCRIPTORS = kernel_refuses_descriptors()


@pytest.mark.parametrize("count", [1, 2, 100, 253])
@pytest.mark.parametrize(
    "sent",
    [datagram(*WANTED), datagram(ALICE), b"wrong", b""],
    ids=["good", "name", "bad", "empty"],
)
def test_descriptors_are_not_taken(shared: Accessory, count: int, sent: bytes) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as pipe, shared.client() as client, shared.client() as bystander:
        assert not client.names()  # it has been accepted
        with frozen(shared.pid):
            taken = sends_descriptors(client, sent, [write_end] * count)
            os.close(write_end)
            client.send(ALICE)
        if taken:
            assert received(client).error == "descriptors are not taken"
            assert client.dropped()
        else:
            assert not client.names()
        assert pipe.read() == ""  # nobody holds the other end
        assert not bystander.names()


@pytest.mark.parametrize("accepted", [True, False])
def test_a_socket_that_lingers_does_not_stop_the_daemon(shared: Accessory, accepted: bool) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(shared.client())
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        lingering = stack.enter_context(socket.create_connection(server.getsockname()))
        stack.enter_context(server.accept()[0])  # which reads nothing
        lingering.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                lingering.send(bytes(65536))
        # Its last owner waits that long when it closes it (socket(7)), which should not be the
        # daemon; an older kernel leaves it no choice.
        set_linger(lingering, 5 if KERNEL_REFUSES_DESCRIPTORS else 0)
        client = stack.enter_context(shared.client())
        if accepted:
            assert not client.names()
        with frozen(shared.pid):
            if not sends_descriptors(client, datagram(ALICE), [lingering.fileno()]):
                set_linger(lingering, 0)
            lingering.close()
        began = time.monotonic()
        works(other, (NAME, b"other"), KINDS["ipc"])
        assert time.monotonic() - began < 4


def set_linger(connection: socket.socket, seconds: int) -> None:
    linger = struct.pack("=2i", 1, seconds)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def test_credentials_are_passed_over(shared: Accessory) -> None:
    with shared.client() as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        credentials = struct.pack("=3i", os.getpid(), 0, 0)
        rights = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)]
        client.socket.sendmsg([datagram((STATUS, b""))], rights)
        data, _, _, _ = client.socket.recvmsg(4096, 100)
        assert b"version=" in data


# Clients that do not behave


def settle(client: Client, other: Client) -> bool:
    """Wait until the daemon takes no more from CLIENT; whether it was so from the beginning."""
    for turn in itertools.count():
        before = unread(client)
        for _ in range(3):  # the daemon goes round, so CLIENT had its turn
            works(other, (NAME, b"other"), KINDS["ipc"])
        if unread(client) == before:
            return turn == 0
    raise AssertionError


def fill(client: Client, other: Client, *packets: tuple[int, bytes]) -> int:
    """Send requests until the daemon takes no more of them; return how many."""
    client.socket.setblocking(False)
    sent = 0
    while True:
        try:
            client.send(*packets)
            sent += 1
        except BlockingIOError:
            if settle(client, other):
                client.socket.settimeout(30)
                return sent


def test_the_reason_comes_even_if_many_answers_are_still_unread(shared: Accessory) -> None:
    wanted = (ALICE, KINDS["ipc"])
    with shared.client() as client, shared.client() as other:
        with frozen(shared.pid):
            client.send(*wanted)
            one = unread(client)
        sent = fill(client, other, *wanted)
        room = 1 + sent - unread(client) // one  # answers that are under way, and one that waits
    for count in range(room - 3, room + 4):
        with shared.client() as client, shared.client() as other:
            for _ in range(count):
                client.send(*wanted)
            client.socket.send(b"wrong")
            settle(client, other)
            for _ in range(count):
                with received(client) as answer:
                    assert answer.flags == [0x08000000]
            assert received(client).error
            assert client.dropped()


def test_a_client_that_does_not_read_stops_nobody_and_gets_all_answers_later(
    shared: Accessory,
) -> None:
    with shared.client() as client, shared.client() as other:
        first = works(other, *WANTED)
        client.names()
        before, memory = shared.descriptors(), resident(shared.pid)
        sent = fill(client, other, *WANTED, (LEASE, b""))
        assert sent > 200
        assert shared.descriptors() <= before + 2  # the lease's pipe, other's namespace
        assert resident(shared.pid) < memory + 4_000_000
        began = cpu_seconds(shared.pid)
        time.sleep(0.5)
        assert cpu_seconds(shared.pid) - began < 0.2
        for _ in range(sent):
            with received(client) as answer:
                assert len(answer.fds) == 4
                assert answer.inodes()[:3] == first


def test_a_client_that_never_reads_is_dropped_and_one_that_never_asks_is_not(
    stopped_accessory: Accessory,
) -> None:
    stopped_accessory.wrapper = [sys.executable, "-c", IMPATIENT]
    stopped_accessory.settings.write_text(f"expiry = {EXPIRY}")
    accessory = stopped_accessory.start()
    with accessory.client() as silent, accessory.client() as other:
        with accessory.client() as client:
            fill(client, other, *WANTED, (LEASE, b""))
            assert names(accessory) == [b"alice", b"other"]
            is_over = "refused to a process of user 0: it does not read its answers"
            wait_for("it is dropped", lambda: is_over in accessory.errors())
            with pytest.raises(ConnectionError):
                client.send(ALICE)
        wait_for("its leases have ended", lambda: not names(accessory))
        works(silent, *WANTED)


# Runs the daemon with less patience.
IMPATIENT = """
import runpy, sys
from spawn_accessory import server
server._UNREAD_SECONDS = 0.3
del sys.argv[1:3]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_a_client_that_dies_before_its_answer_leaves_nothing(shared: Accessory) -> None:
    for number in range(300):
        with shared.client() as client:
            client.send((NAME, b"dying-%d" % (number % 5)), *EVERYTHING[1:])


def test_clients_that_died_before_they_were_seen_leave_nothing(shared: Accessory) -> None:
    with frozen(shared.pid):
        for number in range(200):
            with shared.client() as client:
                client.send((NAME, b"dead-%d" % (number % 5)), *EVERYTHING[1:])


def test_an_answer_that_is_never_taken_holds_no_lease(shared: Accessory) -> None:
    with shared.client() as other:
        with shared.client() as client:
            client.send(*EVERYTHING)
            wait_for("it is answered", lambda: b"alice" in other.names())
            time.sleep(3 * EXPIRY)
            assert b"alice" in other.names()  # it could still be taken
        wait_for("the name has expired", lambda: not other.names())


def test_2000_idle_connections_do_not_keep_others_from_being_served(shared: Accessory) -> None:
    with many_descriptors(), ExitStack() as clients:
        idle = [clients.enter_context(shared.client()) for _ in range(2000)]
        with shared.client() as client:
            for _ in range(20):
                works(client, *WANTED)
        began = cpu_seconds(shared.pid)
        time.sleep(0.5)
        assert cpu_seconds(shared.pid) - began < 0.2
        for client in idle[::100]:
            works(client, *WANTED)


def test_a_client_that_says_it_is_done_gets_all_its_answers(shared: Accessory) -> None:
    with shared.client() as client:
        for _ in range(50):
            client.send(*WANTED)
        client.socket.shutdown(socket.SHUT_WR)
        for _ in range(50):
            with received(client) as answer:
                assert len(answer.fds) == 3
        assert client.dropped()


def test_a_client_that_takes_no_answers_is_dropped(shared: Accessory) -> None:
    with shared.client() as client:
        client.socket.shutdown(socket.SHUT_RD)
        client.send(*WANTED)
        wait_for("it is dropped", lambda: is_hung_up(client))


def test_sigterm_in_the_middle_of_requests_ends_the_daemon_well(accessory: Accessory) -> None:
    answered = [0] * 4
    wrong: list[object] = []

    def keep_asking(number: int) -> None:
        with suppress(ConnectionError), accessory.client() as client:
            while True:
                client.send((NAME, b"name-%d" % (answered[number] % 3)), *WANTED[1:])
                answer = client.receive()
                if answer is None:
                    return
                with answer:
                    if answer.error is not None or len(answer.fds) != 3:
                        wrong.append(answer)
                answered[number] += 1

    threads = [threading.Thread(target=keep_asking, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_for("all of them are served", lambda: min(answered) > 50)
    accessory.stop()
    for thread in threads:
        thread.join()
    assert not wrong


# Out of descriptors


@contextmanager
def few_descriptors(pid: int, free: int) -> Iterator[None]:
    """Let a process open only FREE more descriptors."""
    used = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
    unused = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(unused, free, None))
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_without_descriptors_for_all_that_is_asked_nothing_is_made(shared: Accessory) -> None:
    with shared.client() as client:
        assert not client.names()  # it has been accepted
        before = descriptors(shared)
        for free in itertools.count():
            with few_descriptors(shared.pid, free), client.ask(*EVERYTHING) as answer:
                pass
            if answer.error is None:
                break
            assert answer.error in NO_DESCRIPTORS
            assert not client.names()
            check_clean(shared, before)
        assert free > len(KINDS)


NO_DESCRIPTORS = {"Too many open files"} | {
    f"no {kind} namespace: {reason}"
    for kind in ("PID", "MOUNT", "TIME")
    for reason in ("Too many open files", "out of descriptors")
}


@pytest.mark.parametrize("kind", ["pid", "mnt", "time"])
def test_a_keeper_without_descriptors_makes_nothing(shared: Accessory, kind: str) -> None:
    with shared.client() as client:
        assert not client.names()  # it has been accepted
        before = descriptors(shared)
        for free in itertools.count():
            with few_descriptors(shared.keeper(), free), client.ask(ALICE, KINDS[kind]) as answer:
                pass
            if answer.error is None:
                break
            assert answer.error.endswith("namespace: Too many open files")
            assert not client.names()
            check_clean(shared, before)
        assert free > 0


def test_what_the_keeper_cannot_hold_is_not_given_out(stopped_accessory: Accessory) -> None:
    accessory = stopped_accessory
    accessory.wrapper = ["prlimit", "--nofile=64:64"]
    accessory.start()
    accessory.stop()
    accessory.wrapper = []  # a later daemon may have more, but the keeper stays
    accessory.start()
    given = {}
    with accessory.client() as client:
        for n in range(100):
            name = (NAME, b"%d" % n)
            with client.ask(name, KINDS["ipc"], (LEASE, b"")) as answer:
                if answer.error:
                    break
                given[name] = answer.inodes()[0]
        assert answer.error == "Too many open files"
    assert len(given) > 10
    accessory.stop()
    accessory.start()
    with accessory.client() as client:
        for name, inode in given.items():
            with client.ask(name, KINDS["ipc"]) as answer:
                assert answer.inodes() == [inode]


@pytest.mark.parametrize("left", [0, 3])
def test_connections_without_a_descriptor_are_told_and_cost_no_time(
    shared: Accessory, left: int
) -> None:
    with ExitStack() as clients:
        with few_descriptors(shared.pid, left):
            several = [clients.enter_context(shared.client()) for _ in range(left + 3)]
            for client in several:
                with suppress(BrokenPipeError):  # it has been told already
                    client.send((LIST, b""))
            told = [received(client) for client in several]
            assert [answer.error for answer in told[:left]] == [None] * left
            reason = "no connection: Too many open files"
            assert [answer.error for answer in told[left:]] == [reason] * 3
            assert all(client.dropped() for client in several[left:])
            waiting = clients.enter_context(shared.client())
            began = cpu_seconds(shared.pid)
            time.sleep(0.5)
            assert cpu_seconds(shared.pid) - began < 0.2
            assert received(waiting).error == reason
        works(clients.enter_context(shared.client()), *WANTED)


def test_a_daemon_that_can_open_nothing_at_all_waits(shared: Accessory) -> None:
    before = resource.prlimit(shared.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(shared.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with shared.client() as client:
            client.send(*WANTED)
            began = cpu_seconds(shared.pid)
            time.sleep(0.5)
            assert cpu_seconds(shared.pid) - began < 0.2
            resource.prlimit(shared.pid, resource.RLIMIT_NOFILE, before)
            with received(client) as answer:
                assert len(answer.fds) == 3
    finally:
        resource.prlimit(shared.pid, resource.RLIMIT_NOFILE, before)


def test_a_daemon_that_may_have_few_descriptors_keeps_what_it_has(
    stopped_accessory: Accessory,
) -> None:
    stopped_accessory.wrapper = ["prlimit", "--nofile=64:64"]
    stopped_accessory.settings.write_text(f"expiry = {EXPIRY}")
    accessory = stopped_accessory.start()
    made: dict[bytes, Answer] = {}
    with ExitStack() as answers, accessory.client() as client:
        for number in itertools.count():
            name = b"%03d" % number
            answer = answers.enter_context(client.ask((NAME, name), *EVERYTHING[1:]))
            if answer.error is not None:
                break
            made[name] = answer
        assert answer.error in NO_DESCRIPTORS
        assert len(made) > 2
        assert list(client.names()) == list(made)
        accessory.kill()
        accessory.start()
        with accessory.client() as later:
            for name, answer in made.items():
                assert works(later, (NAME, name), *EVERYTHING[1:]) == answer.inodes()
            answers.close()
            wait_for("all names have expired", lambda: not later.names())
            assert fails(later, KINDS["ipc"]) == "NAME is missing"
            for name in made:
                works(later, (NAME, name), *EVERYTHING[1:])


def test_an_administrator_is_told_that_descriptors_are_out(shared: Accessory) -> None:
    administrator = Who(60001, capabilities=CAP_SYS_ADMIN)
    reasons = set()
    with shared.client() as client:
        assert not client.names()  # it has been accepted
        for free in itertools.count():
            with few_descriptors(shared.pid, free):
                asked = ask_as(administrator, shared.address, ((LIST, b""),))
            ((answer, _),) = asked.answers
            if not answer:
                break
            reasons.update(answer)
            assert not client.names()  # and the daemon has done with the other one
    assert free >= 2
    assert reasons == {(ERROR, b"no connection: Too many open files")}


def test_sigterm_ends_a_daemon_without_descriptors_well(accessory: Accessory) -> None:
    with few_descriptors(accessory.pid, 0), accessory.client() as client:
        assert received(client).error == "no connection: Too many open files"
        accessory.stop()


def test_one_connection_too_many_is_told_even_if_it_has_asked_already(
    stopped_accessory: Accessory,
) -> None:
    stopped_accessory.settings.write_text("limits.connections = 2")
    accessory = stopped_accessory.start()
    with ExitStack() as clients:
        for _ in range(2):
            works(clients.enter_context(accessory.client()), *WANTED)
        with frozen(accessory.pid):
            client = clients.enter_context(accessory.client())
            client.send(*WANTED)
        assert received(client).error == "there are too many connections (limits.connections)"
        assert client.dropped()


# No room in the epoll set


# Runs the daemon with an epoll set that takes no more while a file is there.
FULL = """
import errno, os, runpy, sys
from spawn_accessory.watch import Watch
full, real = sys.argv.pop(1), Watch.add_event
def add_event(*arguments):
    if os.path.exists(full):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(*arguments)
Watch.add_event = add_event
del sys.argv[1:3]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_what_the_daemon_cannot_wait_for_is_not_given_out(
    stopped_accessory: Accessory, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    stopped_accessory.wrapper = [sys.executable, "-c", FULL, str(full)]
    accessory = stopped_accessory.start()
    with accessory.client() as client:
        works(client, (NAME, b"other"), KINDS["ipc"], KINDS["pid"])
        works(client, (NAME, b"other"), KINDS["mnt"])  # so the keeper has read all before it
        wait_for("the init has its name", lambda: len(accessory.inits()) == 1)
        before = descriptors(accessory), client.names()
        full.touch()
        for wanted in (((LEASE, b""),), (KINDS["ipc"], KINDS["pid"]), EVERYTHING[1:]):
            assert fails(client, ALICE, *wanted) == "No space left on device"
            wait_for("nothing was made", lambda: descriptors(accessory) == before[0])
            assert client.names() == before[1]
        assert fails(client, (NAME, b"other"), (LEASE, b"")) == "No space left on device"
        wait_for("nothing was made", lambda: descriptors(accessory) == before[0])
        assert list(accessory.inits().values()) == ["init-other"]
        full.unlink()
        works(client, *EVERYTHING)


# Limits of the kernel, which are the user namespace's own


@pytest.fixture(scope="module")
def running_confined() -> Iterator[Accessory]:
    with (
        TemporaryDirectory() as directory,
        make_host(Path(directory), "confined") as host,
        make_accessory(host.directory, host.scope("accessory.service")) as accessory,
    ):
        # Without namespaces that belong to this user namespace it could not go back into them.
        accessory.wrapper = ["unshare", "-Ur", "--ipc", "--net", "--uts", "--cgroup"]
        accessory.settings.write_text(f"expiry = {EXPIRY}")
        accessory.activate()
        yield accessory.start()


@pytest.fixture
def confined(running_confined: Accessory) -> Iterator[Accessory]:
    """A daemon in a user namespace of its own, used by other tests before."""
    before = descriptors(running_confined)
    yield running_confined
    check_clean(running_confined, before)


def set_limit(pid: int, kind: str, number: int) -> None:
    script = f"echo {number} >/proc/sys/user/max_{kind}_namespaces"
    subprocess.run(["nsenter", "-t", str(pid), "-U", "sh", "-c", script], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_of_the_kernel_is_named_and_nothing_is_made(confined: Accessory, kind: str) -> None:
    others = [packet for other, packet in KINDS.items() if other != kind]
    with confined.client() as client:
        assert not client.names()  # it has been accepted
        before = descriptors(confined)
        set_limit(confined.pid, kind, 0)
        reason = f"the kernel's limit user.max_{kind}_namespaces is reached"
        for wanted in ((ALICE, KINDS[kind]), EVERYTHING):
            assert fails(client, *wanted) == reason
            assert not client.names()
            check_clean(confined, before)
        there = works(client, ALICE, *others)
        assert fails(client, *EVERYTHING) == reason
        assert works(client, ALICE, *others) == there
        set_limit(confined.pid, kind, 1000)
        assert set(there) < set(works(client, *EVERYTHING))


def test_answers_that_the_kernel_does_not_send_are_errors(confined: Accessory) -> None:
    with confined.client() as client, few_descriptors(confined.pid, 15):
        with suppress(BrokenPipeError):
            for _ in range(200):  # more descriptors under way than it may have open
                client.send(*WANTED)
        last = None
        while answer := client.receive():
            answer.close()
            last = answer
        assert last is not None
        assert last.error == os.strerror(errno.ETOOMANYREFS)


# No process for an init, or no keeper


@pytest.fixture
def masked(stopped_accessory: Accessory) -> Accessory:
    """A daemon in a mount namespace of its own."""
    stopped_accessory.wrapper = ["unshare", "-m"]
    stopped_accessory.settings.write_text(f"expiry = {EXPIRY}")
    return stopped_accessory.start()


def mount(pid: int, *arguments: str | Path) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-m", *arguments], check=True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("/dev/null", "Permission denied"), (__file__, "Permission denied"), (None, "No such file")],
    ids=["no program", "not executable", "not there"],
)
def test_without_its_program_there_is_no_init(
    masked: Accessory, source: str | None, reason: str
) -> None:
    with masked.client() as client:
        assert not client.names()  # it has been accepted
        before = descriptors(masked)
        if source is None:
            mount(masked.pid, "mount", "-t", "tmpfs", "none", INIT.parent)
        else:
            mount(masked.pid, "mount", "--bind", source, INIT)
        for wanted in ((ALICE, KINDS["pid"]), EVERYTHING):
            assert fails(client, *wanted).startswith(f"no PID namespace: {reason}")
            assert not client.names()
            check_clean(masked, before)
        works(client, ALICE, KINDS["ipc"], KINDS["mnt"])
        mount(masked.pid, "umount", INIT if source else INIT.parent)
        works(client, *EVERYTHING)
        assert list(masked.inits().values()) == ["init-alice"]


def test_without_a_keeper_what_exists_is_served_and_the_rest_works_later(masked: Accessory) -> None:
    masked.settings.write_text("")
    masked.signal(signal.SIGHUP)
    wait_for("it has other settings", lambda: masked.manager.notifications.count("READY=1") > 1)
    with masked.client() as client, client.ask(*EVERYTHING) as first:
        mount(masked.pid, "mount", "--bind", "/dev/null", KEEPER)
        keeper = masked.keeper()
        os.kill(keeper, signal.SIGKILL)
        wait_for("the keeper is dead", lambda: keeper not in masked.processes())
        with client.ask(*EVERYTHING) as again:
            assert again.inodes() == first.inodes()
        for kind in ("ipc", "pid"):
            reason = fails(client, (NAME, b"bob"), KINDS[kind])
            assert reason in ("Permission denied", "the keeper has ended")
        assert list(client.names()) == [b"alice"]
        mount(masked.pid, "umount", KEEPER)
        works(client, (NAME, b"bob"), *EVERYTHING[1:])
        with client.ask(*EVERYTHING) as again:
            assert again.inodes() == first.inodes()
        assert sorted(masked.inits().values()) == ["init-alice", "init-bob"]
        masked.stop()
        masked.start()
        with masked.client() as later, later.ask(*EVERYTHING) as again:
            assert again.inodes() == first.inodes()


# Becomes root of a user namespace that is another user outside, one whose processes are limited.
# The files of the host's root can be read nevertheless, since that is somebody in there.
LIMITED = """
import os, sys
from spawn_common import linux
pid = os.getpid()
ready, unshared = os.pipe()
if not (child := os.fork()):
    os.close(unshared)
    os.read(ready, 1)
    for which in ("uid", "gid"):
        with open(f"/proc/{pid}/{which}_map", "w") as file:
            file.write("0 65534 1\\n1 0 1")
    os._exit(0)
linux.unshare(0x10000000 | 0x08000000 | 0x40000000 | 0x04000000 | 0x02000000)
os.close(unshared)
assert os.waitpid(child, 0)[1] == 0
os.close(ready)
os.setresgid(0, 0, 0)
os.setresuid(0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_without_a_process_for_an_init_nothing_is_made(stopped_accessory: Accessory) -> None:
    stopped_accessory.activate()  # from outside of its network namespace
    stopped_accessory.wrapper = [sys.executable, "-c", LIMITED]
    stopped_accessory.settings.write_text("allow = [{users = [1]}]")
    accessory = stopped_accessory.start()
    with accessory.client() as client:
        assert not client.names()  # it has been accepted
        before = descriptors(accessory)
        limit = resource.prlimit(accessory.keeper(), resource.RLIMIT_NPROC)
        resource.prlimit(accessory.keeper(), resource.RLIMIT_NPROC, (1, limit[1]))
        for wanted in ((ALICE, KINDS["pid"]), (ALICE, KINDS["mnt"], KINDS["pid"], (LEASE, b""))):
            reason = fails(client, *wanted)
            assert reason == "no PID namespace: Resource temporarily unavailable"
            assert not client.names()
            check_clean(accessory, before)
        resource.prlimit(accessory.keeper(), resource.RLIMIT_NPROC, limit)
        works(client, ALICE, KINDS["mnt"], KINDS["pid"])
        assert list(accessory.inits().values()) == ["init-alice"]
