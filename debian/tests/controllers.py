#!/usr/bin/python3
"""What the controllers count arrives in the script and in the log, and is what the jobs did."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reaper import SERVICE, STATE, Scope, use
from support import keep, wait_for

MIB: Final = 1 << 20
CONTROLLERS: Final = ("cpu", "io", "memory", "pids")

PRESSURES: Final = ("cpu_pressure", "io_pressure", "memory_pressure")
EVENTS: Final = {
    "memory_events_high": ("memory.events", "high"),
    "memory_events_max": ("memory.events", "max"),
    "memory_events_oom": ("memory.events", "oom"),
    "memory_events_oom_kill": ("memory.events", "oom_kill"),
    "pids_events_max": ("pids.events", "max"),
}
INPUT_OUTPUT: Final = {
    "io_read_bytes": "rbytes",
    "io_read_operations": "rios",
    "io_write_bytes": "wbytes",
    "io_write_operations": "wios",
}
PEAKS: Final = {
    "memory_peak": "memory.peak",
    "memory_swap_peak": "memory.swap.peak",
    "pids_peak": "pids.peak",
}
THROTTLING: Final = ("cpu_throttled", "cpu_throttled_periods")
COUNTED: Final = (*EVENTS, *INPUT_OUTPUT, *THROTTLING)

# Writes what is in its three tables, one release a line.
RECORD: Final = """
local file = assert(io.open(os.getenv("STATE_DIRECTORY") .. "/releases", "a"))
file:setvbuf("line")

