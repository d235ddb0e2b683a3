"""The test scripts of debian/tests: which there are, and what comes of them in a machine."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.system import image
from tests.system.emulated import EmulatedMachine
from tests.system.job import Outcome
from tests.system.machine import Failed, Host, Machine
from tests.tools.native import ROOT

CONTROL = ROOT / "debian" / "tests" / "control"
CONTROLLERS = "controllers"
SECONDS = 300.0
EMULATED_SECONDS = 600.0

_SOURCE = "/root/source"
_OUTPUT = "/root/output"
_SETUP = f"mkdir -p {_SOURCE} /root/tmp && tar --extract --directory {_SOURCE}"
_RUN = (
    f'cd {_SOURCE} && AUTOPKGTEST_TMP=/root/tmp exec "debian/tests/$1" >{_OUTPUT} 2>&1 </dev/null'
)
_JOURNAL = ["journalctl", "--no-pager", "--output=short-precise", "--boot", "--unit=cm4all-*"]


@dataclass(frozen=True)
class Script:
    """A file in debian/tests that is a test."""

    name: str
    controllers: bool
    """It needs the controllers of cgroup v2, which only the emulated machine has."""


def read_control(path: Path = CONTROL) -> list[Script]:
    """Return the scripts that a file in the format of autopkgtest's debian/tests/control lists."""
    return [
        Script(name, CONTROLLERS in _words(paragraph.get("classes", "")))
        for paragraph in _paragraphs(path.read_text())
        for name in _words(paragraph["tests"])
    ]


def run_script(machine: Host, name: str, *, source: Path = ROOT, seconds: float) -> Outcome:
    """Run a script of the tree SOURCE as autopkgtest does: as root, in a copy of the tree."""
    try:
        machine.run("sh", "-c", _SETUP, stdin=_archive(source)).check_returncode()
        verdict = _verdict(machine, name, seconds)
        output = machine.run("cat", _OUTPUT).stdout
        if verdict is None:
            return Outcome(True, output)
        journal = machine.run(*_JOURNAL).stdout
    except (Failed, subprocess.SubprocessError) as error:
        return Outcome(False, f"{name}: {error}\n--- console\n{machine.console()}")
    return Outcome(False, f"{name}: {verdict}\n--- output\n{output}\n--- journal\n{journal}")


def _verdict(machine: Host, name: str, seconds: float) -> str | None:
    """Return why a script did not pass; None if it did."""
    try:
        status = machine.run("sh", "-c", _RUN, "sh", name, seconds=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"did not end within {seconds:g} s"
    return f"exit status {status}" if status else None


def run_in_fresh_machine(script: Script) -> Outcome:
    """Boot the machine that a script needs, and run it there."""
    try:
        if script.controllers:
            with EmulatedMachine() as emulated:
                return run_script(emulated, script.name, seconds=EMULATED_SECONDS)
        with Machine(image.installed()) as machine:
            return run_script(machine, script.name, seconds=SECONDS)
    except Failed as error:
        return Outcome(False, f"{script.name}: {error}")


def _archive(source: Path) -> bytes:
    """Return what scripts may read of the tree, as a tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("debian", "README.md"):
            if (source / name).exists():
                archive.add(source / name, name)
    return buffer.getvalue()


def _paragraphs(text: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each paragraph of a control file, their names in lower case."""
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0] in " \t":
                fields[name] += f" {line.strip()}"
            else:
                name, _, value = line.partition(":")
                name = name.lower()
                fields[name] = value.strip()
        if fields:
            yield fields


def _words(value: str) -> list[str]:
    return value.replace(",", " ").split()
