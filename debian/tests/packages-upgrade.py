#!/usr/bin/python3
"""An upgrade asks nothing, keeps what the administrator wrote, restarts the daemons that run."""

from __future__ import annotations

import os
from pathlib import Path

import accessory
import reaper
from netns import NAMES, Instance, inode
from packages import ALL, NETNS, SLICE_UNIT, apt, installed
from reaper import Scope
from support import attempt, keep, packed, repacked, run, unpacked, version_of, wait_for

CURRENT = {package: version_of(package) for package in ALL}
OLDER = {package: f"{version}~older" for package, version in CURRENT.items()}

BLUE = Instance("blue")
DAEMONS = (accessory.SERVICE, reaper.SERVICE)

SCRIPT = """
function cgroup_released(cgroup)
  print(os.getenv("GREETING"), cgroup.path)
end
"""
DROP_IN = "[Service]\nEnvironment=GREETING=hello\n"
SCOPE = "our-spawn"
SETTINGS = f'scopes = ["{reaper.SLICE}/{SCOPE}.scope"]\n'


def daemons_that_run_are_restarted_and_nothing_else() -> None:
    install_older(*ALL)
    for unit in (accessory.SOCKET, *DAEMONS, BLUE):
        unit.start()
    with Scope(SCOPE) as scope:
        job = scope.begin("job")
        pids = {unit: unit.pid for unit in DAEMONS}
        others = (accessory.SOCKET, BLUE, SLICE_UNIT, scope.unit)
        invocations = {unit: unit["InvocationID"] for unit in others}
        namespace = inode(NAMES / "blue")
        upgrade()
        for unit, pid in pids.items():
            assert (unit.state, unit.restarts) == ("active", 0), unit.name
            assert unit.pid not in (0, pid), unit.name
        for unit, invocation in invocations.items():
            assert (unit.state, unit["InvocationID"]) == ("active", invocation), unit.name
        assert inode(NAMES / "blue") == namespace
        assert job.poll() is None
        job.kill()
        scope.wait_empty()


def the_service_manager_knows_the_new_units() -> None:
    for unit in (accessory.SOCKET, *DAEMONS, BLUE, SLICE_UNIT):
        assert unit["NeedDaemonReload"] == "no", unit.name
    install_older(NETNS)  # no other package would make the new unit known
    upgrade()
    assert BLUE["NeedDaemonReload"] == "no"


def script_settings_and_drop_in_are_kept_and_used() -> None:
    assert reaper.SCRIPT.read_text() == SCRIPT
    assert reaper.SETTINGS.read_text() == SETTINGS
    kept = {path.name for path in reaper.SCRIPT.parent.iterdir() if path.is_file()}
    assert kept == {"reaper.lua", "reaper.toml"}
    with Scope(SCOPE) as scope:
        scope.run("afterwards")
        scope.wait_empty()
        said = f"hello\t{scope.path}/afterwards"
        wait_for("the script says so", lambda: said in reaper.SERVICE.journal())


def daemons_that_do_not_run_are_not_started() -> None:
    for unit in DAEMONS:
        unit.stop()
    run("systemctl", "mask", reaper.SERVICE.name)
    install_older(*ALL)
    upgrade()
    assert [unit.state for unit in DAEMONS] == ["inactive"] * 2
    assert reaper.SERVICE["LoadState"] == "masked"
    run("systemctl", "unmask", reaper.SERVICE.name)
    assert accessory.SOCKET.state == "active"
    accessory.client("alice", "--ipc", "--", "true")
    assert accessory.SERVICE.state == "active"


def a_daemon_that_cannot_work_is_upgraded_all_the_same() -> None:
    """It is tried again as before, until what keeps it from working has been put right."""
    install_older(*ALL)
    reaper.use("function")
    assert attempt("systemctl", "start", reaper.SERVICE.name).returncode != 0
    upgrade()
    reaper.use(SCRIPT)
    wait_for("the reaper works", lambda: reaper.SERVICE.state == "active")


def install_older(*packages: str) -> None:
    run("dpkg", "--install", *map(older, packages))
    assert installed() == CURRENT | {package: OLDER[package] for package in packages}
    run("systemctl", "daemon-reload")


def older(package: str) -> Path:
    """Return the file of an older version, with older units."""
    with unpacked(repacked(package, OLDER[package])) as directory:
        for unit in directory.glob("usr/lib/systemd/system/*"):
            os.utime(unit, (1e9, 1e9))
        return packed(directory)


def upgrade() -> None:
    apt("upgrade")
    assert installed() == CURRENT


if __name__ == "__main__":
    BLUE.set_up_by(":")
    reaper.use(SCRIPT)
    reaper.SETTINGS.write_text(SETTINGS)
    reaper.SERVICE.configure(DROP_IN)
    keep(
        daemons_that_run_are_restarted_and_nothing_else,
        the_service_manager_knows_the_new_units,
        script_settings_and_drop_in_are_kept_and_used,
        daemons_that_do_not_run_are_not_started,
        a_daemon_that_cannot_work_is_upgraded_all_the_same,
    )
