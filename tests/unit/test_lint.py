"""What --check finds in a script without running it, and what it must not complain about."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_reaper.runner import lint as module
from spawn_reaper.runner.bindings.api import api
from spawn_reaper.runner.lint import Api, Unavailable, lint
from spawn_reaper.runner.script import new_runtime

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "lua/reaper.lua", *sorted((ROOT / "lua/examples").glob("*.lua"))]


@functools.cache
def runtime() -> Any:
    """Return an interpreter; scripts are only read in it, so one is enough for all."""
    return new_runtime()


def check(code: str | bytes) -> list[str]:
    """Return what is wrong in CODE, without its name."""
    raw = code if isinstance(code, bytes) else code.encode()
    return [m.removeprefix("x.lua:") for m in lint(runtime(), raw, "x.lua", api())]


CONNECT = "local s = socket:connect('/x')\n"
SNED = "socket has no method 'sned'; did you mean 'send'?"
PAHT = "cgroup has no field 'paht'; did you mean 'path'?"
FROMAT = "string has no function 'fromat'; did you mean 'format'?"

FOUND = {
    "pritn('x')": "1: unknown global 'pritn'; did you mean 'print'?",
    "\n\nlocal x =\n  foobar": "4: unknown global 'foobar'",
    "\ufefffoobar()": "1: unknown global 'foobar'",
    "#!/usr/bin/lua\nfoobar()": "2: unknown global 'foobar'",
    "python.eval('1')": "1: unknown global 'python'",
    "utf8.char(1)": "1: unknown global 'utf8'",
    "statts.count = 1": "1: unknown global 'statts'",
    "sokcet:connect('/x')": "1: unknown global 'sokcet'; did you mean 'socket'?",
    "local x = os.getenv('X') or defualt": "1: unknown global 'defualt'",
    "local s = 1 if s == oops then end": "1: unknown global 'oops'",
    "_G.x = 1 print(_G.y, x, oops)": "1: unknown global 'oops'",
    "local ok, c = pcall(require, 'c') oops(c)": "1: unknown global 'oops'",
    "function account_of() end acount_of()": (
        "1: unknown global 'acount_of'; did you mean 'account_of'?"
    ),
    "string.fromat('x')": f"1: {FROMAT}",
    "local string = string string.fromat('x')": f"1: {FROMAT}",
    "local f = string.fromat": f"1: {FROMAT}",
    "io.sdterr:write('x')": "1: io has no function 'sdterr'; did you mean 'stderr'?",
    "pg:nwe('')": "1: pg has no function 'nwe'",
    "print(sodium.bin2hexx)": "1: sodium has no function 'bin2hexx'; did you mean 'bin2hex'?",
    "local c = pg c:nwe('')": "1: pg has no function 'nwe'",
    "control_resolve('x'):foo()": "1: address has no method 'foo'",
    CONNECT + "s:sned('x')": f"2: {SNED}",
    CONNECT + "s.sned(s, 'x')": f"2: {SNED}",
    CONNECT + "do local s = {} s:sned() end s:sned()": f"2: {SNED}",
    CONNECT + "return function() return function() s:sned() s = nil end end": f"2: {SNED}",
    CONNECT + "if not s then s = socket:connect('/y') end s:sned()": f"2: {SNED}",
    "assert(socket:connect('/x')):sned()": f"1: {SNED}",
    "local s = socket:connect('/x') or error('no') s:sned()": f"1: {SNED}",
    "function f() s:sned() end s = socket:connect('/x')": f"1: {SNED}",
    "local s function f() s = s or socket:connect('/x') s:sned() end": f"1: {SNED}",
    "local c = control_client:new('x')\nc:build()\n:fade_children('x')\n:cancel_jbo()": (
        "4: builder has no method 'cancel_jbo'; did you mean 'cancel_job'?"
    ),
    "function cgroup_released(c) print(c.paht or 0) end": f"1: {PAHT}",
    "function cgroup_released(c) if c.parent.paht then end end": f"1: {PAHT}",
    "cgroup_released = function(c) while c do print(c.paht) c = c.parent end end": f"1: {PAHT}",
    "dofile('x') function cgroup_released(c) return c.paht end": f"1: {PAHT}",
    "function cgroup_released(c) print(c.own.paht) end": "1: own has no field 'paht'",
}


@pytest.mark.parametrize("code", FOUND)
def test_mistakes_are_found(code: str) -> None:
    assert check(code) == [FOUND[code]]


QUIET = {
    "Lua": "print(string.format('%s', math.pi), bit.band(1, 2), jit.version, table.move, arg)",
    "globals defined later": "function f() later() end function g() later = print end",
    "globals defined through _G": "_G.x = 1 _G['y'] = 2 print(x, y)",
    "globals defined by name": "rawset(_G, 'z', 3) print(z)",
    "globals of globals": "local env = _G env.foo = print foo()",
    "globals from tables": "for k, v in pairs(math) do _G[k] = v end print(floor(1))",
    "globals with a metatable": "setmetatable(_G, { __index = function() end }) foo()",
    "environments": "setfenv(1, {}) foo() pg:nwe()",
    "the registry": "debug.getregistry()[2].foo = print package.loaded._G.bar = print foo() bar()",
    "modules of the old kind": "module('x', package.seeall) foo()",
    "other files": "dofile('x') foo() print(string.trim(' x '))",
    "other files by require": "require 'helpers' foo() pg:nwe()",
    "code in strings": "loadstring('function foo() end')() foo()",
    "questions": "if foo then foo() elseif bar ~= nil then bar() end while not baz do baz() end",
    "questions in expressions": "local x = foo and foo(1) or 2 local y = bar or 3 print(x, y)",
    "questions with others": "local x if x or foo then foo() end if x and type(bar) then bar() end",
    "questions later": "local f = foo local u = table.unpack if f and not u then f() end",
    "questions about methods": CONNECT + "if s.flush then s:flush() end print(pg.x and pg.x())",
    "other versions": "local u = unpack or table.unpack local b = bit or bit32 print(u, b)",
    "asked versions": "if _VERSION == 'Lua 5.4' then print(utf8.char(1), math.tointeger(1)) end",
    "modules with our names": "local ok, pg = pcall(require, 'pg') pg.anything()",
    "modules that define globals": "local http = require 'socket.http' print(socket.gettime())",
    "added functions": "function string.trim() end function pg.quote() end string.trim(pg.quote())",
    "added by others": "local t = table require('x').extend(t) print(table.keys({}))",
    "added in a loop": "for k, v in pairs({}) do os[k] = v end os.sleep(1)",
    "exchanged functions": "socket.connect = print local s = socket:connect('/x') s:anything()",
    "replaced modules": "if not pg then pg = {} end os = {} pg:anything() os.anything()",
    "attributes": "function cgroup_released(c) print(c.xattr.x, c.parent.xattr['trusted.x']) end",
    "computed fields": "function cgroup_released(c) for k in pairs({}) do print(c[k]) end end",
    "added fields": "function cgroup_released(c) local own = c.own print(own) print(own.x) end",
    "other values": CONNECT + "local function f() s = {} end f() s:anything()",
    "other classes": "local c = control_client:new('x') c = c:build() c:anything()",
    "either": "local s = socket:connect('/x') or { anything = 1 } s:anything()",
    "the second value": "local s, e = socket:connect('/x') print(e:upper(), s)",
    "loops": "for s in socket:connect('/x') do s:anything() end for pg = 1, 2 do pg.x() end",
    "parameters": "local function f(s) s:anything() end f(socket:connect('/x')) f({})",
    "aliases": "local c = socket c:connect('') c = pg:new('') c:execute('')",
    "conditions after the block": CONNECT + "repeat local s = {} until s:anything()",
    "objects in tables": "local t = { s = socket:connect('/x') } t.s:anything()",
    "fake releases": "function cgroup_released(c) print(c.fake) end cgroup_released({ fake = 1 })",
    "two handlers": "function cgroup_released(c) print(c.fake) end function cgroup_released() end",
    "classes of the script": "socket = {} function socket:reconnect() end socket:reconnect()",
    "shadowed names": "local function f(string, pg) return string.anything, pg:anything() end",
    "what does not compile": "oops(",
}


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_reported_without_need(name: str) -> None:
    assert check(QUIET[name]) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_our_scripts_are_in_order(path: Path) -> None:
    assert check(path.read_bytes()) == []


def test_findings_are_in_order_and_names_come_from_the_api() -> None:
    found = lint(runtime(), b"b()\npg:new()\na()", "n", Api({}, {}, {}, {}))
    assert found == [
        f"n:{line}: unknown global '{x}'" for line, x in ((1, "b"), (2, "pg"), (3, "a"))
    ]


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("oops() -- luacheck: ignore\noops()", [2]),
        ("oops() -- luacheck: ignore 113\noops() -- luacheck: ignore oops", []),
        ("pg:nwe() -- luacheck: ignore\npg:nwe()", [2]),
        ("-- luacheck: globals oops\noops()\nother()", [3]),
        ("-- luacheck: push ignore\noops()\n-- luacheck: pop\noops()", [4]),
        ("-- luacheck: std none\nprint(pg:new(''))\noops()", [3]),
        ("-- luacheck: only 211\nlocal unused", []),
        ("-- luacheck: nonsense\noops()", [2]),
    ],
)
def test_luacheck_can_be_told_to_ignore_findings(code: str, lines: list[int]) -> None:
    assert [int(message.split(":")[0]) for message in check(code)] == lines


def test_without_luacheck_it_says_what_to_install() -> None:
    lua = new_runtime()
    lua.globals()[b"package"][b"path"] = b"/nonexistent/?.lua"
    with pytest.raises(Unavailable, match=r"^install lua-check to find unknown names$"):
        lint(lua, b"oops()", "x.lua", api())


def test_nothing_is_loaded_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "luacheck.lua").write_text(f"io.open([[{tmp_path}/sprung]], 'w'):close()")
    monkeypatch.chdir(tmp_path)
    lua = new_runtime()
    lua.globals()[b"package"][b"path"] = b"./?.lua"
    with pytest.raises(Unavailable):
        lint(lua, b"", "x.lua", api())
    assert not (tmp_path / "sprung").exists()


HOSTILE = {
    "bytecode": b"\x1bLJ\x02\x00" + b"\xff" * 1000,
    "NUL": b"print('\0', string['a\0b'], _G['\0'], pg['\xff'], socket['\\n'])",
    "spaces": b"x=1" + b" " * 100_000 + b"y=2",
    "dashes": b"-" * 100_000,
    "deep": b"x=" + b"(" * 150 + b"1" + b")" * 150 + b"+1" * 50_000,
    "a long name": b"-- luacheck: ignore .-.-.-b\n" + b"a" * 100_000 + b"()",
    "a pattern": b"-- luacheck: ignore " + b".-" * 40 + b"b\n" + b"a" * 90 + b"()",
    "a malformed pattern": b"-- luacheck: ignore [\noops()",
    "many options": b"-- luacheck: ignore x\n" * 5000 + b"oops()",
    "many mistakes": b"".join(b"accounts%d = accuonts%d()\n" % (i, i) for i in range(4000)),
    "branches": b"local a = 1\n" + b"if a then a = a + 1 end\n" * 4000,
    "copies": b"".join(b"a%d = b or a%d or a%d\n" % (i, i + 1, i + 1) for i in range(60))
    + b"a0:x()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_scripts_do_no_harm(name: str) -> None:
    start = time.process_time()
    assert len(check(HOSTILE[name])) <= 100
    assert time.process_time() - start < 10


PIECES = re.findall(r"\w+|\s+|[^\w\s]+", SCRIPTS[2].read_text())


@given(st.data())
def test_any_script_can_be_analysed(data: st.DataObject) -> None:
    pieces = list(PIECES)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pieces) - 1))
        pieces[at] = data.draw(st.sampled_from(["", "\0", "_G", "...", *sorted(set(PIECES))]))
    with patch.object(module, "_log") as log:
        for message in check("".join(pieces)):
            assert re.fullmatch("[1-9][0-9]*: [ -~]+", message)
    assert not log.debug.called
