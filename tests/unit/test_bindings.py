"""What the bindings do with arguments that are wrong, strange or hostile.

Nothing here needs a server: datagrams go to a port where nobody listens, and the database's socket
would be in a directory that does not exist.
"""

from __future__ import annotations

import functools
import gc
import re
import socket
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spawn_reaper.settings import Handlers
from tests.tools.scripts import SCOPE, Stage, descriptors, evaluated, leaked, printed, run

# One of each class, and what a call may need.
OBJECTS: Final = """
local a = control_resolve("127.0.0.1:9")
local s = assert(socket:connect("127.0.0.1:9", {type = "dgram"}))
local closed = assert(socket:connect("127.0.0.1:9", {type = "dgram"}))
closed:close()
local c = assert(control_client:new("127.0.0.1:9"))
local b = c:build()
local db = pg:new("host=/nonexistent")
"""


@pytest.fixture(scope="module", autouse=True)
def own_resolver() -> Iterator[None]:
    """No test here asks the network for a name, and none finds a database by accident."""
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host not in ("localhost", b"localhost"):
            real(host, None, flags=socket.AI_NUMERICHOST)  # raises for names
        return real(host, port, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        patch.setenv("PGHOST", "/nonexistent")
        yield


def quoted(data: bytes) -> str:
    """Return DATA as a Lua expression."""
    return '"' + "".join(f"\\{byte:03}" for byte in data) + '"'


# Arguments: how many, and of which types


class Call(NamedTuple):
    """How a function is called, and which arguments it takes."""

    code: str
    kinds: tuple[str, ...]
    required: int
    variadic: bool = False

    @property
    def name(self) -> str:
        """The name that error messages have."""
        return re.split("[.:]", self.code)[-1]

    @property
    def first(self) -> int:
        """The number of the first argument in error messages: the object itself is the first."""
        return 2 if ":" in self.code else 1

    def with_arguments(self, arguments: list[str]) -> str:
        """Return an expression that calls it."""
        return f"{self.code}({', '.join(arguments)})"


BUILDERS: Final = (
    *("discard_session", "disconnect_database", "fade_children", "flush_filter_cache"),
    *("flush_http_cache", "reset_limiter", "terminate_children"),
)
WITH_SECONDS: Final = ("reject_client", "tarpit_client")

CALLS: Final = [
    Call("control_resolve", ("string",), 1),
    Call("socket:connect", ("address|string", "table"), 1),
    Call("s:send", ("string", "number", "number"), 1),
    Call("s:close", (), 0),
    Call("control_client:new", ("address|string",), 1),
    Call("c:build", (), 0),
    Call("c:send", ("builder",), 1),
    Call("b:cancel_job", ("string", "string"), 2),
    *(Call(f"b:{name}", ("string",), 1, variadic=True) for name in BUILDERS),
    *(Call(f"b:{name}", ("string",), 1, variadic=True) for name in WITH_SECONDS),
    Call("pg:new", ("string", "string"), 1),
    Call("pg:encode_array", ("table",), 1),
    Call("pg:decode_array", ("string",), 1),
    Call("db:execute", ("string", "table"), 1),
    Call("db:listen", ("string", "function"), 2),
]

# An argument of each kind with which the call goes as far as checking the others.
GOOD: Final = {
    "string": '"1.2.3.4:5"',
    "address|string": "a",
    "number": "1",
    "table": "{}",
    "builder": "b",
    "function": "print",
}

# Values and their types as messages have them.
VALUES: Final = {
    "nil": "nil",
    "true": "boolean",
    "12": "number",
    '"x"': "string",
    "{}": "table",
    "print": "function",
    "coroutine.create(print)": "thread",
    "newproxy()": "userdata",
    "a": "address",
    "s": "socket",
    "c": "control_client",
    "b": "builder",
    "db": "connection",
}

# What passes as what.
PASSES: Final = {
    "string": {"string", "number"},
    "address|string": {"address", "string", "number"},
    "number": {"number"},
}


def wrong_values(call: Call, position: int) -> Iterator[tuple[str, str]]:
    """Yield (value, type) for the values that must not pass at POSITION."""
    kind = call.kinds[position]
    for value, type_name in VALUES.items():
        if type_name in PASSES.get(kind, {kind}):
            continue
        if type_name == "nil" and position >= call.required:
            continue
        yield value, type_name


def expected_kind(kind: str) -> str:
    """Return what a message says of KIND."""
    return kind.rpartition("|")[2]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.code)
