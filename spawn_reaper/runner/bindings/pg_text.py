"""Text forms of values, as PostgreSQL reads and writes them. Pure: bytes in, bytes out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any


class NotAnArray(Exception):
    """The text is not that of a one-dimensional array."""


def text_of(value: Any) -> bytes | None:
    """Return the text of a Lua value: string, number or boolean; None for anything else."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"1" if value else b"0"
    if isinstance(value, int):
        return b"%d" % value
    if isinstance(value, float):
        return b"%d" % int(value) if value.is_integer() else repr(value).encode()
    return None


def join_array(elements: Iterable[bytes]) -> bytes:
    """Return the text of an array; every element is quoted."""
    quoted = (element.replace(b"\\", rb"\\").replace(b'"', rb"\"") for element in elements)
    return b"{" + b",".join(b'"' + element + b'"' for element in quoted) + b"}"


# Anything may be escaped; outside of quotes, what has a meaning must be (PostgreSQL manual, 8.15).
_ELEMENT = re.compile(rb'"((?:[^"\\]|\\.)*)"|((?:[^",{}\\]|\\.)*)', re.DOTALL)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)


def split_array(text: bytes) -> Iterator[bytes]:
    """Yield the elements of an array's text; NotAnArray says why that cannot be done."""
    end = len(text) - 1
    if end < 1 or not (text.startswith(b"{") and text.endswith(b"}")):
        raise NotAnArray("not enclosed in braces")
    position = 1
    while end > 1:
        found = _ELEMENT.match(text, position, end)
        assert found is not None  # even if there is nothing, nothing is an element
        if found.end() < end and text[found.end()] != ord(","):
            raise NotAnArray(f"unexpected character at position {found.end() + 1}")
        yield _ESCAPED.sub(rb"\1", found[1] if found[1] is not None else found[2])
        if found.end() == end:
            return
        position = found.end() + 1
