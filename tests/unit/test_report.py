"""The log line of a release, and that no name from outside can break or forge one."""

import re
import unicodedata
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_reaper.release import Release
from spawn_reaper.report import one_line, printable, release_line
from spawn_reaper.usage import NO_COUNTERS, NO_PEAKS, Counters, Peaks, Usage

MIB: Final = 1 << 20
BORN: Final = 1770984930.75  # 2026-02-13T12:15:30.75Z


def line(
    counters: Counters = NO_COUNTERS,
    peaks: Peaks = NO_PEAKS,
    *,
    name: bytes = b"job",
    born: float | None = None,
    age: float | None = None,
) -> bytes:
    """Return the log line of a release."""
    usage = Usage(counters, peaks)
    path = b"/a.scope/" + name
    return release_line(Release("id", path, name, 0.0, born, age, usage, counters, ()))


# The example of the interface description

EXAMPLE: Final = (
    b"NAME/SESSION: since=2026-02-13T12:15:30Z cpu=1.5s/1.0s/0.5s[12%] memory=34M reclaim=3 "
    b"oom=1 procs=5 forks=17[2/s] procs_rejected=1\n"
)


def test_a_line_is_written_as_users_parse_it() -> None:
    counters = Counters(
        cpu_total=1_452_000,
        cpu_user=1_000_000,
        cpu_system=452_000,
        memory_events_high=1,
        memory_events_max=2,
        memory_events_oom=1,
        pids_forks=17,
        pids_events_max=1,
    )
    peaks = Peaks(memory_peak=34 * MIB, pids_peak=5)
    # The share is cut off and the rate rounded: nothing else gives both figures of the example.
    assert line(counters, peaks, name=b"NAME/SESSION", born=BORN, age=11.3) == EXAMPLE


# Which field is there when


def test_a_line_without_numbers_is_the_name() -> None:
    assert line() == b"job:\n"


@pytest.mark.parametrize(
    ("counters", "expected"),
    [
        (Counters(cpu_total=0), b" cpu=0.0s"),
        (Counters(cpu_total=250_000), b" cpu=0.2s"),
        (Counters(cpu_total=3, cpu_user=2, cpu_system=1), b" cpu=0.0s/0.0s/0.0s"),
        (Counters(cpu_total=3_600_000_000), b" cpu=3600.0s"),
        (Counters(memory_events_high=2), b" reclaim=2"),
        (Counters(memory_events_max=3), b" reclaim=3"),
        (Counters(memory_events_high=2, memory_events_max=3), b" reclaim=5"),
        (Counters(memory_events_high=0, memory_events_max=0), b""),
        (Counters(memory_events_oom=1), b" oom=1"),
        (Counters(memory_events_oom=0), b""),
        (Counters(memory_events_oom_kill=1), b""),
        (Counters(pids_forks=0), b" forks=0"),
        (Counters(pids_forks=9), b" forks=9"),
        (Counters(pids_events_max=1), b" procs_rejected=1"),
        (Counters(pids_events_max=0), b""),
        (Counters(cpu_throttled=5, io_read_bytes=7), b""),
    ],
)
def test_a_counter_is_shown_where_it_says_something(counters: Counters, expected: bytes) -> None:
    assert line(counters) == b"job:" + expected + b"\n"


