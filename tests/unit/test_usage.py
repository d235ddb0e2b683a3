"""Reading the kernel's statistics files, and the arithmetic that keeps sums of ``own`` right."""

import os
import re
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, astuple, replace

from spawn_reaper.usage import (
    NO_COUNTERS,
    NO_PEAKS,
    PRESSURE_FILES,
    STATISTICS_FILES,
    TIME_COUNTERS,
    Counters,
    Peaks,
    Pressure,
    Usage,
    add,
    file_of,
    local_counters,
    parse_pressure,
    parse_usage,
    read_descriptor,
    read_file,
    subtract,
)

DATA: Final = Path(__file__).resolve().parents[1] / "data"
CAPTURED: Final = [
    pytest.param(DATA / f"kernel-{kernel}" / state, id=f"{kernel}-{state}")
    for kernel in ("6.1", "6.12", "6.18")
    for state in ("job", "fresh", "busy")
]
COUNTERS: Final = Counters.__struct_fields__
ALL_FIELDS: Final = (*COUNTERS, *Peaks.__struct_fields__)

# Which number each field is, as a person would search for it in the files.
PATTERNS: Final = {
    "cpu_total": ("cpu.stat", r"^usage_usec (\d+)$"),
    "cpu_user": ("cpu.stat", r"^user_usec (\d+)$"),
    "cpu_system": ("cpu.stat", r"^system_usec (\d+)$"),
    "cpu_throttled": ("cpu.stat", r"^throttled_usec (\d+)$"),
    "cpu_throttled_periods": ("cpu.stat", r"^nr_throttled (\d+)$"),
    "memory_events_high": ("memory.events", r"^high (\d+)$"),
    "memory_events_max": ("memory.events", r"^max (\d+)$"),
    "memory_events_oom": ("memory.events", r"^oom (\d+)$"),
    "memory_events_oom_kill": ("memory.events", r"^oom_kill (\d+)$"),
    "pids_forks": ("pids.forks", r"^(\d+)$"),
    "pids_events_max": ("pids.events", r"^max (\d+)$"),
    "io_read_bytes": ("io.stat", r" rbytes=(\d+)\b"),
    "io_write_bytes": ("io.stat", r" wbytes=(\d+)\b"),
    "io_read_operations": ("io.stat", r" rios=(\d+)\b"),
    "io_write_operations": ("io.stat", r" wios=(\d+)\b"),
    "memory_peak": ("memory.peak", r"^(\d+)$"),
    "memory_swap_peak": ("memory.swap.peak", r"^(\d+)$"),
    "pids_peak": ("pids.peak", r"^(\d+)$"),
}


def parse(**files: bytes) -> tuple[Usage, list[str]]:
    """Parse files named like cpu_stat; return the usage and the complaints."""
    contents = [(name.replace("_", ".").encode(), data) for name, data in files.items()]
    usage, malformed = parse_usage(contents)
    return usage, [str(problem) for problem in malformed]


def captured(directory: Path) -> list[tuple[bytes, bytes]]:
    """Return name and contents of the statistics files that a kernel gave."""
    names = sorted(name.decode() for name in STATISTICS_FILES)
    return [(n.encode(), (directory / n).read_bytes()) for n in names if (directory / n).exists()]


def searched(directory: Path, field: str) -> int | None:
    name, pattern = PATTERNS[field]
    file = directory / name
    text = file.read_text() if file.exists() else ""
    numbers = [int(number) for number in re.findall(pattern, text, re.MULTILINE)]
    return sum(numbers) if numbers or (name == "io.stat" and file.exists()) else None


def known(usage: Usage) -> dict[str, int]:
    """Return the fields that have a number."""
    fields = asdict(usage.counters) | asdict(usage.peaks)
    return {name: value for name, value in fields.items() if value is not None}


# What real kernels give


@pytest.mark.parametrize("directory", CAPTURED)
def test_every_number_of_a_real_kernel_is_found(directory: Path) -> None:
    usage, malformed = parse_usage(captured(directory))
    assert malformed == []
    assert asdict(usage.counters) | asdict(usage.peaks) == {
        field: searched(directory, field) for field in ALL_FIELDS
    }


def test_a_job_on_6_1_is_read_to_the_last_number() -> None:
    usage, _ = parse_usage(captured(DATA / "kernel-6.1" / "job"))
    counters = Counters(
        cpu_total=1926584,
        cpu_user=292280,
        cpu_system=1634303,
        cpu_throttled=2920505,
        cpu_throttled_periods=38,
        memory_events_high=52,
        memory_events_max=71,
        memory_events_oom=1,
        memory_events_oom_kill=1,
        pids_events_max=2,
        io_read_bytes=4194304 + 16531456,
        io_write_bytes=2097152 + 28049408,
        io_read_operations=64 + 4036,
        io_write_operations=33 + 6848,
    )
    assert usage == Usage(counters, Peaks(memory_peak=20971520, pids_peak=3))