def test_a_wrong_type_raises_with_position_name_and_both_types(call: Call) -> None:
    for position, kind in enumerate(call.kinds):
        for value, type_name in wrong_values(call, position):
            arguments = [GOOD[kind] for kind in call.kinds]
            arguments[position] = value
            assert evaluated(call.with_arguments(arguments), OBJECTS) == (
                f"raises bad argument #{call.first + position} to '{call.name}'"
                f" ({expected_kind(kind)} expected, got {type_name})"
            )


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.code)
def test_too_few_arguments_raise(call: Call) -> None:
    for count in range(call.required):
        arguments = [GOOD[kind] for kind in call.kinds[:count]]
        assert evaluated(call.with_arguments(arguments), OBJECTS) == (
            f"raises bad argument #{call.first + count} to '{call.name}'"
            f" ({expected_kind(call.kinds[count])} expected, got no value)"
        )


@pytest.mark.parametrize(
    "call", [call for call in CALLS if not call.variadic], ids=lambda call: call.code
)
def test_too_many_arguments_raise(call: Call) -> None:
    arguments = [GOOD[kind] for kind in call.kinds]
    most = len(arguments) + call.first - 1
    for more in (["nil"], ['"x"'], ["1", "nil", "{}"]):
        assert evaluated(call.with_arguments(arguments + more), OBJECTS) == (
            f"raises too many arguments to '{call.name}' ({most} expected, got {most + len(more)})"
        )


@pytest.mark.parametrize("name", [*BUILDERS, *WITH_SECONDS])
def test_each_further_argument_of_a_builder_s_method_is_checked(name: str) -> None:
    assert evaluated(f'b:{name}("x", "y", {{}})', OBJECTS) == (
        f"raises bad argument #4 to '{name}' (string expected, got table)"
    )
    assert evaluated(f'b:{name}("x", nil)', OBJECTS) == (
        f"raises bad argument #3 to '{name}' (string expected, got nil)"
    )


SELVES: Final = {
    "socket.connect": "socket module",
    "control_client.new": "control_client module",
    "pg.new": "pg module",
    "pg.encode_array": "pg module",
    "pg.decode_array": "pg module",
    "s.send": "socket",
    "s.close": "socket",
    "c.build": "control_client",
    "c.send": "control_client",
    "b.cancel_job": "builder",
    **{f"b.{name}": "builder" for name in (*BUILDERS, *WITH_SECONDS)},
    "db.execute": "connection",
    "db.listen": "connection",
}


@pytest.mark.parametrize(("function", "expected"), SELVES.items())
def test_a_method_called_without_its_object_raises(function: str, expected: str) -> None:
    name = function.rpartition(".")[2]
    for value, type_name in VALUES.items():
        if type_name != expected:
            assert evaluated(f'{function}({value}, "x", "y")', OBJECTS) == (
                f"raises bad argument #1 to '{name}' ({expected} expected, got {type_name})"
            )
    assert evaluated(f"{function}()", OBJECTS) == (
        f"raises bad argument #1 to '{name}' ({expected} expected, got no value)"
    )


def test_an_error_names_the_line_of_the_script_also_below_pcall() -> None:
    code = """local function inner()
      s:send({})
    end
    s = socket:connect("127.0.0.1:9", {type = "dgram"})
    print(pcall(inner))
    print(pcall(s.send, s, {}))
    """
    text = "bad argument #2 to 'send' (string expected, got table)"
    assert printed(code) == [f"false\ttest.lua:{line}: {text}" for line in (2, 6)]


# Numbers


@pytest.mark.parametrize("value", ["0/0", "1/0", "-1/0", '"nan"', '"inf"'])
@pytest.mark.parametrize("position", [3, 4])
def test_a_number_that_is_no_integer_raises(value: str, position: int) -> None:
    arguments = value if position == 3 else f"1, {value}"
    outcome = evaluated(f's:send("abc", {arguments})', OBJECTS)
    text = f"raises bad argument #{position} to 'send' ("
    assert outcome == f"{text}number has no integer representation)" or (
        # Whether tonumber() takes these words is the C library's business.
        value.startswith('"') and outcome == f"{text}number expected, got string)"
    )


