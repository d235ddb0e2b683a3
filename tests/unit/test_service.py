"""That at most one daemon holds a claim, however the one before it ended."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from spawn_common.claims import AlreadyRunning, Claims


@pytest.fixture
def kind() -> str:
    """Return a kind of claim that nobody else uses."""
    return f"test-{uuid.uuid4()}"


HOLDER = """
import asyncio, sys
from spawn_common.claims import Claims

async def hold():
    Claims(sys.argv[1]).take(sys.argv[2])
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(hold())
"""


@pytest.fixture
def holder(kind: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start another process that holds the claim /held."""
    command = [sys.executable, "-c", HOLDER, kind, "/held"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test within an event loop."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run


@asynchronous
async def test_a_second_claim_names_the_holder(kind: str, holder: subprocess.Popen[bytes]) -> None:
    with pytest.raises(AlreadyRunning) as refusal:
        Claims(kind).take("/held")
    assert refusal.value.pid == holder.pid
    assert str(refusal.value) == f"/held is already managed by process {holder.pid}"


@asynchronous
async def test_a_claim_is_free_again_after_its_holder_was_killed(
    kind: str, holder: subprocess.Popen[bytes]
) -> None:
    holder.kill()
    holder.wait()
    Claims(kind).take("/held")


@asynchronous
async def test_a_claim_is_free_again_after_it_was_given_back(kind: str) -> None:
    for _ in range(2):
        claims = Claims(kind)
        claims.take("/a")
        claims.take("/b")
        claims.close()


@asynchronous
async def test_claims_on_other_names_or_of_another_kind_do_not_meet(kind: str) -> None:
    Claims(kind).take("/a")
    Claims(kind).take("/b")
    Claims(kind + "-other").take("/a")


@asynchronous
async def test_one_process_cannot_claim_twice_either(kind: str) -> None:
    claims = Claims(kind)
    claims.take("/a")
    with pytest.raises(AlreadyRunning) as refusal:
        Claims(kind).take("/a")
    assert refusal.value.pid == os.getpid()
    claims.close()


@asynchronous
async def test_long_names_that_begin_alike_do_not_meet(kind: str) -> None:
    claims = Claims(kind)
    claims.take(f"/{'a' * 100}/1.scope")
    claims.take(f"/{'a' * 100}/2.scope")
    claims.close()


@asynchronous
async def test_a_name_that_is_not_utf8_can_be_claimed(kind: str) -> None:
    Claims(kind).take(os.fsdecode(b"/\xff.scope"))


@asynchronous
async def test_the_thousandth_refusal_is_like_the_first(
    kind: str, holder: subprocess.Popen[bytes]
) -> None:
    for _ in range(1000):
        with pytest.raises(AlreadyRunning):
            Claims(kind).take("/held")
    os.kill(holder.pid, 0)


@asynchronous
async def test_a_holder_that_does_not_answer_keeps_nobody_from_starting_and_is_told_of(
    kind: str, holder: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    holder.send_signal(signal.SIGSTOP)  # as if it were anybody's, who fills his own queue
    address = Claims(kind)._address("/held")
    with ExitStack() as callers:
        with suppress(BlockingIOError):
            while True:
                caller = callers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                caller.setblocking(False)
                caller.connect(address)
        Claims(kind).take("/held")
    (line,) = caplog.messages
    assert line.startswith("/held is claimed by process (unknown) ")
