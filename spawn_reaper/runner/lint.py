"""Looks for mistakes in a script without running it: names and methods that do not exist.

Pure, but for luacheck (Debian's lua-check), which reads the script in a Lua interpreter that the
caller made for this. What is not certain is not reported: a false alarm is worse than a miss. Only
``--check`` imports this module.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

_log = logging.getLogger(__name__)

_LARGEST: Final = 128 * 1024
_SLOW: Final = re.compile(rb"\s{1000}|\w{300}|luacheck:(?:[^\n]{1000}|(?:[^\n*+?-]*[*+?-]){4})")
"""What the patterns in luacheck take very long for: nothing can interrupt Lua there."""

_MOST: Final = 100  # messages, and times ten: names that are compared for each of them
_LONGEST: Final = 50  # of a name that may be misspelt
_CLOSE: Final = 0.7  # how similar a name must be to be suggested

_IGNORED: Final = re.compile(rb"luacheck:\s*ignore")


class Unavailable(Exception):
    """luacheck is not installed; the message says what to do."""


class Api(msgspec.Struct, frozen=True):
    """What scripts find besides Lua's own names; None is a class that nothing is known of."""

    functions: Mapping[str, str | None]
    """Global functions, and the class of what they return."""

    modules: Mapping[str, Mapping[str, str | None]]
    """Global tables, and the class of what their functions return."""

    classes: Mapping[str, Mapping[str, str | None]]
    """Classes, and the class of what their methods return."""

    fields: Mapping[str, Mapping[str, str | None]]
    """Classes without methods, and the class of what is in their fields."""


class _Finding(msgspec.Struct, frozen=True):
    """A name that does not exist."""

    line: int
    kind: str  # global, function, method, field
    owner: str  # what has no such name; empty for a global
    name: str
    known: Any  # a table of Lua whose keys are the names that exist there


def lint(runtime: Any, code: bytes, name: str, api: Api) -> list[str]:
    """Return what is wrong in the script CODE, as ``NAME:LINE: message`` in the order of lines.

    Raises Unavailable without luacheck. What cannot be analysed gives no messages: whoever loads
    the script says whether it can be used.
    """
    loadstring = runtime.eval(b"loadstring")
    source = Path(__file__).with_suffix(".lua").read_bytes()
    ok, analyse = runtime.eval(b"pcall")(loadstring(source, b"=lint.lua"))
    if not ok:
        raise Unavailable("install lua-check to find unknown names")
    code = code.removeprefix(b"\xef\xbb\xbf")
    if len(code) > _LARGEST or _SLOW.search(code):
        _log.debug("%s is not analysed: that may take too long", name)
        return []
    if isinstance(loadstring(code, b"=script", b"t"), tuple):
        return []  # its limits on nesting keep luacheck from getting lost
    findings, reason = analyse(code, _lua_api(runtime, api))
    if findings is None:
        _log.debug("%s cannot be analysed: %s", name, reason)
        return []
    ignored = {i for i, line in enumerate(code.splitlines(), 1) if _IGNORED.search(line)}
    found = [f for f in map(_finding, findings.values()) if f.line not in ignored]
    found.sort(key=lambda finding: finding.line)
    return list(dict.fromkeys(f"{name}:{f.line}: {_message(f)}" for f in found[:_MOST]))


def _finding(row: Any) -> _Finding:
    line, kind, owner, name, known = row.values()
    return _Finding(line, kind.decode(), owner.decode(), name.decode(), known)


def _message(finding: _Finding) -> str:
    if finding.kind == "global":
        message = f"unknown global '{finding.name}'"
    else:
        message = f"{finding.owner} has no {finding.kind} '{finding.name}'"
    known = [key.decode() for key in islice(finding.known, 10 * _MOST) if len(key) <= _LONGEST]
    if len(finding.name) <= _LONGEST:
        for close in difflib.get_close_matches(finding.name, known, 1, _CLOSE):
            message += f"; did you mean '{close}'?"
    return message


def _lua_api(runtime: Any, api: Api) -> Any:
    """Return API as tables of Lua, in which each class is one table."""
    classes = {name: _type(runtime, name, "method", api.classes[name]) for name in api.classes}
    classes |= {name: _type(runtime, name, "field", api.fields[name]) for name in api.fields}
    modules = {name: _type(runtime, name, "function", api.modules[name]) for name in api.modules}
    functions = {
        name: classes.get(returned or "", False) for name, returned in api.functions.items()
    }
    own = (key.decode() for key in runtime.globals() if key != b"python")
    known = {*own, *functions, *modules}
    return _table(
        runtime,
        {
            "classes": _table(runtime, classes),
            "modules": _table(runtime, modules),
            "functions": _table(runtime, functions),
            "known": _table(runtime, dict.fromkeys(known, True)),
        },
    )


def _type(runtime: Any, name: str, kind: str, members: Mapping[str, str | None]) -> Any:
    table = _table(runtime, {key: value or False for key, value in members.items()})
    return _table(runtime, {"name": name, "kind": kind, "members": table})


def _table(runtime: Any, items: Mapping[str, Any]) -> Any:
    """Return a table; strings become Lua's."""
    return runtime.table_from(
        {
            key.encode(): value.encode() if isinstance(value, str) else value
            for key, value in items.items()
        }
    )
