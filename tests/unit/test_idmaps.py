"""Maps of ids: what is accepted, what is refused, and why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_accessory.idmaps import BadMap, Extent, parse_map

GOOD = {
    b"": (),
    b"0 1000 1": (Extent(0, 1000, 1),),
    b"0 1000 1\n": (Extent(0, 1000, 1),),
    b" 0\t 1000  1 \n1 100000 65536\n": (Extent(0, 1000, 1), Extent(1, 100000, 65536)),
    b"0 0 4294967295": (Extent(0, 0, 4294967295),),
    b"4294967294 0 1": (Extent(4294967294, 0, 1),),
    b"10 20 5\n0 25 10\n15 0 5": (Extent(10, 20, 5), Extent(0, 25, 10), Extent(15, 0, 5)),
}

BAD = {
    b"\n": "line 1: three numbers expected",
    b"0 0": "line 1: three numbers expected",
    b"0 0 1 1": "line 1: three numbers expected",
    b"0 0 1\n\n1 1 1": "line 2: three numbers expected",
    b"0 0 one": "line 1: three numbers expected",
    b"-1 0 1": "line 1: three numbers expected",
    b"0x0 0 1": "line 1: three numbers expected",
    b"0 0 1\0": "line 1: three numbers expected",
    b"0 0 99999999999": "line 1: three numbers expected",
    b"0 0 0": "line 1: the length is zero",
    b"0 0 4294967296": "line 1: the ids inside go beyond 4294967294",
    b"4294967295 0 1": "line 1: the ids inside go beyond 4294967294",
    b"0 4294967290 6": "line 1: the ids outside go beyond 4294967294",
    b"0 0 10\n5 100 1": "line 2: the ids inside overlap line 1",
    b"0 0 10\n10 9 1": "line 2: the ids outside overlap line 1",
    b"5 100 1\n100 200 1\n0 0 10": "line 3: the ids inside overlap line 1",
    b"1 1 1\n" * 341: "341 lines are more than 340",
    b"1000000000 1000000000 1000000000\n" * 128: "4224 bytes are more than 4095",
}


@pytest.mark.parametrize("text", GOOD)
def test_maps_are_read(text: bytes) -> None:
    assert parse_map(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_used_is_named_by_its_line(text: bytes) -> None:
    with pytest.raises(BadMap) as caught:
        parse_map(text)
    assert str(caught.value) == BAD[text]


def test_an_id_outside_is_found() -> None:
    extent = Extent(0, 1000, 10)
    assert [extent.contains_outside(number) for number in (999, 1000, 1009, 1010)] == [
        False, True, True, False,
    ]  # fmt: skip


@given(st.lists(st.tuples(*[st.integers(0, 30)] * 3), max_size=6))
def test_ranges_that_share_an_id_are_refused_and_no_others(lines: list[tuple[int, ...]]) -> None:
    text = b"".join(b"%d %d %d\n" % line for line in lines)
    inside = [first + i for first, _, count in lines for i in range(count)]
    outside = [first + i for _, first, count in lines for i in range(count)]
    fine = len(set(inside)) == len(inside) and len(set(outside)) == len(outside)
    if fine and all(count for _, _, count in lines):
        assert parse_map(text) == tuple(Extent(*line) for line in lines)
    else:
        with pytest.raises(BadMap):
            parse_map(text)
