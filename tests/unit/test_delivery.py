"""Which releases a runner gets, in which order, and what becomes of them when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from spawn_reaper import delivery as module
from spawn_reaper.delivery import Delivery, Line
from spawn_reaper.page import IDLE, OURS
from spawn_reaper.wire import Ack, Numbered
from tests.tools.scripts import release


class Runner:
    """Somebody who handles releases when the test says so."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self.got: list[Numbered] = []
        self.messages: list[int] = []  # how many there were in each
        self.begun = 0
        self.line: Line
        self.line = delivery.connect(self._run, "s.lua:1")

    def _run(self, releases: list[Numbered]) -> None:
        self.got += releases
        self.messages.append(len(releases))

    @property
    def numbers(self) -> list[int]:
        """The numbers that it got, in order."""
        return [each.number for each in self.got]

    def begin(self, count: int, *done: int, failed: tuple[str, ...] = ()) -> None:
        """Say that COUNT more were begun, and those DONE that are done."""
        self.begun += count
        self._delivery.acknowledge(self.line, Ack(self.begun, list(done), list(failed)))

    def handle_all(self) -> None:
        """Handle what there is, and what comes of that."""
        while len(self.got) > self.begun:
            new = self.numbers[self.begun :]
            self.begin(len(new), *new)

    def end(self, *, begun: int | None = None, in_hand: int = IDLE) -> None:
        """Be gone; BEGUN is what its page says."""
        self._delivery.lost(self.line, self.begun if begun is None else begun, in_hand)


class Waiting(list[str]):
    """Who wants to know that releases were begun."""

    def __call__(self, name: str) -> Callable[[], None]:
        """Return what takes note of it under NAME."""
        return lambda: self.append(name)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run an asynchronous test."""

    async def main() -> None:
        async with asyncio.timeout(10):
            await test()

    asyncio.run(main())


def hand_over(delivery: Delivery, count: int, begun: Callable[[], None] = lambda: None) -> None:
    """Hand over so many releases at once."""
    delivery.hand_over([release(f"job-{number}") for number in range(count)], begun)


def test_releases_keep_their_order_and_a_runner_gets_only_so_many_at_a_time() -> None:
    async def test() -> None:
        delivery = Delivery(10_000)
        runner = Runner(delivery)
        for _ in range(10):
            hand_over(delivery, 50)
        assert len(runner.got) <= 192
        runner.handle_all()
        assert runner.numbers == list(range(1, 501))
        assert max(runner.messages) <= 64
        assert len(delivery) == 0

    run(test)


def test_whoever_waits_is_told_when_the_last_was_begun() -> None:
    async def test() -> None:
        delivery, told = Delivery(100), Waiting()
        runner = Runner(delivery)
        hand_over(delivery, 2, told("first"))
        hand_over(delivery, 1, told("second"))
        runner.begin(1)
        assert told == []
        runner.begin(1)
        assert told == ["first"]
        runner.begin(1)
        assert told == ["first", "second"]
        assert len(delivery) == 3  # begun is not done

    run(test)


def test_nobody_waits_while_there_is_no_runner() -> None:
    async def test() -> None:
        delivery, told = Delivery(100), Waiting()
        runner = Runner(delivery)
        hand_over(delivery, 1, told("waits"))
        assert told == []
        runner.end()
        assert told == ["waits"]
        hand_over(delivery, 1, told("does not"))
        assert told == ["waits", "does not"]
        assert Runner(delivery).numbers == [1, 2]

    run(test)


def test_nobody_waits_for_longer_than_a_second_nor_then_for_what_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.05)

    async def test() -> None:
        delivery, told = Delivery(100), Waiting()
        runner = Runner(delivery)
        hand_over(delivery, 1, told("first"))
        hand_over(delivery, 1, told("second"))
        assert told == []
        while not told:
            await asyncio.sleep(0.005)
        assert told == ["first", "second"]
        hand_over(delivery, 1, told("third"))
        assert told[2:] == ["third"]
        runner.begin(2)
        hand_over(delivery, 1, told("fourth"))  # the third was not begun yet
        assert told[3:] == ["fourth"]
        runner.begin(2)
        hand_over(delivery, 1, told("fifth"))
        assert told[4:] == []

    run(test)


def test_who_can_wait_no_longer_does_not_until_all_is_begun() -> None:
    async def test() -> None:
        delivery, told = Delivery(100), Waiting()
        runner = Runner(delivery)
        hand_over(delivery, 1, told("first"))
        delivery.fall_behind()
        hand_over(delivery, 1, told("second"))
        assert told == ["first", "second"]
        runner.begin(2)
        hand_over(delivery, 1, told("third"))
        assert told == ["first", "second"]

    run(test)


def test_progress_keeps_those_waiting_who_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patience of each begins when he comes."""
    monkeypatch.setattr(module, "_PATIENCE", 0.2)

    async def test() -> None:
        delivery, told = Delivery(1000), Waiting()
        runner = Runner(delivery)
        hand_over(delivery, 1, told("0"))
        for number in range(1, 20):
            await asyncio.sleep(0.02)
            hand_over(delivery, 1, told(str(number)))
            runner.begin(1)
            assert len(told) == number

    run(test)


def test_what_a_runner_did_not_finish_goes_to_the_next_in_order() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        first = Runner(delivery)
        hand_over(delivery, 5)
        first.begin(3, 2)
        first.end()
        hand_over(delivery, 1)
        second = Runner(delivery)
        second.handle_all()
        assert second.numbers == [1, 3, 4, 5, 6]
        assert [each.attempt for each in second.got] == [2, 2, 1, 1, 1]
        assert len(delivery) == 0

    run(test)


