"""Sockets and the control client against real receivers."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast
from unittest.mock import patch

import pytest

from spawn_reaper.runner.bindings.socket import Socket, Sockets
from spawn_reaper.settings import Handlers
from tests.integration.test_script import complaints, has_printed, run_jobs
from tests.tools import control, servers
from tests.tools.control import Command, decode
from tests.tools.harness import Cgroup, Host, wait_for
from tests.tools.scripts import Stage, play, printed, run

EVERY_BYTE: Final = bytes(range(256))
EVERY_BYTE_IN_LUA: Final = (
    "(function() local t = {} for i = 0, 255 do t[i + 1] = string.char(i) end"
    " return table.concat(t) end)()"
)
MEGABYTES: Final = 8_000_000  # more than any buffer of a socket takes


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for sockets."""
    with servers.short_directory() as path:
        yield path


# Every kind of socket that a script can connect to

Receiving = Callable[[Path], servers.Receiver]
Listening = Callable[[Path], servers.Listener]

DATAGRAMS: Final[dict[str, Receiving]] = {
    "IPv4": lambda _: servers.udp("127.0.0.1"),
    "IPv6": lambda _: servers.udp("::1"),
    "path": lambda directory: servers.unix("dgram", directory / "socket"),
    "abstract": lambda _: servers.unix("dgram", servers.abstract_name()),
}
STREAMS: Final[dict[str, Listening]] = {
    "IPv4": lambda _: servers.tcp("127.0.0.1"),
    "IPv6": lambda _: servers.tcp("::1"),
    "path": lambda directory: servers.unix_listener("stream", directory / "socket"),
    "abstract": lambda _: servers.unix_listener("stream", servers.abstract_name()),
}
PACKETS: Final[dict[str, Listening]] = {
    "path": lambda directory: servers.unix_listener("seqpacket", directory / "socket"),
    "abstract": lambda _: servers.unix_listener("seqpacket", servers.abstract_name()),
}


@pytest.mark.parametrize("kind", DATAGRAMS)
def test_datagrams_arrive_one_by_one(kind: str, directory: Path) -> None:
    with DATAGRAMS[kind](directory) as receiver:
        code = f"""
        local s = assert(socket:connect("{receiver.address}", {{type = "dgram"}}))
        print(s:send("one"), s:send({EVERY_BYTE_IN_LUA}), s:send("three", 3, 4))
        """
        assert printed(code) == ["3\t256\t2"]
        assert [receiver.receive() for _ in range(3)] == [b"one", EVERY_BYTE, b"re"]
        assert not receiver.has_more()


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("options", ["", ', {type = "stream"}', ", {}"])
def test_a_stream_is_the_default_and_carries_every_byte(
    kind: str, options: str, directory: Path
) -> None:
    with STREAMS[kind](directory) as listener:
        code = f"""
        local s = assert(socket:connect("{listener.address}"{options}))
        print(s:send("one"), s:send({EVERY_BYTE_IN_LUA}), s:send("three", -2))
        s:close()
        """
        assert printed(code) == ["3\t256\t2"]
        assert listener.receive_all() == b"one" + EVERY_BYTE + b"ee"


@pytest.mark.parametrize("kind", PACKETS)
def test_seqpacket_sockets_keep_messages_apart(kind: str, directory: Path) -> None:
    with PACKETS[kind](directory) as listener:
        code = f"""
        local s = assert(socket:connect("{listener.address}", {{type = "seqpacket"}}))
        print(s:send("one"), s:send({EVERY_BYTE_IN_LUA}), s:send("three"))
        s:close()
        """
        assert printed(code) == ["3\t256\t5"]
        peer = listener.accept()
        assert [peer.receive() for _ in range(4)] == [b"one", EVERY_BYTE, b"three", b""]


@pytest.mark.parametrize("kind", STREAMS)
def test_an_address_object_serves_as_well_as_its_text(kind: str, directory: Path) -> None:
    with STREAMS[kind](directory) as listener:
        code = f"""
        local s = assert(socket:connect(control_resolve("{listener.address}")))
        print(s:send("x"))
        s:close()
        """
        assert printed(code) == ["1"]
        assert listener.receive_all() == b"x"