@pytest.mark.parametrize("value", ['"2"', '" 2 "', '"0x2"', "2.9", '"2.9"'])
def test_numeric_strings_pass_as_numbers_and_fractions_are_cut_off(value: str) -> None:
    assert evaluated(f's:send("abc", {value})', OBJECTS) == "2"


def test_numbers_pass_as_strings_as_lua_formats_them() -> None:
    assert evaluated("s:send(12345)", OBJECTS) == "5"
    assert evaluated("s:send(0.1)", OBJECTS) == "3"
    assert evaluated("s:send(1e15)", OBJECTS) == "5"


# Sockets


@pytest.mark.parametrize(
    ("positions", "sent"),
    [
        *(("1", 3), ("2", 2), ("3", 1), ("4", 0), ("-1", 1), ("-3", 3)),
        *(("1, 3", 3), ("1, 2", 2), ("1, 0", 0), ("2, 2", 1), ("3, 2", 0), ("4, 3", 0)),
        *(("1, -1", 3), ("1, -2", 2), ("1, -3", 1), ("-2, -2", 1), ("-1, -2", 0)),
        *(("nil, 2", 2), ("2, nil", 2), ("nil, nil", 3)),
    ],
)
def test_send_takes_positions_as_string_sub_does(positions: str, sent: int) -> None:
    assert evaluated(f's:send("abc", {positions})', OBJECTS) == str(sent)


@pytest.mark.parametrize("start", ["0", "5", "-5", "1000", "-1000", "2^53", "1e300", "-1e300"])
def test_a_start_outside_the_string_raises(start: str) -> None:
    outcome = evaluated(f's:send("abc", {start})', OBJECTS)
    assert outcome.startswith("raises bad argument #3 to 'send' (")


@pytest.mark.parametrize("end", ["4", "-5", "1000", "-1000", "2^53", "1e300", "-1e300"])
def test_an_end_outside_the_string_raises(end: str) -> None:
    outcome = evaluated(f's:send("abc", 1, {end})', OBJECTS)
    assert outcome.startswith("raises bad argument #4 to 'send' (")


def test_an_empty_string_sends_nothing() -> None:
    assert evaluated('s:send("")', OBJECTS) == "0"


def test_a_closed_socket_says_so_and_may_be_closed_again() -> None:
    assert evaluated('closed:send("x")', OBJECTS) == "nil, socket is closed"
    assert evaluated("(closed:close())", OBJECTS) == "nil"
    assert evaluated("tostring(closed)", OBJECTS) == "socket (closed)"


def test_what_is_too_long_for_a_datagram_is_an_error() -> None:
    assert evaluated('s:send(("x"):rep(1048576))', OBJECTS) == "nil, Message too long"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ('"/nonexistent/socket"', "No such file or directory"),
        (f'"@cm4all-spawn-test-{"0" * 20}"', "Connection refused"),
        ('"127.0.0.1"', ""),
        ('"::1"', ""),
        ('"[::1]"', ""),
        ('"localhost"', ""),
        ('"no-such-host.invalid:80"', ""),
        ('"localhost:http-of-sorts"', ""),
        ('"127.0.0.1:65536"', ""),
        ('"127.0.0.1:-1"', ""),
        ('"127.0.0.1:"', ""),
        ('":80"', ""),
        ('"[::1:80"', ""),
        ('"[::1]80"', ""),
        ('""', ""),
        ('"/" .. ("x"):rep(200)', ""),
        ('"@" .. ("x"):rep(200)', ""),
        ('"/tmp/a\\0b"', ""),
        ('"local\\0host:80"', ""),
        ('"\\255\\254:80"', ""),
        ('("x"):rep(300) .. ":80"', ""),
        ('("x"):rep(1048576)', ""),
        ("80", ""),
    ],
)
def test_connect_returns_an_error_for_an_address_that_cannot_be_used(
    address: str, reason: str
) -> None:
    outcome = evaluated(f"socket:connect({address})", OBJECTS)
    assert re.match(r"nil, [^\n]{3,}", outcome), outcome
    assert reason in outcome


