"""The accessory's client: what answers mean to it, and how it deals with connections."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_accessory.protocol import Maps, Namespace, Request, Response
from spawn_client.accessory import (
    Accessory,
    AccessoryError,
    AsyncAccessory,
    Namespaces,
    ProtocolError,
    Refused,
    Timeout,
    Unavailable,
    Unsupported,
)
from spawn_client.dialogue import Dialogue, pack_checked, read_answer
from tests.tools.descriptors import nothing_stays_open
from tests.tools.harness import wait_for
from tests.tools.wire import datagram

IPC, PID, USER, NET = 0x08000000, 0x20000000, 0x10000000, 0x40000000
SHORT = 0.05  # seconds until nobody is waited for any more


def handles(*flags: int) -> tuple[int, bytes]:
    """Return the packet that announces namespaces."""
    return 1, struct.pack(f"={len(flags)}I", *flags)


LEASE = (2, b"")


@dataclass(frozen=True)
class Answer:
    """What a fake accessory answers, with descriptors of these namespaces of its own."""

    datagram: bytes | None  # None for silence, empty for the end of the connection
    kinds: tuple[str, ...] = ()
    after: threading.Event | None = None


GRANTED = Answer(datagram(handles(IPC), LEASE), ("ipc", "mnt"))
CLOSED = Answer(b"")


@dataclass
class Fake:
    """An accessory that does as a test says; ``requests`` has what it received."""

    address: str
    requests: list[bytes] = field(default_factory=list)


@contextmanager
def fake(*connections: Sequence[Answer]) -> Iterator[Fake]:
    """Accept connections one after the other, with one answer for each request.

    Each connection is closed after its last answer, the last one when the client closes it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        name = os.urandom(8).hex()
        listener.bind(f"\0{name}")
        listener.listen()
        accessory = Fake(f"@{name}")
        thread = threading.Thread(target=_serve, args=(listener, connections, accessory))
        thread.start()
        try:
            yield accessory
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(listener: socket.socket, connections: Sequence[Sequence[Answer]], fake: Fake) -> None:
    for number, answers in enumerate(connections, 1):
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # the test is over
        with connection, suppress(ConnectionError):
            for answer in answers:
                fake.requests.append(connection.recv(5000))
                _give(connection, answer)
            if number == len(connections):
                connection.recv(1)


def _give(connection: socket.socket, answer: Answer) -> None:
    if answer.after is not None:
        answer.after.wait()
    if answer.datagram is None:
        connection.recv(1)  # until the client has had enough
    if not answer.datagram:
        return
    with ExitStack() as exits:
        descriptors = []
        for kind in answer.kinds:
            descriptors.append(os.open(f"/proc/self/ns/{kind}", os.O_RDONLY))
            exits.callback(os.close, descriptors[-1])
        with suppress(ConnectionError):
            socket.send_fds(connection, [answer.datagram], descriptors)


@pytest.fixture(autouse=True)
def no_descriptor_stays() -> Iterator[None]:
    """Every descriptor is closed after every test, however answers were broken."""
    with nothing_stays_open():
        yield


def kind_of(descriptor: int | None) -> str:
    """Return which kind of namespace a descriptor is of."""
    return os.readlink(f"/proc/self/fd/{descriptor}").partition(":")[0]


# What is said