def test_a_job_on_6_12_has_a_peak_of_swap() -> None:
    usage, _ = parse_usage(captured(DATA / "kernel-6.12" / "job"))
    assert usage.peaks == Peaks(memory_peak=20971520, memory_swap_peak=16826368, pids_peak=3)


def test_a_job_on_6_18_without_controllers_has_cpu_time_only() -> None:
    usage, _ = parse_usage(captured(DATA / "kernel-6.18" / "job"))
    counters = Counters(cpu_total=1047558, cpu_user=36407, cpu_system=1011151)
    assert usage == Usage(counters, NO_PEAKS)


@pytest.mark.parametrize("directory", CAPTURED)
def test_only_a_fresh_cgroup_shows_no_use(directory: Path) -> None:
    usage, _ = parse_usage(captured(directory))
    assert usage.shows_use() == (directory.name != "fresh")


@pytest.mark.parametrize(
    "usage",
    [
        Usage(Counters(cpu_total=1), NO_PEAKS),
        Usage(NO_COUNTERS, Peaks(memory_peak=4096)),
        Usage(Counters(cpu_total=0), Peaks(memory_peak=0, pids_peak=1)),
    ],
)
def test_one_number_above_zero_is_evidence_of_use(usage: Usage) -> None:
    assert usage.shows_use()


def test_no_numbers_are_no_evidence_of_use() -> None:
    assert not Usage(NO_COUNTERS, NO_PEAKS).shows_use()


@pytest.mark.parametrize("directory", CAPTURED)
@pytest.mark.parametrize("name", [name.decode() for name in PRESSURE_FILES])
def test_the_totals_of_a_real_pressure_file_are_found(directory: Path, name: str) -> None:
    data = (directory / name).read_bytes()
    some, full = (int(total) for total in re.findall(rb"total=(\d+)", data))
    assert parse_pressure(data) == Pressure(some=some, full=full)


# Files that are missing or make no sense


def test_no_files_give_no_numbers_and_no_complaint() -> None:
    assert parse_usage([]) == (Usage(NO_COUNTERS, NO_PEAKS), [])


def test_forks_are_read_where_a_kernel_counts_them() -> None:
    assert parse(pids_forks=b"17\n") == (Usage(Counters(pids_forks=17), NO_PEAKS), [])


@pytest.mark.parametrize("name", sorted(STATISTICS_FILES - {b"io.stat"}))
def test_an_empty_file_is_malformed(name: bytes) -> None:
    usage, malformed = parse_usage([(name, b"")])
    assert known(usage) == {}
    assert len(malformed) == 1


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (b"cpu.stat", b"usage_usec 5\nuser_usec\n"),
        (b"cpu.stat", b"usage_usec -5\n"),
        (b"cpu.stat", b"usage_usec 1_000\n"),
        (b"cpu.stat", b"usage_usec 1.5\n"),
        (b"cpu.stat", b"usage_usec\0 5\n\0"),
        (b"memory.events", b"high x\n"),
        (b"memory.peak", b"max\n"),
        (b"memory.peak", b"1 2\n"),
        (b"memory.swap.peak", b"+1\n"),
        (b"pids.peak", b"0x10\n"),
        (b"pids.forks", "٣\n".encode()),
        (b"pids.events", b"max max\n"),
        (b"io.stat", b"254:0 rbytes=\n"),
        (b"io.stat", b"254:0 rbytes=1 wbytes=-1\n"),
        (b"io.stat", b"254:0 rbytes=1\n254:16 rbytes=\xff\n"),
    ],
)
def test_a_malformed_file_costs_its_own_numbers_only(name: bytes, data: bytes) -> None:
    files = captured(DATA / "kernel-6.12" / "job")
    expected = known(parse_usage(file for file in files if file[0] != name)[0])
    usage, malformed = parse_usage([*(file for file in files if file[0] != name), (name, data)])
    assert known(usage) == expected
    assert [str(problem).partition(":")[0] for problem in malformed] == [name.decode()]


def test_each_malformed_file_is_named_once() -> None:
    usage, problems = parse(memory_peak=b"?", cpu_stat=b"usage_usec 7\n", pids_peak=b"")
    assert usage == Usage(Counters(cpu_total=7), NO_PEAKS)
    assert [problem.partition(":")[0] for problem in problems] == ["memory.peak", "pids.peak"]