@pytest.mark.parametrize(
    "options",
    [
        *('{type = "nonsense"}', '{type = ""}', "{type = 1}", "{type = {}}", "{type = false}"),
        *('{typ = "stream"}', '{type = "stream", more = 1}', '{"stream"}', "{[{}] = 1}"),
    ],
)
def test_an_unknown_option_or_type_raises(options: str) -> None:
    outcome = evaluated(f'socket:connect("127.0.0.1:9", {options})', OBJECTS)
    assert outcome.startswith("raises "), outcome


def test_no_options_are_fine() -> None:
    for options in ("nil", "{}"):
        outcome = evaluated(f'socket:connect("/nonexistent/socket", {options})')
        assert re.match("nil, .*No such file or directory", outcome)


# Addresses


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        ("1.2.3.4", "1.2.3.4:5478"),
        ("1.2.3.4:80", "1.2.3.4:80"),
        ("::1", "[::1]:5478"),
        ("[::1]", "[::1]:5478"),
        ("[::1]:80", "[::1]:80"),
        ("[2001:DB8:0:0::1]:65535", "[2001:db8::1]:65535"),
        ("::ffff:1.2.3.4", "[::ffff:1.2.3.4]:5478"),
        ("localhost:80", r"(127\.0\.0\.1|\[::1\]):80"),
        ("localhost", r"(127\.0\.0\.1|\[::1\]):5478"),
        ("/run/socket", "/run/socket"),
        ("/run/with space:80", "/run/with space:80"),
        ("@abstract", "@abstract"),
        ("@abstract:80", "@abstract:80"),
    ],
)
def test_control_resolve_takes_each_kind_of_address(text: str, formatted: str) -> None:
    pattern = formatted if "(" in formatted else re.escape(formatted)
    assert re.fullmatch(pattern, evaluated(f'control_resolve("{text}")'))


@pytest.mark.parametrize(
    "text",
    [
        *('""', '":80"', '"1.2.3.4:"', '"1.2.3.4:65536"', '"1.2.3.4:-1"', '"1.2.3.4:x"'),
        *('"[::1"', '"[::1]80"', '"[]"', '"[no-address]:80"', '"no-such-host.invalid"', '"a b"'),
        *('"/" .. ("x"):rep(200)', '"@" .. ("x"):rep(200)', '"/a\\0b"', '"\\255"', '"a\\0b"'),
        '("x"):rep(1048576)',
    ],
)
def test_control_resolve_raises_on_failure(text: str) -> None:
    outcome = evaluated(f"control_resolve({text})")
    assert outcome.startswith("raises "), outcome
    assert len(outcome) < 400 or "rep" in text


def test_objects_have_a_text_of_their_own() -> None:
    for value, name in [("s", "socket"), ("c", "control_client"), ("b", "builder")]:
        assert evaluated(value, OBJECTS).startswith(name)
    assert evaluated("db", OBJECTS).startswith("connection")


def test_nothing_of_python_can_be_reached_through_an_object() -> None:
    for value in ("a", "s", "c", "b", "db"):
        assert evaluated(f"type({value})", OBJECTS) == "userdata"
        for change in (f"{value}.x = 1", f"setmetatable({value}, {{}})"):
            outcome = evaluated(f'loadstring("local {value} = ... {change}")({value})', OBJECTS)
            assert not re.fullmatch("nil|", outcome), change
        for key in ("__class__", "__init__", "_handle", "__gc", "__index", "new", "1"):
            assert evaluated(f'{value}["{key}"]', OBJECTS) == "nil"
        assert evaluated(f"type(getmetatable({value}))", OBJECTS) in ("string", "boolean")


# The control client


@pytest.mark.parametrize(
    "address", ['"/" .. ("x"):rep(200)', '"[::1"', '""', '"no-such-host.invalid"', '"a\\0b"']
)
def test_a_client_for_an_address_that_cannot_be_used_is_an_error(address: str) -> None:
    outcome = evaluated(f"control_client:new({address})")
    assert re.match(r"nil, [^\n]{3,}", outcome), outcome


def test_builder_methods_return_the_builder() -> None:
    for name in (*BUILDERS, *WITH_SECONDS):
        assert evaluated(f'b:{name}("x") == b, b:{name}("x", "y") == b', OBJECTS) == "true, true"
    assert evaluated('b:cancel_job("x", "y") == b', OBJECTS) == "true"


