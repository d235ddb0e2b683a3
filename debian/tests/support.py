"""What test scripts share. They run as root in a machine of their own, and may change all of it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

DEADLINE: Final = 20.0
PACKAGES: Final = Path("/srv/packages")  # what was built, and what apt installs from


def keep(*promises: Callable[[], None]) -> None:
    """Check promises one after the other; one that is broken ends the script."""
    for promise in promises:
        promise()
        print("ok:", promise.__name__.replace("_", " "), flush=True)


def wait_for(what: str, condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Return as soon as CONDITION holds; AssertionError if it does not within SECONDS."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def attempt(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what it writes, to standard error too, is in ``stdout``."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


def run(*command: str | Path) -> str:
    """Run a command that has to succeed, and return what it writes."""
    done = attempt(*command)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}"
    return done.stdout


class Unit:
    """A unit of the service manager."""

    def __init__(self, name: str) -> None:
        """NAME has its suffix, such as .service."""
        self.name = name

    def __getitem__(self, key: str) -> str:
        """Return a property, as "systemctl show" has it."""
        return run("systemctl", "show", "--property", key, "--value", self.name).rstrip("\n")

    @property
    def state(self) -> str:
        """Whether it is active, inactive, failed ..."""
        return self["ActiveState"]

    @property
    def pid(self) -> int:
        """The process id of a service, 0 if it has none."""
        return int(self["MainPID"])

    @property
    def restarts(self) -> int:
        """How often the service manager has started the service again by itself."""
        return int(self["NRestarts"])

    def start(self) -> None:
        """Start it."""
        run("systemctl", "start", self.name)

    def stop(self) -> None:
        """Stop it."""
        run("systemctl", "stop", self.name)

    def restart(self) -> None:
        """Stop and start it."""
        run("systemctl", "restart", self.name)

    def reload(self) -> None:
        """Let the service read its configuration again."""
        run("systemctl", "reload", self.name)

    def status(self) -> str:
        """Return what administrators see; any exit status is fine."""
        return attempt("systemctl", "status", "--no-pager", "--full", self.name).stdout

    def journal(self) -> list[str]:
        """Return all that was logged about it and by it, line by line."""
        run("journalctl", "--sync")
        return run("journalctl", "--output", "cat", "--unit", self.name).splitlines()

    def processes(self) -> dict[int, str]:
        """Return pid and name of everything in its cgroup, also after it was stopped."""
        found = {}
        if cgroup := self["ControlGroup"]:
            for pid in Path(f"/sys/fs/cgroup{cgroup}/cgroup.procs").read_text().split():
                with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                    found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
        return found

    def configure(self, text: str) -> None:
        """Have a drop-in say TEXT; it counts from the next start on."""
        directory = Path(f"/etc/systemd/system/{self.name}.d")
        directory.mkdir(exist_ok=True)
        (directory / "test.conf").write_text(text)
        run("systemctl", "daemon-reload")


def built(package: str) -> Path:
    """Return the file of a package that was built."""
    (file,) = PACKAGES.glob(f"{package}_*.deb")
    return file


def version_of(package: str) -> str:
    """Return the version that is installed."""
    return run("dpkg-query", "--show", "--showformat", "${Version}", package)


def repacked(package: str, version: str) -> Path:
    """Return a file of the package as it was built, but for its VERSION.

    It wants what else comes from the same source in that version, too.
    """
    file = built(package)
    current = run("dpkg-deb", "--field", file, "Version").strip()
    with unpacked(file) as directory:
        control = directory / "DEBIAN" / "control"
        text = control.read_text()
        text = text.replace(f"Version: {current}\n", f"Version: {version}\n")
        control.write_text(text.replace(f"(= {current})", f"(= {version})"))
        return packed(directory)


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """Return a directory with what is in the FILE of a package; it ends with the context."""
    directory = Path(tempfile.mkdtemp())
    try:
        run("dpkg-deb", "--raw-extract", file, directory)
        yield directory
    finally:
        shutil.rmtree(directory)


def packed(directory: Path) -> Path:
    """Return the file of a package made from such a directory."""
    place = tempfile.mkdtemp()
    run("dpkg-deb", "--build", "-Znone", "--root-owner-group", directory, place)
    (file,) = Path(place).iterdir()
    return file