@pytest.mark.parametrize("name", sorted(STATISTICS_FILES))
def test_a_truncated_file_never_gives_more_than_the_whole(name: bytes) -> None:
    whole = (
        (DATA / "kernel-6.12" / "job" / name.decode()).read_bytes()
        if name != b"pids.forks"
        else b"17\n"
    )
    most = known(parse_usage([(name, whole)])[0])
    for length in range(len(whole)):
        found = known(parse_usage([(name, whole[:length])])[0])
        assert all(value <= most[field] for field, value in found.items())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param(b"io.stat", b"garbage\n", id="no device"),
        pytest.param(b"io.stat", b"8:0 rbytes=1 wby", id="cut in a word"),
        pytest.param(b"cpu.stat", b"x\nusage_usec 5\ny\n", id="lines of one word"),
        pytest.param(b"memory.peak", b"18446744073709551616\n", id="more than 64 bits"),
        pytest.param(b"cpu.stat", b"usage_usec %s\n" % (b"9" * 400), id="more than a float"),
    ],
)
def test_contents_no_kernel_writes_are_malformed(name: bytes, data: bytes) -> None:
    usage, malformed = parse_usage([(name, data)])
    assert known(usage) == {}
    assert len(malformed) == 1


def test_a_complaint_speaks_of_the_file() -> None:
    _, (problem,) = parse(cpu_stat=b"usage_usec 5\nuser_usec\n")
    assert "zip" not in problem


# I/O of several devices


def test_io_is_summed_over_all_devices() -> None:
    usage, problems = parse(
        io_stat=b"8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n"
        b"8:16 rbytes=10 wbytes=20 rios=30 wios=40 dbytes=0 dios=0\n"
    )
    assert known(usage) == {
        "io_read_bytes": 11,
        "io_write_bytes": 22,
        "io_read_operations": 33,
        "io_write_operations": 44,
    }
    assert problems == []


def test_a_device_without_fields_adds_nothing() -> None:
    assert parse(io_stat=b"8:0 rbytes=1 wios=4\n8:16 \n") == parse(io_stat=b"8:0 rbytes=1 wios=4\n")


def test_fields_of_other_io_controllers_are_passed_over() -> None:
    usage, problems = parse(io_stat=b"8:0 rbytes=1 cost.usage=27 cost.vrate=1.5\n")
    assert (usage.counters.io_read_bytes, problems) == (1, [])


# Any bytes at all

WORDS: Final = st.sampled_from(
    rb"usage_usec/max/high/some/full/total=/8:0/rbytes=/wios=/-1/12/18446744073709551615".split(
        b"/"
    )
)
BYTES: Final = st.sampled_from([b" ", b"\n", b"\0", b"=", b"\xff"])
ANYTHING: Final = st.binary() | st.lists(WORDS | BYTES).map(b"".join)


@given(st.dictionaries(st.sampled_from(sorted(STATISTICS_FILES)), ANYTHING))
def test_no_bytes_can_break_the_parser(files: dict[bytes, bytes]) -> None:
    usage, malformed = parse_usage(files.items())
    assert all(value >= 0 for value in known(usage).values())
    complained = {str(problem).partition(":")[0].encode() for problem in malformed}
    assert len(complained) == len(malformed)
    assert not complained & {file_of(field) for field in known(usage)}


@given(ANYTHING)
def test_no_bytes_can_break_the_pressure_parser(data: bytes) -> None:
    assert all(total is None or total >= 0 for total in astuple(parse_pressure(data)))


NUMBERS: Final = st.integers(0, 2**64 - 1)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(PATTERNS, NUMBERS)))
def test_what_a_kernel_writes_is_what_is_read(numbers: dict[str, int]) -> None:
    numbers = {name: number for name, number in numbers.items() if not name.startswith("io_")}
    files: dict[bytes, bytes] = {}
    for name, number in numbers.items():
        file, pattern = PATTERNS[name]
        line = pattern.strip("^$").replace(r"(\d+)", str(number))
        files[file.encode()] = files.get(file.encode(), b"unknown 1\n" * (" " in line)) + (
            f"{line}\n".encode()
        )
    usage, malformed = parse_usage(files.items())
    assert (known(usage), malformed) == (numbers, [])


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)))
def test_what_a_kernel_writes_of_devices_is_what_is_summed(
    devices: list[tuple[int, int, int, int]],
) -> None:
    lines = [
        b"8:%d rbytes=%d wbytes=%d rios=%d wios=%d dbytes=0 dios=0\n" % (minor, *numbers)
        for minor, numbers in enumerate(devices)
    ]
    usage, problems = parse(io_stat=b"".join(lines))
    assert problems == []
    assert astuple(usage.counters)[-4:] == tuple(
        sum(numbers[column] for numbers in devices) for column in range(4)
    )


