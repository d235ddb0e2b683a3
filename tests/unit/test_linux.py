"""What the kernel says in binary records and in /proc: inotify events, mounts, birth times."""

import errno
import os
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_common import linux
from spawn_common.linux import Mount, parse_inotify_events, parse_mountinfo

DATA: Final = Path(__file__).resolve().parents[1] / "data"

Event = tuple[int, int, bytes]

EVENTS: Final = st.lists(
    st.tuples(
        st.integers(-1, 2**31 - 1),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=255).map(lambda name: name.replace(b"\0", b"").replace(b"/", b"")),
    )
)


def encode(event: Event) -> bytes:
    """Write an event as the kernel does: the name with at least one NUL, in units of 16."""
    watch, mask, name = event
    padded = name + b"\0" * (16 - len(name) % 16) if name else b""
    return struct.pack("=iIII", watch, mask, 0, len(padded)) + padded


# inotify


@given(EVENTS)
def test_every_event_that_the_kernel_writes_is_read(events: list[Event]) -> None:
    assert parse_inotify_events(b"".join(map(encode, events))) == events


@given(EVENTS, st.data())
def test_truncated_events_are_either_whole_or_refused(
    events: list[Event], data: st.DataObject
) -> None:
    records = [encode(event) for event in events]
    whole = b"".join(records)
    length = data.draw(st.integers(0, len(whole)))
    boundaries = [sum(map(len, records[:count])) for count in range(len(records) + 1)]
    if length in boundaries:
        assert parse_inotify_events(whole[:length]) == events[: boundaries.index(length)]
    else:
        with pytest.raises(ValueError, match="truncated"):
            parse_inotify_events(whole[:length])


@given(st.binary())
def test_any_bytes_are_events_or_a_value_error(data: bytes) -> None:
    try:
        events = parse_inotify_events(data)
    except ValueError:
        return
    assert len(events) * 16 <= len(data)


def test_a_length_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="truncated"):
        parse_inotify_events(struct.pack("=iIII", 1, linux.IN_CREATE, 0, 2**32 - 1))


def test_an_overflow_of_the_queue_belongs_to_no_watch() -> None:
    data = struct.pack("=iIII", -1, linux.IN_Q_OVERFLOW, 0, 0)
    assert parse_inotify_events(data) == [(-1, linux.IN_Q_OVERFLOW, b"")]


@pytest.fixture
def inotify() -> Iterator[int]:
    fd = linux.inotify_init()
    yield fd
    os.close(fd)


def test_a_real_directory_tells_what_comes_and_goes(inotify: int, tmp_path: Path) -> None:
    directory = os.fsencode(tmp_path)
    watch = linux.inotify_add_watch(
        inotify, directory, linux.IN_CREATE | linux.IN_DELETE | linux.IN_ONLYDIR
    )
    names = [b"a", b"n" * 15, b"n" * 16, b"n" * 17, b"n" * 255, b"two words\n\xff"]
    for name in names:
        os.mkdir(directory + b"/" + name)
    os.rmdir(directory + b"/a")
    created = [(watch, linux.IN_CREATE | linux.IN_ISDIR, name) for name in names]
    deleted = [(watch, linux.IN_DELETE | linux.IN_ISDIR, b"a")]
    assert parse_inotify_events(os.read(inotify, 65536)) == created + deleted


def test_a_watched_file_tells_of_changes_without_a_name(inotify: int, tmp_path: Path) -> None:
    file = tmp_path / "cgroup.events"
    file.touch()
    watch = linux.inotify_add_watch(inotify, os.fsencode(file), linux.IN_MODIFY)
    file.write_bytes(b"populated 0\n")
    assert parse_inotify_events(os.read(inotify, 4096)) == [(watch, linux.IN_MODIFY, b"")]


def test_an_inotify_descriptor_neither_blocks_nor_is_inherited(inotify: int) -> None:
    assert not os.get_inheritable(inotify)
    with pytest.raises(BlockingIOError):
        os.read(inotify, 4096)


def test_a_removed_watch_is_silent(inotify: int, tmp_path: Path) -> None:
    watch = linux.inotify_add_watch(inotify, os.fsencode(tmp_path), linux.IN_CREATE)
    linux.inotify_rm_watch(inotify, watch)
    (tmp_path / "new").touch()
    in_ignored = 0x8000  # <linux/inotify.h>
    assert parse_inotify_events(os.read(inotify, 4096)) == [(watch, in_ignored, b"")]


def test_a_watch_that_is_gone_may_be_removed_again(inotify: int) -> None:
    linux.inotify_rm_watch(inotify, 1)


