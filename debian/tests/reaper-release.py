#!/usr/bin/python3
"""What becomes of a cgroup that ran empty: the service as installed, its log line, its script."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from reaper import (
    CAP_DAC_OVERRIDE,
    RECORD,
    SERVICE,
    SLICE,
    STATE,
    USER,
    Scope,
    capabilities,
    capabilities_of,
    cpu_usec,
    releases,
    use,
)
from support import keep, run, wait_for

GRACE = 0.05  # seconds, from the last notification on
BURN = "exec python3 -c 'import time\nwhile time.process_time() < 0.3: pass'"
LINE = re.compile(
    r"shop/fcgi-1: since=20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    r" cpu=(\d+\.\d)s/(\d+\.\d)s/(\d+\.\d)s\[(\d+)%\]"
)


def it_is_there_but_was_not_started() -> None:
    assert SERVICE["LoadState"] == "loaded"
    assert SERVICE.state == "inactive"
    assert SERVICE["UnitFileState"] == "static"
    assert "-g /usr/sbin/cm4all-spawn-reaper" not in run("ps", "-A", "-o", "args")


def it_starts_where_no_scope_is() -> None:
    SERVICE.start()
    assert (SERVICE.state, SERVICE["SubState"], SERVICE.restarts) == ("active", "running", 0)
    assert SERVICE["ControlGroup"] == f"{SLICE}/{SERVICE.name}"
    assert 'Status: "0 scopes, 0 cgroups, 0 released, 0 gone unread"' in SERVICE.status()


def it_runs_as_its_own_user_without_power() -> None:
    assert SERVICE["User"] == USER
    threads = list(Path(f"/proc/{SERVICE.pid}/task").iterdir())
    assert threads
    for thread in threads:
        status = (thread / "status").read_text()
        assert {os.stat(thread).st_uid} == {int(run("id", "-u", USER))}
        assert "NoNewPrivs:\t1" in status
        assert capabilities(status) == {
            "Inh": 0,
            "Prm": CAP_DAC_OVERRIDE,
            "Eff": CAP_DAC_OVERRIDE,
            "Bnd": CAP_DAC_OVERRIDE,
            "Amb": 0,
        }


def its_script_runs_without_any_power() -> None:
    (runner,) = Path(f"/proc/{SERVICE.pid}/task/{SERVICE.pid}/children").read_text().split()
    sets = capabilities_of(int(runner))
    assert sets.pop("Bnd") == CAP_DAC_OVERRIDE
    assert set(sets.values()) == {0}


def it_gives_way_to_what_earns_money() -> None:
    assert os.sched_getscheduler(SERVICE.pid) == os.SCHED_BATCH


def it_writes_a_line_into_the_journal() -> None:
    with Scope() as scope:
        os.setxattr(scope.make("shop"), "user.account", b"alice")
        scope.run("shop/fcgi-1", BURN)
        scope.wait_reaped("shop", "shop/fcgi-1")
    lines = [line for line in SERVICE.journal() if line.startswith("shop/fcgi-1:")]
    assert len(lines) == 1, lines
    figures = LINE.fullmatch(lines[0])
    assert figures, lines
    total, user, system, percent = map(float, figures.groups())
    assert 0.2 <= total <= 1.0
    assert abs(total - user - system) < 0.11, lines
    assert 10 <= percent <= 100


def it_tells_the_script_the_same() -> None:
    name, session = sorted(releases(), key=lambda release: release.path)
    assert (name.path, name.account) == (f"{SLICE}/bp-spawn.scope/shop", "alice")
    assert (session.path, session.account) == (f"{SLICE}/bp-spawn.scope/shop/fcgi-1", "")
    for line in SERVICE.journal():
        for release in (name, session):
            if line.startswith(f"{release.path.partition('.scope/')[2]}: "):
                assert f" cpu={release.total:.1f}s/" in line, line
    assert session.own == session.total >= 0.2
    assert name.total >= session.total
    assert abs(name.own + session.own - name.total) < 0.000002


def it_says_what_it_does() -> None:
    with Scope() as scope:
        jobs = [scope.begin(f"job-{number}") for number in range(3)]
        wait_for_status("1 scope, 4 cgroups, 2 released, ")
        for job in jobs:
            job.kill()
            job.wait()
        scope.wait_empty()
    wait_for_status("0 scopes, 0 cgroups, 5 released, ")


def wait_for_status(beginning: str) -> None:
    """Return when the status begins like that."""

    def told() -> bool:
        SERVICE.reload()  # or it would tell when it feeds the watchdog
        return SERVICE["StatusText"].startswith(beginning)

    wait_for(beginning, told)


def time_to_deletion(scope: Scope, name: str) -> float:
    """Let a job end; return after how many seconds its cgroup was gone, which is read meanwhile."""
    job = scope.begin(name, "read _")
    directory = scope.directory / name
    began = time.monotonic()
    job.communicate(b"\n")
    used = 0
    with suppress(FileNotFoundError):  # we have not run for as long as it was there
        used = cpu_usec(directory)
    assert used > 0 or time.monotonic() - began > GRACE
    wait_for("it is deleted", lambda: not directory.exists())
    return time.monotonic() - began


def its_spawner_can_read_from_it_for_a_while() -> None:
    with Scope() as scope:
        times = [time_to_deletion(scope, f"job-{number}") for number in range(10)]
    print("deleted after", ", ".join(f"{1000 * each:.0f}" for each in sorted(times)), "ms")
    assert min(times) > GRACE


def nothing_is_touched_that_still_runs() -> None:
    with Scope() as scope:
        daemon = scope.begin("daemon")
        for number in range(5):
            scope.run(f"daemon/session-{number}")
        wait_for(
            "the sessions are gone",
            lambda: (
                scope.jobs() == ["daemon"]
                and not [
                    entry for entry in os.scandir(scope.directory / "daemon") if entry.is_dir()
                ]
            ),
        )
        assert daemon.poll() is None
        assert scope.released("daemon") == 0
        assert scope.own.is_dir()
        daemon.kill()
        daemon.wait()
        scope.wait_reaped("daemon")
        assert scope.released("daemon") == 1


def it_ends_when_told_to() -> None:
    SERVICE.stop()
    assert (SERVICE.state, SERVICE["Result"]) == ("inactive", "success")
    assert STATE.is_dir()
    assert SERVICE.processes() == {}


if __name__ == "__main__":
    keep(it_is_there_but_was_not_started)
    use(RECORD)
    keep(
        it_starts_where_no_scope_is,
        it_runs_as_its_own_user_without_power,
        its_script_runs_without_any_power,
        it_gives_way_to_what_earns_money,
        it_writes_a_line_into_the_journal,
        it_tells_the_script_the_same,
        it_says_what_it_does,
        its_spawner_can_read_from_it_for_a_while,
        nothing_is_touched_that_still_runs,
        it_ends_when_told_to,
    )
