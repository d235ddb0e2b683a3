#!/usr/bin/python3
"""Whenever a start of cm4all-spawn-netns@.service fails or is killed, the next one succeeds."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from netns import NAMES, Instance, flags, forgive, host
from support import attempt, keep, run, wait_for

BLUE = Instance("blue")
OUTPUT = Path(os.environ["AUTOPKGTEST_TMP"])
COUNT = OUTPUT / "count"
DEATH = OUTPUT / "death"
NOTHING = host()

TOOLS = ("unshare", "nsenter", "ip", "umount", "rm")
STAND_INS = OUTPUT / "stand-ins"


def stand_in(tool: str, first: str = "step", victims: str = '$(grep -vx $$ "$procs")') -> None:
    """Let VICTIMS and the tool be killed, once, at the step that DEATH says.

    The steps are the moments before (FIRST) and behind each call of a tool. VICTIMS are by default
    all processes of the unit.
    """
    file = STAND_INS / tool
    file.write_text(f"""#!/bin/sh
step() {{
    [ -e {DEATH} ] || return 0
    echo >>{COUNT}
    [ "$(wc -l <{COUNT})" -ge "$(cat {DEATH})" ] || return 0
    /usr/bin/rm -f {DEATH}
    procs=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/cgroup.procs
    kill -KILL {victims} $$
}}
{first}
status=0
/usr/bin/{tool} "$@" || status=$?
step
exit $status
""")
    file.chmod(0o755)


def die_at(step: int) -> None:
    COUNT.write_text("")
    DEATH.write_text(str(step))
    forgive(BLUE)


def works_again() -> None:
    BLUE.set_up_by(":")
    forgive(BLUE)
    BLUE.start()
    assert "UP" in flags(run("ip", "-n", "blue", "-o", "link", "show", "dev", "net0"))
    BLUE.stop()
    assert host() == NOTHING, host()


def a_script_that_fails_fails_the_unit() -> None:
    BLUE.set_up_by("ip link show dev net0", "sleep infinity &", "echo no luck >&2", "exit 3")
    assert BLUE.fail() == f"{BLUE.script} has failed with status 3"
    assert BLUE["ExecMainStatus"] == "3"
    assert "no luck" in BLUE.status()
    assert host() == NOTHING, host()
    works_again()


def a_script_that_cannot_be_run_fails_the_unit() -> None:
    BLUE.script.unlink()
    assert BLUE.fail() == f"there is no script {BLUE.script} to set it up"
    BLUE.script.mkdir()
    assert BLUE.fail() == f"{BLUE.script} is not a file"
    BLUE.script.rmdir()
    BLUE.script.touch(mode=0o644)
    assert BLUE.fail() == f"{BLUE.script} is not executable"
    BLUE.script.write_text("#!/no/such/interpreter\n")
    BLUE.script.chmod(0o755)
    assert BLUE.fail().startswith(f"{BLUE.script} has failed with status ")
    assert "No such file or directory" in BLUE.status()
    assert host() == NOTHING, host()
    works_again()


def a_name_that_no_link_can_have_is_refused_in_one_line() -> None:
    for name, line in (
        ("abcdefghijk", "the name abcdefghijk is too long: it may have at most 10 characters"),
        ("a\\x2db", "the name a\\x2db is escaped: give it as it is, without systemd-escape"),
        ("a:b", "no link can have the name 'a:b'"),
        (".", "no link can have the name '.'"),
        ("..", "no link can have the name '..'"),
        ("all", "no link can have the name 'all'"),
    ):
        unit = Instance(name)
        assert unit.fail() == line
        assert unit["ExecMainStatus"] == "2"
        assert host() == NOTHING, host()


def a_script_that_hangs_is_ended() -> None:
    BLUE.configure("[Service]\nTimeoutStartSec=500ms\n")
    BLUE.set_up_by("sleep infinity")
    forgive(BLUE)
    assert attempt("systemctl", "start", BLUE.name).returncode != 0
    assert (BLUE.state, BLUE["Result"]) == ("failed", "timeout")
    assert host() == NOTHING, host()
    BLUE.configure("")
    works_again()


def start_with_a_script_that_stays() -> None:
    running = OUTPUT / "running"
    running.unlink(missing_ok=True)
    BLUE.set_up_by(f"touch {running}", "sleep infinity")
    forgive(BLUE)
    run("systemctl", "start", "--no-block", BLUE.name)
    wait_for("the script", running.exists)


def a_start_whose_processes_are_killed_leaves_nothing() -> None:
    for whom in ("main", "others"):
        start_with_a_script_that_stays()
        victims = [BLUE.pid] if whom == "main" else sorted({*BLUE.processes()} - {BLUE.pid})
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        wait_for("the end", lambda: BLUE.state == "failed")
        assert host() == NOTHING, host()
        works_again()


def a_start_whose_cgroup_is_killed_does_not_fail_the_next_one() -> None:
    """Whatever is left: in such a cgroup some kernels kill what should clean up, too."""
    start_with_a_script_that_stays()
    run("systemctl", "kill", "--signal=KILL", BLUE.name)
    wait_for("the end", lambda: BLUE.state == "failed")
    works_again()


def a_start_that_is_killed_at_any_step_leaves_nothing() -> None:
    step = 1
    die_at(step)
    while attempt("systemctl", "start", BLUE.name).returncode != 0:
        assert not DEATH.exists(), BLUE.status()
        assert host() == NOTHING, f"after a death at step {step}"
        step += 1
        die_at(step)
    assert DEATH.exists()
    assert step > 10
    DEATH.unlink()
    BLUE.stop()
    assert host() == NOTHING, host()


def a_stop_that_is_killed_at_any_step_does_not_fail_the_next_start() -> None:
    step = 1
    while True:
        forgive(BLUE)
        BLUE.start()
        die_at(step)
        attempt("systemctl", "stop", BLUE.name)
        if DEATH.exists():
            break
        forgive(BLUE)
        BLUE.start()
        BLUE.stop()
        assert host() == NOTHING, f"after a death at step {step}: {host()}"
        step += 1
    assert step > 10
    DEATH.unlink()
    assert host() == NOTHING, host()


def nor_does_a_stop_of_which_a_single_tool_is_killed() -> None:
    for tool in TOOLS:
        stand_in(tool, victims="")
    a_stop_that_is_killed_at_any_step_does_not_fail_the_next_start()


def a_start_that_is_killed_while_the_name_is_made_leaves_nothing() -> None:
    """That is one call of a tool, which makes a file, and then mounts the namespace on it."""
    for tool in TOOLS:
        (STAND_INS / tool).unlink()
    stand_in("ip", f'[ "$2" != attach ] || ! [ -e {DEATH} ] || {{ touch {NAMES}/blue; step; }}')
    die_at(1)
    assert attempt("systemctl", "start", BLUE.name).returncode != 0
    assert not DEATH.exists()
    assert host() == NOTHING, host()
    works_again()


if __name__ == "__main__":
    keep(
        a_script_that_fails_fails_the_unit,
        a_script_that_cannot_be_run_fails_the_unit,
        a_name_that_no_link_can_have_is_refused_in_one_line,
        a_script_that_hangs_is_ended,
        a_start_whose_processes_are_killed_leaves_nothing,
        a_start_whose_cgroup_is_killed_does_not_fail_the_next_one,
    )
    STAND_INS.mkdir()
    for tool in TOOLS:
        stand_in(tool)
    BLUE.configure(f"[Service]\nEnvironment=PATH={STAND_INS}:/usr/bin\n")
    keep(
        a_start_that_is_killed_at_any_step_leaves_nothing,
        a_stop_that_is_killed_at_any_step_does_not_fail_the_next_start,
        nor_does_a_stop_of_which_a_single_tool_is_killed,
        a_start_that_is_killed_while_the_name_is_made_leaves_nothing,
    )
