"""Something that takes a machine, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    passed: bool
    report: str
    """What it printed, and everything else that tells why it did not pass."""


@dataclass(frozen=True)
class Job:
    """A test that runs in the background."""

    name: str
    run: Callable[[], Outcome]
    slow: bool = False
    """Whether it is among those to begin with."""
