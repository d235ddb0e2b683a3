"""cm4all-spawn-reaper: the command line, and where the daemon's parts are put together."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import pwd
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from spawn_common import linux
from spawn_common.claims import AlreadyRunning, Claims
from spawn_common.command import (
    Unusable,
    Version,
    freeze_memory,
    load_settings,
    problem,
    reporting,
)
from spawn_common.privileges import keep
from spawn_common.service import Service
from spawn_common.standalone import Standing, add_options, refuse_options, standing_alone
from spawn_reaper import wire
from spawn_reaper.accounts import Accounts
from spawn_reaper.delivery import Delivery
from spawn_reaper.reaper import Hooks, Reaper
from spawn_reaper.reloading import ReloadSocket
from spawn_reaper.reloading import ask as ask_to_reload
from spawn_reaper.scopes import ScopeFinder, check_pattern
from spawn_reaper.settings import Settings, check
from spawn_reaper.supervisor import CannotRun, Supervisor
from spawn_reaper.usage import local_counters

_log = logging.getLogger("spawn_reaper")

PROGRAM: Final = "cm4all-spawn-reaper"
DEFAULT_CONFIG: Final = Path("/etc/cm4all/spawn/reaper.toml")
DEFAULT_SCRIPT: Final = Path("/etc/cm4all/spawn/reaper.lua")
_USER: Final = "cm4all-spawn-reaper"  # whom the service manager runs us as
NOWHERE: Final = b"/dev/null"  # a cgroup root below which there is nothing


def main() -> None:
    """Run the command; the exit status is 0, or 1 for a problem, or 2 for wrong usage."""
    arguments = _parse_arguments()
    with reporting(PROGRAM):
        if arguments.check or arguments.release:
            # Unwind, so that no process of the script is left.
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        if arguments.check:
            asyncio.run(_check(arguments))
        elif arguments.release:
            asyncio.run(_try(arguments))
        elif arguments.reload:
            ask_to_reload()
        else:
            with standing_alone(PROGRAM, arguments) as standing:
                asyncio.run(_serve(arguments, standing))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Watch cgroup v2 scopes; when a cgroup runs empty, log what it used, "
        "call the Lua function cgroup_released, and delete it.",
        epilog="SIGHUP calls the Lua function reload, or loads the script again, see the settings. "
        "SIGTERM, SIGINT and SIGQUIT end the daemon.",
    )
    parser.add_argument(
        "--cgroup-root",
        metavar="DIR",
        type=Path,
        help="where the cgroup v2 hierarchy is (default: from /proc/self/mountinfo)",
    )
    parser.add_argument(
        "--scope",
        metavar="PATH",
        action="append",
        dest="scopes",
        help="manage this scope, a path below the cgroup root; may be a glob pattern and given "
        "more than once; replaces those of the settings",
    )
    parser.add_argument(
        "--lua",
        metavar="FILE",
        type=Path,
        help=f"the script (default: {DEFAULT_SCRIPT}, if it exists)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help=f"the settings (default: {DEFAULT_CONFIG}, if it exists)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="load the settings, look for unknown names in the script, run its main chunk, report "
        "every problem, and exit",
    )
    parser.add_argument(
        "--try",
        metavar="FILE",
        type=Path,
        dest="release",
        help="run the script once against the release in FILE (JSON, - for standard input), print "
        "what it does, and exit; no cgroup is touched, all else is done for real",
    )
    parser.add_argument(
        "--reload",
        action="store_true",
        help="let the running daemon reload, wait for it, and fail if that does; for the unit",
    )
    add_options(parser)
    parser.add_argument("--version", action=Version, help="print the version and exit")
    arguments = parser.parse_args()
    if arguments.check or arguments.release or arguments.reload:
        refuse_options(parser, arguments)
    return arguments


# Parts


def _settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings of file and command line."""
    settings = load_settings(arguments.config, DEFAULT_CONFIG, Settings, check)
    if arguments.scopes:
        problems = [
            f"--scope {pattern!r} {reason}"
            for pattern in arguments.scopes
            if (reason := check_pattern(pattern))
        ]
        if problems:
            raise Unusable(*problems)
        settings = msgspec.structs.replace(settings, scopes=tuple(arguments.scopes))
    return settings


def _cgroup_root(arguments: argparse.Namespace) -> tuple[bytes, frozenset[bytes]]:
    """Return the path of the cgroup root directory, and the options of its mount."""
    mount = linux.find_cgroup2_mount()
    root = os.fsencode(arguments.cgroup_root) if arguments.cgroup_root else mount and mount.path
    if not root:
        raise Unusable("no cgroup v2 hierarchy is mounted; --cgroup-root names one")
    root = os.path.abspath(root)
    if not os.path.exists(root + b"/cgroup.controllers"):  # version 1 has no such file
        raise Unusable(f"{os.fsdecode(root)}: not a cgroup v2 directory")
    return root, mount.options if mount else frozenset()


def _script_path(arguments: argparse.Namespace) -> Path | None:
    """Return the path of the script; None if there is no default script."""
    path: Path = arguments.lua or DEFAULT_SCRIPT
    if not arguments.lua and not path.exists():
        _log.info("%s does not exist, running without a script", path)
        return None
    return path


