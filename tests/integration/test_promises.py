"""Nothing left behind, nothing twice, nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest

from tests.tools.harness import (
    Cgroup,
    Host,
    Reaper,
    Release,
    spawn,
    spawner_command,
    wait_for,
)

SPAWNER = ["_"]  # what remains in a scope whose spawner lives in it


def empty(scope: Cgroup) -> bool:
    """Whether everything but the spawner's own cgroup is gone."""
    return scope.children() == SPAWNER


def paths(releases: list[Release]) -> Counter[bytes]:
    """Count the releases of each path, remainders not counted."""
    return Counter(release.path for release in releases if not release.remainder)


@pytest.fixture
def hogs() -> Iterator[None]:
    """Keep the host busy."""
    processes = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(4)]
    yield
    for process in processes:
        process.kill()
        process.wait()


def has_reaped(reaper: Reaper, count: int) -> bool:
    """Whether at least COUNT releases were recorded."""
    return len(reaper.releases()) >= count


def test_nothing_is_left_behind_and_nothing_twice_after_a_burst(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope)
    spawn(scope, 5000, "--workers", "2")
    wait_for("the scope is empty", lambda: empty(scope))
    reaper.stop()
    prefix = os.fsencode(host.path_of(scope))
    expected = {b"%s/job-%d" % (prefix, number): 1 for number in range(5000)}
    assert paths(reaper.releases()) == expected
    assert len({release.id for release in reaper.releases()}) == len(reaper.releases())
    names = [line.partition(":")[0] for line in reaper.errors() if line.startswith("job-")]
    assert Counter(names) == {f"job-{number}": 1 for number in range(5000)}


def test_descriptors_and_watches_are_given_back_after_a_burst(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope)
    descriptors, watches = reaper.descriptors(), reaper.watches()
    spawn(scope, 1000, "--sessions")
    wait_for("the scope is empty", lambda: empty(scope))
    wait_for("no watch is left", lambda: reaper.watches() == watches)
    assert reaper.descriptors() == descriptors


def test_nothing_is_twice_or_lost_when_the_reaper_is_restarted_in_mid_burst(
    host: Host, scope: Cgroup
) -> None:
    with subprocess.Popen(spawner_command(scope, 6000, "--pause", "100")) as spawner:
        for _ in range(4):
            reaper = host.reaper(scope)
            wait_for("it reaps", partial(has_reaped, reaper, len(reaper.releases()) + 300))
            reaper.stop()
        reaper = host.reaper(scope)
        assert spawner.wait() == 0
    wait_for("the scope is empty", lambda: empty(scope))
    reaper.stop()
    counts = paths(reaper.releases())
    assert len(counts) == 6000
    assert set(counts.values()) == {1}


def test_nothing_is_left_behind_or_lost_when_the_reaper_is_killed_in_mid_burst(
    host: Host, scope: Cgroup
) -> None:
    with subprocess.Popen(spawner_command(scope, 6000, "--pause", "100")) as spawner:
        for _ in range(4):
            reaper = host.reaper(scope)
            wait_for("it reaps", partial(has_reaped, reaper, len(reaper.releases()) + 300))
            reaper.kill()
        reaper = host.reaper(scope)
        assert spawner.wait() == 0
    wait_for("the scope is empty", lambda: empty(scope))
    reaper.stop()
    # A batch that was recorded but not yet deleted is recorded again; none is missing.
    assert len(paths(reaper.releases())) == 6000


def test_nothing_is_lost_when_the_event_queue_overflows(host: Host, scope: Cgroup) -> None:
    limit = "/proc/sys/fs/inotify/max_queued_events"  # applies to descriptors made afterwards
    with open(limit) as file:
        before = file.read()
    try:
        with open(limit, "w") as file:
            file.write("64")
        reaper = host.reaper(scope)
    finally:
        with open(limit, "w") as file:
            file.write(before)
    reaper.signal(signal.SIGSTOP)
    spawn(scope, 500, "--sessions")
    reaper.signal(signal.SIGCONT)
    wait_for("the scope is empty", lambda: empty(scope))
    reaper.stop()
    assert any("overflowed" in line for line in reaper.errors())
    counts = paths(reaper.releases())
    assert len(counts) == 1000
    assert set(counts.values()) == {1}


