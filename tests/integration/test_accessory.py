"""What the accessory promises to spawners: the same NAME, the same real namespaces."""

from __future__ import annotations

import os

from tests.tools.accessory import Accessory
from tests.tools.wire import IPC, LEASE, NAME, PID, USER

ALICE = (NAME, b"alice")
MAPS = (USER, b"0 100000 1000\x000 100000 1000")


def test_the_same_name_has_the_same_namespaces(accessory: Accessory) -> None:
    wanted = (ALICE, (IPC, b""), (PID, b""), MAPS)
    with accessory.client() as one, accessory.client() as other:
        with one.ask(*wanted) as first, other.ask(*wanted) as second:
            assert first.flags == [0x08000000, 0x20000000, 0x10000000]
            assert first.inodes() == second.inodes()
        with one.ask((NAME, b"bob"), *wanted[1:]) as third:
            assert not set(third.inodes()) & {
                os.stat(f"/proc/self/ns/{k}").st_ino for k in ("ipc", "pid", "user")
            }


def test_restart(accessory: Accessory) -> None:
    wanted = (ALICE, (IPC, b""), (PID, b""), MAPS, (LEASE, b""))
    with accessory.client() as client, client.ask(*wanted) as first:
        before = first.inodes()
        for end in (accessory.stop, accessory.kill):
            end()
            accessory.start()
            with accessory.client() as again, again.ask(*wanted) as second:
                assert second.inodes() == before
