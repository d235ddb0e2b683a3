"""Show reaper and accessory at work: run jobs as a spawner does, and look at what comes of them.

Exit status 0 if all that they promise held, else 1 with a line that says what did not.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeVar

from demo import checks
from demo.books import Books, Released
from demo.checks import Check
from demo.daemon import ACCESSORY, accessory, reaper
from demo.jobs import JOBS
from demo.namespaces import kept, where
from demo.sandbox import CgroupGone, Failed, Sandbox, sandbox
from demo.spawner import Made, Spawner
from demo.view import View
from spawn_client.accessory import AccessoryError, AsyncAccessory

_LIMIT: Final = 120.0  # seconds for everything, which takes five where nothing is emulated
_PATIENCE: Final = 10.0  # seconds in which what nobody uses any more must be gone

T = TypeVar("T")


def show() -> None:
    """Run the demo and end the process with its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(asyncio.run(_main()))
    except KeyboardInterrupt:  # everything was cleaned up when our own handler was removed
        sys.exit(1)


async def _main() -> int:
    received = _cancel_on_signals()
    view = View()
    try:
        with sandbox() as place:
            found = await _demonstrate(place, view)
    except asyncio.CancelledError:
        names = ", ".join(number.name for number in received)
        return _failed(f"interrupted by {names}; everything was cleaned up")
    except Exception as error:
        return _failed(*_reasons(error))
    view.checks(found)
    return 0 if all(check.holds for check in found) else 1


async def _demonstrate(place: Sandbox, view: View) -> list[Check]:
    """Run daemon and jobs, show the releases and the table, and return what is to be checked."""
    address = f"@cm4all-spawn-demo-{os.getpid()}"
    async with (
        asyncio.timeout(_LIMIT),
        reaper(place) as reaps,
        accessory(place, address) as keeps,
        AsyncAccessory(address) as client,
        asyncio.TaskGroup() as tasks,
    ):
        books, spawner = Books(), Spawner(place, client)
        _introduce(place, view)
        reaping = tasks.create_task(reaps.follow(partial(_said, place, view, books, spawner)))
        keeping = tasks.create_task(keeps.follow(view.note))
        await reaps.notified("READY=1")
        await keeps.notified("READY=1")
        view.begin_releases()
        await spawner.run(JOBS)
        left = await _settled(place.names_in_scope)
        await reaps.reload()
        counted = place.cpu_of_jobs()
        in_use = await _settled(lambda: kept(place.processes_beside(ACCESSORY), where()))
        await reaps.stop()
        await keeps.stop()
        outlived = await _settled(lambda: place.processes_beside(ACCESSORY))
        statuses = await reaping, await keeping
    if books.log_lines:
        view.example(books.log_lines[-1])
    view.table(books.totals, spawner.runs)
    return [
        checks.jobs_ran(spawner),
        checks.each_released_once(books, spawner.made),
        checks.each_logged(books),
        checks.accounts_right(books, spawner.made),
        checks.sums_right(books),
        checks.cpu_complete(books, counted),
        checks.namespaces_right(spawner.seen, where()),
        checks.namespaces_gone(in_use),
        checks.ended_well(*statuses, outlived),
        checks.nothing_left(left),
    ]


def _said(place: Sandbox, view: View, books: Books, spawner: Spawner, line: str) -> None:
    """Enter and show a line of the reaper."""
    entry = books.enter(line)
    if isinstance(entry, Released):
        made = spawner.made.get(entry.inode) or Made("", None, "")
        view.release(entry, place.scope_path, made.shared, made.what)
    elif entry is None:
        view.note(line)


def _introduce(place: Sandbox, view: View) -> None:
    jobs = sum(job.times for job in JOBS)
    view.note(f"running {jobs} jobs in {place.scope_path} of {place.directory.parent}")
    view.note("names of the accessory live 1 s after their last lease, as demo/accessory.toml says")
    if not place.has_memory:
        view.note("cgroup v2 has no memory controller here, so there is no peak memory to show")


async def _settled(look: Callable[[], set[T]]) -> set[T]:
    """Wait until LOOK finds nothing any more; return what it finds to the end."""
    end = asyncio.get_running_loop().time() + _PATIENCE
    while (left := look()) and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.02)
    return left


# Endings


def _cancel_on_signals() -> list[signal.Signals]:
    """Let the first signal cancel the current task, and return a list that will name it.

    More signals change nothing: cleaning up has begun and is not to be interrupted.
    """
    received: list[signal.Signals] = []
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def interrupt(number: signal.Signals) -> None:
        if not received:
            received.append(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt, number)
    return received


def _reasons(error: Exception) -> Iterator[str]:
    """Yield a line for each thing that can go wrong outside of us; anything else is raised."""
    if isinstance(error, ExceptionGroup):
        for member in error.exceptions:
            yield from _reasons(member)
    elif isinstance(error, TimeoutError):
        yield f"not finished after {_LIMIT:g} seconds"
    elif isinstance(error, Failed | CgroupGone | AccessoryError | OSError):
        yield str(error)
    else:
        raise error


def _failed(*reasons: str) -> int:
    for reason in reasons:
        print(f"demo: {reason}", file=sys.stderr)
    return 1
