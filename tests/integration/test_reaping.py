"""When a cgroup is released, when it is not, and what happens when something is in the way."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial

import pytest

from tests.tools.harness import RECORD, Cgroup, Host, Reaper, Release, spawn, wait_for
from tests.tools.standing import readable_to_all

# Prepended to handlers that play the part of somebody else, at the worst moment: their first
# slice runs after the record was made and before the deletion.
ACT = f"""
dofile("{RECORD}")
local record = cgroup_released
local root = "ROOT"
local acted = {{}}
local function act(cgroup, command)
  if not acted[cgroup.path] then
    acted[cgroup.path] = true
    assert(os.execute(command:gsub("CGROUP", root .. cgroup.path)) == 0)
  end
end
"""


def acting(host: Host, body: str) -> str:
    """Return a script that records releases and calls BODY with `cgroup` before."""
    function = f"function cgroup_released(cgroup)\n{body}\nrecord(cgroup)\nend\n"
    return ACT.replace("ROOT", str(host.root)) + function


def released(reaper: Reaper, cgroup: Cgroup) -> list[Release]:
    """Return the releases of one cgroup so far."""
    suffix = os.fsencode(f"/{cgroup.directory.parent.name}/{cgroup.directory.name}")
    return [release for release in reaper.releases() if release.path.endswith(suffix)]


def has_released(reaper: Reaper, cgroup: Cgroup) -> bool:
    """Whether the cgroup was released, just once so far."""
    return len(released(reaper, cgroup)) == 1


def is_gone(cgroup: Cgroup) -> bool:
    """Whether the kernel has the cgroup no more."""
    return not cgroup.exists()


def complaints(reaper: Reaper) -> list[str]:
    """Return what the daemon said besides releases and scopes."""
    usual = re.compile(r"\S+:( (since|cpu)=.*)?|watching scope .*|calling the script's function .*")
    return [line for line in reaper.errors() if not usual.fullmatch(line)]


# What is seen


def test_cgroups_of_any_depth_are_released_children_before_parents(
    host: Host, scope: Cgroup
) -> None:
    reaper = host.reaper(scope)
    scope.make("a/b/c/d/e").run()
    wait_for("all are gone", lambda: scope.children() == ["_"])
    reaper.stop()
    names = [release.path.rpartition(b"/test.scope/")[2] for release in reaper.releases()]
    assert names == [b"a/b/c/d/e", b"a/b/c/d", b"a/b/c", b"a/b", b"a"]


def test_a_tree_deeper_than_the_longest_path_is_released(host: Host, scope: Cgroup) -> None:
    depth, name = 40, "x" * 200  # 8000 bytes; the kernel takes 4095 in one call
    reaper = host.reaper(scope)
    home = os.open(".", os.O_RDONLY)
    try:
        os.chdir(scope.directory)
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
        subprocess.run(["sh", "-c", "echo 0 > cgroup.procs"], check=True)
    finally:
        os.fchdir(home)
        os.close(home)
    wait_for("all are gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert len(reaper.releases()) == depth


def test_what_ran_empty_before_the_start_is_released(host: Host, scope: Cgroup) -> None:
    for number in range(20):
        scope.make(f"{number}/session").run()
    reaper = host.reaper(scope)
    wait_for("all are gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert len(reaper.releases()) == 40


def test_a_cgroup_without_any_process_yet_is_kept_for_its_spawner(
    host: Host, scope: Cgroup
) -> None:
    reaper = host.reaper(scope, settings="unclaimed = 1.5")
    start = time.monotonic()
    fresh = scope.make("fresh")
    scope.make("used").run()
    wait_for("the other one is gone", lambda: scope.children() == ["_", "fresh"])
    wait_for("it is given up", lambda: not fresh.exists())
    assert time.monotonic() - start >= 1.5
    assert len(released(reaper, fresh)) == 1


def test_a_frozen_cgroup_without_any_process_yet_is_kept_for_its_spawner(
    host: Host, scope: Cgroup
) -> None:
    reaper = host.reaper(scope, settings="unclaimed = 1.5")
    start = time.monotonic()
    fresh = scope.make("fresh")
    (fresh.directory / "cgroup.freeze").write_text("1")
    wait_for("it is given up", lambda: not fresh.exists())
    assert time.monotonic() - start >= 1.5
    reaper.stop()


def test_a_spawner_may_read_an_empty_cgroup_during_the_grace_time(
    host: Host, scope: Cgroup
) -> None:
    reaper = host.reaper(scope, settings="grace = 0.7")
    cgroup = scope.make("job")
    start = time.monotonic()
    cgroup.run()
    wait_for("it is gone", lambda: not cgroup.exists())
    assert time.monotonic() - start >= 0.7
    reaper.stop()


def test_a_scope_that_ran_empty_is_cleared_without_grace(host: Host) -> None:
    scope = host.scope()
    reaper = host.reaper(scope, settings="grace = 1000")
    jobs = [scope.make(f"job-{number}/session").start() for number in range(5)]
    wait_for("they run", lambda: all(scope.make(n).populated() for n in scope.children()))
    for job in jobs:
        job.kill()
        job.wait()
    wait_for("it is cleared", lambda: scope.children() == [])
    reaper.stop()
    assert len(reaper.releases()) == 10
    assert scope.exists()


# Scopes


def test_scopes_may_appear_vanish_and_come_back(host: Host) -> None:
    slice_ = Cgroup(host.base.directory / "outer.slice" / "inner.slice")
    scope = Cgroup(slice_.directory / "test.scope")
    reaper = host.reaper(scope)
    for number in range(5):
        job = scope.make(f"job-{number}")
        job.run()
        wait_for("it is released", partial(has_released, reaper, job))
        wait_for("it is gone", lambda: scope.children() == [])
        os.rmdir(scope.directory)
        if number % 2:
            os.rmdir(slice_.directory)
            os.rmdir(slice_.directory.parent)
    reaper.stop()


def test_globs_choose_scopes_and_nothing_else(host: Host) -> None:
    reaper = host.reaper(Cgroup(host.base.directory / "*-spawn.scope"))
    inside = [host.scope(f"{name}-spawn.scope").make("job") for name in ("a", "b")]
    outside = host.scope("other.scope").make("job")
    for job in [*inside, outside]:
        job.run()
    wait_for("they are gone", lambda: not any(job.exists() for job in inside))
    reaper.stop()
    assert outside.exists()
    assert len(reaper.releases()) == 2


def test_a_scope_that_is_deleted_while_it_is_scanned_does_no_harm(host: Host) -> None:
    scope = host.scope()
    reaper = host.reaper(scope, settings="grace = 0")
    for _ in range(30):
        for number in range(30):
            host.scope().make(f"{number}/session")
        scope.remove()
    last = host.scope().make("last")
    last.run()
    wait_for("it is released", partial(has_released, reaper, last))
    reaper.stop()


def test_watches_of_vanished_scopes_are_removed(host: Host) -> None:
    scope = host.scope()
    reaper = host.reaper(scope)
    watches = reaper.watches()
    for _ in range(5):
        wait_for("the scope is watched", lambda: reaper.watches() == watches)
        scope.make("kept/session")
        wait_for("they are watched", lambda: reaper.watches() == watches + 4)
        scope.remove()
        wait_for("nothing is watched", lambda: reaper.watches() == watches - 2)
        host.scope()
    reaper.stop()


# What is in the way


def test_a_cgroup_that_was_refilled_lives_on_and_is_counted_once(host: Host, scope: Cgroup) -> None:
    enter = "sh -c 'echo $$ > CGROUP/cgroup.procs; exec sleep 0.3' & sleep 0.1"
    reaper = host.reaper(scope, script=acting(host, f'act(cgroup, "{enter}")'))
    job = scope.make("job")
    job.run("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
    wait_for("it is gone", lambda: not job.exists())
    reaper.stop()
    first, second = released(reaper, job)
    assert not first.remainder
    assert not second.remainder
    assert first.id != second.id
    assert second.total > first.total
    assert first.own + second.own == pytest.approx(second.total, abs=1e-6)


def test_what_is_used_between_record_and_deletion_is_recorded_too(
    host: Host, scope: Cgroup
) -> None:
    burn = "sh -c 'echo $$ > CGROUP/cgroup.procs; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done'"
    reaper = host.reaper(scope, script=acting(host, f'act(cgroup, "{burn}")'))
    job = scope.make("name/session")
    job.run()
    wait_for("it is gone", lambda: scope.children() == ["_"])
    reaper.stop()
    counted = scope.cpu_seconds() - Cgroup(scope.directory / "_").cpu_seconds()
    first, second = released(reaper, job)  # the second is a remainder if no event came in time
    assert not first.remainder
    assert second.own > 0
    assert sum(r.own for r in reaper.releases()) == pytest.approx(counted, abs=5e-6)


def test_what_a_killed_reaper_left_frozen_is_thawed_and_nothing_else(
    host: Host, scope: Cgroup
) -> None:
    left, other = scope.make("left"), scope.make("other")
    processes = [left.start("sleep 0.2"), other.start("sleep 0.2")]
    for cgroup in (left, other):
        wait_for("it is populated", cgroup.populated)
        (cgroup.directory / "cgroup.freeze").write_text("1")
    os.setxattr(scope.directory, "user.cm4all-spawn-reaper.deleting", b"missing/left")
    reaper = host.reaper(scope)
    wait_for("it could go on", lambda: not left.exists())
    assert other.populated()
    assert os.listxattr(scope.directory) == []
    (other.directory / "cgroup.freeze").write_text("0")
    wait_for("it could go on", lambda: not other.exists())
    assert [process.wait() for process in processes] == [0, 0]
    reaper.stop()


def test_what_the_note_of_a_scope_says_thaws_nothing_but_its_cgroups(
    host: Host, scope: Cgroup
) -> None:
    left = scope.make("left")
    frozen = [host.base, scope, left]  # the scope's owner may write the note, but not above it
    for cgroup in frozen:
        (cgroup.directory / "cgroup.freeze").write_text("1")
    os.setxattr(scope.directory, "user.cm4all-spawn-reaper.deleting", b"..//./left/..")
    reaper = host.reaper(scope)
    wait_for("the note is gone", lambda: os.listxattr(scope.directory) == [])
    states = [(cgroup.directory / "cgroup.freeze").read_text() for cgroup in frozen]
    assert states == ["1\n", "1\n", "0\n"]
    reaper.stop()


def test_a_process_that_enters_a_cgroup_on_its_deletion_runs_on(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope, settings="grace = 0")
    spawned = spawn(scope, 3000, "--names", "1", "--exec", "--workers", "2")
    wait_for("the scope is empty", lambda: scope.children() == ["_"])
    reaper.stop()
    assert spawned.jobs == 3000
    assert complaints(reaper) == []


def test_a_cgroup_that_somebody_else_deletes_first_is_still_counted_once(
    host: Host, scope: Cgroup
) -> None:
    reaper = host.reaper(scope, script=acting(host, 'act(cgroup, "rmdir CGROUP")'))
    job = scope.make("job")
    job.run()
    wait_for("it is released", partial(has_released, reaper, job))
    scope.make("other").run()
    wait_for("all is gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert len(released(reaper, job)) == 1
    assert complaints(reaper) == []


def test_a_cgroup_that_is_gone_unread_gives_one_line(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope, settings="grace = 2")
    watches = reaper.watches()
    job = scope.make("job")
    job.run()
    wait_for("it is watched", lambda: reaper.watches() == watches + 2)
    os.rmdir(job.directory)
    wait_for("it is missed", lambda: len(complaints(reaper)) == 1)
    reaper.stop()
    path = host.path_of(job)
    assert complaints(reaper) == [
        f"{path}: deleted by somebody else before it could be accounted for"
    ]
    assert reaper.releases() == []


@pytest.mark.parametrize("mode", [0o755, 0o2775], ids=["root's", "group-writable"])
def test_without_privileges_only_group_writable_scopes_are_cleared(host: Host, mode: int) -> None:
    user = "65432"
    scope = host.scope()
    os.chown(scope.directory, 0, int(user))
    scope.directory.chmod(mode)
    spawner = scope.make("_").start()
    (host.directory / "reaper").mkdir(mode=0o777)
    (host.directory / "reaper").chmod(0o777)
    reaper = host.start_reaper(
        scope,
        wrapper=[
            *readable_to_all(),
            "setpriv",
            f"--reuid={user}",
            f"--regid={user}",
            "--clear-groups",
        ],
        script="function cgroup_released(cgroup) print(cgroup.path) end",
    )
    reaper.wait_ready()
    job, other = scope.make("job"), scope.make("other")
    job.run()
    other.run()
    wait_for("both are released", lambda: len(reaper.output()) == 2)
    if mode == 0o2775:
        wait_for("both are gone", lambda: scope.children() == ["_"])
        assert complaints(reaper) == []
    else:
        wait_for("it says so", lambda: len(complaints(reaper)) == 1)
        assert complaints(reaper)[0].endswith(": Permission denied")
        assert job.exists()
        assert other.exists()
    reaper.stop()
    assert len(reaper.output()) == 2
    spawner.kill()
    spawner.wait()


def test_a_cgroup_that_may_not_be_read_counts_as_populated(host: Host) -> None:
    user = "65432"
    scope = host.scope()
    os.chown(scope.directory, int(user), int(user))
    hidden = scope.make("_")
    hidden.directory.chmod(0o770)
    spawner = hidden.start()
    (host.directory / "reaper").mkdir()
    (host.directory / "reaper").chmod(0o777)
    reaper = host.start_reaper(
        scope,
        wrapper=[
            *readable_to_all(),
            "setpriv",
            f"--reuid={user}",
            f"--regid={user}",
            "--clear-groups",
        ],
        script="function cgroup_released(cgroup) print(cgroup.path) end",
    )
    reaper.wait_ready()
    scope.make("job").run()
    wait_for("the other is gone", lambda: scope.children() == ["_"])
    spawner.kill()
    spawner.wait()
    reaper.stop()
    assert len(reaper.output()) == 1
    assert complaints(reaper) == []


# Hostile contents


def test_names_may_hold_any_byte(host: Host, scope: Cgroup) -> None:
    # But for a newline, which the kernel refuses
    names = [b"two\rlines", b"\xff\xfe", b"a b\\c", "schöne Grüße".encode(), b"-rf", b"\x1b[31m"]
    reaper = host.reaper(scope)
    for name in names:
        scope.make(name).run()
    wait_for("all are gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert sorted(release.path.rpartition(b"/")[2] for release in reaper.releases()) == sorted(
        names
    )
    lines = [line.partition(":")[0] for line in reaper.errors()[1:]]
    assert sorted(lines) == sorted(
        [r"two\x0dlines", r"\xff\xfe", r"a\x20b\x5cc", r"schöne\x20Grüße", "-rf", r"\x1b[31m"]
    )


def test_attributes_may_hold_any_byte_and_outlive_the_directory(host: Host, scope: Cgroup) -> None:
    script = """
    function cgroup_released(cgroup)
      local account = cgroup.xattr.account or cgroup.parent.xattr.account
      print((account:gsub(".", function(c) return ("%02x"):format(c:byte()) end)),
            cgroup.xattr["user.account"] == cgroup.xattr.account, cgroup.xattr.missing)
    end
    """
    reaper = host.reaper(scope, script=script)
    scope.make("name", account=b"\xff\x00\n").make("session").run()
    wait_for("all are gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert reaper.output() == ["ff000a\ttrue\tnil"] * 2


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (b"", "cpu.stat: not lines of key and number: b''"),
        (b"usage_usec lots\n", "cpu.stat: not lines of key and number: b'usage_usec lots"),
        (b"usage_usec\n", "cpu.stat: "),
    ],
    ids=["empty", "malformed", "truncated"],
)
def test_statistics_that_make_no_sense_are_nil_and_named_once(
    host: Host, scope: Cgroup, contents: bytes, complaint: str
) -> None:
    jobs = [scope.make("one"), scope.make("two")]
    fake = host.directory / "fake"
    fake.write_bytes(contents)
    mounts = "; ".join(f"mount --bind {fake} {job.directory}/cpu.stat" for job in jobs)
    reaper = host.start_reaper(
        scope,
        script="function cgroup_released(cgroup) print(cgroup.path, cgroup.cpu_total) end",
        wrapper=["unshare", "--mount", "sh", "-c", f'{mounts}; exec "$@"', "sh"],
    )
    reaper.wait_ready()
    for job in jobs:
        job.run()
    wait_for("both are released", lambda: len(reaper.output()) == 2)
    wait_for("both are gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert sorted(reaper.output()) == [f"{host.path_of(job)}\tnil" for job in jobs]
    (line,) = complaints(reaper)
    assert complaint in line


def test_statistics_that_cannot_be_read_are_tried_again_before_anything_is_deleted(
    host: Host, scope: Cgroup
) -> None:
    job = scope.make("job")
    file = job.directory / "cpu.stat"
    unreadable = f"mount --bind /proc/self/mem {file}"  # cannot be read at its start
    reaper = host.start_reaper(
        scope, wrapper=["unshare", "--mount", "sh", "-c", f'{unreadable}; exec "$@"', "sh"]
    )
    reaper.wait_ready()
    job.run()
    wait_for("it says so", lambda: len(complaints(reaper)) == 1)
    assert complaints(reaper)[0].startswith(f"{host.path_of(job)}: ")
    assert job.exists()
    subprocess.run(["nsenter", f"--mount=/proc/{reaper.pid}/ns/mnt", "umount", file], check=True)
    wait_for("it is gone", lambda: not job.exists())
    reaper.stop()
    assert len(released(reaper, job)) == 1


def test_out_of_descriptors_nothing_is_lost(host: Host, scope: Cgroup) -> None:
    reaper = host.reaper(scope)
    limit = resource.prlimit(reaper.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(reaper.pid, resource.RLIMIT_NOFILE, (reaper.descriptors(), limit[1]))
    jobs = [scope.make(f"{number}/session") for number in range(10)]
    for job in jobs:
        job.run()
    other = host.scope("other.scope")  # lets it look for scopes, too
    wait_for("it says so", lambda: len(complaints(reaper)) > 0)
    other.remove()
    assert all(job.exists() for job in jobs)
    resource.prlimit(reaper.pid, resource.RLIMIT_NOFILE, limit)
    wait_for("all are gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert len(reaper.releases()) == 20


def test_what_was_recorded_for_the_living_outlives_a_restart(host: Host, scope: Cgroup) -> None:
    """The kernel keeps counting ended sessions in the name's own numbers."""
    spin = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"
    name = scope.make("name")
    holder = name.start()
    for number in range(3):
        reaper = host.reaper(scope)
        session = scope.make(f"name/{number}")
        session.run(spin)
        wait_for("it is gone", partial(is_gone, session))
        reaper.stop()
    reaper = host.reaper(scope)
    holder.kill()
    holder.wait()
    wait_for("it is gone", lambda: not name.exists())
    reaper.stop()
    counted = scope.cpu_seconds() - Cgroup(scope.directory / "_").cpu_seconds()
    own = sum(release.own for release in reaper.releases())
    assert own == pytest.approx(counted, abs=1e-5)
    assert os.listxattr(scope.directory) == []


