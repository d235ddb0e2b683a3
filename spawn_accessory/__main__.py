"""cm4all-spawn-accessory: the command line, and where the daemon's parts are put together."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final

from spawn_accessory.keeper import Keeper
from spawn_accessory.namespaces import Maker
from spawn_accessory.programs import Missing, find
from spawn_accessory.registry import Registry
from spawn_accessory.server import Server
from spawn_accessory.settings import Settings, check
from spawn_accessory.watch import Watch
from spawn_common import VERSION, linux, sockets
from spawn_common.command import (
    Unusable,
    Version,
    freeze_memory,
    load_settings,
    problem,
    reporting,
)
from spawn_common.privileges import pass_on
from spawn_common.service import Service
from spawn_common.standalone import Standing, add_options, refuse_options, standing_alone

_log = logging.getLogger("spawn_accessory")

PROGRAM: Final = "cm4all-spawn-accessory"
DEFAULT_CONFIG: Final = Path("/etc/cm4all/spawn/accessory.toml")
DEFAULT_ADDRESS: Final = "@cm4all-spawn"
# What daemon and keeper need for making namespaces, for any map, and for ending inits.
_CAPABILITIES: Final = (
    linux.CAP_SYS_ADMIN,
    linux.CAP_SETUID,
    linux.CAP_SETGID,
    linux.CAP_SETFCAP,
    linux.CAP_KILL,
)
_KEEPER: Final = "keeper"  # how the service manager calls the socket to the keeper


def main() -> None:
    """Run the command; the exit status is 0, or 1 for a problem, or 2 for wrong usage."""
    arguments = _parse_arguments()
    with reporting(PROGRAM):
        if arguments.check:
            _check(arguments)
        else:
            with standing_alone(PROGRAM, arguments) as standing:
                asyncio.run(_serve(arguments, standing))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Create named namespaces for process spawners, and keep them for as long as "
        "somebody holds a lease.",
        epilog="SIGHUP loads the settings again. SIGTERM, SIGINT and SIGQUIT end the daemon; what "
        "it made lives on if a service manager keeps the socket to the keeper.",
    )
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        action="append",
        help="take requests at @NAME, a name in the abstract namespace, or at /PATH; may be given "
        f"more than once (default: {DEFAULT_ADDRESS}); sockets that the service manager passes "
        "are used instead",
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
        help="load the settings, report every problem, and exit",
    )
    add_options(parser)
    parser.add_argument("--version", action=Version, help="print the version and exit")
    arguments = parser.parse_args()
    for address in arguments.listen or ():
        if address[:1] not in ("@", "/") or len(address) < 2:
            parser.error(f"--listen {address!r}: @NAME or /PATH expected")
    if arguments.check:
        refuse_options(parser, arguments)
    return arguments


def _settings(arguments: argparse.Namespace) -> Settings:
    return load_settings(arguments.config, DEFAULT_CONFIG, Settings, check)


def _check(arguments: argparse.Namespace) -> None:
    _settings(arguments)
    try:
        find("keeper"), find("init")
    except Missing as error:
        raise Unusable(str(error)) from None


async def _serve(arguments: argparse.Namespace, standing: Standing) -> None:
    """Run the daemon until it is told to stop."""
    with problem("cannot set our capabilities"):
        pass_on(*_CAPABILITIES)
    began = time.monotonic()
    listeners, keepers = _passed()
    settings = _settings(arguments)
    _raise_limit()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a keeper ended
    loop = asyncio.get_running_loop()
    registry: Registry | None = None
    server: Server | None = None

    def describe() -> str:
        lines: dict[str, object] = {"version": VERSION, "uptime": int(time.monotonic() - began)}
        if registry and server:
            lines |= {"connections": server.connections} | registry.counts()
        return "".join(f"{key}={value}\n" for key, value in lines.items())

    def reload(done: Callable[[str], None]) -> None:
        try:
            loaded = _settings(arguments)
        except Unusable as error:
            for problem in error.problems:
                _log.error("the settings stay as they are: %s", problem)
        else:
            if registry and server:
                registry.use(loaded)
                server.use(loaded)
        done("")

    with ExitStack() as exits:
        service = Service(standing, reload, lambda: registry.summary() if registry else "starting")
        exits.callback(service.close)
        own = [] if listeners else _listen(arguments.listen or [DEFAULT_ADDRESS], exits)
        listeners += own
        maker = _maker()
        exits.callback(maker.close)
        watch = Watch()
        exits.callback(watch.close)
        keeper = _keeper(min(map(sockets.address_of, listeners)), watch, keepers)
        exits.callback(keeper.close)
        registry = Registry(settings, keeper, maker, watch, loop)
        exits.callback(registry.close)
        server = Server(listeners, registry, settings, watch, describe)
        exits.callback(server.close)
        if own:
            exits.callback(server.accept)
        loop.add_reader(watch, watch.run)
        exits.callback(loop.remove_reader, watch)
        freeze_memory()
        service.ready()
        await service.stopped()


def _raise_limit() -> None:
    """Allow ourselves as many descriptors as we may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _passed() -> tuple[list[socket.socket], list[socket.socket]]:
    """Return the sockets to listen on that the service manager passed, and those to keepers."""
    listeners, keepers = [], []
    for name, passed in sockets.passed_sockets():
        if sockets.is_listening(passed):
            if (passed.family, passed.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                raise Unusable(f"the socket that was passed as {name!r} is not SOCK_SEQPACKET")
            listeners.append(passed)
        elif name == _KEEPER:
            keepers.append(passed)
        else:
            passed.close()
    return listeners, keepers


def _listen(addresses: Iterable[str], exits: ExitStack) -> list[socket.socket]:
    """Return sockets that listen at ADDRESSES until EXITS."""
    listeners = []
    for address in addresses:
        try:
            listener = exits.enter_context(sockets.listen(address))
        except sockets.InUse as error:
            raise Unusable(str(error)) from None
        except OSError as error:
            raise Unusable(f"cannot listen at {address}: {error.strerror or error}") from None
        listeners.append(listener)
        if address.startswith("/"):
            exits.callback(_unlink, address)
    return listeners


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _maker() -> Maker:
    with problem("cannot enter our own namespaces"):
        return Maker()


def _keeper(address: str, watch: Watch, olds: list[socket.socket]) -> Keeper:
    try:
        return Keeper(address, watch, partial(sockets.store, _KEEPER), olds)
    except Missing as error:
        raise Unusable(str(error)) from None
    except OSError as error:
        what = "take over" if olds else "start"
        raise Unusable(f"cannot {what} the keeper: {error.strerror}") from None


if __name__ == "__main__":
    main()
