"""The accessory's wire protocol, against datagrams that are built here byte by byte."""

from __future__ import annotations

import os
import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_accessory.protocol import (
    Listed,
    Malformed,
    Maps,
    Namespace,
    Request,
    Response,
    pack_page,
    pack_request,
    pack_response,
    unpack_datagram,
    unpack_request,
    unpack_response,
)
from tests.tools import fuzz
from tests.tools.wire import datagram

NAME = (1, b"alice")
SUITE = (Namespace.IPC, Namespace.PID, Namespace.USER)

REQUESTS = {
    "nothing": (datagram(), Request()),
    "nop": (datagram((0, b"")), Request()),
    "nops with anything": (datagram((0, b"x"), (0, b"yz")), Request()),
    "name": (datagram(NAME), Request(name=b"alice")),
    "name that needs no padding": (datagram((1, b"bob!")), Request(name=b"bob!")),
    "name of all characters": (
        datagram((1, bytes(range(0x20, 0x80)))),
        Request(name=bytes(range(0x20, 0x80))),
    ),
    "ipc": (datagram(NAME, (2, b"")), Request(b"alice", (Namespace.IPC,))),
    "pid": (datagram(NAME, (3, b"")), Request(b"alice", (Namespace.PID,))),
    "user": (
        datagram(NAME, (4, b"0 1000 1\n\0000 100 1\n")),
        Request(b"alice", (Namespace.USER,), Maps(b"0 1000 1\n", b"0 100 1\n")),
    ),
    "user with empty maps": (
        datagram(NAME, (4, b"\0")),
        Request(b"alice", (Namespace.USER,), Maps(b"", b"")),
    ),
    "lease": (datagram(NAME, (5, b"")), Request(name=b"alice", lease=True)),
    "all": (
        datagram(NAME, (2, b""), (3, b""), (4, b"a\0b"), (5, b"")),
        Request(b"alice", SUITE, Maps(b"a", b"b"), lease=True),
    ),
    "any order": (
        datagram((5, b""), (3, b""), NAME),
        Request(b"alice", (Namespace.PID,), lease=True),
    ),
    "net": (datagram(NAME, (0x8001, b"")), Request(b"alice", (Namespace.NET,))),
    "uts": (datagram(NAME, (0x8002, b"")), Request(b"alice", (Namespace.UTS,))),
    "cgroup": (datagram(NAME, (0x8003, b"")), Request(b"alice", (Namespace.CGROUP,))),
    "mount": (datagram(NAME, (0x8004, b"")), Request(b"alice", (Namespace.MOUNT,))),
    "time": (datagram(NAME, (0x8005, b"")), Request(b"alice", (Namespace.TIME,))),
    "every namespace": (
        datagram(
            NAME,
            (2, b""),
            (3, b""),
            (4, b"a\0b"),
            *((n, b"") for n in range(0x8001, 0x8006)),
            (5, b""),
        ),
        Request(b"alice", tuple(Namespace), Maps(b"a", b"b"), lease=True),
    ),
    "list": (datagram((0x8006, b"")), Request(list_after=b"")),
    "list after a name": (datagram((0x8006, b"bob")), Request(list_after=b"bob")),
    "status": (datagram((0x8007, b"")), Request(status=True)),
    "longest name": (datagram((1, b"x" * 4064)), Request(name=b"x" * 4064)),
    "newer commands": (
        datagram((77, b"something"), NAME, (0x9001, b""), (77, b"")),
        Request(name=b"alice"),
    ),
}

