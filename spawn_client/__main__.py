"""cm4all-spawn-client: the command line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NoReturn

from spawn_accessory.idmaps import parse_map
from spawn_accessory.protocol import Listed, Namespace
from spawn_client.accessory import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT,
    Accessory,
    AccessoryError,
)
from spawn_client.dialogue import kind_name
from spawn_client.launch import CANNOT, Ids, describe, run
from spawn_common.command import Version

_FLAGS: Final = tuple(kind_name(kind) for kind in Namespace if kind is not Namespace.USER)


def main() -> None:
    """Run the command; the exit status is that of what it ran, 125 for a problem of its own."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # so nobody wants it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        arguments = _parse_arguments(sys.argv[1:])
        accessory = Accessory(arguments.address, arguments.timeout)
        if arguments.list:
            _list(accessory.list(), arguments.json)
        elif arguments.status:
            _status(accessory.status(), arguments.json)
        else:
            sys.exit(_run(accessory, arguments))
        sys.stdout.flush()
    except AccessoryError as error:
        _die(str(error))
    except OSError as error:
        _die(describe(error))


class _Parser(argparse.ArgumentParser):
    """Tells of wrong usage in one line; its exit status must not look like that of a command."""

    def error(self, message: str) -> NoReturn:
        _die(message)


def _parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="cm4all-spawn-client",
        usage="%(prog)s [options] NAME [-- COMMAND...]\n"
        "       %(prog)s [options] --list|--status [--json]",
        description="Run a command, or a shell, in the namespaces that the accessory keeps under "
        "a name; they are made if they do not exist, and live while a command runs.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="whose namespaces")
    for kind in _FLAGS:
        parser.add_argument(f"--{kind}", action="store_true", help=f"enter the {kind} namespace")
    parser.add_argument(
        "--user",
        metavar="UIDMAP:GIDMAP",
        type=_maps,
        help="enter a user namespace with these maps: their lines as in user_namespaces(7), with "
        "commas between them, such as '0 100000 65536'; a single map is for users and groups",
    )
    parser.add_argument("--list", action="store_true", help="list the names that exist")
    parser.add_argument("--status", action="store_true", help="show the accessory's figures")
    parser.add_argument("--json", action="store_true", help="list or show as lines of JSON")
    parser.add_argument(
        "--address",
        metavar="@NAME|/PATH",
        default=DEFAULT_ADDRESS,
        help="where the accessory listens (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_TIMEOUT,
        help="how long an answer may take (default: %(default)g)",
    )
    parser.add_argument("--version", action=Version, help="print the version and exit")
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    arguments.command = list(words[end + 1 :])
    if arguments.list + arguments.status + (arguments.name is not None) != 1:
        parser.error("one of NAME, --list and --status is needed")
    if arguments.name is None and arguments.command:
        parser.error("a command needs a NAME")
    if arguments.name is not None and arguments.json:
        parser.error("--json is for --list and --status")
    return arguments


def _maps(text: str) -> tuple[str, str]:
    uid, separator, gid = text.replace(",", "\n").partition(":")
    return uid, gid if separator else uid


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}")


def _die(problem: str) -> NoReturn:
    print(f"cm4all-spawn-client: {problem}", file=sys.stderr)
    sys.exit(CANNOT)


# What it does


def _run(accessory: Accessory, arguments: argparse.Namespace) -> int:
    kinds = {kind: getattr(arguments, kind) for kind in _FLAGS}
    name = os.fsencode(arguments.name)
    command = arguments.command or [os.environ.get("SHELL") or "/bin/sh"]
    try:
        namespaces = accessory.namespaces(name, user=arguments.user, **kinds)
    except ValueError as error:
        _die(str(error))
    accessory.close()
    with namespaces:
        return run(namespaces, _ids(arguments.user), command)


def _ids(maps: tuple[str, str] | None) -> Ids:
    """Return who to be in a user namespace: root if it is mapped, else the first of the map."""
    firsts = []
    for text in maps or ("", ""):
        extents = parse_map(text.encode())
        is_root_mapped = any(extent.inside == 0 for extent in extents)
        firsts.append(0 if is_root_mapped else extents[0].inside if extents else None)
    return firsts[0], firsts[1]


def _list(names: Sequence[Listed], as_json: bool) -> None:
    rows = [("NAME", "NAMESPACES", "LEASES", "AGE")]
    for one in names:
        name = one.name.decode("latin-1")
        kinds = [kind_name(kind) for kind in one.namespaces]
        if as_json:
            print(
                json.dumps(
                    {"name": name, "namespaces": kinds, "leases": one.leases, "age": one.age}
                )
            )
        else:
            rows.append((_printable(name), ",".join(kinds) or "-", str(one.leases), _age(one.age)))
    if not as_json:
        _print_table(rows)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def _age(seconds: int) -> str:
    for unit, size, part, part_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part_size}{part}"
    return f"{seconds}s"


def _status(figures: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            print(f"{key}={value}")


if __name__ == "__main__":
    main()
