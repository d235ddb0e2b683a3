"""The accessory's wire protocol, against datagrams that are built here byte by byte."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_accessory.protocol import (
    Malformed,
    Maps,
    Namespace,
    Request,
    Response,
    pack_request,
    pack_response,
    unpack_datagram,
    unpack_request,
    unpack_response,
)
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
    "too long": (datagram((77, bytes(4096))), "4108 bytes are too long"),
    "empty name": (datagram((1, b"")), "NAME is empty"),
    "control character": (datagram((1, b"a\x1f")), "plain ASCII"),
    "NUL": (datagram((1, b"a\0")), "plain ASCII"),
    "UTF-8": (datagram((1, "ä".encode())), "plain ASCII"),
    "two names": (datagram(NAME, NAME), "NAME is there twice"),
    "ipc twice": (datagram(NAME, (2, b""), (2, b"")), "IPC_NAMESPACE is there twice"),
    "ipc with a payload": (datagram(NAME, (2, b"x")), "IPC_NAMESPACE takes no payload"),
    "pid with a payload": (datagram(NAME, (3, b"x")), "PID_NAMESPACE takes no payload"),
    "lease with a payload": (datagram(NAME, (5, b"x")), "LEASE_PIPE takes no payload"),
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


@pytest.mark.parametrize("what", ["name", "ipc", "pid", "user", "lease", "all"])
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


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=64)), max_size=20))
def test_packets_come_out_as_they_went_in(packets: list[tuple[int, bytes]]) -> None:
    assert list(unpack_datagram(datagram(*packets))) == packets
