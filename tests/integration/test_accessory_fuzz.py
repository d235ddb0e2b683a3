"""A running accessory daemon under datagrams of all sorts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from spawn_accessory.protocol import Malformed, Request, unpack_request
from tests.tools.accessory import Accessory
from tests.tools.fuzz import datagrams
from tests.tools.harness import wait_for
from tests.tools.wire import HANDLES, LEASE_PIPE, LIST_MORE, LISTED, STATUS_TEXT, Answer

COUNT = 50_000
AT_ONCE = 16  # sent before answers are read; fits into the queue
HELD = 20  # leases

PAGES = {LISTED, LIST_MORE}


def test_every_datagram_gets_its_answer_and_nothing_stays(stopped_accessory: Accessory) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    accessory = stopped_accessory
    accessory.settings.write_text("expiry = 0.5")
    accessory.start()
    before = descriptors(accessory)
    fuzzed = islice(datagrams(seed), COUNT)
    results: Counter[str] = Counter()
    leases: list[int] = []
    while talk(accessory, fuzzed, results, leases):
        while len(leases) > HELD:
            os.close(leases.pop(0))
    assert all(
        results[what] > COUNT / 100 for what in ("malformed", "refused", "granted", "silent")
    )
    accessory.check_own_namespaces()
    assert set(accessory.inits().values()) <= {thread_name(name) for name in names(accessory)}
    for lease in leases:
        os.close(lease)
    wait_for("all names have expired", lambda: not names(accessory))
    wait_for("all inits have ended", lambda: not accessory.inits())
    wait_for("all descriptors are closed", lambda: descriptors(accessory) == before)
    assert not [line for line in accessory.errors() if "Traceback" in line]


def talk(
    accessory: Accessory, fuzzed: Iterator[bytes], results: Counter[str], leases: list[int]
) -> bool:
    """Send some datagrams on one connection, and check what comes back; whether there were any."""
    expected: list[Request | Malformed] = []
    with accessory.client() as client:
        for raw in islice(fuzzed, AT_ONCE):
            client.socket.send(raw)
            expected.append(understood(raw))
            if isinstance(expected[-1], Malformed):
                break
        for request in expected:
            if isinstance(request, Malformed):
                answer = client.receive()
                assert answer is not None
                assert answer.error == f"malformed request: {request}"
                assert client.dropped()
                results["malformed"] += 1
            elif request.wants_answer():
                answer = client.receive()
                assert answer is not None
                with answer:
                    results[check(request, answer)] += 1
                    if request.lease and answer.error is None and answer.fds:
                        leases.append(answer.fds.pop())
            else:
                results["silent"] += 1
    return bool(expected)


def understood(raw: bytes) -> Request | Malformed:
    try:
        return unpack_request(raw)
    except Malformed as error:
        return error


def check(request: Request, answer: Answer) -> str:
    """Check that an answer has what was asked for, or says why not; return which."""
    commands = [command for command, _ in answer.packets]
    if answer.error is not None:
        assert answer.error
        assert len(commands) == 1
        assert not answer.fds
        return "refused"
    if request.list_after is not None:
        assert set(commands) <= PAGES
        return "listed"
    if request.status:
        assert commands == [STATUS_TEXT]
        return "told"
    assert request.name is not None
    assert commands == [HANDLES] * bool(request.namespaces) + [LEASE_PIPE] * request.lease
    assert answer.flags == list(request.namespaces)
    assert len(answer.fds) == len(request.namespaces) + request.lease
    return "granted"


def names(accessory: Accessory) -> set[bytes]:
    """Return all names that exist."""
    with accessory.client() as client:
        return set(client.names())


def thread_name(name: bytes) -> str:
    """Return how the init of a name is called, as /proc tells it."""
    prefix = "init-" if len(name) <= 10 else "i-"
    return (prefix + name.decode())[:15]


def descriptors(accessory: Accessory) -> tuple[int, int]:
    """Return how many descriptors daemon and keeper have open."""
    return accessory.descriptors(), accessory.keeper_descriptors()