REQUESTS = {
    "ipc": (
        Request(b"alice", (Namespace.IPC,), lease=True),
        datagram((1, b"alice"), (2, b""), (5, b"")),
    ),
    "suite": (
        Request(b"a", (Namespace.PID, Namespace.USER), Maps(b"0 1 1\n", b"")),
        datagram((1, b"a"), (3, b""), (4, b"0 1 1\n\0")),
    ),
    "ours": (
        Request(b"a", (Namespace.NET, Namespace.TIME)),
        datagram((1, b"a"), (0x8001, b""), (0x8005, b"")),
    ),
    "list": (Request(list_after=b"bob"), datagram((0x8006, b"bob"))),
    "status": (Request(status=True), datagram((0x8007, b""))),
}
ALL = Request(b"a", (Namespace.IPC, Namespace.PID, Namespace.NET), lease=True)
WRONG = {
    "empty": (b"", 0, ProtocolError, "0 bytes are too short"),
    "crc": (datagram(handles(IPC), crc=1), 1, ProtocolError, "wrong checksum"),
    "magic": (datagram(magic=1), 0, ProtocolError, "wrong magic"),
    "half a number": (datagram((1, b"abc")), 0, ProtocolError, "half a number"),
    "unknown kind": (datagram((1, b"\1\0\0\0")), 1, ProtocolError, "not a valid"),
    "error": (datagram((0, b"no \xff way")), 0, Refused, "^no \N{REPLACEMENT CHARACTER} way$"),
    "error beside handles": (datagram((0, b"no"), handles(IPC)), 1, Refused, "^no$"),
    "unasked kind": (datagram(handles(IPC, USER)), 2, ProtocolError, "more than was asked"),
    "twice": (datagram(handles(IPC, IPC)), 2, ProtocolError, "more than was asked"),
    "no descriptors": (datagram(handles(IPC, PID, NET), LEASE), 0, ProtocolError, "number of"),
    "one missing": (datagram(handles(IPC, PID, NET), LEASE), 3, ProtocolError, "descriptors: 3"),
    "one too many": (datagram(handles(IPC, PID, NET), LEASE), 5, ProtocolError, "descriptors: 5"),
    "nothing": (datagram(), 0, ProtocolError, "less than was asked"),
    "no lease": (datagram(handles(IPC, PID, NET)), 3, ProtocolError, "less than was asked"),
    "no pid": (datagram(handles(IPC, NET), LEASE), 3, ProtocolError, "less than was asked"),
    "as the suite": (datagram(handles(IPC, PID), LEASE), 3, Unsupported, "over net; .* C\\+\\+"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_requests_are_those_of_the_contract(what: str) -> None:
    request, raw = REQUESTS[what]
    assert pack_checked(request) == raw


def test_an_answer_with_all_that_was_asked_for_is_taken() -> None:
    raw = datagram(handles(IPC, PID, NET), LEASE)
    assert read_answer(ALL, raw, 4) == Response(ALL.namespaces, lease=True)


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_an_answer_is_told(what: str) -> None:
    raw, count, kind, message = WRONG[what]
    with pytest.raises(kind, match=message):
        read_answer(ALL, raw, count)


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=12))), st.integers(0, 5))
def test_no_answer_raises_anything_but_our_errors(
    packets: list[tuple[int, bytes]], count: int
) -> None:
    with suppress(AccessoryError):
        assert read_answer(ALL, datagram(*packets), count).namespaces == ALL.namespaces