def test_multicast_datagrams_arrive() -> None:
    def test() -> None:
        servers.command("ip route add multicast 239.0.0.0/8 dev lo")
        with servers.multicast("239.1.2.3") as receiver:
            code = f"""
            local s = assert(socket:connect("{receiver.address}", {{type = "dgram"}}))
            print(s:send("x"))
            local c = assert(control_client:new("{receiver.address}"))
            print(c:send(c:build():fade_children("tag")))
            """
            assert printed(code) == ["1", "true"]
            assert receiver.receive() == b"x"
            assert decode(receiver.receive()) == [Command(control.FADE_CHILDREN, b"tag")]

    servers.isolated(test)


# Names


def test_localhost_is_found_whichever_address_is_served() -> None:
    for host in ("127.0.0.1", "::1"):
        with servers.tcp(host) as listener:
            port = listener.address.rpartition(":")[2]
            code = f"""
            local s = assert(socket:connect("localhost:{port}"))
            print(s:send("x"))
            s:close()
            """
            if host == "::1" and not _localhost_has_ipv6():
                continue
            assert printed(code) == ["1"]
            assert listener.receive_all() == b"x"


def _localhost_has_ipv6() -> bool:
    with suppress(socket.gaierror):
        found = socket.getaddrinfo("localhost", 1, socket.AF_INET6, socket.SOCK_STREAM)
        return any(address[0] == "::1" for *_, address in found)
    return False


def test_all_addresses_of_a_name_that_only_etc_hosts_has_are_tried(directory: Path) -> None:
    hosts = directory / "hosts"
    hosts.write_text("127.0.0.7 few.test\n" + "::1 several.test\n127.0.0.9 several.test\n")

    def test() -> None:
        servers.command(f"mount --bind {hosts} /etc/hosts")
        for name, host in [
            *(("few.test", "127.0.0.7"), ("several.test", "::1"), ("several.test", "127.0.0.9")),
        ]:
            with servers.tcp(host, 4000) as listener:
                code = f"""
                function cgroup_released()
                  local s = assert(socket:connect("{name}:4000"))
                  print(s:send("x"))
                  s:close()
                end
                """
                assert printed(code) == ["1"]
                assert listener.receive_all() == b"x"
        code = """
        print(control_resolve("few.test"), control_resolve("few.test:80"))
        print(socket:connect("absent.test:80"))
        print(pcall(control_resolve, "absent.test"))
        """
        first, second, third = printed(code)
        assert first == "127.0.0.7:5478\t127.0.0.7:80"
        assert second.startswith("nil\t")
        assert third.startswith("false\ttest.lua:")

    servers.isolated(test)


def test_a_name_is_resolved_while_other_handlers_go_on(directory: Path) -> None:
    def test() -> None:
        # The resolver waits for a server that does not answer.
        with servers.udp("127.0.0.1", 53) as nameserver:
            configuration = directory / "resolv.conf"
            configuration.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            servers.command(f"mount --bind {configuration} /etc/resolv.conf")
            code = """
            function cgroup_released(c)
              if c.path:match("slow") then
                print(pcall(control_resolve, "slow.test"))
              end
              print(c.path)
            end
            """
            output = printed(code, "slow", "quick")
            assert output[0] == "/test.scope/quick"
            assert output[1].startswith("false\ttest.lua:4: ")
            assert output[2] == "/test.scope/slow"
            assert b"\4slow\4test" in nameserver.receive()

    servers.isolated(test)


# What does not work


def test_a_connection_that_nobody_takes_is_refused(directory: Path) -> None:
    stale = directory / "stale"
    with servers.unix_listener("stream", stale):
        pass
    addresses = [f"127.0.0.1:{servers.free_port()}", str(stale), servers.abstract_name()]
    for address in addresses:
        code = f"""
        function cgroup_released() print(socket:connect("{address}")) end
        """
        (line,) = printed(code)
        assert line.startswith("nil\t")
        assert line.endswith("Connection refused")