def test_nothing_is_lost_when_watches_are_exhausted(host: Host, scope: Cgroup) -> None:
    # The limit belongs to the user namespace, so nobody else is affected.
    limit = "echo 30 > /proc/sys/user/max_inotify_watches"
    wrapper = ["unshare", "--user", "--map-root-user", "sh", "-c", f'{limit}; exec "$@"', "sh"]
    reaper = host.start_reaper(scope, wrapper=wrapper).wait_ready()
    jobs = [scope.make(f"job-{number}/session") for number in range(60)]
    processes = [job.start() for job in jobs]
    wait_for("it says so", lambda: any("max_user_watches is reached" in e for e in reaper.errors()))
    for process in processes:
        process.kill()
        process.wait()
    wait_for("the scope is empty", lambda: empty(scope))
    wait_for("it says so", lambda: any("room for all watches" in e for e in reaper.errors()))
    reaper.stop()
    counts = paths(reaper.releases())
    assert len(counts) == 120
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("sessions", [["--sessions"], []], ids=["sessions", "names"])
def test_the_sum_of_own_is_what_the_kernel_counted_under_reuse(
    host: Host, scope: Cgroup, sessions: list[str]
) -> None:
    reaper = host.reaper(scope, settings="grace = 0")
    reuse = ["--names", "4", "--spin", "1500", "--pause", "4000"]
    spawned = spawn(scope, 800, *sessions, *reuse)
    wait_for("the scope is empty", lambda: empty(scope))
    reaper.stop()
    counted = scope.cpu_seconds() - Cgroup(scope.directory / "_").cpu_seconds()
    own = sum(release.own for release in reaper.releases())
    assert own == pytest.approx(counted, rel=0.001)
    assert spawned.names > 4  # otherwise nothing was deleted and made again meanwhile


def test_no_process_is_lost_that_enters_a_cgroup_on_its_deletion(
    host: Host, scope: Cgroup, hogs: None
) -> None:
    """On a busy host rmdir may wait so long that a whole process runs in between."""
    reaper = host.reaper(scope, settings="grace = 0.02")
    reuse = ["--names", "2", "--exec", "--pause", "20000", "--workers", "3"]
    spawned = spawn(scope, 600, *reuse)
    wait_for("the scope is empty", lambda: empty(scope))
    reaper.stop()
    counted = scope.cpu_seconds() - Cgroup(scope.directory / "_").cpu_seconds()
    own = sum(release.own for release in reaper.releases())
    # The kernel cuts off each cgroup's number at a microsecond. It says "populated 0" before a
    # process has quite ended: the grace time is for that, unless the process does not get a CPU
    # for so long; its last moments take up to 0.2 ms, the shortest process takes 0.5.
    assert own == pytest.approx(counted, abs=1e-6 * (spawned.names + 2) + 250e-6)
    assert spawned.names > 2  # otherwise nothing was deleted and made again meanwhile


def test_a_busy_host_leaves_no_short_job_behind_or_unaccounted(
    host: Host, scope: Cgroup, hogs: None
) -> None:
    # As the unit will have it: CPUSchedulingPolicy=batch
    reaper = host.start_reaper(scope, wrapper=["chrt", "--batch", "0"]).wait_ready()
    spawn(scope, 10_000, "--exec", "--workers", "4")
    wait_for("the scope is empty", lambda: empty(scope), 120)
    reaper.stop()
    counts = paths(reaper.releases())
    assert len(counts) == 10_000
    assert set(counts.values()) == {1}
    assert all(release.own > 0 for release in reaper.releases())
