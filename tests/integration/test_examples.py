"""The scripts in lua/examples, as they are, do what they say."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from nacl.public import PrivateKey, SealedBox

from spawn_reaper.release import Release
from spawn_reaper.usage import Counters, Peaks
from tests.integration.test_script import complaints, run_jobs
from tests.tools import control, servers
from tests.tools.control import Command, decode
from tests.tools.harness import Cgroup, Host, wait_for
from tests.tools.native import ROOT
from tests.tools.postgresql import Postgresql, programs
from tests.tools.scripts import SCOPE, Stage, release, run

EXAMPLES: Final = ROOT / "lua" / "examples"
USED: Final = Counters(
    cpu_total=512_345, cpu_user=500_000, cpu_system=12_345, memory_events_oom=0, io_read_bytes=4096
)
PEAKS: Final = Peaks(memory_peak=35_651_584, pids_peak=3)


def example(name: str) -> str:
    """Return the text of an example."""
    return (EXAMPLES / name).read_text()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for sockets."""
    with servers.short_directory() as path:
        yield path


@pytest.fixture
def server(module_server: Postgresql, monkeypatch: pytest.MonkeyPatch) -> Iterator[Postgresql]:
    """The server with the tables of the examples, empty, where the examples look for it."""
    if not module_server.running:
        module_server.start()
    module_server.query("DROP SCHEMA IF EXISTS reaper CASCADE")
    for _ in range(2):  # they may be run again
        for file in ("postgresql.sql", "prices.sql"):
            psql(module_server, EXAMPLES / file)
    monkeypatch.setenv("CONNINFO", f"{module_server.conninfo} application_name=script")
    yield module_server
    if module_server.running:
        module_server.terminate("script")


