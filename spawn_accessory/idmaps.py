"""Maps of user and group ids (user_namespaces(7)): reading and checking what a client sent.

Pure. The kernel answers "Invalid argument" to anything that it does not like; here the line is
named. Its rules: at most 340 lines and less than a page; each line an id inside, an id outside and
a length above zero; no range may reach the last id, which means "none", or overlap another one on
its side.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Final

import msgspec

_LINES_MAX: Final = 340  # UID_GID_MAP_MAX_EXTENTS
_BYTES_MAX: Final = 4095
_NO_ID: Final = 0xFFFFFFFF
_LINE: Final = re.compile(rb"[ \t]*(\d{1,10})[ \t]+(\d{1,10})[ \t]+(\d{1,10})[ \t]*")


class BadMap(Exception):
    """The map cannot be used; the message says which line is wrong, and why."""


class Extent(msgspec.Struct, frozen=True):
    """One line of a map: COUNT ids from INSIDE on are those from OUTSIDE on."""

    inside: int
    outside: int
    count: int

    def contains_outside(self, number: int) -> bool:
        """Whether the id NUMBER outside is mapped."""
        return self.outside <= number < self.outside + self.count


def parse_map(text: bytes) -> tuple[Extent, ...]:
    """Return the lines of a map; BadMap if the kernel would refuse it. An empty map has none."""
    if len(text) > _BYTES_MAX:
        raise BadMap(f"{len(text)} bytes are more than {_BYTES_MAX}")
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    if len(lines) > _LINES_MAX:
        raise BadMap(f"{len(lines)} lines are more than {_LINES_MAX}")
    extents = tuple(_parse_line(number, line) for number, line in enumerate(lines, 1))
    _check_overlap("inside", [(extent.inside, extent.count) for extent in extents])
    _check_overlap("outside", [(extent.outside, extent.count) for extent in extents])
    return extents


@lru_cache(64)  # a spawner's customers mostly have the same
def parse_maps(uid_map: bytes, gid_map: bytes) -> tuple[Extent, ...]:
    """Return the lines of both maps; BadMap also says which of them cannot be used."""
    extents: tuple[Extent, ...] = ()
    for which, text in (("uid_map", uid_map), ("gid_map", gid_map)):
        try:
            extents += parse_map(text)
        except BadMap as error:
            raise BadMap(f"{which}: {error}") from None
    return extents


def _parse_line(number: int, line: bytes) -> Extent:
    found = _LINE.fullmatch(line)
    if found is None:
        raise BadMap(f"line {number}: three numbers expected")
    extent = Extent(*map(int, found.groups()))
    if not extent.count:
        raise BadMap(f"line {number}: the length is zero")
    for side, first in (("inside", extent.inside), ("outside", extent.outside)):
        if first + extent.count > _NO_ID:
            raise BadMap(f"line {number}: the ids {side} go beyond {_NO_ID - 1}")
    return extent


def _check_overlap(side: str, ranges: list[tuple[int, int]]) -> None:
    """Raise BadMap if two ranges, as (first, count), share an id."""
    numbered = sorted((first, count, number) for number, (first, count) in enumerate(ranges, 1))
    for (first, count, one), (following, _, other) in pairwise(numbered):
        if following < first + count:
            raise BadMap(f"line {max(one, other)}: the ids {side} overlap line {min(one, other)}")
