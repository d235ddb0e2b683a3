"""The accessory with as many names and leases as a large host has."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from tests.tools.accessory import Accessory
from tests.tools.native import ROOT
from tests.tools.wire import NAME, PID


@pytest.mark.timeout(600)
def test_five_thousand_names_with_four_leases_each_outlive_a_restart(accessory: Accessory) -> None:
    held = accessory.keeper_descriptors()
    with ExitStack() as stack:
        known: dict[bytes, int] = {}
        for prefix, holder in [(prefix, hold(accessory, prefix, stack)) for prefix in "ab"]:
            assert holder.stdout is not None
            lines = iter(holder.stdout.readline, b"\n")
            known |= {f"{prefix}{n}".encode(): int(line) for n, line in enumerate(lines)}
        assert len(known) == 5000
        before = accessory.processes()
        began = time.monotonic()
        accessory.stop()
        stopped = time.monotonic()
        accessory.start()
        print(f"{stopped - began:.2f} s to end, {time.monotonic() - stopped:.2f} s to be ready")
        with accessory.client() as client:
            listed = client.names()
            assert listed.keys() == known.keys()
            assert all(one.leases > 0 for one in listed.values())
            for name, inode in known.items():
                with client.ask((NAME, name), (PID, b"")) as answer:
                    assert answer.inodes() == [inode]
        assert accessory.keeper_descriptors() == held + 5000 * 3
        assert len(accessory.processes()) == len(before)


def hold(accessory: Accessory, prefix: str, stack: ExitStack) -> subprocess.Popen[bytes]:
    """Start a process that makes names and holds leases: one has no room for 20,000."""
    command = [sys.executable, "-m", "tests.tools.holder", accessory.address, prefix, "2500", "4"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    stack.enter_context(holder)
    stack.callback(holder.kill)
    return holder
