#!/usr/bin/python3
"""Nobody notices an upgrade of the packages, and nothing lives longer than they do."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from accessory import SERVICE, SOCKET, Inhabitant, leases, nobody_notices
from support import keep, repacked, run, version_of, wait_for

PACKAGE = "cm4all-spawn-accessory"
SAME_SOURCE = ("python3-cm4all-spawn", "cm4all-spawn-client", "cm4all-spawn-reaper", PACKAGE)
CURRENT = version_of(PACKAGE)
OLDER = f"{CURRENT}~older"


def nobody_notices_an_upgrade() -> None:
    install_older()
    SOCKET.start()
    SERVICE.start()
    with nobody_notices():
        upgrade()
    assert SERVICE.restarts == 0


def nobody_notices_that_the_packages_are_installed_again() -> None:
    with nobody_notices():
        run("apt-get", "install", "--yes", "--reinstall", *SAME_SOURCE)


def everything_ends_when_the_package_is_removed() -> None:
    inhabitant = Inhabitant("alice")
    assert {"cm4all-spawn-init", "cm4all-spawn-keeper"} <= programs()
    run("apt-get", "remove", "--yes", PACKAGE)
    wait_for("keeper and inits end", lambda: not programs())
    wait_for("what ran inside ends", inhabitant.has_ended)
    assert "@cm4all-spawn" not in run("ss", "--no-header", "--listening", "--unix")


def installed_again_it_begins_with_nothing() -> None:
    run("apt-get", "install", "--yes", PACKAGE)
    assert (SOCKET.state, SERVICE.state) == ("inactive", "inactive")
    SOCKET.start()
    assert not leases()


def programs() -> set[str]:
    """Return which of the package's own programs run, whether they have been removed or not."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            found.add((process / "exe").readlink())
    names = (str(program).removesuffix(" (deleted)") for program in found)
    return {Path(name).name for name in names if name.startswith("/usr/libexec/cm4all-spawn/")}


def install_older() -> None:
    run("dpkg", "--install", *(repacked(package, OLDER) for package in SAME_SOURCE))
    assert version_of(PACKAGE) == OLDER


def upgrade() -> None:
    run("apt-get", "install", "--yes", PACKAGE)
    assert version_of(PACKAGE) == CURRENT


if __name__ == "__main__":
    keep(
        nobody_notices_an_upgrade,
        nobody_notices_that_the_packages_are_installed_again,
        everything_ends_when_the_package_is_removed,
        installed_again_it_begins_with_nothing,
    )