def test_removing_a_watch_from_no_descriptor_names_the_call() -> None:
    with pytest.raises(OSError, match="inotify_rm_watch") as failure:
        linux.inotify_rm_watch(-1, 1)
    assert failure.value.errno == errno.EBADF


def test_a_watch_on_nothing_names_the_path(inotify: int, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="inotify_add_watch") as failure:
        linux.inotify_add_watch(inotify, path, linux.IN_CREATE)
    assert failure.value.filename == path


# Birth time


def test_a_new_directory_was_born_now_or_the_file_system_does_not_say(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        (tmp_path / "new").mkdir()
        born = linux.birth_time(fd, b"new")
    finally:
        os.close(fd)
    assert born is None or abs(time.time() - born) < 60


def test_the_birth_of_nothing_names_the_path(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileNotFoundError, match="statx"):
            linux.birth_time(fd, b"absent")
    finally:
        os.close(fd)


# Mounts


@pytest.mark.parametrize(
    ("kernel", "minor", "path"),
    [
        ("6.1", 21, b"/sys/fs/cgroup"),
        ("6.12", 23, b"/sys/fs/cgroup"),
        ("6.18", 38, b"/sys/fs/cgroup/unified"),
    ],
)
def test_the_cgroup2_mount_of_a_real_kernel_is_understood(
    kernel: str, minor: int, path: bytes
) -> None:
    data = (DATA / f"kernel-{kernel}" / "mountinfo.txt").read_bytes()
    assert parse_mountinfo(data) == [
        Mount(os.makedev(0, minor), path, b"cgroup2", frozenset({b"rw"}))
    ]


@pytest.mark.parametrize("optional", [b"", b"shared:9 ", b"shared:9 master:2 propagate_from:1 "])
def test_optional_fields_of_a_mount_are_passed_over(optional: bytes) -> None:
    line = b"30 23 0:26 / /mnt rw,nosuid %s- cgroup2 cgroup rw,nsdelegate,memory_localevents\n"
    options = frozenset({b"rw", b"nsdelegate", b"memory_localevents"})
    assert parse_mountinfo(line % optional) == [
        Mount(os.makedev(0, 26), b"/mnt", b"cgroup2", options)
    ]


def test_escapes_in_the_path_of_a_mount_are_undone() -> None:
    line = rb"30 23 8:1 / /a\040-\040b\011c\012d\134e\377 rw - ext4 /dev/sda1 rw"
    assert parse_mountinfo(line)[0].path == b"/a - b\tc\nd\\e\xff"


def test_a_mount_without_a_source_is_understood() -> None:
    mounts = parse_mountinfo(b"30 23 0:26 / /mnt rw - tmpfs  rw,size=4k\n")
    assert mounts == [Mount(os.makedev(0, 26), b"/mnt", b"tmpfs", frozenset({b"rw", b"size=4k"}))]


def test_mounts_keep_the_order_of_the_kernel() -> None:
    lines = [b"%d 1 0:%d / /m%d rw - tmpfs tmpfs rw\n" % (n, n, n) for n in (30, 7, 12)]
    assert [mount.path for mount in parse_mountinfo(b"".join(lines))] == [b"/m30", b"/m7", b"/m12"]


def test_a_carriage_return_in_a_path_ends_no_line() -> None:
    mounts = parse_mountinfo(b"30 23 0:26 / /a\rb rw - tmpfs tmpfs rw\n")
    assert [mount.path for mount in mounts] == [b"/a\rb"]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"30 23 0:26 / /mnt rw\n",
        b"30 23 0:26 / /mnt rw - cgroup2\n",
        b"30 23 0:26 / /mnt rw - cgroup2 cgroup\n",
        b"30 23 0:26 / /mnt - cgroup2 cgroup rw\n",
        b"30 23 026 / /mnt rw - cgroup2 cgroup rw\n",
        b"30 23 x:26 / /mnt rw - cgroup2 cgroup rw\n",
        b"30 23 0:-6 / /mnt rw - cgroup2 cgroup rw\n",
    ],
)
def test_a_malformed_mount_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="malformed mountinfo line"):
        parse_mountinfo(line)


@given(st.binary())
def test_any_bytes_are_mounts_or_a_value_error(data: bytes) -> None:
    with suppress(ValueError):
        assert len(parse_mountinfo(data)) <= data.count(b" - ")


def test_the_mounts_of_this_process_are_understood() -> None:
    data = Path("/proc/self/mountinfo").read_bytes()
    assert len(parse_mountinfo(data)) == data.count(b"\n")


def test_the_mount_that_is_found_is_a_cgroup2_hierarchy() -> None:
    mount = linux.find_cgroup2_mount()
    assert mount is None or os.path.exists(mount.path + b"/cgroup.controllers")