@pytest.mark.parametrize("seconds", ["-1", "2^32", "1e300", "1/0", "0/0", "-2^53"])
@pytest.mark.parametrize("name", WITH_SECONDS)
def test_seconds_out_of_range_raise(name: str, seconds: str) -> None:
    outcome = evaluated(f'b:{name}("1.2.3.4", {seconds})', OBJECTS)
    assert outcome.startswith(f"raises bad argument #3 to '{name}' ("), outcome


@pytest.mark.parametrize(
    "commands",
    [
        'fade_children(("x"):rep(65536))',
        'fade_children(("x"):rep(65504))',
        'fade_children(("x"):rep(40000), ("x"):rep(40000))',
        'cancel_job(("x"):rep(40000), ("x"):rep(40000))',
        'fade_children(("x"):rep(1048576))',
        'reject_client(("x"):rep(65534), 5)',
    ],
)
def test_a_datagram_that_would_be_too_large_is_an_error(commands: str) -> None:
    outcome = evaluated(f"c:send(c:build():{commands})", OBJECTS)
    assert re.match(r"nil, [^\n]{3,}", outcome), outcome


# PostgreSQL, as far as it does not take a server


@pytest.mark.parametrize(
    "conninfo", ['"nonsense"', '"=x"', '"host=\'x"', '"no_such_option=1"', '"host=/x\\0"']
)
def test_a_connection_string_that_does_not_parse_raises(conninfo: str) -> None:
    outcome = evaluated(f"pg:new({conninfo})")
    assert outcome.startswith("raises "), outcome


@pytest.mark.parametrize(
    ("parameters", "position", "type_name"),
    [
        ("{{}}", 1, "table"),
        ('{"x", print}', 2, "function"),
        ("{nil, a}", 2, "address"),
        ("{1, true, newproxy()}", 3, "userdata"),
        ("{coroutine.running()}", 1, "thread"),
    ],
)
def test_a_parameter_of_another_type_raises(parameters: str, position: int, type_name: str) -> None:
    assert evaluated(f'db:execute("SELECT 1", {parameters})', OBJECTS) == (
        f"raises bad parameter #{position}"
        f" (string, number, boolean or nil expected, got {type_name})"
    )


@pytest.mark.parametrize("arguments", ['"SELECT\\0 1"', '"SELECT $1", {"a\\0b"}'])
def test_a_nul_in_a_query_is_an_error_at_once(arguments: str) -> None:
    outcome = evaluated(f"db:execute({arguments})", OBJECTS)
    assert re.match(r"nil, [^\n]{3,}", outcome), outcome


@pytest.mark.parametrize("name", ['""', '("x"):rep(64)', '"a\\0b"', '("x"):rep(1048576)'])
def test_a_bad_name_to_listen_to_raises(name: str) -> None:
    outcome = evaluated(f"db:listen({name}, print)", OBJECTS)
    assert outcome.startswith("raises bad argument #2 to 'listen' ("), outcome


def test_a_second_listen_on_one_name_raises() -> None:
    twice = 'db:listen("x", print), db:listen("x", print)'
    assert evaluated(twice, OBJECTS).startswith("raises ")
    assert not evaluated('db:listen("x", print), db:listen("X", print)', OBJECTS).startswith("rais")
    assert not evaluated('db:listen(("x"):rep(63), print)', OBJECTS).startswith("raises ")


ARRAYS: Final = [
    ("{}", "{}"),
    ('{"foo", "b\\"ar"}', '{"foo","b\\"ar"}'),
    ('{"a\\\\b"}', '{"a\\\\b"}'),
    ('{"", "NULL", "{}", ","}', '{"","NULL","{}",","}'),
    ("{1, 0.5, -3}", '{"1","0.5","-3"}'),
]


@pytest.mark.parametrize(("elements", "text"), ARRAYS)
def test_encode_array_quotes_every_element(elements: str, text: str) -> None:
    assert evaluated(f"pg:encode_array{elements}") == text


