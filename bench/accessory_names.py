"""``names``: what many names cost that are all leased at the same time.

Each has a PID namespace and four leases. Two daemons run beside each other, one with all these
names and one with a single one, so that whatever else the machine does touches both alike.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench import proc
from bench.accessory_servers import ask_in_turns, running_daemon, settle, start_asker
from bench.figures import Figure
from bench.interrupts import held
from bench.plan import Plan
from bench.progress import progress
from bench.site import Site
from bench.unusable import Unusable
from tests.tools import wire
from tests.tools.accessory import Accessory

NAME: Final = "names"
_LEASES: Final = 4
_HOLDERS: Final = 2  # each with half of the names, since it has a descriptor for each lease
_ASKED: Final = 1000  # requests of one kind in all rounds, for which there must be descriptors
_SAMPLE: Final = 100  # inits whose memory is read, which takes time
_WISHES: Final = {"new ipc": "i", "new pid": "p", "existing name": "p"}

_INIT_TARGET: Final = 100.0  # kB of proportional memory
_NAME_TARGET: Final = 4000  # bytes of the daemon's own memory
_TIME_TARGET: Final = 2.0  # times that with one name
_RESTART_TARGET: Final = 2.0  # seconds


@dataclass(frozen=True)
class Holdings:
    """Memory in bytes: own of daemon and keeper for each name, proportional of some inits."""

    daemon: float
    keeper: float
    inits: tuple[int, ...]


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of one run."""
    with (
        running_daemon(site, "many") as many,
        running_daemon(site, "one") as one,
        ExitStack() as stack,
    ):
        holdings = _hold(stack, site, many, plan.names)
        _start_holder(stack, site, one, ["name-0"])
        times = _ask(site, one, many, plan.rounds)
        settle(many.pid)
        before = _names(many)
        seconds = _restart(many)
        if _names(many) != before:
            raise Unusable(f"there were {before} names, and {_names(many)} after a restart")
        progress(f"{NAME}: restarted in {seconds:.2f} s")
    return [*_figures(plan.names, holdings, seconds), *_time_figures(plan.names, times)]


def _hold(stack: ExitStack, site: Site, daemon: Accessory, count: int) -> Holdings:
    """Make all names; return what they cost."""
    settle(daemon.pid)
    pids = daemon.pid, daemon.keeper()
    before = [proc.memory(pid).private for pid in pids]
    progress(f"{NAME}: making {count} names with {count * _LEASES} leases")
    names = [f"name-{number}" for number in range(count)]
    for half in range(_HOLDERS):
        _start_holder(stack, site, daemon, names[half::_HOLDERS])
    settle(daemon.pid)
    after = [proc.memory(pid).private for pid in pids]
    inits = sorted(daemon.inits())
    if len(inits) != count:
        raise Unusable(f"{len(inits)} inits run for {count} names")
    sample = inits[:: max(1, count // _SAMPLE)]
    return Holdings(
        daemon=(after[0] - before[0]) / count,
        keeper=(after[1] - before[1]) / count,
        inits=tuple(proc.memory(pid).proportional for pid in sample),
    )


def _start_holder(stack: ExitStack, site: Site, daemon: Accessory, names: Sequence[str]) -> None:
    """Make NAMES, each with a PID namespace, and let somebody hold leases until STACK ends."""
    asked = [name for name in names for _ in range(_LEASES)]
    # It ends by itself with the pipe, should nobody be left to end it.
    holder = start_asker(stack, site, daemon.address, "pl", asked, stdin=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stderr is not None
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    line = holder.stderr.readline()
    try:
        json.loads(line)
    except ValueError:
        raise Unusable(f"the asker failed: {line.decode().strip()}") from None


def _ask(
    site: Site, one: Accessory, many: Accessory, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return medians in microseconds of each round: with one name, and with many."""
    count = _ASKED // rounds
    times: dict[str, list[tuple[float, float]]] = {what: [] for what in _WISHES}
    for number in range(rounds):
        for what, kinds in _WISHES.items():
            names = [f"{kinds}-{number}-{serial}" for serial in range(count)]
            if what == "existing name":
                names = ["name-0"] * count
            with_one, with_many = ask_in_turns(site, (one.address, many.address), kinds, names)
            times[what].append((with_one, with_many))
            progress(
                f"{NAME}, {what}: round {number + 1} of {rounds}: with one name "
                f"{with_one:.1f} us, with many {with_many:.1f} us"
            )
    return times


def _names(daemon: Accessory) -> int:
    """Return how many names the daemon says that it has."""
    with daemon.client() as client, client.ask((wire.STATUS, b"")) as answer:
        text = dict(answer.packets)[wire.STATUS_TEXT].decode()
    return int(dict(line.split("=") for line in text.splitlines())["names"])


def _restart(daemon: Accessory) -> float:
    """Return the seconds from SIGTERM until the next daemon is ready."""
    with held():
        started = time.monotonic()
        daemon.stop()
        daemon.start()
        return time.monotonic() - started


def _figures(count: int, holdings: Holdings, seconds: float) -> list[Figure]:
    def figure(what: str, unit: str, value: float, target: float | None = None) -> Figure:
        return Figure(NAME, what, unit, (value,), target)

    inits = [size / 1000 for size in holdings.inits]
    return [
        figure(f"init, Pss, median, {count} names", "kB", statistics.median(inits), _INIT_TARGET),
        figure(f"init, Pss, mean, {count} names", "kB", statistics.mean(inits), _INIT_TARGET),
        figure("daemon's own memory per name", "B", holdings.daemon, _NAME_TARGET),
        figure("keeper's own memory per name", "B", holdings.keeper),
        figure("restart, SIGTERM to ready", "s", seconds, _RESTART_TARGET),
    ]


def _time_figures(count: int, times: dict[str, list[tuple[float, float]]]) -> Iterator[Figure]:
    for what, rounds in times.items():
        ratios = tuple(many / one for one, many in rounds)
        yield Figure(NAME, f"{what}, one name", "us", tuple(one for one, _ in rounds))
        yield Figure(NAME, f"{what}, {count} names", "us", tuple(many for _, many in rounds))
        yield Figure(NAME, f"{what}, {count} names / one", "times", ratios, _TIME_TARGET)
