"""``accessory``: how long an answer takes, compared with the system calls that it takes.

A round asks the bare server of accessory_floor.c and the daemon for the same, both new and in
cgroups of their own; ratios are made round by round. What the command ``unshare`` takes for the
same namespaces, process and all, is printed beside it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.accessory_servers import ask_in_turns, running_daemon, running_floor
from bench.figures import Figure
from bench.plan import Plan
from bench.progress import progress
from bench.site import Site
from bench.unusable import Unusable

NAME: Final = "accessory"
_TARGET: Final = 1.6
_COMMANDS: Final = 50  # runs of unshare in a round


@dataclass(frozen=True)
class Wish:
    """What is asked for: letters for accessory_floor.c, options for unshare if that can do it."""

    name: str
    kinds: str
    options: tuple[str, ...]


_EXISTING: Final = Wish("existing name", "ipu", ())
_WISHES: Final = (
    Wish("new ipc", "i", ("--ipc",)),
    Wish("new user", "u", ("--user", "--map-root-user")),
    Wish("new pid", "p", ("--pid", "--fork")),
    Wish("all three and lease", "ipul", ("--ipc", "--user", "--map-root-user", "--pid", "--fork")),
    _EXISTING,
)


@dataclass(frozen=True)
class Round:
    """Medians in microseconds; ``unshare`` is 0 if there is nothing to compare with."""

    floor: float
    daemon: float
    unshare: float

    @property
    def ratio(self) -> float:
        """How many times the floor the daemon takes."""
        return self.daemon / self.floor


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of all wishes."""
    figures: list[Figure] = []
    for wish in _WISHES:
        rounds = []
        for number in range(plan.rounds):
            rounds.append(_round(site, wish, plan.asked))
            progress(
                f"{NAME}, {wish.name}: round {number + 1} of {plan.rounds}: "
                f"floor {rounds[-1].floor:.1f} us, daemon {rounds[-1].daemon:.1f} us, "
                f"ratio {rounds[-1].ratio:.2f}"
            )
        figures += _figures(wish, rounds)
    return figures


def _round(site: Site, wish: Wish, count: int) -> Round:
    existing = wish is _EXISTING
    names = ["bench" if existing else f"bench-{number}" for number in range(count)]
    with (
        running_floor(site, wish.kinds, "same" if existing else "new") as floor,
        running_daemon(site, "accessory") as daemon,
    ):
        medians = ask_in_turns(site, (floor, daemon.address), wish.kinds, names)
    return Round(*medians, unshare=_unshare(wish.options) if wish.options else 0.0)


def _unshare(options: Sequence[str]) -> float:
    """Return the median of microseconds from the start of the command to its end."""
    program = shutil.which("unshare")
    if program is None:
        raise Unusable("there is no command unshare (util-linux)")
    samples = []
    for _ in range(_COMMANDS):
        started = time.perf_counter()
        pid = os.posix_spawn(program, [program, *options, "true"], os.environ)
        _, status = os.waitpid(pid, 0)
        samples.append((time.perf_counter() - started) * 1e6)
        if status != 0:
            raise Unusable(f"unshare {' '.join(options)} failed")
    return statistics.median(samples)


def _figures(wish: Wish, rounds: Sequence[Round]) -> Iterator[Figure]:
    def figure(
        what: str, unit: str, samples: Sequence[float], target: float | None = None
    ) -> Figure:
        return Figure(NAME, f"{wish.name}, {what}", unit, tuple(samples), target)

    yield figure("floor", "us", [r.floor for r in rounds])
    yield figure("daemon", "us", [r.daemon for r in rounds])
    yield figure("daemon / floor", "times", [r.ratio for r in rounds], _TARGET)
    if wish.options:
        yield figure("unshare command", "us", [r.unshare for r in rounds])