def psql(server: Postgresql, file: Path) -> None:
    """Run a file of SQL as its comment says."""
    result = subprocess.run(
        [programs() / "psql", "-X", "-q", "-d", server.conninfo, "-f", file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def check(file: Path, records: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with --check, as the examples say."""
    return subprocess.run(
        [sys.executable, "-m", "spawn_reaper", "--check", "--lua", file],
        input=records,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=ROOT,
        timeout=30,
        check=False,
    )


# accounts.lua


def test_accounts_prints_releases_and_sums() -> None:
    async def test() -> None:
        async with Stage(example("accounts.lua")) as stage:
            stage.release(
                release("web/one", b"alice", own=USED, peaks=PEAKS),
                release("web", b"alice", own=Counters(cpu_total=1)),
                release("web", b"alice", own=Counters(cpu_total=2), remainder=True),
                release("mail\tx", b"bob\n", own=USED),
                release("none"),
            )
            stage.script.reload(lambda: None)
            first, *_, last, _, _, _ = output = await stage.end()
            assert first == (
                f"released\taccount=alice\tpath={SCOPE}web/one\tcpu=0.512345"
                "\tmemory_peak=35651584\tid=web/one"
            )
            assert last == f"released\taccount=-\tpath={SCOPE}none\tcpu=-\tmemory_peak=-\tid=none"
            assert output[3].startswith(f"released\taccount=bob\\x0a\tpath={SCOPE}mail\\x09x\t")
            assert sorted(output[5:]) == [
                "total\taccount=-\treleases=1\tcpu=0.000000\tmemory_peak=-",
                "total\taccount=alice\treleases=2\tcpu=0.512348\tmemory_peak=35651584",
                "total\taccount=bob\\x0a\treleases=1\tcpu=0.512345\tmemory_peak=-",
            ]

    run(test)


# statsd.lua


def test_statsd_gets_one_datagram_for_each_release(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        with servers.udp() as receiver:
            monkeypatch.setenv("STATSD", receiver.address)
            async with Stage(example("statsd.lua")) as stage:
                stage.release(
                    release("web/one", b"alice", own=USED, peaks=PEAKS),
                    release("web", b"a:b|c.d\n", own=Counters(cpu_total=7), remainder=True),
                    release("none"),
                )
                assert await stage.end() == []
            assert receiver.receive().decode().splitlines() == [
                "spawn.alice.releases:1|c",
                "spawn.alice.cpu_us:512345|c",
                "spawn.alice.oom:0|c",
                "spawn.alice.io_read_bytes:4096|c",
                "spawn.alice.memory_peak:35651584|g",
                "spawn.alice.processes_peak:3|g",
            ]
            assert receiver.receive() == b"spawn.a_b_c_d_.cpu_us:7|c"
            assert receiver.receive() == b"spawn.none.releases:1|c"

    run(test)


def test_statsd_loses_nothing_when_its_server_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        port = servers.free_port()
        monkeypatch.setenv("STATSD", f"127.0.0.1:{port}")
        async with Stage(example("statsd.lua")) as stage:
            stage.release("lost 1", "lost 2", "lost 3")
            await stage.end_all()
            with servers.udp("127.0.0.1", port) as receiver:
                stage.release(release("one", b"one"), release("two", b"two"))
                await stage.end_all()
                received = [receiver.receive() for _ in range(2)]
                assert received == [b"spawn.one.releases:1|c", b"spawn.two.releases:1|c"]

    run(test)


# journal.lua


def fields_of(record: bytes) -> dict[bytes, bytes]:
    """Take a datagram of the journal's native protocol apart."""
    fields = {}
    while record:
        line, _, rest = record.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        assert name not in fields
        fields[name] = value
        record = rest
    return fields


def test_journal_gets_fields_that_nobody_can_forge(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setenv("JOURNAL_SOCKET", str(directory / "journal"))
        async with Stage(example("journal.lua")) as stage:
            for count in range(2):  # the journal was started again in between
                with servers.unix("dgram", directory / "journal") as receiver:
                    stage.release(
                        release("web/one", b"alice", identity="7", own=USED, peaks=PEAKS),
                        release(b"\xff", b"x\nPRIORITY=0\n=", identity="8", remainder=True),
                    )
                    assert await stage.end() == [], count
                    first, second = (fields_of(receiver.receive()) for _ in range(2))
                os.unlink(directory / "journal")
                assert first == {
                    b"MESSAGE": f"{SCOPE}web/one used 0.512 s of CPU time".encode(),
                    b"PRIORITY": b"6",
                    b"SYSLOG_IDENTIFIER": b"reaper-accounting",
                    b"REAPER_ID": b"7",
                    b"REAPER_PATH": f"{SCOPE}web/one".encode(),
                    b"REAPER_ACCOUNT": b"alice",
                    b"REAPER_REMAINDER": b"0",
                    b"REAPER_CPU_USEC": b"512345",
                    b"REAPER_CPU_USER_USEC": b"500000",
                    b"REAPER_CPU_SYSTEM_USEC": b"12345",
                    b"REAPER_MEMORY_PEAK": b"35651584",
                    b"REAPER_MEMORY_OOM": b"0",
                    b"REAPER_IO_READ_BYTES": b"4096",
                }
                assert second[b"REAPER_ACCOUNT"] == b"x\nPRIORITY=0\n="
                assert second[b"REAPER_PATH"] == SCOPE.encode() + b"\xff"
                assert second[b"REAPER_REMAINDER"] == b"1"
                assert second[b"PRIORITY"] == b"6"

    run(test)


# sealed.lua, open_sealed.lua


def test_sealed_records_can_be_opened_by_the_owner_of_the_key_only(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = PrivateKey.generate()
    releases = [
        release("web/one", b"alice", identity="7", own=USED, peaks=PEAKS),
        release(b'\xff"\\\n', b"\xc3\xa4", identity="8", remainder=True),
        release("none", identity="9"),
    ]

    async def seal() -> str:
        monkeypatch.setenv("RECORDS", str(directory / "records"))
        monkeypatch.setenv("PUBLIC_KEY", bytes(secret.public_key).hex())
        with servers.unix_listener("stream", directory / "records") as listener:
            async with Stage(example("sealed.lua")) as stage:
                stage.release(*releases)
                assert await stage.end() == []
                text = (await asyncio.to_thread(listener.accept().receive)).decode()
        return text

    lines = run(seal).splitlines()
    records = [json.loads(SealedBox(secret).decrypt(bytes.fromhex(line))) for line in lines]
    assert [record.pop("time") > 1e9 for record in records] == [True] * 3
    assert records == [
        {
            "id": "7",
            "account": "alice",
            "path": f"{SCOPE}web/one",
            "remainder": False,
            "cpu": 0.512345,
            "memory_peak": 35651584,
            "oom": 0,
        },
        {
            "id": "8",
            "account": "\xc3\xa4",
            "path": f'{SCOPE}\xff"\\\n',
            "remainder": True,
        },
        {"id": "9", "path": f"{SCOPE}none", "remainder": False},
    ]

    torn = [lines[0], lines[1][:-2], "nonsense", lines[2]]
    opened = check(
        EXAMPLES / "open_sealed.lua",
        "\n".join(torn) + "\n",
        SECRET_KEY=bytes(secret).hex(),
    )
    assert opened.returncode == 0, opened
    assert [json.loads(line)["id"] for line in opened.stdout.splitlines()[:2]] == ["7", "9"]
    assert "line 2 does not open\nline 3 does not open\n" in opened.stderr


def test_sealed_sends_a_torn_line_again_when_its_reader_comes_back(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = PrivateKey.generate()
    path = directory / "records"

    async def test() -> None:
        monkeypatch.setenv("RECORDS", str(path))
        monkeypatch.setenv("PUBLIC_KEY", bytes(secret.public_key).hex())
        with servers.unix_listener("stream", path) as listener:
            async with Stage(example("sealed.lua")) as stage:
                stage.release("one")
                await stage.end()
                first = listener.accept()
                assert first.receive()
                first.close()
                stage.release("two", "three")
                assert await stage.end() == []
                text = (await asyncio.to_thread(listener.accept().receive)).decode()
        records = [
            json.loads(SealedBox(secret).decrypt(bytes.fromhex(line))) for line in text.splitlines()
        ]
        assert [record["id"] for record in records] == ["two", "three"]

    run(test)


def test_open_sealed_makes_a_pair_of_keys() -> None:
    made = check(EXAMPLES / "open_sealed.lua")
    assert made.returncode == 0, made
    keys = dict(line.split("=") for line in made.stdout.splitlines() if "_KEY=" in line)
    secret = PrivateKey(bytes.fromhex(keys["SECRET_KEY"]))
    assert bytes(secret.public_key).hex() == keys["PUBLIC_KEY"]


@pytest.mark.parametrize("key", ["", "00", "0" * 63, "g" * 64])
def test_sealed_is_refused_without_a_key(key: str) -> None:
    result = check(EXAMPLES / "sealed.lua", PUBLIC_KEY=key)
    assert result.returncode != 0
    assert "PUBLIC_KEY must be 64 hexadecimal digits" in result.stderr


# fade_children.lua


def test_fade_children_fades_once_in_a_while_what_ran_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    oom = Counters(memory_events_oom=1)

    async def test() -> None:
        name = servers.abstract_name()
        monkeypatch.setenv("CONTROL", name)
        async with Stage(example("fade_children.lua")) as stage:
            with servers.unix("dgram", name) as receiver:
                stage.release(
                    release("fine", b"alice", own=Counters(memory_events_oom=0)),
                    release("web/one", b"alice", own=oom),
                    release("web/two", b"alice", own=oom),
                    release("untagged", own=oom),
                )
                output = await stage.end()
                assert decode(receiver.receive()) == [Command(control.FADE_CHILDREN, b"alice")]
                assert not receiver.has_more()
                assert output == [
                    f"{SCOPE}web/one ran out of memory, faded the children of alice",
                    f"{SCOPE}untagged ran out of memory and has no user.account",
                ]
            with servers.unix("dgram", name) as receiver:  # beng-proxy was started again
                stage.release(release("mail", b"bob", own=oom))
                await stage.end()
                assert decode(receiver.receive()) == [Command(control.FADE_CHILDREN, b"bob")]
            stage.release(release("late", b"carol", own=oom))
            (error,) = (await stage.end_all()).errors
            assert f"cannot tell {name} to fade carol: " in error

    run(test)


# postgresql.lua


TOTALS: Final = (
    "SELECT account, releases, memory_peak, cpu_total FROM reaper.account_total ORDER BY 1"
)


def test_postgresql_counts_each_release_exactly_once(server: Postgresql) -> None:
    releases = [
        release("web/one", b"alice", own=USED, peaks=PEAKS),
        release("web", b"alice", own=Counters(cpu_total=1)),
        release("web", b"alice", identity="web-2", own=Counters(cpu_total=2), remainder=True),
        release(b"\xff\n", b"\xfe", own=USED),
        release("plain/session", own=Counters(cpu_total=3)),
    ]

    async def test() -> None:
        async with Stage(example("postgresql.lua")) as stage:
            stage.release(*releases, *releases)  # each is there twice
            assert await stage.end() == []

    run(test)
    rows = server.query(TOTALS)
    assert [(row[0], row[1], row[2], str(row[3])) for row in rows] == [
        (r"\xfe", 1, None, "0.512345"),
        ("alice", 2, 35_651_584, "0.512348"),
        ("plain", 1, None, "0.000003"),
    ]
    (row,) = server.query(
        "SELECT path, remainder, cpu_user, oom, forks, io_read_bytes, released > now() - interval"
        " '1 minute' FROM reaper.release WHERE id = 'web/one'"
    )
    assert (*row[:2], str(row[2]), *row[3:]) == (
        *(f"{SCOPE}web/one", False, "0.500000"),
        *(0, None, 4096, True),
    )


def test_postgresql_loses_and_doubles_nothing_when_the_server_is_killed(
    server: Postgresql,
) -> None:
    async def test() -> None:
        async with Stage(example("postgresql.lua")) as stage:
            for batch in range(6):
                stage.release(
                    *(
                        release(f"{batch}-{number}", b"alice", own=Counters(cpu_total=1000))
                        for number in range(100)
                    )
                )
                if batch in (1, 3):
                    await asyncio.sleep(0.03)  # in the middle of it
                    server.kill()
                    server.start()
            outcome = await stage.end_all(20)
            assert not [line for line in outcome.errors if "is not in the database" in line]

    run(test, 40)
    ((account, count, _, cpu),) = server.query(TOTALS)
    assert (account, count, str(cpu)) == ("alice", 600, "0.600000")
    assert server.query("SELECT count(*) FROM reaper.release") == [(600,)]


def test_postgresql_records_what_the_daemon_releases(
    server: Postgresql, host: Host, scope: Cgroup
) -> None:
    reaper = host.reaper(scope, script=EXAMPLES / "postgresql.lua")
    scope.make("web", account=b"alice")
    scope.make("web/one").run("exec sh -c ':'")
    wait_for("it is gone", lambda: scope.children() == ["_"])
    run_jobs(scope, reaper, "mail")
    reaper.stop()
    assert complaints(reaper) == [], reaper.errors()
    rows = server.query("SELECT path, account, cpu_total > 0 FROM reaper.release ORDER BY path")
    base = host.path_of(scope)
    assert [row for row in rows if row[0] != f"{base}/web"] == [
        (f"{base}/mail", "mail", True),
        (f"{base}/web/one", "alice", True),
    ]


# prices.lua


def test_prices_are_loaded_at_once_and_after_each_change(server: Postgresql) -> None:
    def cost_of(identity: str, cost: str) -> str:
        path = f"path={SCOPE}web/{identity}"
        return f"cost account=alice {path} cost={cost} cpu=0.512345 id=web/{identity}"

    def job(identity: str) -> Release:
        return release(f"web/{identity}", b"alice", own=USED)

    async def test() -> None:
        async with Stage(example("prices.lua")) as stage:
            stage.release(job("one"))
            await stage.printed(cost_of("one", "0.000005164"))

            count = len(stage.output())
            server.query("UPDATE reaper.price SET price = 2 WHERE counter = 'cpu_total'")
            await stage.until("they are loaded", lambda: len(stage.output()) > count)
            stage.release(job("two"))
            await stage.printed(cost_of("two", "1.024690041"))

            server.query("ALTER TABLE reaper.price RENAME TO elsewhere")
            stage.script.reload(lambda: None)
            await stage.logged("cannot load the prices: ")
            stage.release(job("three"))
            await stage.printed(cost_of("three", "1.024690041"))
            server.query("ALTER TABLE reaper.elsewhere RENAME TO price")
            count = len(stage.output())
            stage.script.reload(lambda: None)
            await stage.until("they are loaded", lambda: len(stage.output()) > count)
            assert stage.output()[-1] == "loaded 3 prices"

    run(test)


# All of them


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.lua")), ids=lambda file: file.name)
def test_every_example_passes_the_check(file: Path) -> None:
    result = check(file, PUBLIC_KEY="0" * 64, CONNINFO="host=/nonexistent")
    assert result.returncode == 0, result
