"""cm4all-spawn-reaper: the command line, and where the daemon's parts are put together."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import pwd
import resource
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
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
from spawn_common.privileges import Reserve
from spawn_common.service import Service
from spawn_common.standalone import Standing, add_options, refuse_options, standing_alone
from spawn_reaper.accounts import Accounts
from spawn_reaper.bindings.calling import Trace
from spawn_reaper.reaper import Reaper
from spawn_reaper.scopes import ScopeFinder, check_pattern
from spawn_reaper.script import Script, ScriptError, new_runtime
from spawn_reaper.settings import Settings, check
from spawn_reaper.usage import local_counters

_log = logging.getLogger("spawn_reaper")

PROGRAM: Final = "cm4all-spawn-reaper"
DEFAULT_CONFIG: Final = Path("/etc/cm4all/spawn/reaper.toml")
DEFAULT_SCRIPT: Final = Path("/etc/cm4all/spawn/reaper.lua")
_USER: Final = "cm4all-spawn-reaper"  # whom the service manager runs us as
_STACK: Final = 100 << 20  # bytes
NOWHERE: Final = b"/dev/null"  # a cgroup root below which there is nothing


def main() -> None:
    """Run the command; the exit status is 0, or 1 for a problem, or 2 for wrong usage."""
    arguments = _parse_arguments()
    _allow_deep_recursion()
    with reporting(PROGRAM):
        if arguments.check:
            _reserve()
            asyncio.run(_check(arguments))
        elif arguments.release:
            _reserve()
            asyncio.run(_try(arguments))
        else:
            with standing_alone(PROGRAM, arguments) as standing:
                asyncio.run(_serve(arguments, standing))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Watch cgroup v2 scopes; when a cgroup runs empty, log what it used, "
        "call the Lua function cgroup_released, and delete it.",
        epilog="SIGHUP calls the Lua function reload. SIGTERM, SIGINT and SIGQUIT end the daemon.",
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
    add_options(parser)
    parser.add_argument("--version", action=Version, help="print the version and exit")
    arguments = parser.parse_args()
    if arguments.check or arguments.release:
        refuse_options(parser, arguments)
    return arguments


def _allow_deep_recursion() -> None:
    """Let a script's endless recursion end in an error of Lua, not in a crash.

    Lua's limit for functions that C calls, such as those that string.gsub calls, is reached at
    about 60 MB of stack. The kernel leaves room for 128 MB, and asks for the limit only when the
    stack grows.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    with suppress(ValueError, OSError):  # the hard limit is lower
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK, hard))


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


async def _script(
    path: Path, settings: Settings, root: bytes, trace: Trace | None = None
) -> Script:
    """Return the loaded script."""
    try:
        with ExitStack() as exits:
            script = Script(settings.handlers, root, trace)
            exits.callback(script.close)
            await script.load(path)
            exits.pop_all()
    except ScriptError as error:
        raise Unusable(str(error)) from None
    return script


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
    problems: list[str] = []
    settings = Settings()
    try:
        settings = _settings(arguments)
    except Unusable as error:
        problems += error.problems
    path = _script_path(arguments)
    if path is not None:
        problems += _unknown_names(path)
        try:
            (await _script(path, settings, NOWHERE)).close()
        except Unusable as error:
            problems += error.problems
    if problems:
        raise Unusable(*problems)


def _unknown_names(path: Path) -> list[str]:
    """Return what can be seen to be wrong in a script without running it."""
    from spawn_reaper.bindings.api import api
    from spawn_reaper.lint import Unavailable, lint

    try:
        return lint(new_runtime(), path.read_bytes(), str(path), api())
    except (OSError, ScriptError):
        return []  # whoever loads it says so
    except Unavailable as error:
        _log.warning("%s", error)
        return []


async def _try(arguments: argparse.Namespace) -> None:
    """Run the script against a release from a file."""
    from spawn_reaper.trial import TrialError, read_file, read_release, tracer, try_script

    def tell(line: str) -> None:
        print(line, flush=True)

    settings = _settings(arguments)
    try:
        release = read_release(read_file(arguments.release))
    except OSError as error:
        raise Unusable(f"{arguments.release}: {error.strerror}") from None
    except TrialError as error:
        raise Unusable(f"{arguments.release}: {error}") from None
    path = _script_path(arguments)
    if path is None:
        raise Unusable("there is no script to try")
    with closing(await _script(path, settings, NOWHERE, tracer(tell))) as script:
        if not script.handles_releases:
            raise Unusable(f"{path}: does not define cgroup_released")
        if not await try_script(script, release, settings.handlers.time, tell):
            sys.exit(1)


async def _serve(arguments: argparse.Namespace, standing: Standing) -> None:
    """Run the daemon until it is told to stop."""
    reserve = _reserve()
    settings = _settings(arguments)
    root, mount_options = _cgroup_root(arguments)
    script: Script | None = None
    reaper: Reaper | None = None

    def reload(done: Callable[[], None]) -> None:
        script.reload(done) if script else done()

    def status() -> str:
        if reaper is None:
            return "starting"
        waiting = script.waiting_count if script else 0
        return reaper.status() + (f", {waiting} handlers waiting" if waiting else "")

    service = Service(standing, reload, status)
    # Patterns are claimed because a scope may be absent now, scopes because patterns may overlap.
    patterns, scopes = _claims(root, "pattern"), _claims(root, "scope")
    try:
        for pattern in dict.fromkeys(settings.scopes):
            patterns.take(pattern)
        stopped = asyncio.ensure_future(service.stopped())
        path = _script_path(arguments)
        if path is not None:
            service.starting(f"running {path}")
            loading = asyncio.ensure_future(_script(path, settings, root))
            await asyncio.wait([stopped, loading], return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                return
            script = await loading
        reaper = _reaper(settings, root, mount_options, scopes, reserve, script)
        reaper.start()
        freeze_memory()
        service.ready()
        await stopped
        reaper.stop()
        if script is not None and (left := await script.finish(settings.stop)):
            _log.error("%d releases were not handled to the end", left)
    except AlreadyRunning as error:
        raise Unusable(str(error)) from None
    finally:
        service.close()
        if script is not None:
            script.close()
        patterns.close()
        scopes.close()


def _reaper(
    settings: Settings,
    root: bytes,
    mount_options: frozenset[bytes],
    claims: Claims,
    reserve: Reserve,
    script: Script | None,
) -> Reaper:
    with problem("cannot watch cgroups"):  # fs.inotify.max_user_instances, say
        return Reaper(
            ScopeFinder(root, [os.fsencode(pattern) for pattern in settings.scopes]),
            Accounts(_local_counters(root, mount_options), pressure=settings.pressure),
            claims,
            reserve,
            grace=settings.grace,
            unclaimed=settings.unclaimed,
            log_lines=settings.log,
            hooks=script if script and script.handles_releases else None,
        )


def _reserve() -> Reserve:
    """Return the power to delete the cgroups of others, which nothing else here shall have."""
    with problem("cannot set our capabilities"):  # because of a filter of system calls, say
        return Reserve(linux.CAP_DAC_OVERRIDE)


def _local_counters(root: bytes, mount_options: frozenset[bytes]) -> frozenset[str]:
    """Find out which counters leave out a cgroup's children; see usage.local_counters()."""
    directories = [root, *(entry.path for entry in os.scandir(root) if entry.is_dir())]
    known = any(os.path.exists(path + b"/pids.events.local") for path in directories)
    return local_counters(mount_options, pids_events_local=known)


if __name__ == "__main__":
    main()
