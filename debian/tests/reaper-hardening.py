#!/usr/bin/python3
"""What a script can do under the unit's restrictions, and what not."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from reaper import RECORD, SERVICE, SETTINGS, STATE, Scope, capabilities, counted, releases, use
from support import keep, wait_for

PLACE = Path("/run/receivers")
PREAMBLE = """
local file = assert(io.open(os.getenv("STATE_DIRECTORY") .. "/said", "w"))
file:setvbuf("line")

local function say(...)
  file:write(table.concat({ ... }, " "), "\\n")
end
"""
MAGIC, FADE_CHILDREN = 0x63046101, 8  # of the control protocol


def said_of(code: str) -> list[str]:
    """Let the body of cgroup_released be CODE; return the lines that it says of one cgroup."""
    said = STATE / "said"
    use(f"{PREAMBLE}\nfunction cgroup_released(cgroup)\n{code}\nsay('end')\nend\n")
    SERVICE.restart()
    with Scope() as scope:
        scope.run("job")
        wait_for("it has come to its end", lambda: said.read_text().endswith("end\n"))
        # With the scope, its spawner's own cgroup is released, too.
        return said.read_text().splitlines()[:-1]


def receiver(kind: socket.SocketKind, path: Path) -> socket.socket:
    """Return a socket that everybody may send to."""
    bound = socket.socket(socket.AF_UNIX, kind)
    bound.settimeout(20)
    bound.bind(str(path))
    path.chmod(0o666)
    return bound


def it_sends_datagrams_to_addresses() -> None:
    for family, host, shown in (
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "[::1]"),
    ):
        with socket.socket(family, socket.SOCK_DGRAM) as bound:
            bound.settimeout(20)
            bound.bind((host, 0))
            address = f"{shown}:{bound.getsockname()[1]}"
            code = f'say(assert(socket:connect("{address}", {{type="dgram"}})):send("hello"))'
            assert said_of(code) == ["5"]
            assert bound.recv(100) == b"hello"


def it_sends_to_servers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        address = f"localhost:{server.getsockname()[1]}"
        assert said_of(f'say(assert(socket:connect("{address}")):send("hello"))') == ["5"]
        connection, _ = server.accept()
        with connection:
            assert connection.recv(100) == b"hello"


def it_sends_to_sockets_of_the_host() -> None:
    for kind, name in (
        (socket.SOCK_DGRAM, "dgram"),
        (socket.SOCK_STREAM, "stream"),
        (socket.SOCK_SEQPACKET, "seqpacket"),
    ):
        with receiver(kind, PLACE / name) as bound:
            if kind != socket.SOCK_DGRAM:
                bound.listen()
            code = f'say(assert(socket:connect("{PLACE / name}", {{type="{name}"}})):send("hello"))'
            assert said_of(code) == ["5"]
            connection = bound if kind == socket.SOCK_DGRAM else bound.accept()[0]
            with connection:
                assert connection.recv(100) == b"hello"


def it_sends_commands() -> None:
    with receiver(socket.SOCK_DGRAM, PLACE / "control") as bound:
        code = f"""
            local client = assert(control_client:new("{PLACE / "control"}"))
            say(tostring(client:send(client:build():fade_children("tag"))))
        """
        assert said_of(code) == ["true"]
        assert bound.recv(100) == struct.pack(">IHH4s", MAGIC, 3, FADE_CHILDREN, b"tag")


def it_encrypts() -> None:
    code = """
        local public, secret = sodium.crypto_box_keypair()
        say(sodium.crypto_box_seal_open(sodium.crypto_box_seal("hello", public), public, secret))
    """
    assert said_of(code) == ["hello"]


def it_has_no_power_over_files_of_others() -> None:
    """Neither itself nor a program that it starts, although the daemon can delete any cgroup."""
    code = """
        for line in io.lines("/proc/self/status") do say(line) end
        say("program")
        for line in io.popen("cat /proc/self/status"):lines() do say(line) end
    """
    lines = said_of(code)
    middle = lines.index("program")
    ours, program = (
        capabilities("\n".join(part)) for part in (lines[:middle], lines[middle + 1 :])
    )
    assert ours["Eff"] == ours["Inh"] == ours["Amb"] == 0
    assert program["Eff"] == program["Prm"] == program["Inh"] == program["Amb"] == 0


def it_cannot_read_or_write_elsewhere() -> None:
    for path in ("/home/open", "/tmp/open", "/srv/open"):
        Path(path).touch()
        Path(path).chmod(0o666)
    for path, mode, reason in (
        ("/etc/shadow", "r", "Permission denied"),
        ("/etc/cm4all/spawn/reaper.lua", "a", "Permission denied"),
        ("/srv/open", "a", "Read-only file system"),
        ("/home/open", "r", "Permission denied"),
        ("/tmp/open", "r", "No such file or directory"),
        ("/proc/1/status", "r", "No such file or directory"),
    ):
        code = f'say((select(2, io.open("{path}", "{mode}"))))'
        said = said_of(code)
        assert said == [f"{path}: {reason}"], said


def it_has_the_surroundings_that_scripts_of_the_suite_have() -> None:
    """Files that others can read, nice programs, and callbacks, which need executable memory."""
    code = """
        local ffi = require("ffi")
        ffi.cdef("void qsort(void *, size_t, size_t, int (*)(const int *, const int *))")
        local numbers = ffi.new("int[3]", 3, 1, 2)
        ffi.C.qsort(numbers, 3, 4, function(a, b) return a[0] - b[0] end)
        say(numbers[0], numbers[1], numbers[2])
        say(io.popen("umask"):read())
        say(io.popen("nice -n 5 nice"):read())
    """
    assert said_of(code) == ["1 2 3", "0022", "5"]


def it_cannot_end_the_daemon() -> None:
    code = 'say(os.execute("kill -9 $(cut -d\' \' -f4 /proc/$PPID/stat)") == 0 and "can" or "no")'
    assert said_of(code) == ["no"]
    assert (SERVICE.state, SERVICE.restarts) == ("active", 0)


def what_it_does_not_come_back_from_costs_its_process_only() -> None:
    SETTINGS.write_text("[handlers]\nhang = 1\n")
    use(
        f"{RECORD}\nlocal record = cgroup_released\nfunction cgroup_released(cgroup)\n"
        'if cgroup.path:match("/stuck$") then os.execute("sleep 1000") end record(cgroup) end'
    )
    SERVICE.restart()
    pid = SERVICE.pid
    with Scope() as scope:
        scope.run("stuck")
        scope.run("job")
        scope.wait_empty()
        wait_for("it is handled", lambda: counted(releases())[f"{scope.path}/job"] == 1)
    assert (SERVICE.pid, SERVICE.restarts) == (pid, 0)
    wait_for("it is set aside", lambda: "set aside" in "".join(SERVICE.journal()))
    SETTINGS.unlink()


def it_can_keep_files_of_its_own() -> None:
    code = """
        local path = os.getenv("STATE_DIRECTORY") .. "/kept"
        local kept = assert(io.open(path, "w"))
        kept:write("for ever")
        kept:close()
        say(path)
    """
    assert said_of(code) == [str(STATE / "kept")]
    assert (STATE / "kept").read_text() == "for ever"


if __name__ == "__main__":
    PLACE.mkdir()
    keep(
        it_sends_datagrams_to_addresses,
        it_sends_to_servers,
        it_sends_to_sockets_of_the_host,
        it_sends_commands,
        it_encrypts,
        it_has_no_power_over_files_of_others,
        it_cannot_read_or_write_elsewhere,
        it_has_the_surroundings_that_scripts_of_the_suite_have,
        it_cannot_end_the_daemon,
        what_it_does_not_come_back_from_costs_its_process_only,
        it_can_keep_files_of_its_own,
    )
