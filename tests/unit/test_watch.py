"""The order in which descriptors that became ready are seen to."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from spawn_accessory.watch import Watch


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("clients", [2, 63, 64, 65, 200])
def test_what_happened_before_a_request_is_seen_before_it(stack: ExitStack, clients: int) -> None:
    """Also with more clients that are busy than are looked at in one go."""
    watch = Watch()
    stack.callback(watch.close)
    died, life = os.pipe()
    stack.callback(os.close, died)
    living = [life]
    seen: list[str] = []
    watch.add_event(died, 0, lambda: seen.append("the event"))
    ends: list[socket.socket] = []

    def serve(number: int) -> None:
        if ends[2 * number].recv(100) == b"last":
            seen.append("the request")
        elif number == 0 and living:
            os.close(living.pop())
            ends[3].send(b"last")

    for number in range(clients):
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends += map(stack.enter_context, pair)
        watch.add_request(ends[2 * number].fileno(), select.EPOLLIN, partial(serve, number))
        ends[2 * number + 1].send(b"first")
        if number != 1:
            ends[2 * number + 1].send(b"second")
    while "the request" not in seen:
        watch.run()
    assert seen == ["the event", "the request"]


def test_what_is_changed_holds_for_what_is_there_already(stack: ExitStack) -> None:
    watch = Watch()
    stack.callback(watch.close)
    one, other = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    calls = []
    watch.add_event(one.fileno(), select.EPOLLIN, lambda: calls.append(1))
    watch.look()
    assert not calls
    watch.change_event(one.fileno(), select.EPOLLIN | select.EPOLLOUT)
    watch.look()
    watch.look()
    assert len(calls) == 1
    watch.change_event(one.fileno(), select.EPOLLIN)
    other.send(b"x")
    watch.look()
    assert len(calls) == 2