@pytest.mark.parametrize(
    ("name", "maps", "message"),
    [
        ("", None, "NAME is empty"),
        ("ä", None, "plain ASCII"),
        (b"a\n", None, "plain ASCII"),
        ("x" * 4065, None, "longer than 4064"),
        ("a", ("0 0 0", ""), "uid map: line 1: the length is zero"),
        ("a", ("", [(0, 0, 1), (0, 5, 1)]), "gid map: line 2: the ids inside overlap line 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(
    name: str | bytes, maps: tuple[str, str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Accessory("@nowhere").namespaces(name, user=maps)


def test_asking_for_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="neither a namespace nor a lease"):
        Accessory("@nowhere").namespaces("alice", lease=False)


# Answers over a socket


def test_descriptors_are_found_by_their_kind_and_closed_in_the_end() -> None:
    with fake([GRANTED]) as server, Accessory(server.address) as accessory:
        with accessory.namespaces("alice", ipc=True) as namespaces:
            assert (kind_of(namespaces.ipc), kind_of(namespaces.lease)) == ("ipc", "mnt")
            assert not os.get_inheritable(namespaces.ipc or -1)
            assert namespaces.pid is None
        assert (namespaces.ipc, namespaces.lease) == (None, None)
        namespaces.close()
    assert server.requests == [datagram((1, b"alice"), (2, b""), (5, b""))]


def test_maps_are_texts_or_numbers() -> None:
    granted = Answer(datagram(handles(USER)), ("user",))
    with fake([granted, granted]) as server, Accessory(server.address) as accessory:
        for maps in (("0 7 1\n1 100 5\n", b"0 8 1"), ([(0, 7, 1), (1, 100, 5)], "0 8 1")):
            accessory.namespaces("a", user=maps, lease=False).close()
    expected = datagram((1, b"a"), (4, b"0 7 1\n1 100 5\n\x000 8 1"))
    assert server.requests == [expected, expected]


def test_a_descriptor_can_be_kept_beyond_its_object() -> None:
    with fake([GRANTED]) as server, Accessory(server.address) as accessory:
        namespaces = accessory.namespaces("alice", ipc=True)
        lease = namespaces.detach("lease")
        namespaces.close()
        assert kind_of(lease) == "mnt"
        os.close(lease)
        with pytest.raises(ValueError, match="no descriptor for lease"):
            namespaces.detach("lease")


def test_forgotten_descriptors_are_closed() -> None:
    with fake([GRANTED]) as server, Accessory(server.address) as accessory:
        accessory.namespaces("alice", ipc=True)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(datagram((0, b"no")), ("ipc", "net")), Refused),
        (Answer(b"rubbish", ("ipc",)), ProtocolError),
        (Answer(datagram(handles(IPC), LEASE), ("ipc",)), ProtocolError),
        (Answer(datagram(handles(IPC), LEASE), ("ipc", "net", "uts")), ProtocolError),
        (Answer(datagram(handles(IPC), LEASE), ("ipc",) * 100), ProtocolError),
        (Answer(datagram((77, bytes(5000))), ("ipc",)), ProtocolError),
    ],
)
def test_descriptors_of_an_answer_that_is_not_taken_are_closed(
    answer: Answer, kind: type[AccessoryError]
) -> None:
    with fake([answer], [GRANTED]) as server, Accessory(server.address) as accessory:
        with pytest.raises(kind):
            accessory.namespaces("alice", ipc=True)
        accessory.namespaces("alice", ipc=True).close()


def test_silence_is_a_timeout_where_every_accessory_answers() -> None:
    with (
        fake([Answer(None)]) as server,
        Accessory(server.address, SHORT) as accessory,
        pytest.raises(Timeout, match=r"no answer within 0\.05 s"),
    ):
        accessory.namespaces("alice", ipc=True, net=True)


def test_silence_is_unsupported_where_the_suite_passes_over() -> None:
    with fake(*[[Answer(None)]] * 3) as server, Accessory(server.address, SHORT) as accessory:
        with pytest.raises(Unsupported, match=r"no answer to list .* C\+\+ suite"):
            accessory.list()
        with pytest.raises(Unsupported, match="answer to status"):
            accessory.status()
        with pytest.raises(Unsupported, match="answer to net, uts"):
            accessory.namespaces("alice", net=True, uts=True, lease=False)


def test_a_list_is_read_page_by_page() -> None:
    first = (0x8001, struct.pack("=III", IPC | NET, 2, 61) + b"alice")
    second = (0x8001, struct.pack("=III", 0, 0, 5) + b"bob")
    pages = [Answer(datagram(first, (0x8002, b""))), Answer(datagram(second))]
    with fake(pages) as server, Accessory(server.address) as accessory:
        listed = accessory.list()
    assert [(one.name, one.namespaces, one.leases, one.age) for one in listed] == [
        (b"alice", (Namespace.IPC, Namespace.NET), 2, 61),
        (b"bob", (), 0, 5),
    ]
    assert server.requests == [datagram((0x8006, b"")), datagram((0x8006, b"alice"))]


def test_a_list_that_does_not_go_on_is_not_followed_for_ever() -> None:
    page = datagram((0x8001, struct.pack("=III", 0, 0, 5) + b"bob"), (0x8002, b""))
    with (
        fake([Answer(page)] * 3) as server,
        Accessory(server.address) as accessory,
        pytest.raises(ProtocolError, match="no further names"),
    ):
        accessory.list()


