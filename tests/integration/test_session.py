"""That a run of the tests leaves nothing behind, however it ends, whoever has started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from spawn_common import linux
from tests.tools.harness import DEADLINE, wait_for
from tests.tools.native import ROOT

HERE = Path(__file__).parent
REAPER = "test_reaping.py::test_what_ran_empty_before_the_start_is_released"
ACCESSORY = "test_accessory.py::test_processes_that_joined_are_in_these_very_namespaces"
DETACHED = (
    "test_standalone.py::test_the_command_returns_when_the_daemon_is_ready[cm4all-spawn-accessory]"
)
INTERRUPTED = "test_client.py::test_an_interrupt_from_the_terminal_is_not_passed_on"
POSTGRESQL = "test_postgresql.py::test_numbers_keep_their_value"


class Run:
    """Tests that another pytest runs."""

    def __init__(
        self,
        test: str,
        *options: str,
        wrapper: tuple[str, ...] = (),
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", *wrapper, sys.executable),
                *("-m", "pytest", "-q", *options, str(HERE / test)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def output(self) -> str:
        """Return what it wrote, at its end: nobody has the terminal any more then."""
        output, _ = self.process.communicate(timeout=DEADLINE)
        return output

    def processes(self) -> dict[int, str]:
        """Return pid and name of all that it has started, itself included."""
        found = {}
        for cgroup in self.cgroups():
            for procs in cgroup.rglob("cgroup.procs"):
                for pid in procs.read_text().split():
                    with suppress(OSError):  # it has ended
                        found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
        return found

    def cgroups(self) -> list[Path]:
        """Return the cgroups that it has made."""
        mount = linux.find_cgroup2_mount()
        assert mount is not None
        pattern = f"cm4all-spawn-*-{self.process.pid}-*"
        return list(Path(os.fsdecode(mount.path)).glob(pattern))

    def files(self) -> list[Path]:
        """Return what is left of its temporary files."""
        return list(Path(tempfile.gettempdir()).glob(f"spawn-{self.process.pid}-*"))


class Stuck(Run):
    """Tests of which the first hangs at its end."""

    def __init__(self, test: str, directory: Path, *options: str) -> None:
        self._file = directory / "stuck"
        environment = os.environ | {"STUCK": str(self._file)}
        super().__init__(test, "-p", "tests.tools.stuck", *options, environment=environment)

    def wait(self) -> dict[int, str]:
        """Wait until it hangs; return pid and name of all its processes."""
        wait_for("it is in the middle", lambda: self._file.exists() or self.has_ended())
        assert not self.has_ended(), self.output()
        return self.processes()

    def has_ended(self) -> bool:
        """Whether it has, which it should not."""
        return self.process.poll() is not None


def exists(pid: int) -> bool:
    """Whether there is a process."""
    return Path(f"/proc/{pid}").exists()


@contextmanager
def running(run: Run) -> Iterator[None]:
    """End a run in the end."""
    with run.process:
        try:
            yield
        finally:
            run.process.kill()


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (REAPER, {"python"}),
        (ACCESSORY, {"python", "spawn-keeper"}),
        (DETACHED, {"python", "spawn-keeper"}),
        (POSTGRESQL, {"python", "postgres"}),
    ],
    ids=["reaper", "accessory", "detached", "postgresql"],
)
def test_nothing_outlives_a_run_that_is_killed(
    test: str, expected: set[str], tmp_path: Path
) -> None:
    with running(run := Stuck(test, tmp_path)):
        processes = run.wait()
        assert expected <= set(processes.values())
        assert len(run.files()) == 1
        run.process.kill()
        run.output()
    assert run.cgroups() == []
    assert run.files() == []
    wait_for("who has adopted them knows", lambda: not any(map(exists, processes)))


def test_nothing_outlives_a_run_that_is_interrupted(tmp_path: Path) -> None:
    with running(run := Stuck(ACCESSORY, tmp_path)):
        processes = run.wait()
        run.process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in run.output()
    assert run.cgroups() == []
    assert run.files() == []
    wait_for("who has adopted them knows", lambda: not any(map(exists, processes)))


def test_a_test_that_hangs_fails_with_a_traceback_and_its_fixtures_clean_up(tmp_path: Path) -> None:
    with running(run := Stuck(ACCESSORY, tmp_path, "--timeout=5")):
        output = run.output()
    assert run.process.returncode == pytest.ExitCode.TESTS_FAILED
    assert "Timeout (>5.0s) from pytest-timeout" in output
    assert "threading.Event().wait()" in output
    assert "1 failed" in output
    assert "error" not in output.splitlines()[-1]


LEAVES = """
import subprocess

def pytest_runtest_teardown() -> None:
    subprocess.Popen(["sleep", "1000"])
"""


def test_a_run_whose_tests_leave_a_process_fails_and_ends_it(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    path = os.environ | {"PYTHONPATH": str(tmp_path)}
    with running(run := Run(REAPER, "-p", "leaves", environment=path)):
        output = run.output()
    assert run.process.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 passed" in output
    assert "left: sleep 1000" in output
    assert run.cgroups() == []


def test_every_test_has_a_time_limit(request: pytest.FixtureRequest) -> None:
    limits = [request.config.getini("timeout"), request.config.getini("faulthandler_timeout")]
    assert all(0 < float(limit) < 2 * 3600 for limit in limits)


@pytest.mark.parametrize("how", ["ignore", "block"])
@pytest.mark.parametrize("test", [ACCESSORY, INTERRUPTED])
def test_it_does_not_matter_which_signals_the_caller_ignores_or_blocks(test: str, how: str) -> None:
    wrapper = ("env", f"--{how}-signal")  # all that can be
    with running(run := Run(test, wrapper=wrapper)):
        output = run.output()
        assert run.process.returncode == 0, output