def test_a_socket_of_another_type_is_an_error(directory: Path) -> None:
    with servers.unix("dgram", directory / "dgram") as receiver:
        (line,) = printed(f'print(socket:connect("{receiver.address}"))')
    assert line.startswith("nil\t")
    assert line.endswith("Protocol wrong type for socket")


def test_a_network_that_cannot_be_reached_is_an_error() -> None:
    def test() -> None:
        code = """
        print(socket:connect("203.0.113.1:80"))
        print(socket:connect("203.0.113.1:80", {type = "dgram"}))
        print(socket:connect("[2001:db8::1]:80"))
        print(control_client:new("203.0.113.1"))
        """
        for line in printed(code):
            assert line.startswith("nil\t")
            assert line.endswith("Network is unreachable")

    servers.isolated(test)


def test_a_stream_is_unusable_after_an_error_in_the_middle() -> None:
    async def test() -> None:
        with servers.tcp() as listener:
            code = f"""
            s = assert(socket:connect("{listener.address}"))
            function cgroup_released(c)
              print(s:send(("x"):rep({MEGABYTES})))
              print(s:send("more"))
              s:close()
            end
            """
            async with Stage(code) as stage:
                peer = listener.accept()
                stage.release("job")
                await asyncio.to_thread(peer.receive_exactly, 1000)
                peer.close()
                first, second = await stage.end()
                assert first.endswith(("Broken pipe", "Connection reset by peer")), first
                assert first.startswith("nil\t")
                assert second.startswith("nil\t")

    run(test)


def test_messages_that_are_too_long_are_not_sent(directory: Path) -> None:
    with (
        servers.unix("dgram", directory / "dgram") as dgram,
        servers.unix_listener("seqpacket", directory / "seqpacket") as seqpacket,
        servers.udp() as udp,
    ):
        code = f"""
        for address, type in pairs{{["{dgram.address}"] = "dgram",
            ["{seqpacket.address}"] = "seqpacket", ["{udp.address}"] = "dgram"}} do
          local s = assert(socket:connect(address, {{type = type}}))
          print(s:send(("x"):rep({MEGABYTES})))
          print(s:send("short"))
        end
        """
        assert printed(code) == ["nil\tMessage too long", "5"] * 3
        for peer in (dgram, seqpacket.accept(), udp):
            assert peer.receive() == b"short"


def test_a_datagram_that_nobody_takes_is_an_error_at_the_next_one() -> None:
    code = f"""
    local s = assert(socket:connect("127.0.0.1:{servers.free_port()}", {{type = "dgram"}}))
    print(s:send("one"))
    print(s:send("two"))
    """
    assert printed(code) == ["3", "nil\tConnection refused"]


# Waiting


def test_sending_into_a_full_buffer_suspends_only_its_handler(directory: Path) -> None:
    async def test() -> None:
        with servers.unix_listener("stream", directory / "socket") as listener:
            code = f"""
            local s = assert(socket:connect("{listener.address}"))
            function cgroup_released(c)
              if c.path:match("big") then
                print("sent", s:send(("x"):rep({MEGABYTES})))
                s:close()
              else
                print(c.path)
              end
            end
            """
            async with Stage(code) as stage:
                stage.release("big", "other")
                await stage.printed("/test.scope/other")
                stage.release("another")
                await stage.printed("/test.scope/another")
                received = await asyncio.to_thread(listener.receive_all)
                assert received == b"x" * MEGABYTES
                assert (await stage.end())[2] == f"sent\t{MEGABYTES}"

    run(test)


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_connecting_to_a_full_backlog_suspends_only_its_handler(kind: str, directory: Path) -> None:
    async def test() -> None:
        with servers.unix_listener(kind, directory / "socket", backlog=1) as listener:
            filled = listener.fill()
            code = f"""
            function cgroup_released(c)
              if c.path:match("connect") then
                local s = assert(socket:connect("{listener.address}", {{type = "{kind}"}}))
                print(s:send("x"))
                s:close()
              else
                print(c.path)
              end
            end
            """
            async with Stage(code) as stage:
                stage.release("connect", "other")
                await stage.printed("/test.scope/other")
                for _ in range(filled):
                    listener.accept()
                await stage.printed("1")
                assert listener.receive_all() == b"x"
                await stage.end()

    run(test)


