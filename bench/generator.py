"""The process spawner under whose load the reaper is measured (tests/tools/spawner.c)."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import start
from bench.site import SPAWNER_CGROUP, Site
from bench.unusable import Unusable


@dataclass(frozen=True)
class Generated:
    """What the spawner says at its end: ``created`` counts the cgroups, not the names."""

    jobs: int
    created: int
    seconds: float

    @property
    def rate(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds


def generate(
    stack: ExitStack,
    site: Site,
    scope: Path,
    count: int,
    *options: str,
    stdout: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start the spawner: COUNT jobs in SCOPE."""
    return start(
        stack,
        [site.spawner, "--enter", SPAWNER_CGROUP, *options, scope, str(count)],
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def result(generator: subprocess.Popen[bytes]) -> Generated:
    """Wait for the spawner and return what it did."""
    report = report_of(generator, "the spawner")
    created = report["created"]["targets"]
    return Generated(report["jobs"], created, report["seconds"])


def report_of(process: subprocess.Popen[bytes], name: str) -> dict[str, Any]:
    """Wait for a process that ends with a line of JSON on standard error, and return that."""
    _, errors = process.communicate()
    text = errors.decode(errors="replace").strip()
    if process.returncode != 0:
        raise Unusable(f"{name} failed: {text}")
    report: dict[str, Any] = json.loads(text)
    return report
