"""Each package alone, on the smallest Debian: apt brings all that it needs, and no more."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.system import image
from tests.system.job import Job, Outcome

WORKS = {
    "cm4all-slice": "test -e /usr/lib/systemd/system/system-cm4all.slice",
    "cm4all-spawn-accessory": """
        cm4all-spawn-accessory --version
        cm4all-spawn-accessory --check
        test -x /usr/libexec/cm4all-spawn/cm4all-spawn-keeper
        test -x /usr/libexec/cm4all-spawn/cm4all-spawn-init
        for library in python3-lupa python3-psycopg python3-nacl; do
            if dpkg-query --show $library; then exit 1; fi
        done
        """,
    "cm4all-spawn-client": "cm4all-spawn-client --version",
    "cm4all-spawn-doc": "test -d /usr/share/doc/cm4all-spawn-doc",
    "cm4all-spawn-netns": "ip netns list && sh -n /usr/libexec/cm4all-spawn/netns",
    "cm4all-spawn-reaper": """
        cm4all-spawn-reaper --version
        cm4all-spawn-reaper --check
        echo 'pg:new("") sodium.randombytes(1) control_resolve("127.0.0.1")' >/root/reaper.lua
        cm4all-spawn-reaper --check --lua /root/reaper.lua
        """,
    "python3-cm4all-spawn": "python3 -c 'import spawn_client.accessory, spawn_common.service'",
}
"""What shows that a package works, as far as it does where no systemd runs."""


def install_alone(package: str) -> Outcome:
    """Install a package, without recommended ones, from Debian's repository and ours."""
    script = f"set -eux; apt-get update -q; apt-get install -q -y --no-install-recommends {package}"
    with TemporaryDirectory() as layer:
        image.write_repository(Path(layer), image.built_packages())
        result = subprocess.run(
            [
                *("sh", str(image.HERE / "enter"), "--throwaway", f"{layer}:{image.minimal()}"),
                *(
                    "env",
                    "DEBIAN_FRONTEND=noninteractive",
                    "sh",
                    "-c",
                    f"{script}\n{WORKS[package]}",
                ),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    return Outcome(result.returncode == 0, result.stdout)


JOBS = [Job(package, partial(install_alone, package)) for package in WORKS]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_dependencies(outcome: Outcome) -> None:
    if not outcome.passed:
        pytest.fail(outcome.report, pytrace=False)


def test_every_package_is_tried() -> None:
    assert {image.package_name(package) for package in image.built_packages()} == set(WORKS)
