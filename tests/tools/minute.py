"""What happens in the first minute after a name was asked for: ADDRESS CGROUP, those of a daemon.

A program of its own, since it runs while tests do, which may leave it no descriptors, for example.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.tools.accessory import inits_in
from tests.tools.harness import Cgroup, wait_for
from tests.tools.wire import IPC, LEASE, NAME, PID, Client

_KINDS = ((IPC, b""), (PID, b""))


def main() -> None:
    """Check that names which nobody leases live for a minute, and no longer."""
    address, directory = sys.argv[1:]
    with Client(address) as client, client.ask((NAME, b"kept"), *_KINDS, (LEASE, b"")):
        began = time.monotonic()
        client.ask((NAME, b"leased"), *_KINDS, (LEASE, b"")).close()
        client.ask((NAME, b"never leased"), *_KINDS).close()
        names = [b"kept", b"leased", b"never leased"]
        while list(client.names()) == names:  # LIST does not count as being asked for
            assert time.monotonic() - began < 90
            time.sleep(0.5)
        assert time.monotonic() - began >= 60
        wait_for("two names are gone", lambda: list(client.names()) == [b"kept"])
        # The names go first: nobody waits for the end of an init.
        cgroup = Cgroup(Path(directory))
        wait_for("one init is left", lambda: list(inits_in(cgroup).values()) == ["init-kept"])


if __name__ == "__main__":
    main()
