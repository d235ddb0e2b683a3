"""Maps of ids: the kernel takes what we take, and refuses what we refuse."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tools.harness import wait_for
from tests.unit.test_idmaps import BAD, GOOD

# Here the kernel may do something else than what was meant: it cuts numbers to 32 bits, and takes a
# NUL byte for the end.
LENIENT = (b"0 0 99999999999", b"0 0 4294967296", b"0 0 1\0")


@contextmanager
def user_namespace() -> Iterator[int]:
    """Yield the process id of somebody in a new user namespace that has no maps yet."""
    process = subprocess.Popen(["unshare", "--user", "sleep", "1000"])
    try:
        ours = os.readlink("/proc/self/ns/user")
        wait_for("it is there", lambda: os.readlink(f"/proc/{process.pid}/ns/user") != ours)
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("text", [text for text in GOOD if text])
def test_the_kernel_takes_what_is_accepted(text: bytes) -> None:
    with user_namespace() as pid:
        Path(f"/proc/{pid}/uid_map").write_bytes(text)


@pytest.mark.parametrize("text", [text for text in BAD if text not in LENIENT])
def test_the_kernel_refuses_what_is_refused(text: bytes) -> None:
    with user_namespace() as pid, pytest.raises(OSError, match="Invalid argument"):
        Path(f"/proc/{pid}/uid_map").write_bytes(text)