def test_hostile_baselines_are_refused_with_one_line(host: Host, scope: Cgroup) -> None:
    attribute = "user.cm4all-spawn-reaper.accounted"
    os.setxattr(scope.directory, attribute, b'[[1, true, {"cpu_total": "lots"}]]')
    reaper = host.reaper(scope)
    scope.make("job").run()
    wait_for("it is gone", lambda: scope.children() == ["_"])
    reaper.stop()
    assert len(complaints(reaper)) == 1
    assert attribute in complaints(reaper)[0]
    assert len(reaper.releases()) == 1


def test_an_attribute_too_long_to_be_meant_well_is_not_handed_to_scripts(
    host: Host, scope: Cgroup
) -> None:
    script = "function cgroup_released(c) print(c.xattr.account, c.xattr.other) end"
    reaper = host.reaper(scope, script=script)
    job = scope.make("job", account=b" " * 60000 + b"x")
    os.setxattr(job.directory, "user.other", b"fine")
    job.run()
    wait_for("it is gone", lambda: not job.exists())
    reaper.stop()
    assert reaper.output() == ["nil\tfine"]


def test_a_storm_of_hang_ups_does_no_harm(host: Host, scope: Cgroup) -> None:
    script = "count = 0\nfunction reload() count = count + 1 print('reload', count) end"
    reaper = host.reaper(scope, script=script)
    process = os.pidfd_open(reaper.pid)
    stop = threading.Event()

    def storm() -> None:
        with suppress(ProcessLookupError):
            while not stop.is_set():
                signal.pidfd_send_signal(process, signal.SIGHUP)

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for number in range(50):
            scope.make(f"job-{number}").run()
        wait_for("all are gone", lambda: scope.children() == ["_"])
        reaper.stop()
    finally:
        stop.set()
        thread.join()
        os.close(process)
    assert complaints(reaper) == []
    assert reaper.output()[-1] == f"reload\t{len(reaper.output())}"


@pytest.mark.parametrize("name", ["test.scope", "*.scope"], ids=["path", "pattern"])
def test_a_second_reaper_on_the_same_scope_names_the_first(
    host: Host, scope: Cgroup, name: str
) -> None:
    first = host.reaper(scope)
    second = host.start_reaper(Cgroup(scope.directory.with_name(name)))
    assert second.process.wait() == 1
    path = host.path_of(scope)
    assert second.errors()[-1] == (
        f"cm4all-spawn-reaper: {path} is already managed by process {first.pid}"
    )
    first.kill()
    host.reaper(scope).stop()


def test_a_scope_that_appears_under_two_patterns_is_managed_once(host: Host) -> None:
    pattern = [Cgroup(host.base.directory / name) for name in ("a*", "*a")]
    first, second = host.reaper(pattern[0]), host.reaper(pattern[1])
    scope = host.scope("aa")
    scope.make("job").run()
    wait_for("it is gone", lambda: scope.children() == [])
    wait_for("one refused", lambda: any("already managed" in e for e in first.errors()))
    first.stop()
    second.stop()
    assert len(first.releases()) == 1  # the file is common to both
