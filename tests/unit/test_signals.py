"""That no signal which ends a daemon is lost between its start and its event loop."""

from __future__ import annotations

import subprocess
import sys

SWALLOWED = """
import asyncio, os, signal, time
from spawn_common.signals import Signals

signals = Signals()

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # raises what Python ignores here

Finalized()

async def serve():
    told = asyncio.Event()
    signals.serve(lambda numbers: told.set())
    await told.wait()

asyncio.run(serve())
print("told")
"""


def test_a_signal_whose_exception_is_swallowed_during_the_start_is_told_later() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False, timeout=30
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "told\n", "")
