#!/usr/bin/python3
"""Nobody notices that the daemon ends, in whatever way, while clients ask all the time."""

from __future__ import annotations

import os
import signal

from accessory import (
    SERVICE,
    SETTINGS,
    SOCKET,
    Inhabitant,
    client,
    inits,
    inodes_of,
    kill_daemon,
    leases,
    nobody_notices,
    wait_for_daemon,
)
from support import keep, run, wait_for


def nobody_notices_a_restart() -> None:
    for _ in range(3):
        with nobody_notices():
            SERVICE.restart()


def nobody_notices_that_the_daemon_is_killed() -> None:
    with nobody_notices():
        kill_daemon()
        wait_for_daemon()


def nobody_notices_five_crashes_in_a_row() -> None:
    restarts = SERVICE.restarts
    with nobody_notices():
        for _ in range(5):
            kill_daemon()
            wait_for_daemon()
    assert SERVICE.restarts == restarts + 5


def nobody_notices_crashes_of_daemons_that_are_not_ready() -> None:
    with nobody_notices():
        for _ in range(3):
            wait_for("there is a daemon", lambda: SERVICE.pid != 0)
            kill_daemon()
        wait_for_daemon()


def nobody_notices_that_a_daemon_hangs_until_the_watchdog_ends_it() -> None:
    restarts = SERVICE.restarts
    with nobody_notices():
        os.kill(SERVICE.pid, signal.SIGSTOP)
        wait_for("it is started again", lambda: SERVICE.restarts == restarts + 1)
        wait_for_daemon()


def leases_count_after_restarts_as_before() -> None:
    inhabitant = Inhabitant("leased")
    client("not leased any more", "--ipc", "--pid", "--", "true")
    kill_daemon()
    wait_for_daemon()
    SETTINGS.write_text("expiry = 0.5\n")
    SERVICE.reload()
    wait_for("all other names end", lambda: leases().keys() == {"leased"})
    wait_for("their inits end", lambda: list(inits().values()) == ["init-leased"])
    inhabitant.check()
    inhabitant.end()
    wait_for("the last name ends", lambda: not leases())
    wait_for("its init ends", lambda: not inits())


def a_service_that_is_stopped_leaves_everything_until_it_is_started() -> None:
    SETTINGS.unlink()
    SERVICE.reload()
    inhabitant = Inhabitant("waiting")
    known = inodes_of("waiting")
    stop()
    inhabitant.check()
    SOCKET.start()
    assert inodes_of("waiting") == known
    inhabitant.end()


def what_the_service_manager_forgets_ends() -> None:
    Inhabitant("forgotten")
    stop()
    assert "init-forgotten" in inits().values()
    run("systemctl", "clean", "--what=fdstore", SERVICE.name)
    wait_for("keeper and inits end", lambda: not SERVICE.processes())
    SOCKET.start()
    assert not leases()


def stop() -> None:
    run("systemctl", "stop", SOCKET.name, SERVICE.name)


if __name__ == "__main__":
    SERVICE.configure("[Service]\nWatchdogSec=2\n")
    SOCKET.start()
    SERVICE.start()
    keep(
        nobody_notices_a_restart,
        nobody_notices_that_the_daemon_is_killed,
        nobody_notices_five_crashes_in_a_row,
        nobody_notices_crashes_of_daemons_that_are_not_ready,
        nobody_notices_that_a_daemon_hangs_until_the_watchdog_ends_it,
        leases_count_after_restarts_as_before,
        a_service_that_is_stopped_leaves_everything_until_it_is_started,
        what_the_service_manager_forgets_ends,
    )
