#!/usr/bin/python3
"""What README says about installing on Debian, followed word for word."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

from support import PACKAGES, Unit, attempt, keep, run, wait_for

README: Final = Path("README.md").read_text()
ACCESSORY: Final = Unit("cm4all-spawn-accessory.service")
REAPER: Final = Unit("cm4all-spawn-reaper.service")


def _commands() -> list[str]:
    """Return the blocks of commands of the section."""
    _, section = README.split("\n## Install on Debian\n")
    section = section.split("\n## ")[0]
    blocks = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]


MAKE, INSTALL, START, ASK, JOB, CHECK, RELOAD = _commands()


def follow(commands: str) -> str:
    """Run commands as the reader's shell would, but without sudo; return what they print."""
    commands = re.sub(r"sudo -u (\S+)", r"runuser -u \1 --", commands).replace("sudo ", "")
    shell = ["sh", "-e", "-c", commands]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{commands}: {done.stdout}{done.stderr}"
    return done.stdout


def the_packages_install() -> None:
    assert MAKE == "make deb\n"  # which made what is in PACKAGES
    attempt("apt-get", "purge", "--yes", "cm4all-*", "python3-cm4all-spawn")
    assert not Path("/usr/sbin/cm4all-spawn-reaper").exists()
    Path("build").mkdir()
    Path("build/deb").symlink_to(PACKAGES)
    follow(INSTALL.replace("install", "install --yes"))
    assert (ACCESSORY.state, REAPER.state) == ("inactive", "inactive")


def the_daemons_start() -> None:
    assert "active (running)" in follow(START)
    assert ACCESSORY.state == "inactive"


def the_accessory_starts_when_it_is_asked() -> None:
    processes, names = follow(ASK).split("NAME ")
    assert re.search(r"^ +1 .* init-shop\b", processes, re.MULTILINE), processes
    assert re.search(r"^shop +ipc,pid ", names, re.MULTILINE), names
    assert ACCESSORY.state == "active"


def the_job_is_logged() -> None:
    line = follow(JOB)
    assert re.match(r"job: since=\S+ cpu=\d+\.\ds/\d+\.\ds/\d+\.\ds", line), line


def the_script_is_loaded_again() -> None:
    script = Path("/etc/cm4all/spawn/reaper.lua")
    script.write_text('print("loaded")\nfunction cgroup_released(cgroup) end\n')
    follow(CHECK)
    follow(RELOAD)
    journal = ("journalctl", "-o", "cat", "-u", REAPER.name)
    wait_for("the script has run", lambda: "loaded\n" in run(*journal))


keep(
    the_packages_install,
    the_daemons_start,
    the_accessory_starts_when_it_is_asked,
    the_job_is_logged,
    the_script_is_loaded_again,
)