local function json(object)
  local members = {}
  for name in ("NAMES"):gmatch("%S+") do
    if object[name] then
      members[#members + 1] = ('"%s": %.17g'):format(name, object[name])
    end
  end
  return "{" .. table.concat(members, ", ") .. "}"
end

function cgroup_released(cgroup)
  if not cgroup.remainder then
    file:write(('{"path": "%s", "fields": %s, "own": %s, "parent": %s}\\n'):format(
      cgroup.path, json(cgroup), json(cgroup.own), json(cgroup.parent)))
  end
end
""".replace("NAMES", " ".join(["cpu_total", "pids_forks", *COUNTED, *PEAKS, *PRESSURES]))

Numbers = dict[str, float]


@dataclass(frozen=True)
class Release:
    """What the script got; what is nil is not there."""

    path: str
    fields: Numbers
    own: Numbers
    parent: Numbers


@dataclass(frozen=True)
class Job:
    """What the kernel said of a job that was about to end, and what the script got then."""

    status: int
    kernel: Numbers
    pressures: Numbers
    release: Release

    def __getitem__(self, name: str) -> float:
        """Return a number that the script got, which has to be the kernel's."""
        value, expected = self.release.fields[name], self.kernel[name]
        more = MIB if name == "memory_peak" else 0  # that may be what its end takes
        assert expected <= value <= expected + more, f"{name}: {value}, not {expected}"
        return value


JOBS: Final[dict[str, Job]] = {}  # by name; all that had the controllers
SCOPE: Final = Scope()
FILE: Final = Path("/var/tmp/data")  # on a disk

ALLOCATE: Final = "dd if=/dev/zero of=/dev/null bs=64M count=1 status=none"
WRITE: Final = f"dd if=/dev/zero of={FILE} bs=1M count=16 oflag=direct status=none"
READ: Final = f"dd if={FILE} of=/dev/null bs=1M iflag=direct status=none"
FORK: Final = "(for _ in 1 2 3 4 5 6 7 8 9; do sleep infinity & done)"
SPIN: Final = "timeout 1 sh -c 'while :; do :; done'"


def run_job(name: str, command: str, **limits: str) -> Job:
    """Run a shell command in a cgroup of its own; LIMITS are files there, with "_" for "."."""
    directory = SCOPE.make(name)
    for file, limit in limits.items():
        (directory / file.replace("_", ".")).write_text(limit)
    process = SCOPE.begin(name, f"{{ {command}\n}}; echo $?; read _")
    assert process.stdout is not None
    status = int(process.stdout.readline())
    kernel, pressures = dict(statistics(directory)), pressures_of(directory)
    (directory / "cgroup.kill").write_text("1")
    process.wait()
    JOBS[name] = Job(status, kernel, pressures, released(name))
    return JOBS[name]


def released(name: str) -> Release:
    """Return what the script gets when a cgroup is released, and wait until that is deleted."""
    directory = SCOPE.directory / name
    wait_for(f"{name} is recorded", lambda: records_of(name) != [])
    wait_for(f"{name} is deleted", lambda: not directory.exists())
    (one,) = records_of(name)
    return one


def records_of(name: str) -> list[Release]:
    """Return what the script has written of a cgroup so far."""
    complete, _, _ = (STATE / "releases").read_text().rpartition("\n")
    found = [Release(**json.loads(line)) for line in complete.splitlines()]
    return [release for release in found if release.path == f"{SCOPE.path}/{name}"]


def statistics(directory: Path) -> Iterator[tuple[str, float]]:
    """Yield what the kernel counted for a cgroup, under the names that scripts know."""
    for name, (file, key) in EVENTS.items():
        yield name, int(words(directory / file)[key])
    for name, key in INPUT_OUTPUT.items():
        values = re.findall(rf"\b{key}=(\d+)", (directory / "io.stat").read_text())
        yield name, sum(map(int, values))
    for name, file in PEAKS.items():
        yield name, int((directory / file).read_text())


def words(file: Path) -> dict[str, str]:
    """Return what a file of lines, each of a key and a value, has."""
    return dict(line.split() for line in file.read_text().splitlines())


def pressures_of(directory: Path) -> Numbers:
    """Return for how many seconds some process of a cgroup waited, for each resource."""
    found = {}
    for name in PRESSURES:
        text = (directory / name.replace("_", ".")).read_text()
        total = re.search(r"^some .* total=(\d+)$", text, re.MULTILINE)
        assert total
        found[name] = int(total[1]) / 1e6
    return found


def without_controllers_there_is_cpu_time_only() -> None:
    SCOPE.run("before")
    fields = released("before").fields
    assert fields.keys() - PRESSURES == {"cpu_total"}
    assert fields["cpu_total"] > 0


def enable_controllers(directory: Path) -> None:
    """Let the cgroups in a cgroup have all controllers."""
    enabled = " ".join(f"+{controller}" for controller in CONTROLLERS)
    (directory / "cgroup.subtree_control").write_text(enabled)


def memory_peak_is_what_a_job_allocated() -> None:
    job = run_job("allocates", ALLOCATE)
    assert job.status == 0
    assert 64 * MIB <= job["memory_peak"] < 72 * MIB
    assert job["memory_swap_peak"] == 0
    assert {job[name] for name in EVENTS} == {0}


def an_oom_kill_is_counted_and_ends_nothing_else() -> None:
    job = run_job("greedy", ALLOCATE, memory_max="16M")
    assert job.status == 128 + signal.SIGKILL
    assert job["memory_events_oom_kill"] == 1
    assert job["memory_events_oom"] >= 1
    assert job["memory_events_max"] >= 1
    assert job["memory_events_high"] == 0
    assert 15 * MIB < job["memory_peak"] < 17 * MIB
    assert (SCOPE.unit.state, SERVICE.state) == ("active", "active")


def pids_peak_is_the_number_of_processes() -> None:
    job = run_job("forks", FORK)
    assert job.status == 0
    assert job["pids_peak"] == 2 + 9  # the shell, its subshell, and what that has started
    assert job["pids_events_max"] == 0


def a_refused_fork_is_counted() -> None:
    job = run_job("bomb", FORK, pids_max="4")
    assert job.status != 0
    assert job["pids_peak"] == 4
    assert job["pids_events_max"] == 1


def nobody_counts_forks_where_the_kernel_does_not() -> None:
    assert (SCOPE.own / "pids.peak").exists()
    assert not (SCOPE.own / "pids.forks").exists()
    for job in JOBS.values():
        for numbers in (job.release.fields, job.release.own, job.release.parent):
            assert "pids_forks" not in numbers


def what_is_written_and_read_is_counted_in_bytes_and_operations() -> None:
    job = run_job("writes", WRITE)
    assert job.status == 0
    assert 16 * MIB <= job["io_write_bytes"] < 17 * MIB
    assert 16 <= job["io_write_operations"] < 1000
    assert job["io_read_bytes"] < MIB
    job = run_job("reads", READ)
    assert job.status == 0
    assert 16 * MIB <= job["io_read_bytes"] < 17 * MIB
    assert 16 <= job["io_read_operations"] < 1000
    assert job["io_write_bytes"] < MIB


def reaching_memory_high_is_counted() -> None:
    job = run_job("squeezed", f"cat {FILE} >/dev/null", memory_high="4M")
    assert job["memory_events_high"] >= 1
    assert job["memory_events_max"] == job["memory_events_oom"] == 0
    assert job["memory_peak"] < 8 * MIB


def waiting_arrives_as_pressure() -> None:
    run_job("competes", f"{SPIN} & {SPIN} & wait")
    for job in JOBS.values():
        before, fields = job.pressures, job.release.fields
        for name in ("memory_pressure", "io_pressure"):
            assert fields[name] == before[name], name
        # To be killed, a process has to wait for the CPU once more.
        assert before["cpu_pressure"] <= fields["cpu_pressure"] < before["cpu_pressure"] + 2
    assert JOBS["competes"].pressures["cpu_pressure"] > 0.3
    assert JOBS["reads"].pressures["io_pressure"] > 0
    assert JOBS["squeezed"].pressures["memory_pressure"] > 0
    assert JOBS["forks"].pressures["memory_pressure"] == 0


def being_held_up_at_cpu_max_is_counted() -> None:
    throttled = run_job("limited", SPIN, cpu_max="50000 100000").release.fields
    assert 3 <= throttled["cpu_throttled_periods"] <= 100
    assert 0.1 <= throttled["cpu_throttled"] <= 10
    free = JOBS["allocates"].release.fields
    assert free["cpu_throttled_periods"] == free["cpu_throttled"] == 0


def a_name_has_what_its_sessions_had_and_own_tells_it_apart() -> None:
    enable_controllers(SCOPE.make("name"))
    commands = f"{WRITE}; {ALLOCATE}; {FORK}"
    session = run_job("name/session", commands, memory_max="16M", pids_max="4").release
    name = released("name")
    for counter in ("memory_events_oom_kill", "pids_events_max", "io_write_bytes"):
        assert session.fields[counter] == session.own[counter] > 0, counter
    for counter in (*EVENTS, *INPUT_OUTPUT):
        assert name.fields[counter] == session.fields[counter] + name.own[counter], counter
        assert name.own[counter] == 0, counter
    assert session.parent.keys() == name.fields.keys()
    for peak in PEAKS:
        assert name.fields[peak] >= session.parent[peak] >= session.fields[peak]


def the_log_has_it_too() -> None:
    lines = dict(line.split(": ", 1) for line in SERVICE.journal() if " cpu=" in line)
    for name, job in JOBS.items():
        assert re.sub(r"^(since=\S+ )?cpu=\S+", "", lines[name]) == figures(job), name
    assert lines["before"].rpartition(" ")[2].startswith("cpu=")


def figures(job: Job) -> str:
    """Return what the log line of a job has to end with."""
    reclaim = job["memory_events_high"] + job["memory_events_max"]
    rejected = job["pids_events_max"]
    return "".join(
        (
            f" memory={math.ceil(job['memory_peak'] / MIB - 0.5)}M",
            f" reclaim={reclaim:.0f}" if reclaim else "",
            f" oom={job['memory_events_oom']:.0f}" if job["memory_events_oom"] else "",
            f" procs={job['pids_peak']:.0f}",
            f" procs_rejected={rejected:.0f}" if rejected else "",
        )
    )


if __name__ == "__main__":
    use(RECORD)
    SERVICE.start()
    keep(without_controllers_there_is_cpu_time_only)
    enable_controllers(SCOPE.directory)
    keep(
        memory_peak_is_what_a_job_allocated,
        an_oom_kill_is_counted_and_ends_nothing_else,
        pids_peak_is_the_number_of_processes,
        a_refused_fork_is_counted,
        what_is_written_and_read_is_counted_in_bytes_and_operations,
        reaching_memory_high_is_counted,
        being_held_up_at_cpu_max_is_counted,
        waiting_arrives_as_pressure,
        a_name_has_what_its_sessions_had_and_own_tells_it_apart,
        nobody_counts_forks_where_the_kernel_does_not,
        the_log_has_it_too,
    )
