"""Text forms of values, as PostgreSQL reads and writes them. Pure: bytes in, bytes out."""

from __future__ import annotations

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


def split_array(text: bytes) -> Iterator[bytes]:
    """Yield the elements of an array's text form (PostgreSQL manual, 8.15.6)."""
    if len(text) < 2 or not (text.startswith(b"{") and text.endswith(b"}")):
        raise NotAnArray("not enclosed in braces")
    position, end = 1, len(text) - 1
    while position < end or text[position - 1 : position] == b",":
        if text[position : position + 1] == b'"':
            element, position = _quoted_element(text, position + 1, end)
        else:
            element, position = _plain_element(text, position, end)
        yield element
        if position < end and text[position : position + 1] != b",":
            raise NotAnArray("text after a quoted element")
        position += 1


def _quoted_element(text: bytes, position: int, end: int) -> tuple[bytes, int]:
    """Return the element, and the position after its closing quote."""
    element = bytearray()
    while position < end:
        if text[position] == ord('"'):
            return bytes(element), position + 1
        if text[position] == ord("\\"):
            position += 1
        if position < end:
            element.append(text[position])
        position += 1
    raise NotAnArray("a quote is not closed")


def _plain_element(text: bytes, position: int, end: int) -> tuple[bytes, int]:
    """Return the element, and the position after it."""
    comma = text.find(b",", position, end)
    stop = end if comma < 0 else comma
    element = text[position:stop]
    if any(character in element for character in (b"{", b"}", b'"')):
        raise NotAnArray("more than one dimension, or a quote in the middle")
    return element, stop
