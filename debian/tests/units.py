#!/usr/bin/python3
"""The units have no fault, and confine the daemons as much as their work allows."""

from __future__ import annotations

from support import attempt, keep, run

EXPOSURE = {"cm4all-spawn-reaper.service": 2.0, "cm4all-spawn-accessory.service": 4.5}


def installed() -> list[str]:
    """Return the units of all our packages; of a template, an instance."""
    packages = run("dpkg-query", "--show", "--showformat=${Package}\n", "cm4all-*").split()
    files = run("dpkg-query", "--listfiles", *packages).splitlines()
    names = {
        file.rpartition("/")[2]
        for file in files
        if "/systemd/system/" in file and file.endswith((".service", ".socket", ".slice"))
    }
    return sorted(name.replace("@.", "@blue.") for name in names)


def there_is_nothing_to_say_about_the_units() -> None:
    units = installed()
    assert len(units) == 5, units
    assert run("systemd-analyze", "verify", *units) == ""


def the_daemons_are_exposed_no_more_than_they_have_to_be() -> None:
    for unit, most in EXPOSURE.items():
        done = attempt(
            "systemd-analyze", "security", "--no-pager", f"--threshold={10 * most:.0f}", unit
        )
        print(done.stdout.splitlines()[-1].strip())
        assert done.returncode == 0


if __name__ == "__main__":
    keep(
        there_is_nothing_to_say_about_the_units,
        the_daemons_are_exposed_no_more_than_they_have_to_be,
    )