@pytest.mark.parametrize("element", ["{}", "print", "newproxy()", "coroutine.create(print)"])
def test_encode_array_raises_on_other_elements(element: str) -> None:
    assert evaluated(f'pg:encode_array{{"x", {element}}}').startswith("raises ")


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        (b"{}", []),
        (b"{foo}", [b"foo"]),
        (b"{foo,,bar}", [b"foo", b"", b"bar"]),
        (b"{1,2,3}", [b"1", b"2", b"3"]),
        (b'{"a b","c,d","{}"}', [b"a b", b"c,d", b"{}"]),
        (rb'{"a\"b","c\\d"}', [b'a"b', rb"c\d"]),
        (b"{NULL,null}", [b"NULL", b"null"]),
        (b'{"NULL",""}', [b"NULL", b""]),
        (b"{\xc3\xa4,\xff}", [b"\xc3\xa4", b"\xff"]),
    ],
)
def test_decode_array_returns_the_elements(text: bytes, elements: list[bytes]) -> None:
    code = f"""
    local list = pg:decode_array({quoted(text)})
    print(#list)
    for _, element in ipairs(list) do print(sodium.bin2hex(element)) end
    """
    assert printed(code) == [str(len(elements)), *(element.hex() for element in elements)]


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"x",
            b"{",
            b"}",
            b"{a",
            b"a}",
            b'{"a}',
            b'{"a"b}',
            b'{a"b"}',
            b"{{1},{2}}",
            b"{a}x",
        ),
        *(b"{a}}", rb"{a\}", rb'{"a\"}', b"{a,", b"{a\0"),
    ],
)
def test_decode_array_raises_on_what_is_no_one_dimensional_array(text: bytes) -> None:
    assert evaluated(f"pg:decode_array({quoted(text)})").startswith("raises ")


@given(st.lists(st.binary(max_size=20), max_size=20))
@settings(max_examples=50)
def test_arrays_survive_encoding_and_decoding(elements: list[bytes]) -> None:
    code = f"""
    local list = {{{", ".join(map(quoted, elements))}}}
    local again = pg:decode_array(pg:encode_array(list))
    local same = #again == #list
    for i = 1, #list do same = same and again[i] == list[i] end
    print(same)
    """
    assert printed(code) == ["true"]


# Random calls

FUNCTIONS: Final = [
    ("control_resolve", None),
    ("socket.connect", "socket"),
    ("s.send", "s"),
    ("s.send", "closed"),
    ("s.close", "s"),
    ("control_client.new", "control_client"),
    ("c.build", "c"),
    ("c.send", "c"),
    *((f"b.{name}", "b") for name in ("cancel_job", *BUILDERS, *WITH_SECONDS)),
    ("pg.new", "pg"),
    ("pg.encode_array", "pg"),
    ("pg.decode_array", "pg"),
    ("db.execute", "db"),
    ("db.listen", "db"),
    *((f"sodium.{name}", None) for name in ("bin2hex", "hex2bin", "randombytes")),
    *((f"sodium.crypto_{name}", None) for name in ("box_keypair", "box_seal", "box_seal_open")),
    *((f"sodium.crypto_{name}", None) for name in ("scalarmult_base", "sign_keypair")),
    *((f"sodium.crypto_{name}", None) for name in ("sign_detached", "sign_verify_detached")),
]

STRANGE: Final = [
    *("nil", "true", "false", "0", "1", "-1", "0.5", "2^31", "2^32", "2^53", "2^63", "1e300"),
    *("1/0", "-1/0", "0/0", "{}", "cyclic", "nasty", "{1, 2, nil, 4}", "{nil}", "{nasty}"),
    *("{n = 2^53}", "{n = -1}", "{n = 0/0}", "{n = 1e300}", "{n = {}}", "{n = 3}", "{cyclic}"),
    *('{type = "dgram"}', '{type = "seqpacket"}', '{type = "stream"}', "{type = nasty}"),
    *("print", "failing", "coroutine.yield", "coroutine.create(print)", "coroutine.running()"),
    *("io.stdout", "newproxy()", "newproxy(true)", "cgroup", "cgroup.xattr", "cgroup.parent"),
    *("a", "s", "closed", "c", "b", "db", "socket", "pg", "control_client", "sodium", "_G"),
    *('("x"):rep(1048576)', '("x"):rep(32)', '("x"):rep(64)', '"a\\0b"', '"\\255\\254"', '""'),
    *('"127.0.0.1:9"', '"@x"', '"/nonexistent"', '"[::1]:9"', '"localhost:9"', '"{a,b}"'),
    *('"host=/nonexistent"', '"SELECT $1"', '"00ff"', '"dgram"'),
]

