"""Namespaces that the daemon makes itself: it is always back in its own afterwards, or ends."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spawn_accessory.namespaces import Maker
from spawn_accessory.protocol import Maps, Namespace
from tests.tools.accessory import Accessory, own_namespaces
from tests.tools.descriptors import nothing_stays_open
from tests.tools.harness import DEADLINE

MADE = [Namespace.IPC, Namespace.NET, Namespace.UTS, Namespace.CGROUP, Namespace.USER]
MAPS = Maps(b"0 100000 1", b"0 100000 1")


@pytest.fixture
def maker() -> Iterator[Maker]:
    before = own_namespaces(os.getpid())
    with nothing_stays_open():
        maker = Maker()
        yield maker
        maker.close()
    assert own_namespaces(os.getpid()) == before


@pytest.mark.parametrize("kind", MADE)
def test_each_one_is_new_and_we_are_not_in_it(maker: Maker, kind: Namespace) -> None:
    made = [maker.make(kind, MAPS) for _ in range(3)]
    inodes = {os.fstat(fd).st_ino for fd in made}
    assert len(inodes) == 3
    assert os.stat(f"/proc/self/ns/{kind.name.lower()}").st_ino not in inodes
    for fd in made:
        os.close(fd)


def test_of_the_process_that_a_user_namespace_takes_nothing_is_left(maker: Maker) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    processors, before = os.sched_getaffinity(0), set(children.read_text().split())
    os.close(maker.make(Namespace.USER, MAPS))
    with pytest.raises(OSError, match="Invalid argument"):
        maker.make(Namespace.USER, Maps(b"0 0 0", b""))
    assert os.sched_getaffinity(0) == processors
    assert set(children.read_text().split()) <= before


@pytest.mark.parametrize("kind", MADE)
def test_without_a_free_descriptor_we_are_back_too(maker: Maker, kind: Namespace) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            maker.make(kind, MAPS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE


NO_WAY_BACK = """
import atexit, os
from spawn_accessory.namespaces import Maker
from spawn_accessory.protocol import Namespace
from spawn_common import linux

def refuse(fd, kind):
    raise OSError(1, "setns: Operation not permitted")

atexit.register(print, "cleaned up in a foreign namespace", flush=True)
maker = Maker()
linux.setns = refuse
try:
    maker.make(Namespace.IPC, None)
finally:
    print("went on in a foreign namespace", flush=True)
"""


def test_a_daemon_that_cannot_go_back_ends_at_once() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NO_WAY_BACK], capture_output=True, text=True, check=False
    )
    assert ended.returncode == os.EX_OSERR
    assert ended.stdout == ""
    assert "cannot return from a new IPC namespace: setns: Operation not permitted" in ended.stderr


def test_a_daemon_that_could_not_come_back_does_not_start(stopped_accessory: Accessory) -> None:
    accessory = stopped_accessory
    accessory.wrapper = ["unshare", "--user", "--map-root-user"]
    accessory.begin()
    assert accessory.process is not None
    assert accessory.process.wait(DEADLINE) == 1
    assert accessory.errors() == [
        "cm4all-spawn-accessory: cannot enter our own namespaces: setns: Operation not permitted"
    ]
