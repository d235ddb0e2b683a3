"""What the tests of the packages share: which ones there are, and apt, as it runs unattended."""

from __future__ import annotations

from typing import Final

from support import Unit, run

ACCESSORY: Final = "cm4all-spawn-accessory"
CLIENT: Final = "cm4all-spawn-client"
DOC: Final = "cm4all-spawn-doc"
MODULES: Final = "python3-cm4all-spawn"
NETNS: Final = "cm4all-spawn-netns"
REAPER: Final = "cm4all-spawn-reaper"
SLICE: Final = "cm4all-slice"
ALL: Final = (SLICE, ACCESSORY, CLIENT, DOC, NETNS, REAPER, MODULES)

SLICE_UNIT: Final = Unit("system-cm4all.slice")


def apt(*arguments: str) -> str:
    """Run apt-get as unattended upgrades do: nobody is there who could answer a question."""
    return run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--yes", "-qq", *arguments)


def states() -> dict[str, tuple[str, str]]:
    """Return status and version of those that dpkg knows, if only because of their settings."""
    form = "${Package}\t${db:Status-Status}\t${Version}\n"
    lines = run("dpkg-query", "--show", "--showformat", form).splitlines()
    found = (line.split("\t") for line in lines)
    return {
        name: (status, version)
        for name, status, version in found
        if name in ALL and status != "not-installed"
    }


def installed() -> dict[str, str]:
    """Return the versions of those that are installed completely."""
    return {name: version for name, (status, version) in states().items() if status == "installed"}
