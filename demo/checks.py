"""What must hold at the end of the demo. Each check looks for itself and says what it found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from demo.books import Books, Released, Total
from demo.jobs import Job
from demo.namespaces import Where
from demo.spawner import Made, Spawner


class Check(NamedTuple):
    """Whether something holds, and a line that says what was found."""

    holds: bool
    text: str


def jobs_ran(spawner: Spawner) -> Check:
    """Check that the jobs did what they should: else the demo would show nothing."""
    if spawner.surprises:
        return Check(False, "jobs went wrong: " + "; ".join(spawner.surprises))
    jobs, cgroups = sum(spawner.runs.values()), len(spawner.made)
    return Check(True, f"{jobs} jobs ran in {cgroups} cgroups")


def each_released_once(books: Books, made: Mapping[int, Made]) -> Check:
    """Check that no release is missing, and that none was reported twice.

    A cgroup whose name was used again at once may run empty more than once before it can be
    deleted; never more often than a process was placed into it.
    """
    problems = []
    for inode, cgroup in made.items():
        count = len(books.releases_of(inode))
        if not 1 <= count <= cgroup.uses:
            problems.append(f"{cgroup.cgroup!a} used {cgroup.uses} times, released {count} times")
    problems += [f"{r.path} is not of the demo" for r in books.released if r.inode not in made]
    if problems:
        return Check(False, "not each released once: " + "; ".join(problems))
    again = sum(len(books.releases_of(inode)) - 1 for inode in made)
    reused = f", but for {again} in use again before it could be deleted" if again else ""
    return Check(True, f"each cgroup was released exactly once{reused}")


def each_logged(books: Books) -> Check:
    """Check that log and script tell of the same number of releases."""
    releases = sum(1 for r in books.released if r.kind == "released")
    return Check(
        releases == len(books.log_lines),
        f"{releases} releases were handed to the script, {len(books.log_lines)} have a log line",
    )


def accounts_right(books: Books, made: Mapping[int, Made]) -> Check:
    """Check that each release went to the account whose name its spawner had left there."""
    wrong = [
        f"{r.path} went to {r.account}"
        for r in books.released
        if r.inode in made and r.account != (made[r.inode].account or "-")
    ]
    if wrong:
        return Check(False, "wrong account: " + "; ".join(wrong))
    return Check(True, "each went to the account in its own or its parent's user.account")


def sums_right(books: Books) -> Check:
    """Check that the script's totals are the sums of the lines that it printed."""
    sums = {account: _sum(books.released, account) for account in _accounts(books.released)}
    totals = {total.account: total for total in books.totals}
    if sums.keys() != totals.keys() or any(
        # Binary fractions of a second: the last digit may be rounded.
        abs(sums[account].cpu - total.cpu) > 1
        or sums[account].releases != total.releases
        or sums[account].memory_peak != total.memory_peak
        for account, total in totals.items()
    ):
        return Check(False, f"the script's totals are {totals}, its lines add up to {sums}")
    return Check(True, "the script's totals are the sums of its lines")


def cpu_complete(books: Books, counted: int) -> Check:
    """Check the sum of ``own`` against what the kernel COUNTED for all jobs, in microseconds."""
    own = sum(released.cpu for released in books.released)
    apart = abs(own - counted)
    return Check(
        apart <= counted / 1000,
        f"sum of own: {own / 1e6:.6f} s, the kernel counted {counted / 1e6:.6f} s in the scope: "
        f"{apart} us apart",
    )


def namespaces_right(seen: Sequence[tuple[Job, Where]], ours: Where) -> Check:
    """Check that jobs of one NAME met in its namespaces, and nobody else did.

    SEEN has the jobs that ran in shared namespaces, and where each of them was; OURS are the
    namespaces of the host.
    """
    problems = []
    given: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for job, where in seen:
        for kind, namespace in where.items():
            if job.shared and kind in job.shared.kinds:
                given[job.shared.name, kind].add(namespace)
            elif namespace != ours[kind]:
                problems.append(f"{job.cgroup} was not in the host's {kind} namespace")
    for (name, kind), namespaces in given.items():
        if len(namespaces) > 1:
            problems.append(f"jobs of {name} were in {len(namespaces)} {kind} namespaces")
    users = Counter(
        namespace for namespaces in (*given.values(), ours.values()) for namespace in namespaces
    )
    problems += [
        f"{namespace} was not {name}'s alone"
        for (name, _), namespaces in given.items()
        for namespace in namespaces
        if users[namespace] > 1
    ]
    if problems:
        return Check(False, "wrong namespaces: " + "; ".join(problems))
    names = len({name for name, _ in given})
    return Check(
        names > 0,
        f"{len(seen)} jobs shared {len(given)} namespaces under {names} names, none with another "
        "name or the host",
    )


def namespaces_gone(kept: set[str]) -> Check:
    """Check that nothing of any NAME is left after its last lease; KEPT is what is there."""
    if kept:
        return Check(False, "the accessory still keeps " + ", ".join(sorted(kept)))
    return Check(True, "after the last lease the accessory kept no namespace and no init")


def nothing_left(names: set[str]) -> Check:
    """Check that the reaper left no cgroup in the scope; NAMES are those that are there."""
    if names:
        return Check(False, "left behind: " + ", ".join(ascii(name) for name in sorted(names)))
    return Check(True, "nothing was left behind")


def ended_well(reaper: int, accessory: int, processes: set[int]) -> Check:
    """Check the daemons' exit statuses, and that no PROCESSES of the accessory outlived it."""
    if processes:
        return Check(False, f"{len(processes)} processes outlived the accessory")
    return Check(
        reaper == accessory == 0,
        f"the reaper ended with status {reaper}, the accessory with status {accessory}",
    )


def _accounts(released: list[Released]) -> set[str]:
    return {r.account for r in released}


def _sum(released: list[Released], account: str) -> Total:
    mine = [r for r in released if r.account == account]
    return Total(
        account,
        sum(1 for r in mine if r.kind == "released"),
        sum(r.cpu for r in mine),
        max((r.memory_peak for r in mine if r.memory_peak is not None), default=None),
    )
