"""What happens in the first minute after a name was asked for."""

from __future__ import annotations

import time

from tests.tools.accessory import Accessory
from tests.tools.harness import wait_for
from tests.tools.wire import IPC, LEASE, NAME, PID

_KINDS = ((IPC, b""), (PID, b""))


def watch_for_a_minute(accessory: Accessory) -> None:
    """Check that names which nobody leases live for a minute, and no longer."""
    with accessory.client() as client, client.ask((NAME, b"kept"), *_KINDS, (LEASE, b"")):
        began = time.monotonic()
        client.ask((NAME, b"leased"), *_KINDS, (LEASE, b"")).close()
        client.ask((NAME, b"never leased"), *_KINDS).close()
        while time.monotonic() < began + 59:
            # LIST does not count as being asked for.
            assert list(client.names()) == [b"kept", b"leased", b"never leased"]
            time.sleep(1)
        wait_for("two names are gone", lambda: list(client.names()) == [b"kept"])
        assert time.monotonic() - began >= 60
        # The names go first: nobody waits for the end of an init.
        wait_for("one init is left", lambda: list(accessory.inits().values()) == ["init-kept"])
