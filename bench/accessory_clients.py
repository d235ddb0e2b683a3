"""``clients``: how many requests for an existing name are answered when several clients ask."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Final

from bench.accessory_servers import running_daemon, running_floor, start_asker
from bench.figures import Figure
from bench.generator import report_of
from bench.plan import Plan
from bench.progress import progress
from bench.site import Site

NAME: Final = "clients"
_TARGET: Final = 0.6  # times the bare loop's rate
_CLIENTS: Final = 8
_KINDS: Final = "ipu"


def measure(site: Site, plan: Plan) -> list[Figure]:
    """Return the figures of all rounds."""
    bare: list[float] = []
    ours: list[float] = []
    for number in range(plan.rounds):
        with (
            running_floor(site, _KINDS, "epoll") as floor,
            running_daemon(site, "accessory") as daemon,
        ):
            sides = [(bare, floor), (ours, daemon.address)]
            # Neither is always the first.
            for rates, address in sides if number % 2 == 0 else reversed(sides):
                rates.append(_rate(site, address, plan.asking))
        progress(
            f"{NAME}: round {number + 1} of {plan.rounds}: floor {bare[-1]:.0f} per s, "
            f"daemon {ours[-1]:.0f} per s"
        )
    ratios = tuple(one / other for one, other in zip(ours, bare, strict=True))
    return [
        Figure(NAME, f"requests of {_CLIENTS} clients, floor", "per s", tuple(bare)),
        Figure(NAME, f"requests of {_CLIENTS} clients, daemon", "per s", tuple(ours)),
        Figure(NAME, "requests, daemon / floor", "times", ratios, _TARGET, at_least=True),
    ]


def _rate(site: Site, address: str, seconds: int) -> float:
    """Return how many requests per second all clients together get answered."""
    with ExitStack() as stack:
        waiting, go = os.pipe()
        try:
            askers = [
                start_asker(stack, site, address, _KINDS, ["bench"], seconds=seconds, stdin=waiting)
                for _ in range(_CLIENTS)
            ]
        finally:
            os.close(waiting)
            os.close(go)  # all begin now
        reports = [report_of(asker, "the asker") for asker in askers]
        return float(sum(report["requests"] / report["seconds"] for report in reports))