@pytest.mark.parametrize(
    ("peaks", "expected"),
    [
        (Peaks(memory_peak=0), b" memory=0M"),
        (Peaks(memory_peak=MIB // 2 - 1), b" memory=0M"),
        (Peaks(memory_peak=MIB // 2 + 1), b" memory=1M"),
        (Peaks(memory_peak=33 * MIB + 600_000), b" memory=34M"),
        (Peaks(memory_peak=34 * MIB + 500_000), b" memory=34M"),
        (Peaks(memory_peak=2048 * MIB), b" memory=2048M"),
        (Peaks(memory_swap_peak=MIB), b""),
        (Peaks(pids_peak=0), b" procs=0"),
        (Peaks(pids_peak=5), b" procs=5"),
    ],
)
def test_a_peak_is_shown_where_the_kernel_has_it(peaks: Peaks, expected: bytes) -> None:
    assert line(peaks=peaks) == b"job:" + expected + b"\n"


def test_the_birth_is_shown_in_whole_seconds_of_utc() -> None:
    assert line(born=BORN, age=1.0) == b"job: since=2026-02-13T12:15:30Z\n"


@pytest.mark.parametrize(
    ("seconds", "age", "expected"),
    [
        (1.5, 12.5, b"[12%]"),
        (1.0, 1.0, b"[100%]"),
        (100.0, 25.0, b"[400%]"),
        (0.01, 1.0, b"[1%]"),
        (0.004, 1.0, b""),
        (0.0, 1.0, b""),
        (1.0, 0.0, b""),
        (1.0, None, b""),
    ],
)
def test_the_share_of_a_cpu_is_shown_above_zero(
    seconds: float, age: float | None, expected: bytes
) -> None:
    counters = Counters(cpu_total=int(seconds * 1e6))
    assert line(counters, age=age) == b"job: cpu=%.1fs%s\n" % (seconds, expected)


@pytest.mark.parametrize(
    ("forks", "age", "expected"),
    [
        (17, 8.5, b"[2/s]"),
        (5000, 1.0, b"[5000/s]"),
        (10, 10.0, b"[1/s]"),
        (59, 60.0, b"[59.0/m]"),
        (1, 60.0, b"[1.0/m]"),
        (1, 90.0, b"[0.7/m]"),
        (1, 99.0, b"[0.6/m]"),
        (1, 101.0, b""),
        (0, 60.0, b""),
        (17, 0.0, b""),
        (17, None, b""),
    ],
)
def test_forks_have_a_rate_that_fits_their_number(
    forks: int, age: float | None, expected: bytes
) -> None:
    assert line(Counters(pids_forks=forks), age=age) == b"job: forks=%d%s\n" % (forks, expected)


# Names from outside


def without_escapes(text: str) -> bytes:
    r"""Undo every \xNN."""
    parts = re.split(r"\\x([0-9a-f]{2})", text)
    return b"".join(
        bytes.fromhex(part) if index % 2 else part.encode() for index, part in enumerate(parts)
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"NAME/SESSION", "NAME/SESSION"),
        (b"", ""),
        (b"two words", r"two\x20words"),
        (b"a\nb: cpu=9s", r"a\x0ab:\x20cpu=9s"),
        (b"a\r\t\x1b[31m\x7f\0", r"a\x0d\x09\x1b[31m\x7f\x00"),
        (rb"a\x20b", r"a\x5cx20b"),
        (b"\xff\xfe", r"\xff\xfe"),
        (b"caf\xe9", r"caf\xe9"),
        ("café/日本".encode(), "café/日本"),
        ("🦆".encode(), "🦆"),
        ("\u2028\x85\u202e".encode(), r"\xe2\x80\xa8\xc2\x85\xe2\x80\xae"),
    ],
)
def test_a_name_is_shown_as_it_is_but_for_what_could_harm(name: bytes, shown: str) -> None:
    assert printable(name).decode() == shown


@given(st.binary() | st.text().map(str.encode))
def test_no_two_names_are_shown_alike(name: bytes) -> None:
    assert without_escapes(printable(name).decode()) == name


@given(st.binary() | st.text().map(str.encode))
def test_a_name_brings_no_control_character_and_no_space(name: bytes) -> None:
    shown = printable(name).decode()
    assert not any(unicodedata.category(c)[0] in "CZ" for c in shown)


@given(st.binary() | st.text().map(str.encode))
def test_every_name_makes_exactly_one_line(name: bytes) -> None:
    counters = Counters(cpu_total=1_000_000)
    shown = line(counters, name=name).decode()
    assert shown.splitlines() == [f"{printable(name).decode()}: cpu=1.0s"]
    assert shown.endswith("\n")


# Messages from outside


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (b"attempt to index nil", "attempt to index nil"),
        (b"first\nsecond\tthird", r"first\x0asecond\x09third"),
        (rb"C:\path", r"C:\path"),
        (b"\xff", r"\xff"),
        ("naïve 🦆".encode(), "naïve 🦆"),
    ],
)
def test_a_message_stays_readable_on_one_line(message: bytes, shown: str) -> None:
    assert one_line(message) == shown


@given(st.binary() | st.text().map(str.encode))
def test_every_message_is_one_line_without_control_characters(message: bytes) -> None:
    shown = one_line(message)
    assert not any(unicodedata.category(c)[0] == "C" for c in shown)
    assert len(f"[{shown}]".splitlines()) == 1