MALFORMED = {
    "empty": (b"", "0 bytes are too short"),
    "short": (datagram()[:7], "7 bytes are too short"),
    "magic": (datagram(NAME, magic=0x12345678), "wrong magic number 0x12345678"),
    "crc": (datagram(NAME, crc=1), "wrong checksum"),
    "half a packet header": (
        struct.pack("=II", 0x63046173, zlib.crc32(b"\0\0")) + b"\0\0",
        "truncated packet header",
    ),
    "payload": (
        struct.pack("=II", 0x63046173, zlib.crc32(b"\x08\0\x01\0abcd")) + b"\x08\0\x01\0abcd",
        "truncated payload of command 1",
    ),
    "padding": (
        struct.pack("=II", 0x63046173, zlib.crc32(b"\x02\0\x01\0ab")) + b"\x02\0\x01\0ab",
        "truncated payload of command 1",
    ),
    "too long": (datagram((77, bytes(4096))), "at most 4096 bytes"),
    "empty name": (datagram((1, b"")), "NAME is empty"),
    "control character": (datagram((1, b"a\x1f")), "plain ASCII"),
    "NUL": (datagram((1, b"a\0")), "plain ASCII"),
    "UTF-8": (datagram((1, "ä".encode())), "plain ASCII"),
    "two names": (datagram(NAME, NAME), "NAME is there twice"),
    "ipc twice": (datagram(NAME, (2, b""), (2, b"")), "IPC_NAMESPACE is there twice"),
    "ipc with a payload": (datagram(NAME, (2, b"x")), "IPC_NAMESPACE takes no payload"),
    "pid with a payload": (datagram(NAME, (3, b"x")), "PID_NAMESPACE takes no payload"),
    "lease with a payload": (datagram(NAME, (5, b"x")), "LEASE_PIPE takes no payload"),
    "long name": (datagram((1, b"x" * 4065)), "NAME is longer than 4064 bytes"),
    "net twice": (datagram(NAME, (0x8001, b""), (0x8001, b"")), "NET_NAMESPACE is there twice"),
    "list twice": (datagram((0x8006, b""), (0x8006, b"")), "LIST is there twice"),
    "status twice": (datagram((0x8007, b""), (0x8007, b"")), "STATUS is there twice"),
    "net with a payload": (datagram(NAME, (0x8001, b"x")), "NET_NAMESPACE takes no payload"),
    "time with a payload": (datagram(NAME, (0x8005, b"x")), "TIME_NAMESPACE takes no payload"),
    "status with a payload": (datagram((0x8007, b"x")), "STATUS takes no payload"),
    "list and a name": (datagram(NAME, (0x8006, b"")), "LIST goes alone"),
    "list and status": (datagram((0x8006, b""), (0x8007, b"")), "LIST goes alone"),
    "status and a lease": (datagram((5, b""), (0x8007, b"")), "STATUS goes alone"),
    "one map": (datagram(NAME, (4, b"0 0 1")), "needs two maps"),
    "three maps": (datagram(NAME, (4, b"a\0b\0c")), "needs two maps"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_requests_are_understood(what: str) -> None:
    raw, request = REQUESTS[what]
    assert unpack_request(raw) == request


@pytest.mark.parametrize("what", MALFORMED)
def test_what_breaks_the_protocol_is_named(what: str) -> None:
    raw, reason = MALFORMED[what]
    with pytest.raises(Malformed, match=reason):
        unpack_request(raw)


WRITTEN = (
    *("name", "ipc", "pid", "user", "lease", "all"),
    *("net", "uts", "cgroup", "mount", "time", "every namespace", "list", "status"),
)


@pytest.mark.parametrize("what", WRITTEN)
def test_requests_are_written_as_the_suite_does(what: str) -> None:
    raw, request = REQUESTS[what]
    assert pack_request(request) == raw


def test_only_what_asks_for_something_wants_an_answer() -> None:
    assert not Request(name=b"x").wants_answer()
    assert Request(lease=True).wants_answer()
    assert Request(namespaces=(Namespace.IPC,)).wants_answer()
    assert Request(list_after=b"").wants_answer()
    assert Request(status=True).wants_answer()


def test_responses_are_written_as_the_suite_does() -> None:
    namespaces = SUITE
    flags = struct.pack("=III", 0x08000000, 0x20000000, 0x10000000)
    assert pack_response(Response(namespaces, lease=True)) == datagram((1, flags), (2, b""))
    assert pack_response(Response(error="no")) == datagram((0, b"no"))
    assert unpack_response(datagram((1, flags), (2, b""))) == Response(namespaces, lease=True)


ALICE = Listed(b"alice", (Namespace.IPC, Namespace.USER, Namespace.TIME), leases=3, age=70)
LISTED_ALICE = (0x8001, struct.pack("=III", 0x18000080, 3, 70) + b"alice")


def test_names_and_their_namespaces_leases_and_age_are_listed() -> None:
    bob = Listed(b"bob", (), leases=0, age=0)
    raw = datagram(LISTED_ALICE, (0x8001, bytes(12) + b"bob"))
    assert pack_page([ALICE, bob]) == raw
    assert unpack_response(raw) == Response(listed=(ALICE, bob))


def test_where_there_are_no_names_the_list_is_empty() -> None:
    assert pack_page([]) == datagram()
    assert unpack_response(datagram()) == Response()


def test_a_page_says_that_there_are_more() -> None:
    raw = datagram(LISTED_ALICE, (0x8002, b""))
    assert unpack_response(raw) == Response(listed=(ALICE,), more=True)


@given(st.lists(st.integers(1, 4064), max_size=300))
def test_all_names_are_in_pages_as_full_as_they_can_be(lengths: list[int]) -> None:
    names = [Listed(b"%06d" % n + b"x" * length, (), 0, 0) for n, length in enumerate(lengths)]
    left = [Listed(one.name[:4064], (), 0, 0) for one in names]
    while True:
        raw = pack_page(left)
        assert len(raw) <= 4096
        page = unpack_response(raw)
        assert page.listed == tuple(left[: len(page.listed)])
        left = left[len(page.listed) :]
        assert page.more == bool(left)
        if not left:
            return
        assert page.listed
        following = 4 + 12 + len(left[0].name)
        assert len(raw) + following + -following % 4 > 4096


def test_status_is_text() -> None:
    raw = datagram((0x8003, b"version=1\nnames=2\n"))
    assert pack_response(Response(status="version=1\nnames=2\n")) == raw
    assert unpack_response(raw) == Response(status="version=1\nnames=2\n")


@pytest.mark.parametrize("payload", [b"", bytes(11), bytes(12)])
def test_a_listed_name_that_is_none_is_malformed(payload: bytes) -> None:
    with pytest.raises(Malformed, match="LISTED has no name"):
        unpack_response(datagram((0x8001, payload)))


def test_what_does_not_fit_is_not_written() -> None:
    with pytest.raises(ValueError, match="exceeds 4096"):
        pack_request(Request(name=b"x" * 4064, maps=Maps(b"0 0 1\n1 1 1", b""), namespaces=SUITE))


def test_a_long_error_is_cut_off() -> None:
    raw = pack_response(Response(error="x" * 10_000))
    assert len(raw) == 4096
    assert unpack_response(raw).error == "x" * 4084


@pytest.mark.parametrize("flags", [b"\0", bytes(4), struct.pack("=I", 0x40000)])
def test_a_response_with_unknown_namespaces_is_malformed(flags: bytes) -> None:
    with pytest.raises(Malformed, match="NAMESPACE_HANDLES"):
        unpack_response(datagram((1, flags)))


@given(st.binary(max_size=200))
def test_any_bytes_are_understood_or_malformed(raw: bytes) -> None:
    for tried in (raw, datagram()[:4] + struct.pack("=I", zlib.crc32(raw)) + raw):
        for unpack in (unpack_request, unpack_response):
            with suppress(Malformed):
                unpack(tried)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_datagrams_of_all_sorts_are_understood_or_malformed() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    results = fuzz.check_unpacking(seed, 1_000_000)
    assert min(results["malformed"], results["asks"], results["asks for nothing"]) > 50_000


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=64)), max_size=20))
def test_packets_come_out_as_they_went_in(packets: list[tuple[int, bytes]]) -> None:
    assert list(unpack_datagram(datagram(*packets))) == packets
