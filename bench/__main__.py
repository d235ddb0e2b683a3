"""Run the benchmarks: ``python -m bench [--quick] [--rounds N] [NAME...]``, as root."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from bench import (
    absent,
    accessory,
    accessory_clients,
    accessory_idle,
    accessory_names,
    alive,
    burst,
    delay,
    idle,
    insert,
    interrupts,
    release,
)
from bench.figures import Figure, append, table
from bench.plan import FULL, QUICK, Plan
from bench.progress import progress
from bench.site import Site, make_site
from bench.unusable import Unusable
from tests.tools.native import BUILD

_BENCHMARKS: Final[dict[str, Callable[[Site, Plan], list[Figure]]]] = {
    release.NAME: release.measure,
    burst.NAME: burst.measure,
    delay.NAME: delay.measure,
    alive.NAME: alive.measure,
    idle.NAME: idle.measure,
    insert.NAME: insert.measure,
    absent.NAME: absent.measure,
    accessory.NAME: accessory.measure,
    accessory_clients.NAME: accessory_clients.measure,
    accessory_names.NAME: accessory_names.measure,
    accessory_idle.NAME: accessory_idle.measure,
}
_RESULTS: Final = BUILD / "bench.jsonl"


def main() -> None:
    """Run the command; the exit status is 0 if everything was measured, met or not."""
    arguments = _parse_arguments()
    plan = QUICK if arguments.quick else FULL
    if arguments.rounds:
        plan = replace(plan, rounds=arguments.rounds)
    interrupts.install()
    figures: list[Figure] = []
    status = 0
    try:
        _measure([*dict.fromkeys(arguments.names)] or [*_BENCHMARKS], plan, figures)
    except Unusable as error:
        progress(f"bench: {error}")
        status = 1
    except interrupts.Interrupted as interruption:
        progress("bench: interrupted")
        status = 128 + interruption.number
    if figures:
        print(table(figures), end="")
    sys.exit(status)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the daemons on this machine's kernel. A table goes to standard "
        f"output, and a line of JSON for each figure is added to {_RESULTS}.",
        epilog="The exit status is 0 if everything was measured, whether targets were met or not.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="less of everything, to see whether everything works"
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=_positive,
        help=f"how often to repeat what is compared in rounds (default: {FULL.rounds}, "
        f"with --quick {QUICK.rounds})",
    )
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        type=_name,
        help=f"only these benchmarks: {', '.join(_BENCHMARKS)}",
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a positive number: {text!r}")
    return int(text)


def _name(text: str) -> str:
    if text not in _BENCHMARKS:
        raise argparse.ArgumentTypeError(
            f"no benchmark is called {text!r}; there are {', '.join(_BENCHMARKS)}"
        )
    return text


def _measure(names: list[str], plan: Plan, figures: list[Figure]) -> None:
    """Run the benchmarks called NAMES, adding to FIGURES and to the file after each."""
    with make_site() as site:
        for name in names:
            found = _BENCHMARKS[name](site, plan)
            figures += found
            try:
                append(_RESULTS, found, plan.scale)
            except OSError as error:
                raise Unusable(f"cannot write to {_RESULTS}: {error.strerror}") from None


if __name__ == "__main__":
    main()