@given(NUMBERS, NUMBERS)
def test_what_a_kernel_writes_of_pressure_is_what_is_read(some: int, full: int) -> None:
    averages = b"avg10=0.12 avg60=3.40 avg300=99.00"
    data = b"some %s total=%d\nfull %s total=%d\n" % (averages, some, averages, full)
    assert parse_pressure(data) == Pressure(some=some, full=full)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Pressure()),
        (b"some avg10=0.00 avg60=0.00 avg300=0.00 total=7\n", Pressure(some=7)),
        (b"full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n", Pressure(full=7)),
        (b"some avg10=0.00 total=-1\nfull avg10=0.00 total=2\n", Pressure(full=2)),
        (b"some avg10=0.00 total=\n", Pressure()),
        (b"most avg10=0.00 total=7\n", Pressure()),
    ],
)
def test_a_pressure_line_that_is_missing_or_malformed_has_no_total(
    data: bytes, expected: Pressure
) -> None:
    assert parse_pressure(data) == expected


def test_an_endless_pressure_is_no_pressure() -> None:
    assert parse_pressure(b"some avg10=0.00 total=%s\n" % (b"9" * 5000)) == Pressure()


# Names


@pytest.mark.parametrize("field", ALL_FIELDS)
def test_every_field_names_the_file_it_comes_from(field: str) -> None:
    assert file_of(field) == PATTERNS[field][0].encode()


def test_other_names_come_from_no_file() -> None:
    assert file_of("path") is None


def test_the_counters_that_are_times_are_named() -> None:
    assert TIME_COUNTERS == ("cpu_total", "cpu_user", "cpu_system", "cpu_throttled")


# Arithmetic

AMOUNTS: Final = st.integers(0, 2**63)


def counters(values: Iterable[int | None]) -> Counters:
    return Counters(*values)


def total(parts: Iterable[Counters]) -> Counters:
    return reduce(add, parts, NO_COUNTERS)


MAYBE: Final = st.tuples(*[st.none() | AMOUNTS] * len(COUNTERS)).map(counters)
FULL: Final = st.tuples(*[AMOUNTS] * len(COUNTERS)).map(counters)


@given(st.lists(FULL, min_size=1), st.sets(st.sampled_from(COUNTERS)))
def test_the_sum_of_own_is_what_the_kernel_said_last(
    growth: list[Counters], missing: set[str]
) -> None:
    value = accounted = NO_COUNTERS
    owns = []
    for step in growth:
        value = counters(
            None if name in missing else (before or 0) + more
            for name, before, more in zip(COUNTERS, astuple(value), astuple(step), strict=True)
        )
        owns.append(subtract(value, accounted))
        accounted = add(accounted, owns[-1])
    assert total(owns) == accounted
    assert without_split(accounted) == without_split(value)


def without_split(value: Counters) -> Counters:
    """Leave out what the kernel only estimates: which part of CPU time was user and system."""
    return replace(value, cpu_user=None, cpu_system=None)


@given(st.lists(st.tuples(AMOUNTS, AMOUNTS), min_size=1))
def test_user_and_system_time_add_up_to_the_total_however_the_kernel_splits_it(
    readings: list[tuple[int, int]],
) -> None:
    accounted = NO_COUNTERS
    cpu = 0
    for more, user in readings:
        cpu += more
        user = min(user, cpu)
        value = Counters(cpu_total=cpu, cpu_user=user, cpu_system=cpu - user)
        own = subtract(value, accounted)
        accounted = add(accounted, own)
        assert own.cpu_total == (own.cpu_user or 0) + (own.cpu_system or 0)
    assert accounted.cpu_total == cpu == (accounted.cpu_user or 0) + (accounted.cpu_system or 0)


@given(st.lists(MAYBE, min_size=1))
def test_own_is_never_negative_even_if_a_counter_falls(values: list[Counters]) -> None:
    accounted = NO_COUNTERS
    owns = []
    for value in values:
        owns.append(subtract(value, accounted))
        accounted = add(accounted, owns[-1])
    assert all(number is None or number >= 0 for own in owns for number in astuple(own))
    columns = zip(*map(astuple, values), strict=True)
    highest = [[number for number in column if number is not None] for column in columns]
    expected = counters(max(numbers) if numbers else None for numbers in highest)
    assert without_split(total(owns)) == without_split(expected)


LOCAL: Final = local_counters((), pids_events_local=False)