def test_the_status_is_by_name() -> None:
    answer = Answer(datagram((0x8003, b"names=3\nnote=a=b\n")))
    with fake([answer]) as server, Accessory(server.address) as accessory:
        assert accessory.status() == {"names": "3", "note": "a=b"}


# Connections


def test_that_nobody_listens_is_told_at_once_with_the_address() -> None:
    for address in ("@cm4all-spawn-nobody", "/nowhere/socket", "/" + "x" * 200):
        conversation = Dialogue(address, 10).status()
        with pytest.raises(Unavailable, match=f"nobody listens at {address}: "):
            next(conversation)  # without any wait


def test_a_connection_that_ended_meanwhile_is_made_anew() -> None:
    with fake([GRANTED], [GRANTED]) as server, Accessory(server.address) as accessory:
        accessory.namespaces("alice", ipc=True).close()
        accessory.namespaces("bob", ipc=True).close()
    assert len(server.requests) == 2


def test_a_request_without_an_answer_is_asked_again() -> None:
    with fake([CLOSED], [CLOSED], [GRANTED]) as server, Accessory(server.address) as accessory:
        accessory.namespaces("alice", ipc=True).close()
    assert server.requests == [datagram((1, b"alice"), (2, b""), (5, b""))] * 3


def test_an_accessory_that_never_answers_is_given_up() -> None:
    with (
        fake(*[[CLOSED]] * 9) as server,
        Accessory(server.address, 0.3) as accessory,
        pytest.raises(Unavailable, match="closed the connection without an answer"),
    ):
        accessory.namespaces("alice", ipc=True)
    assert 1 < len(server.requests) < 9


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that listens, for a test that plays the accessory step by step."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(10)
        listener.bind(f"\0{os.urandom(8).hex()}")
        listener.listen(0)
        yield listener


@pytest.fixture
def dialogue(listener: socket.socket) -> Iterator[Dialogue]:
    """What a test leads conversations with."""
    dialogue = Dialogue("@" + listener.getsockname()[1:].decode(), 10)
    yield dialogue
    dialogue.close()


def asked(dialogue: Dialogue, listener: socket.socket) -> socket.socket:
    """Have the status asked for and answered; return the connection over which that was done."""
    conversation = dialogue.status()
    assert next(conversation).events == select.POLLIN
    connection, _ = listener.accept()
    assert connection.recv(100) == datagram((0x8007, b""))
    connection.send(datagram((0x8003, b"a=1")))
    with pytest.raises(StopIteration):
        next(conversation)
    return connection


def test_what_is_said_before_a_connection_is_closed_is_heard(
    listener: socket.socket, dialogue: Dialogue
) -> None:
    conversation = dialogue.namespaces(ALL)
    assert next(conversation).events == select.POLLIN
    connection, _ = listener.accept()
    connection.send(datagram((0, b"too many connections")))
    connection.close()  # with our request unread: that is a reset
    with pytest.raises(Refused, match="too many connections"):
        next(conversation)


def test_what_was_said_unasked_is_not_taken_for_an_answer(
    listener: socket.socket, dialogue: Dialogue
) -> None:
    with asked(dialogue, listener) as first:
        first.send(datagram((0, b"you are late")))
        asked(dialogue, listener).close()


def test_an_abandoned_request_leaves_no_connection_behind(
    listener: socket.socket, dialogue: Dialogue
) -> None:
    conversation = dialogue.status()
    next(conversation)
    with listener.accept()[0]:
        conversation.close()
        asked(dialogue, listener).close()


def test_a_connection_with_a_malformed_answer_is_not_used_again(
    listener: socket.socket, dialogue: Dialogue
) -> None:
    conversation = dialogue.status()
    next(conversation)
    with listener.accept()[0] as connection:
        connection.send(b"rubbish")
        with pytest.raises(ProtocolError):
            next(conversation)
        asked(dialogue, listener).close()