def test_what_was_tried_before_is_tried_alone() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        first = Runner(delivery)
        hand_over(delivery, 4)
        first.end(begun=2)
        second = Runner(delivery)
        assert second.numbers == [1]
        second.begin(1)
        assert second.numbers == [1, 2]
        second.begin(1)
        assert second.numbers == [1, 2, 3, 4]

    run(test)


@pytest.mark.parametrize("seen", [True, False], ids=["in hand", "begun and not told"])
def test_a_release_that_ended_two_runners_is_set_aside(
    caplog: pytest.LogCaptureFixture, seen: bool
) -> None:
    async def test() -> None:
        delivery = Delivery(100)
        runner = Runner(delivery)
        hand_over(delivery, 3)
        runner.begin(1, 1)
        runner.end(begun=3 if not seen else 2, in_hand=2 if seen else IDLE)
        for _ in range(2):
            runner = Runner(delivery)
            assert runner.numbers == [2]
            if delivery.set_aside_count == 0:
                runner.end(begun=1, in_hand=2 if seen else OURS)
            if delivery.set_aside_count:
                break
        assert delivery.set_aside_count == 1
        last = Runner(delivery)
        last.handle_all()
        assert last.numbers == [3]
        assert len(delivery) == 0

    run(test)
    (message,) = caplog.messages
    assert message.startswith("/test.scope/job-1: set aside: the script's process ended")


def test_a_release_that_waits_alone_when_five_runners_end_is_set_aside() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        runner = Runner(delivery)
        hand_over(delivery, 1)
        for _ in range(5):
            assert delivery.set_aside_count == 0
            runner.begin(1)
            runner.end()
            runner = Runner(delivery)
        assert delivery.set_aside_count == 1

    run(test)


def test_releases_that_wait_together_are_tried_for_ever() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        runner = Runner(delivery)
        hand_over(delivery, 2)
        for _ in range(20):
            runner.begin(1)
            runner.begin(1)
            runner.end()
            runner = Runner(delivery)
        assert delivery.set_aside_count == 0

    run(test)


def test_a_page_that_lies_about_what_was_begun_changes_nothing() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        runner = Runner(delivery)
        hand_over(delivery, 3)
        runner.end(begun=1 << 63)
        assert Runner(delivery).numbers == [1]

    run(test)


def test_what_a_replaced_runner_has_stays_its_own() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        old = Runner(delivery)
        hand_over(delivery, 3)
        new = Runner(delivery)
        hand_over(delivery, 1)
        assert new.numbers == [4]
        assert delivery.has_some(old.line)
        old.handle_all()
        assert not delivery.has_some(old.line)
        new.handle_all()
        assert len(delivery) == 0

    run(test)


def test_nobody_can_acknowledge_what_another_has() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        old = Runner(delivery)
        hand_over(delivery, 1)
        new = Runner(delivery)
        hand_over(delivery, 1)
        new.begin(1, 1, 2, 3, 1 << 60)
        assert len(delivery) == 1
        old.begin(1 << 60, 1)
        assert len(delivery) == 0

    run(test)


def test_it_is_full_until_a_tenth_is_free_again() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        runner = Runner(delivery)
        hand_over(delivery, 99)
        assert not delivery.full()
        hand_over(delivery, 1)
        assert delivery.full()
        runner.begin(5)
        assert delivery.full()
        runner.begin(6)
        assert not delivery.full()

    run(test)


def test_a_script_that_handles_no_releases_gets_none() -> None:
    async def test() -> None:
        delivery, told = Delivery(100), Waiting()
        hand_over(delivery, 1, told("before"))
        delivery.refuse()
        hand_over(delivery, 1, told("after"))
        assert (told, len(delivery)) == (["before", "after"], 0)

    run(test)


def test_failures_are_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        delivery = Delivery(100)
        runner = Runner(delivery)
        hand_over(delivery, 1)
        runner.begin(1, 1, failed=("/x: a.lua:1: no\n" + "y" * 10_000,))

    run(test)
    (message,) = caplog.messages
    assert message.startswith("/x: a.lua:1: no\\x0ay")
    assert len(message) < 5000


def test_finishing_takes_as_long_as_it_must_and_no_longer_than_it_may() -> None:
    async def test() -> None:
        delivery = Delivery(100)
        runner = Runner(delivery)
        hand_over(delivery, 2)
        assert await delivery.finish(0.01) == 2
        asyncio.get_running_loop().call_later(0.01, runner.handle_all)
        assert await delivery.finish(10) == 0

    run(test)


@pytest.mark.parametrize("seed", range(20))
def test_each_release_is_handled_at_least_once_whenever_runners_end(seed: int) -> None:
    """Twice only if a runner ended in between; in order, as far as none did."""

    async def test() -> None:
        random = Random(seed)
        delivery = Delivery(10_000)
        runner = Runner(delivery)
        handled: dict[int, int] = {}
        handed_over = 0
        while handed_over < 500 or len(delivery):
            if handed_over < 500 and random.random() < 0.5:
                count = random.randrange(1, 100)
                hand_over(delivery, count)
                handed_over += count
            new = runner.numbers[runner.begun :]
            done = new[: random.randrange(len(new) + 1)]
            for number in done:
                handled[number] = handled.get(number, 0) + 1
            if handed_over < 500 and random.random() < 0.2:
                told = random.randrange(len(done) + 1)
                if told:
                    runner.begin(told, *done[:told])
                runner.end(begun=runner.begun + len(done) - told)
                runner = Runner(delivery)
            elif done:
                runner.begin(len(done), *done)
        assert set(handled) == set(range(1, handed_over + 1))

    run(test)
