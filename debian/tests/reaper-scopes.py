#!/usr/bin/python3
"""Scopes come and go, and belong to root, to a spawner, or are open to the reaper's group."""

from __future__ import annotations

import re
import shutil

from reaper import (
    RECORD,
    SERVICE,
    SETTINGS,
    SLICE,
    USER,
    Scope,
    capabilities_of,
    counted,
    releases,
    use,
)
from support import keep, run, wait_for

SPAWNER = "spawner"  # a user
REFUSED = "Permission denied"
POWERLESS = "[Service]\nAmbientCapabilities=\nCapabilityBoundingSet=\n"

SPAWNED = ("job", "name", "name/session")
# As a spawner that is not root makes jobs, from a process of the scope.
SPAWN = """
cd "$1"
echo 0 >_/cgroup.procs
exec setpriv --reuid="$2" --regid="$2" --init-groups sh -ec '
    umask 002
    mkdir -p job name/session
    for cgroup in job name/session; do
        (echo 0 >$cgroup/cgroup.procs)
    done'
"""


class OfSpawner(Scope):
    """A scope that the service manager has given to the spawner's user."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "User", "s", SPAWNER)
        assert self.directory.owner() == SPAWNER
        shutil.chown(self.own, SPAWNER, SPAWNER)
        self.own.chmod(0o770)

    def spawn(self) -> None:
        """Have the user run a job, and one in a session."""
        for file in (self.directory / "cgroup.procs", self.own / "cgroup.procs"):
            shutil.chown(file, SPAWNER)
        run("sh", "-ec", SPAWN, "sh", self.directory, SPAWNER)


def released(scope: Scope) -> dict[str, int]:
    """Return how often each cgroup of a scope was released, by its path below the scope."""
    prefix = f"{scope.path}/"
    return {
        path.removeprefix(prefix): count
        for path, count in counted(releases()).items()
        if path.startswith(prefix)
    }


def a_scope_is_found_when_it_comes() -> None:
    with Scope() as scope:
        scope.run("first")
        scope.wait_reaped("first")
        assert released(scope) == {"first": 1}


def a_scope_that_was_stopped_may_come_again() -> None:
    path = f"{SLICE}/bp-spawn.scope"
    gone = f"scope {path} is gone"
    before = SERVICE.journal().count(gone)
    for number in range(3):
        with Scope() as scope:
            assert scope.path == path
            scope.run(f"again-{number}/session")
            scope.wait_reaped(f"again-{number}")
            assert scope.released(f"again-{number}") == 1
    wait_for("it is told", lambda: SERVICE.journal().count(gone) == before + 3)


def what_ran_when_its_scope_was_stopped_is_told() -> None:
    """The service manager deletes cgroups, too: what could not be read is named at least."""
    scope = Scope()
    names = {f"job-{number}" for number in range(30)}
    jobs = [scope.begin(name) for name in names]
    wait_for("the daemon knows them", lambda: known_cgroups() == len(jobs) + 1)
    scope.stop()
    for job in jobs:
        job.wait()
    wait_for("the daemon knows that they are gone", lambda: known_cgroups() == 0)
    unread = unread_of(scope)
    wait_for("all are told", lambda: names <= unread | released(scope).keys())
    read = {name for name in released(scope) if name in names}
    assert not read & unread
    print(f"{len(read)} of {len(names)} were read before the service manager deleted them")


def unread_of(scope: Scope) -> set[str]:
    """Return which cgroups of a scope the journal says were gone unread."""
    return {
        line.removeprefix(f"{scope.path}/").partition(": ")[0]
        for line in SERVICE.journal()
        if line.endswith(": deleted by somebody else before it could be accounted for")
    }


def known_cgroups() -> int:
    """Return how many cgroups the daemon says that there are."""
    SERVICE.reload()  # or it would tell when it feeds the watchdog
    found = re.search(r", (\d+) cgroups, ", SERVICE["StatusText"])
    assert found
    return int(found[1])


def scopes_of_all_three_spawners_are_served() -> None:
    scopes = [Scope(f"{name}-spawn") for name in ("bp", "lukko", "workshop")]
    stranger = Scope("stranger-spawn")
    stranger.run("job")
    for scope in scopes:
        scope.run("all-three")
    for scope in scopes:
        scope.wait_reaped("all-three")
        assert scope.released("all-three") == 1
    assert stranger.jobs() == ["job"]
    for scope in (*scopes, stranger):
        scope.stop()


def a_scope_of_another_user_is_served() -> None:
    with OfSpawner("lukko-spawn") as scope:
        scope.spawn()
        scope.wait_reaped(*SPAWNED)
        assert {scope.released(name) for name in SPAWNED} == {1}


def a_cgroup_that_nobody_else_may_read_is_left_to_its_owner() -> None:
    with OfSpawner("lukko-spawn") as scope:
        refused = run(
            *("setpriv", f"--reuid={USER}", "--clear-groups", "sh", "-c"),
            f"cat {scope.own}/cgroup.events || :",
        )
        assert REFUSED in refused
        scope.run("job")
        scope.wait_empty()
        assert scope.own.is_dir()
    assert not [line for line in SERVICE.journal() if REFUSED in line]


def a_scope_that_is_open_to_the_group_is_served_without_any_capability() -> None:
    SERVICE.configure(POWERLESS)
    SERVICE.restart()
    assert set(capabilities_of(SERVICE.pid).values()) == {0}
    with OfSpawner("workshop-spawn") as scope:
        shutil.chown(scope.directory, group=USER)
        scope.directory.chmod(0o2775)
        scope.spawn()
        assert (scope.directory / "name").group() == USER
        scope.wait_reaped(*SPAWNED)
        assert {scope.released(name) for name in SPAWNED} == {1}
    assert not [line for line in SERVICE.journal() if REFUSED in line]


def what_may_not_be_deleted_is_told_once_and_kept() -> None:
    with Scope() as scope:
        before = len(releases())
        for number in range(3):
            scope.run(f"kept-{number}")
        wait_for("all are accounted for", lambda: len(releases()) == before + 3)
        wait_for("it is told", lambda: complaints(scope) != [])
        assert len(complaints(scope)) == 1
        assert len(scope.jobs()) == 3
        # Another daemon, with the power to do so, takes up what was left.
        SERVICE.configure("")
        SERVICE.restart()
        scope.wait_empty()


def scopes_in_other_slices_take_what_the_unit_says() -> None:
    SETTINGS.write_text('scopes = ["/other.slice/*.scope"]\n')
    with Scope("other", within="other.slice") as scope:
        assert scope.path == "/other.slice/other.scope"
        SERVICE.restart()
        scope.run("job")
        wait_for(
            "it is told what is missing",
            lambda: f"{scope.path}/job: Read-only file system" in SERVICE.journal(),
        )
        assert "ReadWritePaths=-/sys/fs/cgroup/machine.slice" in run(
            "systemctl", "cat", SERVICE.name
        )
        SERVICE.configure("[Service]\nReadWritePaths=-/sys/fs/cgroup/other.slice\n")
        SERVICE.restart()
        scope.wait_empty()
    SETTINGS.unlink()


def complaints(scope: Scope) -> list[str]:
    """Return the lines that say that something in a scope was refused."""
    return [
        line
        for line in SERVICE.journal()
        if line.startswith(f"{scope.path}/") and line.endswith(f": {REFUSED}")
    ]


if __name__ == "__main__":
    run("systemd-sysusers", "--inline", f"u {SPAWNER}")
    use(RECORD)
    SERVICE.start()
    keep(
        a_scope_is_found_when_it_comes,
        a_scope_that_was_stopped_may_come_again,
        what_ran_when_its_scope_was_stopped_is_told,
        scopes_of_all_three_spawners_are_served,
        a_scope_of_another_user_is_served,
        a_cgroup_that_nobody_else_may_read_is_left_to_its_owner,
        a_scope_that_is_open_to_the_group_is_served_without_any_capability,
        what_may_not_be_deleted_is_told_once_and_kept,
        scopes_in_other_slices_take_what_the_unit_says,
    )
