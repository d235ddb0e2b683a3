"""What the command lines of the daemons share: problems, the version, where settings come from."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

import msgspec

from spawn_common import VERSION
from spawn_common.notify import notifier
from spawn_common.settings import Check, SettingsError, load

S = TypeVar("S", bound=msgspec.Struct)


class Unusable(Exception):
    """A program cannot do its work; ``problems`` says why, one line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems


@contextmanager
def problem(what: str) -> Iterator[None]:
    """Let an OSError mean that WHAT does not work, and be Unusable for that."""
    try:
        yield
    except OSError as error:
        raise Unusable(f"{what}: {error.strerror or error}") from None


@contextmanager
def reporting(program: str) -> Iterator[None]:
    """Log to standard error, and end with status 1 when the work cannot be done."""
    _open_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except Unusable as error:
        with suppress(OSError):  # nobody listens; the log has it anyway
            notifier()(status=error.problems[0])
        complain(program, error.problems, sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(1)


def _open_streams() -> None:
    """Let there be all three: their numbers must not become those of other files."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it was closed by who started us
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number is free
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", closefd=False))


def complain(program: str, problems: Iterable[str], to: TextIO) -> None:
    """Write a line for each problem."""
    for line in problems:
        print(f"{program}: {line}", file=to)


class Version(argparse.Action):
    """An option that prints the version and ends the program."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:  # noqa: A002
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Do so."""
        print(parser.prog, VERSION)
        sys.exit(0)


def load_settings(path: Path | None, default: Path, kind: type[S], check: Check[S]) -> S:
    """Return the settings in the file at PATH; without PATH those at DEFAULT, if it exists.

    Unusable says everything that is wrong with them.
    """
    try:
        return load(path or default, kind, check)
    except FileNotFoundError:
        if path:
            raise Unusable(f"{path}: No such file or directory") from None
        return kind()
    except OSError as error:
        raise Unusable(f"{path or default}: {error.strerror}") from None
    except SettingsError as error:
        raise Unusable(*error.problems) from None


def freeze_memory() -> None:
    """Take what was loaded out of the garbage collector's sight: it stays anyway."""
    gc.collect()
    gc.freeze()
