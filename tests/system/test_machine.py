"""What the machines and the runner promise, so that a failure in there is one out here."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spawn_common import linux
from tests.system import image
from tests.system.emulated import EmulatedMachine
from tests.system.machine import Failed, Host, Machine
from tests.system.scripts import read_control, run_script
from tests.tools.harness import DEADLINE, wait_for
from tests.tools.native import ROOT

FAILS = """
systemd-run --quiet --wait --unit=cm4all-example sh -c 'echo from the daemon'
echo from the script >&2
exit 3
"""


@pytest.fixture(
    params=[lambda: Machine(image.installed()), EmulatedMachine], ids=["quick", "emulated"]
)
def machine(request: pytest.FixtureRequest) -> Iterator[Host]:
    with request.param() as booted:
        yield booted


def write_script(tree: Path, text: str) -> None:
    script = tree / "debian" / "tests" / "example"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)


def traces(name: str) -> list[str]:
    """Return what exists of machines whose cgroup has this name, or begins with it."""
    mount = linux.find_cgroup2_mount()
    assert mount is not None
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return [
        *(str(path) for path in Path(os.fsdecode(mount.path)).glob(f"{name}*")),
        *(str(path) for path in Path(tempfile.gettempdir()).glob(f"{name}*")),
        *(line for line in mounts if name in line),
        *(
            str(process)
            for process in Path("/proc").glob("[0-9]*/cmdline")
            if name.encode() in _content(process)
        ),
    ]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_a_machine_is_up_and_running(machine: Host) -> None:
    assert machine.run("systemctl", "is-system-running").stdout == "running\n"
    assert machine.run("ip", "-oneline", "link").stdout.startswith("1: lo:")
    assert machine.run("unshare", "--user", "--net", "--map-root-user", "true").returncode == 0


def test_the_emulated_machine_has_the_controllers() -> None:
    with EmulatedMachine() as machine:
        controllers = machine.run("cat", "/sys/fs/cgroup/cgroup.controllers").stdout.split()
    assert {"cpu", "io", "memory", "pids"} <= set(controllers)


def test_a_script_that_passes_has_passed(machine: Host, tmp_path: Path) -> None:
    write_script(tmp_path, 'test -d "$AUTOPKGTEST_TMP" && test "$(id -u)" = 0 && test -d debian')
    outcome = run_script(machine, "example", source=tmp_path, seconds=60)
    assert outcome.passed, outcome.report


def test_a_failing_script_is_a_failure_with_its_output_and_the_journal(
    machine: Host, tmp_path: Path
) -> None:
    write_script(tmp_path, FAILS)
    outcome = run_script(machine, "example", source=tmp_path, seconds=60)
    assert not outcome.passed
    for part in ("exit status 3", "from the script", "from the daemon"):
        assert part in outcome.report


def test_a_script_that_hangs_is_a_failure_with_its_output(machine: Host, tmp_path: Path) -> None:
    write_script(tmp_path, "echo so far; exec sleep 1000")
    outcome = run_script(machine, "example", source=tmp_path, seconds=1)
    assert not outcome.passed
    assert "did not end within 1 s" in outcome.report
    assert "so far" in outcome.report


def test_a_script_that_does_not_exist_is_a_failure(machine: Host, tmp_path: Path) -> None:
    write_script(tmp_path, ":")
    outcome = run_script(machine, "other", source=tmp_path, seconds=60)
    assert not outcome.passed
    assert "exit status 127" in outcome.report


def test_a_script_that_ends_its_machine_is_a_failure(tmp_path: Path) -> None:
    write_script(tmp_path, "systemctl --force --force poweroff; exec sleep 1000")
    with Machine(image.installed()) as machine:
        assert not run_script(machine, "example", source=tmp_path, seconds=60).passed


def test_a_panic_is_a_failure_with_what_the_kernel_said(tmp_path: Path) -> None:
    write_script(tmp_path, "echo c >/proc/sysrq-trigger")
    with EmulatedMachine() as machine:
        outcome = run_script(machine, "example", source=tmp_path, seconds=60)
    assert not outcome.passed
    assert "Kernel panic" in outcome.report


def test_a_command_ends_when_the_runner_is_killed(tmp_path: Path) -> None:
    started = tmp_path / "started"
    command = f"echo $$ >{started}; exec sleep 1000"
    code = f"from tests.system import image; image.run('sh', '-c', '{command}')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as runner:
        wait_for("it runs", lambda: started.exists() and started.read_text() != "")
        pidfd = os.pidfd_open(int(started.read_text()))
        runner.kill()
    assert select.select([pidfd], [], [], DEADLINE)[0]
    os.close(pidfd)


def test_without_systemd_nothing_boots_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="did not boot"):
        Machine(tmp_path)
    assert traces(f"cm4all-spawn-machine-{os.getpid()}-") == []


def test_a_boot_that_hangs_is_a_failure_and_nothing_stays(tmp_path: Path) -> None:
    systemd = tmp_path / "usr/lib/systemd/systemd"
    systemd.parent.mkdir(parents=True)
    systemd.write_text("#!/bin/sh\nexec sleep 1000\n")
    systemd.chmod(0o755)
    with pytest.raises(Failed, match="did not boot"):
        Machine(Path(f"{tmp_path}:{image.installed()}"), seconds=1)
    assert traces(f"cm4all-spawn-machine-{os.getpid()}-") == []


def test_closing_leaves_nothing() -> None:
    with Machine(image.installed()) as machine:
        name = machine.cgroup.name
        machine.run("ip", "netns", "add", "example").check_returncode()
        machine.run("mkdir", "--parents", "/sys/fs/cgroup/a/b").check_returncode()
        machine.run("sh", "-c", "sleep 1000 >/dev/null 2>&1 &").check_returncode()
        assert traces(name) != []
    assert traces(name) == []


@pytest.mark.parametrize("kind", ["Machine(image.installed())", "EmulatedMachine()"])
def test_nothing_stays_when_the_runner_is_killed(kind: str) -> None:
    code = f"""if True:
        from tests.system import image
        from tests.system.emulated import EmulatedMachine
        from tests.system.machine import Machine
        machine = {kind}
        print("booted", flush=True)
        machine.run("sleep", "1000", seconds=1000)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == "booted\n"
        task = Path(f"/proc/{runner.pid}/task/{runner.pid}")
        children = [Path("/proc") / pid for pid in (task / "children").read_text().split()]
        assert children
        runner.kill()
    wait_for("its processes have ended", lambda: not any(child.exists() for child in children))
    wait_for("nothing is left", lambda: traces(f"cm4all-spawn-machine-{runner.pid}-") == [])


def test_the_control_file_says_which_scripts_need_controllers(tmp_path: Path) -> None:
    control = tmp_path / "control"
    control.write_text(
        "# a comment\nTests: one, two,\n three\nRestrictions: needs-root\n\n"
        "Tests: four\nClasses: controllers\n"
    )
    assert [(script.name, script.controllers) for script in read_control(control)] == [
        ("one", False),
        ("two", False),
        ("three", False),
        ("four", True),
    ]