@given(st.lists(st.tuples(st.booleans(), FULL, st.booleans())))
def test_nothing_is_counted_for_a_child_and_again_for_its_parent(
    steps: list[tuple[bool, Counters, bool]],
) -> None:
    used = {"parent": counters([0] * len(COUNTERS)), "child": counters([0] * len(COUNTERS))}
    accounted = {"parent": NO_COUNTERS, "child": NO_COUNTERS}
    owns: list[Counters] = []

    def record(cgroup: str) -> None:
        value = used[cgroup]
        if cgroup == "parent":  # the kernel shows local counters of the parent alone
            value = add(value, used["child"], without=LOCAL)
        own = subtract(value, accounted[cgroup])
        accounted[cgroup] = add(accounted[cgroup], own)
        if cgroup == "child":
            accounted["parent"] = add(accounted["parent"], own, without=LOCAL)
        owns.append(own)

    for in_child, amount, recorded in steps:
        cgroup = "child" if in_child else "parent"
        used[cgroup] = add(used[cgroup], amount)
        if recorded:
            record("child")  # children before parents, as the reaper does
            if not in_child:
                record("parent")
    record("child")
    record("parent")
    assert without_split(total(owns)) == without_split(total(used.values()))


@given(MAYBE)
def test_without_a_baseline_everything_is_own(value: Counters) -> None:
    assert subtract(value, NO_COUNTERS) == value


@given(MAYBE)
def test_nothing_is_own_twice(value: Counters) -> None:
    assert not any(astuple(subtract(value, value)))


@given(MAYBE, MAYBE)
def test_what_the_kernel_lacks_stays_unknown(left: Counters, right: Counters) -> None:
    for name in COUNTERS:
        a, b = getattr(left, name), getattr(right, name)
        assert (getattr(subtract(left, right), name) is None) == (a is None)
        assert (getattr(add(left, right), name) is None) == (a is None and b is None)


@given(MAYBE, MAYBE, st.frozensets(st.sampled_from(COUNTERS)))
def test_a_counter_left_out_of_a_sum_stays_as_it_was(
    left: Counters, right: Counters, without: frozenset[str]
) -> None:
    result = add(left, right, without)
    assert all(getattr(result, name) == getattr(left, name) for name in without)


def test_a_counter_left_out_of_the_first_sum_stays_unknown() -> None:
    right = Counters(cpu_total=5, cpu_throttled=7)
    assert add(NO_COUNTERS, right, frozenset({"cpu_throttled"})) == Counters(cpu_total=5)


# Which counters leave out the children

THROTTLING: Final = {"cpu_throttled", "cpu_throttled_periods"}
MEMORY: Final = {name for name in COUNTERS if name.startswith("memory_events_")}


@pytest.mark.parametrize(
    ("options", "events_local", "expected"),
    [
        ([b"rw"], True, THROTTLING),
        ([b"rw"], False, THROTTLING | {"pids_events_max"}),
        ([b"rw", b"pids_localevents"], True, THROTTLING | {"pids_events_max"}),
        ([b"rw", b"memory_localevents"], True, THROTTLING | MEMORY),
        (
            [b"memory_localevents", b"pids_localevents"],
            True,
            THROTTLING | MEMORY | {"pids_events_max"},
        ),
        ([b"nsdelegate", b"memory_recursiveprot"], True, THROTTLING),
    ],
)
def test_mount_options_and_kernel_tell_which_counters_are_local(
    options: list[bytes], events_local: bool, expected: set[str]
) -> None:
    assert local_counters(options, pids_events_local=events_local) == expected


# Reading


def test_a_file_longer_than_one_read_is_read_to_its_end(tmp_path: Path) -> None:
    data = b"".join(b"8:%d rbytes=1\n" % minor for minor in range(1000))
    (tmp_path / "io.stat").write_bytes(data)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert read_file(directory, b"io.stat") == data
    finally:
        os.close(directory)


def test_a_file_that_is_exactly_one_read_long_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 4096)
    with (tmp_path / "file").open("rb") as file:
        assert read_descriptor(file.fileno()) == b"x" * 4096


def test_an_open_file_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_bytes(b"usage_usec 1\n")
    with (tmp_path / "cpu.stat").open("rb") as file:
        assert read_descriptor(file.fileno()) == b"usage_usec 1\n"
        (tmp_path / "cpu.stat").write_bytes(b"usage_usec 20\n")
        assert read_descriptor(file.fileno()) == b"usage_usec 20\n"


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileNotFoundError):
            read_file(directory, b"pids.forks")
    finally:
        os.close(directory)