@pytest.mark.parametrize("kind", ["dgram", "seqpacket"])
def test_datagrams_wait_for_room_in_the_queue(kind: str, directory: Path) -> None:
    count = 2000

    async def test() -> None:
        path = directory / "socket"
        code = f"""
        local s = assert(socket:connect("{path}", {{type = "{kind}"}}))
        function cgroup_released(c)
          if not c.path:match("sender") then print(c.path) return end
          for i = 1, {count} do assert(s:send("message " .. i)) end
          print("sent")
        end
        """
        make = servers.unix_listener if kind == "seqpacket" else servers.unix
        with make(kind, path) as server:
            async with Stage(code) as stage:
                peer = server.accept() if isinstance(server, servers.Listener) else server
                stage.release("sender", "other")
                await stage.printed("/test.scope/other")
                assert "sent" not in stage.output()
                received = await asyncio.to_thread(lambda: [peer.receive() for _ in range(count)])
                assert received == [f"message {i}".encode() for i in range(1, count + 1)]
                await stage.printed("sent")
                await stage.end()

    run(test)


def test_big_messages_of_two_handlers_on_one_stream_do_not_interleave() -> None:
    size = MEGABYTES // 2

    async def test() -> None:
        with servers.tcp() as listener:
            code = f"""
            local s = assert(socket:connect("{listener.address}"))
            function cgroup_released(c)
              local letter = c.path:match("(.)$")
              print(letter, s:send(letter:rep({size})))
            end
            """
            async with Stage(code) as stage:
                peer = listener.accept()
                stage.release("a", "b")
                received = await asyncio.to_thread(peer.receive_exactly, size // 10)
                stage.release("c")  # while the first one is in the middle of it
                received += await asyncio.to_thread(peer.receive_exactly, 3 * size - len(received))
                assert received == b"a" * size + b"b" * size + b"c" * size
                assert await stage.end() == [f"{letter}\t{size}" for letter in "abc"]

    run(test)


def test_a_socket_may_be_closed_while_another_handler_waits_in_it(directory: Path) -> None:
    async def test() -> None:
        with servers.unix_listener("stream", directory / "socket") as listener:
            code = f"""
            local s = assert(socket:connect("{listener.address}"))
            function cgroup_released(c)
              if c.path:match("sender") then
                print(s:send(("x"):rep({MEGABYTES})))
              else
                s:close()
                print("closed")
              end
            end
            """
            async with Stage(code) as stage:
                stage.release("sender", "waiting sender", "closer")
                await stage.printed("closed")
                output = await stage.end()
                assert [line.split("\t")[0] for line in output] == ["closed", "nil", "nil"]
                assert len(listener.receive_all()) < MEGABYTES

    run(test)


@pytest.mark.parametrize(
    "call",
    ['socket:connect("{full}")', 'stuck:send(("x"):rep(8000000))'],
    ids=["connect", "send"],
)
def test_a_handler_that_waits_too_long_for_a_socket_gets_an_error_with_the_line(
    call: str, directory: Path
) -> None:
    with (
        servers.unix_listener("stream", directory / "full", backlog=0) as full,
        servers.unix_listener("stream", directory / "stuck") as stuck,
    ):
        full.fill()
        code = f"""
        local stuck = assert(socket:connect("{stuck.address}"))
        function cgroup_released()
          {call.format(full=full.address)}
        end
        """
        outcome = play(code, limits=Handlers(time=0.1))
        assert outcome.errors == ["/test.scope/job: test.lua:4: ran longer than 0.1 s"]


def test_operations_have_a_limit_of_their_own_of_ten_seconds(directory: Path) -> None:
    async def test() -> None:
        with (
            servers.unix_listener("stream", directory / "full", backlog=0) as full,
            servers.unix_listener("stream", directory / "stuck") as stuck,
            servers.unix("dgram", directory / "queue") as queue,
        ):
            full.fill()
            code = f"""
            local stuck = assert(socket:connect("{stuck.address}"))
            local client = assert(control_client:new("{queue.address}"))
            local calls = {{
              connect = function() return socket:connect("{full.address}") end,
              send = function() return stuck:send(("x"):rep({MEGABYTES})) end,
              control = function()
                for _ = 1, 10000 do
                  local ok, text = client:send(client:build():fade_children("x"))
                  if not ok then return ok, text end
                end
              end,
            }}
            function cgroup_released(c)
              local name = c.path:match("[^/]+$")
              print(name, calls[name]())
            end
            """
            async with Stage(code) as stage:
                before = asyncio.get_running_loop().time()
                stage.release("connect", "send", "control")
                await asyncio.sleep(9)
                assert stage.output() == []
                output = await stage.end(5)
                assert asyncio.get_running_loop().time() - before < 13
                names = ["connect\tnil", "control\tnil", "send\tnil"]
                assert sorted(line.rpartition("\t")[0] for line in output) == names
                assert all("timed out" in line for line in output), output

    run(test)


# Where Lua cannot suspend its caller

PLACES: Final = {
    "gsub": 'string.gsub("x", ".", function() {work} end)',
    "sort": "table.sort({{2, 1}}, function(a, b) {work} return a < b end)",
    "require": 'package.preload.m = function() {work} end require "m" package.loaded.m = nil',
    "dofile": 'local f = io.open("{file}", "w") f:write([==[{work}]==]) f:close() dofile("{file}")',
    "metamethod of a C function": (
        "tostring(setmetatable({{}}, {{__tostring = function() {work} return '' end}}))"
    ),
    "__gc": (
        "do local p = newproxy(true) getmetatable(p).__gc = function() {work} end end"
        " collectgarbage() collectgarbage()"
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_sockets_block_where_lua_cannot_suspend_its_caller(place: str, directory: Path) -> None:
    work = f"""
    local s = assert(socket:connect("localhost:PORT"))
    done = tostring(s:send(("x"):rep({MEGABYTES})))
    s:close()
    """

    async def test() -> None:
        with servers.tcp() as listener:
            port = listener.address.rpartition(":")[2]
            text = PLACES[place].format(
                work=work.replace("PORT", port), file=directory / "module.lua"
            )
            code = f"""
            function cgroup_released(c)
              {text}
              print(done)
              done = "again"
            end
            """
            async with Stage(code) as stage:
                # Received in a thread that runs already: the loop is about to be blocked, too.
                loop = asyncio.get_running_loop()
                receiving = loop.run_in_executor(None, listener.receive_all)
                stage.release("job")
                assert len(await receiving) == MEGABYTES
                assert (await stage.end())[0] == str(MEGABYTES)

    run(test)


def test_what_blocks_has_a_limit_too(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spawn_reaper.runner.bindings.socket.LIMIT", 0.2)
    with (
        servers.unix_listener("stream", directory / "full", backlog=0) as full,
        servers.unix_listener("stream", directory / "stuck") as stuck,
    ):
        full.fill()
        code = f"""
        local s = assert(socket:connect("{stuck.address}"))
        function cgroup_released()
          string.gsub("x", ".", function()
            print(socket:connect("{full.address}"))
            print(s:send(("x"):rep({MEGABYTES})))
            print(s:send("x"))
          end)
        end
        """
        first, second, third = printed(code)
    assert re.match("nil\t.*timed out", first)
    assert second == "nil\ttimed out"
    assert third.startswith("nil\tsocket is unusable")


def test_the_main_chunk_may_connect_resolve_and_send(directory: Path) -> None:
    with (
        servers.unix_listener("stream", directory / "socket") as listener,
        servers.udp() as receiver,
    ):
        port = receiver.address.rpartition(":")[2]
        code = f"""
        local s = assert(socket:connect("{listener.address}"))
        print(s:send("x"), pcall(function() return control_resolve("localhost:{port}") end))
        s:close()
        local c = assert(control_client:new("127.0.0.1:{port}"))
        print(c:send(c:build():fade_children("tag")))
        """
        first, second = printed(code)
        assert first.startswith("1\ttrue\t")
        assert second == "true"
        assert listener.receive_all() == b"x"
        assert decode(receiver.receive()) == [Command(control.FADE_CHILDREN, b"tag")]


# Lives


def test_sockets_outlive_the_handler_that_made_them() -> None:
    with servers.udp() as receiver:
        code = f"""
        function cgroup_released(c)
          s = s or assert(socket:connect("{receiver.address}", {{type = "dgram"}}))
          client = client or assert(control_client:new("{receiver.address}"))
          builder = builder or client:build():fade_children("x")
          print(s:send(c.path), client:send(builder))
        end
        """
        assert printed(code, "a", "b") == ["13\ttrue"] * 2
        received = [receiver.receive() for _ in range(4)]
        assert received[0::2] == [b"/test.scope/a", b"/test.scope/b"]
        assert [decode(data) for data in received[1::2]] == [[Command(8, b"x")]] * 2


def test_a_socket_that_is_collected_is_closed(directory: Path) -> None:
    async def test() -> None:
        with servers.unix_listener("stream", directory / "socket") as listener:
            code = f"""
            function cgroup_released(c)
              if c.path:match("connect") then
                local s = assert(socket:connect("{listener.address}"))
                print(s:send("x"))
              else
                collectgarbage()
                collectgarbage()
              end
            end
            """
            async with Stage(code) as stage:
                stage.release("connect")
                await stage.printed("1")
                peer = listener.accept()
                assert peer.receive() == b"x"
                assert not peer.has_more()
                stage.release("collect", "collect")
                assert await asyncio.to_thread(peer.receive) == b""
                await stage.end()

    run(test)


def test_the_daemon_ends_well_with_sockets_and_clients_still_open(
    host: Host, scope: Cgroup
) -> None:
    with servers.udp() as receiver:
        script = f"""
        s = assert(socket:connect("{receiver.address}", {{type = "dgram"}}))
        c = assert(control_client:new("{receiver.address}"))
        b = c:build()
        db = pg:new("host=/nonexistent")
        a = control_resolve("{receiver.address}")
        function cgroup_released(cgroup) s:send(cgroup.path) end
        """
        reaper = host.reaper(scope, script=script)
        run_jobs(scope, reaper, "job")
        assert receiver.receive() == f"{host.path_of(scope)}/job".encode()
        reaper.stop()
        assert complaints(reaper) == []
        assert not [line for line in reaper.errors() if "finalizer" in line or "rror:" in line]


# The control client


NUMBERS: Final = {
    "fade_children": 8,
    "flush_filter_cache": 12,
    "discard_session": 14,
    "flush_http_cache": 15,
    "terminate_children": 16,
    "disconnect_database": 20,
    "reset_limiter": 22,
    "reject_client": 23,
    "tarpit_client": 24,
}


def sent_by(code: str) -> list[bytes]:
    """Return the datagrams that a client `c` sends, all of them successfully."""
    with servers.udp() as receiver:
        output = printed(f'local c = assert(control_client:new("{receiver.address}"))\n{code}')
        assert set(output) == {"true"}
        return [receiver.receive() for _ in output]


@pytest.mark.parametrize(("method", "number"), NUMBERS.items())
def test_each_command_has_its_number_and_each_string_makes_one(method: str, number: int) -> None:
    (datagram,) = sent_by(f"""
    print(c:send(c:build():{method}("a"):{method}("bc", "def", "ghij", "")))
    """)
    payloads = [b"a", b"bc", b"def", b"ghij", b""]
    assert decode(datagram) == [Command(number, payload) for payload in payloads]


def test_a_datagram_has_exactly_the_bytes_of_the_protocol() -> None:
    datagrams = sent_by("""
    print(c:send(c:build():fade_children("tag"):flush_http_cache("abcd")))
    print(c:send(c:build():cancel_job("part", "id")))
    print(c:send(c:build()))
    """)
    assert datagrams == [
        b"\x63\x04\x61\x01" + b"\0\3\0\10tag\0" + b"\0\4\0\17abcd",
        b"\x63\x04\x61\x01" + b"\0\7\0\31part\0id\0",
        b"\x63\x04\x61\x01",
    ]


def test_payloads_are_binary_safe_and_numbers_pass_as_strings() -> None:
    (datagram,) = sent_by(f"""
    print(c:send(c:build():discard_session({EVERY_BYTE_IN_LUA}, 42, 0.5)))
    """)
    assert decode(datagram) == [Command(14, data) for data in (EVERY_BYTE, b"42", b"0.5")]


@pytest.mark.parametrize("method", ["reject_client", "tarpit_client"])
def test_seconds_go_before_the_address_and_a_packed_string_goes_unchanged(method: str) -> None:
    (datagram,) = sent_by(f"""
    print(c:send(c:build()
      :{method}("192.0.2.1", 60)
      :{method}("192.0.2.2")
      :{method}("\\0\\0\\0\\060192.0.2.3")
      :{method}("a", 0, "b", "c", 4294967295)))
    """)
    assert decode(datagram) == [
        Command(NUMBERS[method], payload)
        for payload in (
            b"\0\0\0\x3c192.0.2.1",
            b"192.0.2.2",
            b"\0\0\0\x3c192.0.2.3",
            *(b"\0\0\0\0a", b"b", b"\xff\xff\xff\xffc"),
        )
    ]


def test_fractions_of_seconds_are_cut_off_like_those_of_every_integer() -> None:
    (datagram,) = sent_by('print(c:send(c:build():reject_client("x", 1.9)))')
    assert decode(datagram) == [Command(control.REJECT_CLIENT, b"\0\0\0\1x")]


def test_a_builder_may_be_sent_again_and_grow_in_between() -> None:
    first, second, third = sent_by("""
    local b = c:build():fade_children("one")
    print(c:send(b))
    print(c:send(b))
    print(c:send(b:fade_children("two")))
    """)
    assert decode(first) == decode(second) == [Command(8, b"one")]
    assert decode(third) == [Command(8, b"one"), Command(8, b"two")]


def test_the_largest_datagram_arrives_whole() -> None:
    size = 65507 // 4 * 4 - 8
    (datagram,) = sent_by(f'print(c:send(c:build():fade_children(("x"):rep({size}))))')
    assert decode(datagram) == [Command(8, b"x" * size)]


def test_a_client_speaks_to_unix_sockets_too(directory: Path) -> None:
    for address in (str(directory / "socket"), servers.abstract_name()):
        with servers.unix("dgram", address) as receiver:
            code = f"""
            local c = assert(control_client:new("{receiver.address}"))
            print(c:send(c:build():fade_children("x")))
            """
            assert printed(code) == ["true"]
            assert decode(receiver.receive()) == [Command(8, b"x")]


@pytest.mark.parametrize("address", ['"127.0.0.1"', '"localhost"', 'control_resolve("127.0.0.1")'])
def test_a_client_s_default_port_is_5478(address: str, directory: Path) -> None:
    hosts = directory / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")

    def test() -> None:
        servers.command(f"mount --bind {hosts} /etc/hosts")
        with servers.udp("127.0.0.1", 5478) as receiver:
            code = f"""
            local c = assert(control_client:new({address}))
            print(c:send(c:build():fade_children("x")))
            """
            assert printed(code) == ["true"]
            assert decode(receiver.receive()) == [Command(8, b"x")]

    servers.isolated(test)


def test_a_client_says_why_it_cannot_send() -> None:
    code = f"""
    local c = assert(control_client:new("127.0.0.1:{servers.free_port()}"))
    local b = c:build():fade_children("x")
    print(c:send(b))
    print(c:send(b))
    """
    assert printed(code) == ["true", "nil\tConnection refused"]


def test_a_client_reconnects_once_when_the_network_has_become_unreachable() -> None:
    # A connected socket keeps the source address that it got in the beginning. When the host gets
    # another one, every datagram fails with ENETUNREACH, until the socket is connected again.
    def use_source(address: str) -> None:
        servers.command(f"ip address add {address}/32 dev lo")
        servers.command(f"ip route replace local 203.0.113.0/24 dev lo src {address}")

    async def test() -> None:
        use_source("198.51.100.1")
        with servers.udp("203.0.113.5", 5478) as receiver:
            code = """
            local c = assert(control_client:new("203.0.113.5"))
            function cgroup_released(cgroup)
              print(c:send(c:build():fade_children(cgroup.path)))
            end
            """
            async with Stage(code) as stage:
                stage.release("one")
                await stage.until("it is sent", lambda: stage.output() == ["true"])
                _, (source, _) = receiver.socket.recvfrom(1000)
                assert source == "198.51.100.1"

                servers.command("ip address delete 198.51.100.1/32 dev lo")
                stage.release("two")
                await stage.until("it has failed", lambda: len(stage.output()) == 2)
                assert re.match("nil\t.*Network is unreachable", stage.output()[1])

                use_source("198.51.100.2")
                stage.release("three")
                await stage.until("it is sent", lambda: len(stage.output()) == 3)
                data, (source, _) = receiver.socket.recvfrom(1000)
                assert source == "198.51.100.2"
                assert decode(data) == [Command(8, b"/test.scope/three")]
                assert (await stage.end())[2] == "true"

    servers.isolated(lambda: run(test))


def test_descriptors_do_not_add_up(host: Host, scope: Cgroup) -> None:
    with servers.tcp() as listener:
        script = f"""
        function cgroup_released(cgroup)
          for _ = 1, 30 do
            local s = assert(socket:connect("{listener.address}"))
            s:close()
            assert(control_client:new("127.0.0.1"))
            socket:connect("127.0.0.1:{servers.free_port()}")
          end
          collectgarbage()
          collectgarbage()
          print("done")
        end
        """
        reaper = host.reaper(scope, script=script)
        before = reaper.descriptors()
        for count, name in enumerate(("one", "two", "three"), 1):
            run_jobs(scope, reaper, name)
            wait_for("its handler is done", partial(has_printed, reaper, count))
            for _ in range(30):
                listener.accept().close()
        wait_for("all are closed", lambda: reaper.descriptors() <= before + 4)
        reaper.stop()
        assert reaper.output() == ["done"] * 3


def test_nobody_overtakes_who_waits_to_send() -> None:
    """Between two senders the lock is free for a moment, and a third one may come just then."""
    size = MEGABYTES // 2
    messages = [letter * size for letter in (b"a", b"b", b"c")]

    async def test() -> None:
        ours, peer = socket.socketpair()
        with ours, peer:
            ours.setblocking(False)
            sender = Socket(ours, cast("Sockets", SimpleNamespace(open=set())))
            tasks: list[asyncio.Future[int]] = []

            def send(message: bytes) -> None:
                tasks.append(asyncio.ensure_future(cast("Any", sender.send(message))))

            release = sender._turn.release

            def release_and_send() -> None:
                release()
                if len(tasks) == 2:
                    send(messages[2])

            with patch.object(sender._turn, "release", release_and_send):
                send(messages[0])
                send(messages[1])
                received = await asyncio.to_thread(receive_exactly, peer, 3 * size)
            assert received == b"".join(messages)
            assert await asyncio.gather(*tasks) == [size] * 3

    asyncio.run(test())


def receive_exactly(peer: socket.socket, size: int) -> bytes:
    """Return the next SIZE bytes of a stream."""
    peer.settimeout(servers.SECONDS)
    with peer.makefile("rb") as stream:
        return stream.read(size)
