"""When names end: each exactly this long after it was last started, and in this order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_accessory.expiry import Expiry
from tests.tools.clock import FakeClock


class Ended:
    """What ended, with the time since the beginning."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.clock = FakeClock()
        self._began = self.clock.now
        self.names: list[tuple[bytes, float]] = []
        self.expiry = Expiry(seconds, self.clock, self._end)

    def _end(self, name: bytes) -> None:
        self.names.append((name, self.clock.now - self._began))


@pytest.fixture
def ended() -> Ended:
    return Ended()


def test_a_name_ends_at_its_time_and_once(ended: Ended) -> None:
    ended.expiry.start(b"a")
    ended.clock.advance(59.75)
    assert ended.names == []
    ended.clock.advance(1000)
    assert ended.names == [(b"a", 60.0)]


def test_names_end_in_the_order_in_which_they_were_started(ended: Ended) -> None:
    for name in (b"c", b"a", b"b"):
        ended.expiry.start(name)
        ended.clock.advance(1)
    ended.expiry.start(b"d")
    ended.clock.advance(1000)
    assert ended.names == [(b"c", 60.0), (b"a", 61.0), (b"b", 62.0), (b"d", 63.0)]


def test_names_that_are_started_at_once_end_at_once(ended: Ended) -> None:
    for name in (b"c", b"a", b"b"):
        ended.expiry.start(name)
    ended.clock.advance(60)
    assert ended.names == [(b"c", 60.0), (b"a", 60.0), (b"b", 60.0)]


def test_a_second_start_begins_to_count_anew(ended: Ended) -> None:
    ended.expiry.start(b"a")
    ended.clock.advance(59)
    ended.expiry.start(b"b")
    ended.expiry.start(b"a")
    ended.clock.advance(1000)
    assert ended.names == [(b"b", 119.0), (b"a", 119.0)]


def test_a_name_that_was_stopped_lives(ended: Ended) -> None:
    ended.expiry.start(b"a")
    ended.expiry.start(b"b")
    ended.clock.advance(59.75)
    ended.expiry.stop(b"a")
    ended.clock.advance(1000)
    assert ended.names == [(b"b", 60.0)]
    ended.expiry.start(b"a")
    ended.clock.advance(1000)
    assert ended.names == [(b"b", 60.0), (b"a", 1119.75)]


def test_what_was_never_started_can_be_stopped(ended: Ended) -> None:
    ended.expiry.stop(b"a")
    ended.clock.advance(1000)
    assert ended.names == []


def test_a_name_may_be_started_while_another_one_ends() -> None:
    clock = FakeClock()
    names = []

    def end(name: bytes) -> None:
        names.append(name)
        if len(names) < 3:
            expiry.start(name + b"!")

    expiry = Expiry(60, clock, end)
    expiry.start(b"a")
    clock.advance(59.75)
    assert names == []
    clock.advance(1000)
    assert names == [b"a", b"a!", b"a!!"]


def test_nothing_is_waited_for_when_nothing_is_counted(ended: Ended) -> None:
    assert ended.clock.timers() == []
    ended.expiry.start(b"a")
    ended.clock.advance(60)
    assert ended.clock.timers() == []


def test_thousands_of_names_take_one_timer(ended: Ended) -> None:
    for number in range(5000):
        ended.expiry.start(b"%d" % number)
        ended.expiry.start(b"again")
    assert len(ended.clock.timers()) == 1


def test_after_close_nothing_ends(ended: Ended) -> None:
    ended.expiry.start(b"a")
    ended.expiry.close()
    ended.clock.advance(1000)
    assert ended.names == []


@pytest.mark.parametrize(("seconds", "expected"), [(10, 50.0), (55, 55.0), (100, 100.0)])
def test_another_time_holds_for_what_is_counted_already(
    ended: Ended, seconds: float, expected: float
) -> None:
    ended.expiry.start(b"a")
    ended.clock.advance(50)
    ended.expiry.start(b"b")
    ended.expiry.use(seconds)
    ended.clock.advance(1000)
    assert ended.names == [(b"a", expected), (b"b", 50.0 + seconds)]


def test_another_time_holds_for_what_is_started_later(ended: Ended) -> None:
    ended.expiry.use(10)
    ended.expiry.start(b"a")
    ended.clock.advance(1000)
    assert ended.names == [(b"a", 10.0)]


NAMES = st.sampled_from([b"a", b"b", b"c"])
STEPS = st.one_of(
    st.tuples(st.just("start"), NAMES),
    st.tuples(st.just("stop"), NAMES),
    st.tuples(st.just("advance"), st.integers(0, 15)),
    st.tuples(st.just("use"), st.integers(1, 20)),
)


@given(st.lists(STEPS, max_size=40))
def test_names_end_as_in_a_simple_model(steps: list[tuple[str, bytes | int]]) -> None:
    ended = Ended(10)
    seconds, now = 10, 0
    started: dict[bytes, int] = {}
    expected: list[tuple[bytes, float]] = []

    def catch_up() -> None:
        for name, since in sorted(started.items(), key=lambda one: one[1]):
            if since + seconds <= now:
                expected.append((name, float(now)))
                del started[name]

    for what, value in steps:
        if isinstance(value, bytes):
            started.pop(value, None)
            if what == "start":
                started[value] = now
                ended.expiry.start(value)
            else:
                ended.expiry.stop(value)
        elif what == "use":
            seconds = value
            catch_up()
            ended.expiry.use(value)
        else:
            for _ in range(value):
                now += 1
                catch_up()
            ended.clock.advance(value)
    assert sorted(ended.names) == sorted(expected)
    assert [when for _, when in ended.names] == sorted(when for _, when in expected)
