"""What is written about the script API names all of it: definitions for editors, manual page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from spawn_reaper.runner.bindings.api import api
from spawn_reaper.runner.script import new_runtime

ROOT = Path(__file__).parents[2]
DEFINITIONS = ROOT / "lua" / "types" / "reaper.d.lua"
MANUAL = ROOT / "docs" / "reaper.lua.5"


def names() -> set[str]:
    """Return the names of all functions, methods and fields that scripts find."""
    known = api()
    groups = (known.modules, known.classes, known.fields)
    return {
        *known.functions,
        *(name for group in groups for part in group.values() for name in part),
    }


NAMES: Final = sorted(names())


def test_the_definitions_are_lua() -> None:
    compiled = new_runtime().eval(b"loadstring")(DEFINITIONS.read_bytes())
    assert not isinstance(compiled, tuple), compiled[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_in_the_definitions(name: str) -> None:
    declaration = rf"^function ([a-z_]+[.:])?{name}\(|^---@field {name}\b"
    assert re.search(declaration, DEFINITIONS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_in_the_manual_page(name: str) -> None:
    assert re.search(rf"\b{name}\b", MANUAL.read_text())
