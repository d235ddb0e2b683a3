#!/usr/bin/python3
"""Removing the packages ends all that they run; purging them leaves nothing but users."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import accessory
import reaper
from accessory import Inhabitant
from netns import Instance, host
from packages import ALL, apt, states
from reaper import Scope
from support import Unit, keep, run, wait_for

BLUE = Instance("blue")
UNITS = (accessory.SOCKET, accessory.SERVICE, reaper.SERVICE, BLUE)
HOST = host()

SCRIPT: Final = 'function cgroup_released(cgroup)\n  print("gone:", cgroup.path)\nend\n'
ENABLED: Final = Path("/etc/systemd/system/multi-user.target.wants") / BLUE.name
SETTINGS: Final = (reaper.SCRIPT, reaper.SETTINGS, accessory.SETTINGS, BLUE.script, ENABLED)

OURS: Final = re.compile("cm4all|spawn_(accessory|client|common|reaper)")
# They stay, as Debian's users do: files that they own may be anywhere.
USERS: Final = {f"/etc/{name}" for name in ("group", "gshadow", "passwd", "shadow")}
PLACES: Final = ("/etc", "/usr", "/var", "/opt", "/home", "/run")
# What changes by itself, or with every package.
VOLATILE: Final = re.compile(
    "/(run/(log|netns|systemd|udev)|var/(cache|log)|var/lib/(apt|dpkg|systemd))(/|$)"
)


def what_was_only_installed_has_left_nothing() -> None:
    assert not states()
    assert_only_users_are_left()


def removal_ends_everything() -> None:
    apt("install", *ALL)
    configure()
    with Scope() as scope:
        job = scope.begin("job")
        inhabitant = start()
        processes = accessory.SERVICE.processes() | reaper.SERVICE.processes()
        assert len(processes) >= 4  # two daemons, keeper and init
        apt("remove", *ALL)
        wait_for("all processes end", lambda: not any(map(exists, processes)))
        wait_for("what ran in namespaces ends", inhabitant.has_ended)
        assert job.poll() is None, "a job of a spawner was ended"
        job.kill()
    assert host() == HOST
    assert active_or_failed() == ""


def what_the_administrator_wrote_stays() -> None:
    assert {status for status, _ in states().values()} == {"config-files"}
    assert reaper.SCRIPT.read_text() == SCRIPT
    assert [file for file in SETTINGS if not file.is_file() and not file.is_symlink()] == []


def what_is_installed_again_uses_it() -> None:
    apt("install", *ALL)
    assert {unit.state for unit in UNITS} == {"inactive"}
    assert BLUE["UnitFileState"] == "enabled"
    start().end()
    with Scope() as scope:
        scope.run("job")
        scope.wait_empty()
        said = f"gone:\t{scope.path}/job"
        wait_for("the script says so", lambda: said in reaper.SERVICE.journal())


def removal_ends_what_a_stopped_accessory_keeps() -> None:
    inhabitant = Inhabitant("bob")
    run("systemctl", "stop", accessory.SOCKET.name, accessory.SERVICE.name)
    processes = accessory.SERVICE.processes()
    assert {"spawn-keeper", "init-bob"} <= set(processes.values()), processes
    apt("remove", *ALL)
    wait_for("all processes end", lambda: not any(map(exists, processes)))
    wait_for("what ran in namespaces ends", inhabitant.has_ended)


def removal_ends_what_has_failed() -> None:
    apt("install", *ALL)
    inhabitant = start()
    processes = accessory.SERVICE.processes()
    for service in (accessory.SERVICE, reaper.SERVICE):
        drop_in = Path(f"/run/systemd/system/{service.name}.d/once.conf")
        drop_in.parent.mkdir()
        drop_in.write_text("[Service]\nRestart=no\n")
    run("systemctl", "daemon-reload")
    for service in (accessory.SERVICE, reaper.SERVICE):
        os.kill(service.pid, signal.SIGKILL)
    for service in (accessory.SERVICE, reaper.SERVICE):
        wait_until_failed(service)
    apt("remove", *ALL)
    wait_for("all processes end", lambda: not any(map(exists, processes)))
    wait_for("what ran in namespaces ends", inhabitant.has_ended)
    for service in (accessory.SERVICE, reaper.SERVICE):
        shutil.rmtree(f"/run/systemd/system/{service.name}.d")
    run("systemctl", "daemon-reload")
    assert active_or_failed() == ""


def purging_leaves_only_what_has_never_been_ours() -> None:
    apt("install", *ALL)
    start()
    apt("purge", *ALL)
    assert not states()
    assert active_or_failed() == ""
    assert BLUE.script.is_file()
    shutil.rmtree("/etc/cm4all/spawn/netns")
    Path("/etc/cm4all/spawn").rmdir()
    Path("/etc/cm4all").rmdir()
    assert_only_users_are_left()
    now = files()
    changed = {path for path in {*CLEAN, *now} if now.get(path) != CLEAN.get(path)}
    assert not changed, changed


def configure() -> None:
    """Do what administrators do."""
    reaper.use(SCRIPT)
    reaper.SETTINGS.write_text("grace = 0.1\n")
    accessory.SETTINGS.write_text("expiry = 1\n")
    BLUE.set_up_by(":")
    run("systemctl", "enable", BLUE.name)


def start() -> Inhabitant:
    """Start everything; return somebody who is in namespaces of the accessory."""
    for unit in UNITS:
        unit.start()
    return Inhabitant("alice")


def wait_until_failed(service: Unit) -> None:
    wait_for("it has failed", lambda: service.state == "failed")


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def active_or_failed() -> str:
    """Return our units that are more to the service manager than names."""
    return run("systemctl", "list-units", "--plain", "--no-legend", "cm4all-spawn*")


def assert_only_users_are_left() -> None:
    unexpected = traces() ^ USERS
    assert not unexpected, unexpected


def entries() -> Iterator[os.DirEntry[str]]:
    """Yield all files and directories that do not change by themselves."""
    directories = list(PLACES)
    while directories:
        with os.scandir(directories.pop()) as found:
            for entry in found:
                if VOLATILE.match(entry.path):
                    continue
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)


def files() -> Mapping[str, tuple[int, ...]]:
    """Return all files and directories, and what would tell that they were changed."""
    found = {}
    for entry in entries():
        status = entry.stat(follow_symlinks=False)
        what: tuple[int, ...] = (status.st_mode, status.st_uid, status.st_gid)
        if not stat.S_ISDIR(status.st_mode):
            what += (status.st_size, status.st_mtime_ns)
        found[entry.path] = what
    return found


def traces() -> set[str]:
    """Return files that have our names, or are below /etc and speak of us."""
    found = set()
    for entry in entries():
        text = ""
        if entry.path.startswith("/etc/") and entry.is_file(follow_symlinks=False):
            text = Path(entry).read_text(errors="replace")
        if OURS.search(entry.name) or OURS.search(text):
            found.add(entry.path.rstrip("-"))  # passwd- is what passwd was before
    return found


if __name__ == "__main__":
    apt("purge", *ALL)
    CLEAN = files()
    keep(
        what_was_only_installed_has_left_nothing,
        removal_ends_everything,
        what_the_administrator_wrote_stays,
        what_is_installed_again_uses_it,
        removal_ends_what_a_stopped_accessory_keeps,
        removal_ends_what_has_failed,
        purging_leaves_only_what_has_never_been_ours,
    )
