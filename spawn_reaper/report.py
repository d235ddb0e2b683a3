"""The log line of a release, and how names from outside are shown in messages.

Pure: bytes in, bytes out. The format is that of the C++ suite, since people parse it.
"""

from __future__ import annotations

import functools
import re
import time

from spawn_reaper.release import Release

_PLAIN = re.compile(rb"[!-\[\]-~]+")  # printable ASCII, without space and backslash


_MIB = 1 << 20
_LONGEST = 4096  # characters of a message
_HALF_MIB = _MIB // 2


def printable(name: bytes) -> bytes:
    r"""Return NAME with whatever could break or forge a log line written as ``\xNN``.

    That is control characters, spaces, backslashes and bytes that are not UTF-8.
    """
    if _PLAIN.fullmatch(name):
        return name
    text = name.decode("utf-8", "surrogateescape")
    return "".join(map(_printable_character, text)).encode()


def one_line(message: bytes) -> str:
    """Return a message as text in which no control character is left."""
    text = message.decode("utf-8", "surrogateescape")
    return "".join(c if c == " " or c == "\\" else _printable_character(c) for c in text)


def readable(text: str) -> str:
    """Return a text that came from elsewhere as one line, cut where it is too long to be read."""
    return one_line(text[:_LONGEST].encode(errors="surrogateescape"))


def _printable_character(character: str) -> str:
    if character.isprintable() and character not in " \\":
        return character
    raw = character.encode("utf-8", "surrogateescape")
    return "".join(f"\\x{byte:02x}" for byte in raw)


def release_line(release: Release) -> bytes:
    """Return the log line of RELEASE, newline included; fields only where there are numbers."""
    counters, peaks, age = release.usage.counters, release.usage.peaks, release.age
    line = printable(release.name) + b":"
    if release.born is not None:
        line += b" since=" + _timestamp(int(release.born))
    if counters.cpu_total is not None:
        line += _cpu(counters.cpu_total, counters.cpu_user, counters.cpu_system, age)
    if peaks.memory_peak is not None:
        line += b" memory=%dM" % ((peaks.memory_peak + _HALF_MIB - 1) // _MIB)
    if reclaim := (counters.memory_events_high or 0) + (counters.memory_events_max or 0):
        line += b" reclaim=%d" % reclaim
    if counters.memory_events_oom:
        line += b" oom=%d" % counters.memory_events_oom
    if peaks.pids_peak is not None:
        line += b" procs=%d" % peaks.pids_peak
    if counters.pids_forks is not None:
        line += b" forks=%d" % counters.pids_forks + _rate(counters.pids_forks, age)
    if counters.pids_events_max:
        line += b" procs_rejected=%d" % counters.pids_events_max
    return line + b"\n"


@functools.lru_cache(maxsize=64)
def _timestamp(seconds: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)).encode()


def _cpu(total: int, user: int | None, system: int | None, age: float | None) -> bytes:
    line = b" cpu=%.1fs" % (total / 1e6)
    if user is not None and system is not None:
        line += b"/%.1fs/%.1fs" % (user / 1e6, system / 1e6)
    if age and (percent := int(total / 1e4 / age)):
        line += b"[%d%%]" % percent
    return line


def _rate(count: int, age: float | None) -> bytes:
    """Return how often something happened: per second, below that per minute, or nothing."""
    rate = count / age if age else 0.0
    if rate >= 1:
        return b"[%.0f/s]" % rate
    if rate >= 0.01:
        return b"[%.1f/m]" % (rate * 60)
    return b""
