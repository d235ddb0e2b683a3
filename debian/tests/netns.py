"""What the tests of cm4all-spawn-netns@.service share: an instance, and what there is of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from support import Unit, attempt, run

SCRIPTS: Final = Path("/etc/cm4all/spawn/netns/setup.d")
NAMES: Final = Path("/run/netns")

# What the C++ suite has in the place of our unit.
SUITE_UNIT: Final = """
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip netns add %i
ExecStart=ip link add name %i type veth peer name %i_peer
ExecStart=ip link set %i_peer netns %i
ExecStart=ip netns exec %i ip link set %i_peer name net0 up
ExecStop=-ip link delete %i
ExecStop=-ip netns delete %i
"""


class Instance(Unit):
    """An instance of the template."""

    def __init__(self, instance: str) -> None:
        """INSTANCE is what is between @ and .service."""
        super().__init__(f"cm4all-spawn-netns@{instance}.service")
        self.instance = instance
        self.script = SCRIPTS / instance

    def set_up_by(self, *lines: str) -> None:
        """Let the administrator's script be these lines."""
        self.script.unlink(missing_ok=True)
        self.script.write_text("\n".join(("#!/bin/sh -e", *lines, "")))
        self.script.chmod(0o755)

    def fail(self) -> str:
        """Start it, which has to fail; return the line that the status ends with.

        What the service manager itself says about the failure is left out.
        """
        forgive(self)
        assert attempt("systemctl", "start", self.name).returncode != 0
        assert self.state == "failed"
        run("journalctl", "--sync")
        said = run(
            "journalctl", "--output", "cat", f"_SYSTEMD_INVOCATION_ID={self['InvocationID']}"
        ).splitlines()
        assert said, self.status()
        assert said[-1] in self.status()
        return said[-1]


def forgive(unit: Unit) -> None:
    """Forget failures, and how often the unit was started."""
    attempt("systemctl", "reset-failed", unit.name)


def inode(path: Path) -> int:
    """Tell a namespace from others, while it lives."""
    return path.stat().st_ino


def inside(name: str, *command: str) -> str:
    """Run a command in a named network namespace."""
    return run("ip", "netns", "exec", name, *command)


def flags(listing: str) -> set[str]:
    """Return the flags of a link that "ip -o link show dev" tells about."""
    return set(listing.partition("<")[2].partition(">")[0].split(","))


def host() -> dict[str, list[str]]:
    """Return all that instances make and may leave, whichever they are."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        "links": sorted(os.listdir("/sys/class/net")),
        "names": sorted(os.listdir(NAMES)) if NAMES.exists() else [],
        "mounts": [line.split()[4] for line in mounts if " - nsfs " in line],
        "marks": sorted(str(path) for path in Path("/run").glob("cm4all-spawn-netns*")),
        "processes": processes(),
    }


def processes() -> list[str]:
    """Return what runs in units of the template."""
    slice_ = Path("/sys/fs/cgroup/system.slice/system-cm4all\\x2dspawn\\x2dnetns.slice")
    found = []
    for file in slice_.rglob("cgroup.procs"):
        for pid in file.read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                command = Path(f"/proc/{pid}/cmdline").read_text()
                found.append(command.replace("\0", " ").rstrip())
    return found
