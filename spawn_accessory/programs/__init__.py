"""The programs that are not Python: sources here, and where the compiled ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_BUILT: Final = Path(__file__).parents[2] / "build" / "libexec"  # by make, in a source tree
_INSTALLED: Final = Path("/usr/libexec/cm4all-spawn")


class Missing(Exception):
    """A program is not there; the message says which."""


def find(name: str) -> Path:
    """Return the path of the program cm4all-spawn-NAME."""
    for directory in (_BUILT, _INSTALLED):
        path = directory / f"cm4all-spawn-{name}"
        if path.exists():
            return path
    raise Missing(f"{_INSTALLED}/cm4all-spawn-{name}: No such file or directory")