values = st.one_of(
    st.sampled_from(STRANGE),
    st.binary(max_size=40).map(quoted),
    st.integers(-5, 70000).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda number: f"({number!r})"),
)


@st.composite
def calls(draw: st.DrawFn) -> str:
    """Give a call, mostly with the right object."""
    function, self = draw(st.sampled_from(FUNCTIONS))
    arguments = draw(st.lists(values, max_size=4))
    if self is not None and draw(st.integers(0, 9)) > 0:
        arguments.insert(0, self)
    return ", ".join([function, *arguments])


FUZZ: Final = (
    OBJECTS
    + """
local cyclic = {}
cyclic[1], cyclic.type, cyclic.n = cyclic, cyclic, cyclic
local function failing() error("not to be touched") end
local nasty = setmetatable({}, {__index = failing, __newindex = failing, __tostring = failing,
                                __len = failing, __eq = failing, __call = failing})

local function check(ok, first, second, ...)
  if not ok and type(first) ~= "string" then
    print("raised a " .. type(first))
  elseif ok and first == nil and second ~= nil and type(second) ~= "string" then
    print("returned a " .. type(second) .. " as error")
  end
end

local calls = {
  %s
}

function cgroup_released(cgroup)
  local number = tonumber(cgroup.path:match("call.(%%d+)$"))
  if number then
    calls[number](cgroup)
  else
    print("unharmed", sodium.bin2hex("x"), tostring(control_resolve("/x")))
  end
end
"""
)


async def call_all(code: list[str]) -> list[str]:
    """Make each call in a handler of its own, and return what was printed."""
    functions = [f"function(cgroup) check(pcall({call})) end," for call in code]
    async with Stage(FUZZ % "\n  ".join(functions), Handlers(cpu=2)) as stage:
        stage.release(*(f"call.{number + 1}" for number in range(len(code))), "control")
        await stage.until("the last one runs", lambda: "unharmed" in "".join(stage.output()))
        await stage.finish(0.01)  # some wait for the database, and always will
        allowed = ("ran longer", "PostgreSQL", "nonexistent", "went on after", "time was over")
        strange = [line for line in stage.errors() if not any(text in line for text in allowed)]
        assert strange == []
        return stage.output()


@functools.cache
def warm_up() -> None:
    """Open what is opened once for all."""
    run(lambda: call_all(["sodium.bin2hex"]))


@given(st.lists(calls(), min_size=1, max_size=12))
@settings(max_examples=300)
def test_random_calls_raise_strings_and_harm_nothing(code: list[str]) -> None:
    warm_up()
    before = descriptors()
    output = run(lambda: call_all(code))
    assert [line for line in output if line != "unharmed\t78\t/x"] == []
    assert leaked(before) == 0


# Descriptors

MAKERS: Final = {
    "socket": 'socket:connect("127.0.0.1:9", {type = "dgram"})',
    "failed socket": 'socket:connect("/nonexistent/socket")',
    "refused socket": 'socket:connect("127.0.0.1:9")',
    "client": 'control_client:new("127.0.0.1:9")',
    "connection": 'pg:new("host=/nonexistent")',
}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_collected_leaves_no_descriptor(maker: str) -> None:
    code = f"""
    function cgroup_released(cgroup)
      if cgroup.path ~= "{SCOPE}collect" then
        for _ = 1, 20 do local object = {MAKERS[maker]} end
      else
        collectgarbage()
        collectgarbage()
        print("collected")
      end
    end
    """

    async def test() -> None:
        async with Stage(code) as stage:
            before = descriptors()
            stage.release("one", "two", "three")
            assert await stage.finish(10) == 0
            stage.release("collect")
            await stage.printed("collected")
            await stage.until("all are closed", lambda: leaked(before) == 0)

    run(test)


def test_finalizers_of_the_script_cannot_crash_the_end() -> None:
    async def test() -> None:
        code = """
        local proxy = newproxy(true)
        getmetatable(proxy).__gc = function()
          sodium.bin2hex("x")
          tostring(control_resolve("/x"))
        end
        function cgroup_released() end
        """
        async with Stage(code) as stage:
            stage.release("job")
            await stage.end()

    run(test)
    gc.collect()  # closes the interpreter, which runs the finalizer