def _setup(path: Path, settings: Settings, root: bytes) -> wire.Setup:
    """Return what a runner has to know."""
    return wire.Setup(os.fsencode(path), root, settings.handlers)


def _claims(root: bytes, what: str) -> Claims:
    """Return what keeps two reapers from managing the same part of this hierarchy."""
    status = os.stat(root)
    trusted = set()
    with suppress(KeyError):  # where the package is not installed there is no such user
        trusted.add(pwd.getpwnam(_USER).pw_uid)
    return Claims(f"{PROGRAM}/{status.st_dev}:{status.st_ino}/{what}", trusted)


# Commands


async def _check(arguments: argparse.Namespace) -> None:
    """Try everything that can be tried without touching a cgroup, and report all problems."""
    from spawn_reaper.attempt import check_script

    problems: list[str] = []
    settings = Settings()
    try:
        settings = _settings(arguments)
    except Unusable as error:
        problems += error.problems
    path = _script_path(arguments)
    if path is not None:
        setup = msgspec.structs.replace(_setup(path, settings, NOWHERE), lint=True)
        problems += await check_script(setup)
    if problems:
        raise Unusable(*problems)


async def _try(arguments: argparse.Namespace) -> None:
    """Run the script against a release from a file."""
    from spawn_reaper.attempt import try_script
    from spawn_reaper.trial import TrialError, read_file, read_trial

    def tell(line: str) -> None:
        print(line, flush=True)

    settings = _settings(arguments)
    try:
        trial = read_trial(read_file(arguments.release))
    except OSError as error:
        raise Unusable(f"{arguments.release}: {error.strerror}") from None
    except TrialError as error:
        raise Unusable(f"{arguments.release}: {error}") from None
    path = _script_path(arguments)
    if path is None:
        raise Unusable("there is no script to try")
    setup = msgspec.structs.replace(_setup(path, settings, NOWHERE), trace=True)
    if not await try_script(setup, trial, tell):
        sys.exit(1)


async def _serve(arguments: argparse.Namespace, standing: Standing) -> None:
    """Run the daemon until it is told to stop."""
    with problem("cannot set our capabilities"):  # because of a filter of system calls, say
        keep(linux.CAP_DAC_OVERRIDE)
    settings = _settings(arguments)
    root, mount_options = _cgroup_root(arguments)
    delivery = Delivery(settings.handlers.queue)
    supervisor: Supervisor | None = None
    reaper: Reaper | None = None

    def reload(done: Callable[[str], None]) -> None:
        if supervisor is not None:
            supervisor.reload(done)
        else:
            done("")

    def status() -> str:
        if reaper is None:
            return "starting"
        parts = [reaper.status()]
        if len(delivery):
            parts.append(f"{len(delivery)} handlers waiting")
        if supervisor is not None:
            parts += supervisor.status()
        return ", ".join(parts)

    service = Service(standing, reload, status)
    asked: ReloadSocket | None = None
    # Patterns are claimed because a scope may be absent now, scopes because patterns may overlap.
    patterns, scopes = _claims(root, "pattern"), _claims(root, "scope")
    try:
        for pattern in dict.fromkeys(settings.scopes):
            patterns.take(pattern)
        stopped = asyncio.ensure_future(service.stopped())
        path = _script_path(arguments)
        if path is not None:
            service.starting(f"running {path}")
            afresh = settings.reload == "script"
            supervisor = Supervisor(_setup(path, settings, root), delivery, afresh=afresh)
            standing.reopened = supervisor.reopen_output
            starting = asyncio.ensure_future(supervisor.start())
            await asyncio.wait([stopped, starting], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return
            await starting
        hooks = delivery if supervisor else None
        reaper = _reaper(settings, root, mount_options, scopes, hooks)
        asked = ReloadSocket(service.reload)  # before anything is taken over that could get lost
        reaper.start()
        freeze_memory()
        service.ready()
        await stopped
        reaper.stop()
        if supervisor is not None and (left := await supervisor.finish(settings.stop)):
            _log.error("%d releases were not handled to the end", left)
    except (AlreadyRunning, CannotRun) as error:
        raise Unusable(*error.args) from None
    finally:
        service.close()
        if asked is not None:
            asked.close()
        if supervisor is not None:
            supervisor.close()
        patterns.close()
        scopes.close()


def _reaper(
    settings: Settings,
    root: bytes,
    mount_options: frozenset[bytes],
    claims: Claims,
    hooks: Hooks | None,
) -> Reaper:
    with problem("cannot watch cgroups"):  # fs.inotify.max_user_instances, say
        return Reaper(
            ScopeFinder(root, [os.fsencode(pattern) for pattern in settings.scopes]),
            Accounts(_local_counters(root, mount_options), pressure=settings.pressure),
            claims,
            grace=settings.grace,
            unclaimed=settings.unclaimed,
            log_lines=settings.log,
            hooks=hooks,
        )


def _local_counters(root: bytes, mount_options: frozenset[bytes]) -> frozenset[str]:
    """Find out which counters leave out a cgroup's children; see usage.local_counters()."""
    directories = [root, *(entry.path for entry in os.scandir(root) if entry.is_dir())]
    known = any(os.path.exists(path + b"/pids.events.local") for path in directories)
    return local_counters(mount_options, pids_events_local=known)


if __name__ == "__main__":
    main()