def test_a_forked_process_has_a_connection_of_its_own(
    listener: socket.socket, dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asked(dialogue, listener):
        monkeypatch.setattr("os.getpid", lambda: 1)
        asked(dialogue, listener).close()


def test_a_full_queue_is_waited_for(listener: socket.socket, dialogue: Dialogue) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(listener.getsockname())
        conversation = dialogue.status()
        assert next(conversation).socket is None
        assert next(conversation).socket is None
        with listener.accept()[0]:
            assert next(conversation).events == select.POLLIN
        conversation.close()


def test_a_queue_that_stays_full_is_told(listener: socket.socket) -> None:
    address = "@" + listener.getsockname()[1:].decode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(listener.getsockname())
        with pytest.raises(Unavailable, match=f"{address} accepts no connection"):
            Accessory(address, SHORT).list()


def test_threads_take_turns() -> None:
    answers = [
        Answer(datagram(handles(IPC), LEASE), ("ipc", "mnt")),
        Answer(datagram(handles(IPC), LEASE), ("ipc", "mnt")),
    ] * 20
    kinds: list[str] = []
    with fake(answers) as server, Accessory(server.address) as accessory:

        def ask() -> None:
            for _ in range(10):
                with accessory.namespaces("alice", ipc=True) as namespaces:
                    kinds.append(kind_of(namespaces.ipc) + kind_of(namespaces.lease))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert kinds == ["ipcmnt"] * 40


# asyncio


def test_coroutines_get_their_own_answers_in_order() -> None:
    answers = [
        Answer(datagram(handles(IPC)), ("ipc",)),
        Answer(datagram(handles(NET)), ("net",)),
        Answer(datagram(handles(PID)), ("pid",)),
    ]

    async def ask(address: str) -> tuple[Namespaces, Namespaces, Namespaces]:
        async with AsyncAccessory(address) as accessory:
            return await asyncio.gather(
                accessory.namespaces("a", ipc=True, lease=False),
                accessory.namespaces("b", net=True, lease=False),
                accessory.namespaces("c", pid=True, lease=False),
            )

    with fake(answers) as server:
        a, b, c = asyncio.run(ask(server.address))
        assert (kind_of(a.ipc), kind_of(b.net), kind_of(c.pid)) == ("ipc", "net", "pid")
        for namespaces in (a, b, c):
            namespaces.close()


def test_a_late_answer_to_a_cancelled_request_is_nobody_elses() -> None:
    late = threading.Event()
    answer = Answer(datagram(handles(IPC), LEASE), ("ipc", "net"), after=late)

    async def ask(server: Fake) -> Namespaces:
        async with AsyncAccessory(server.address) as accessory:
            cancelled = asyncio.create_task(accessory.namespaces("alice", ipc=True))
            waiting = asyncio.create_task(accessory.namespaces("bob", ipc=True))

            def received() -> bool:
                return len(server.requests) == 1

            await asyncio.to_thread(wait_for, "the request is there", received)
            cancelled.cancel()
            late.set()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            return await waiting

    with fake([answer], [GRANTED]) as server, asyncio.run(ask(server)) as namespaces:
        assert kind_of(namespaces.lease) == "mnt"
        assert server.requests[1] == datagram((1, b"bob"), (2, b""), (5, b""))


def test_coroutines_get_the_same_errors() -> None:
    async def ask(address: str) -> None:
        async with AsyncAccessory(address, SHORT) as accessory:
            with pytest.raises(Refused, match="no"):
                await accessory.namespaces("alice", ipc=True)
            with pytest.raises(Timeout):
                await accessory.namespaces("alice", ipc=True)
            with pytest.raises(Unsupported):
                await accessory.list()
            assert await accessory.status() == {"a": "1"}

    status = Answer(datagram((0x8003, b"a=1\n")))
    refused = Answer(datagram((0, b"no")))
    with fake([refused, Answer(None)], [Answer(None)], [CLOSED], [status]) as server:
        asyncio.run(ask(server.address))


def test_that_nobody_listens_is_told_to_coroutines() -> None:
    async def ask() -> None:
        async with AsyncAccessory("@cm4all-spawn-nobody") as accessory:
            with pytest.raises(Unavailable, match="@cm4all-spawn-nobody"):
                await accessory.status()

    asyncio.run(ask())
