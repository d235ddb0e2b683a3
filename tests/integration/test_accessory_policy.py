"""Whom the accessory serves, and how much: real processes of other users, settings, limits."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from spawn_accessory.policy import Policy
from spawn_accessory.settings import Settings
from spawn_common import linux
from tests.tools.accessory import Accessory, running_accessory
from tests.tools.harness import Host, wait_for
from tests.tools.peers import CAP_SYS_ADMIN, Who, ask_as, connections_of
from tests.tools.wire import (
    CGROUP,
    ERROR,
    IPC,
    LEASE,
    LIST,
    LIST_MORE,
    LISTED,
    MOUNT,
    NAME,
    NET,
    PID,
    STATUS,
    STATUS_TEXT,
    TIME,
    USER,
    UTS,
    Client,
    Packet,
)

NOBODY = 65534
# <linux/capability.h>
CAP_DAC_OVERRIDE = 1 << 1
CAP_SETGID = 1 << 6
CAP_SETUID = 1 << 7
CAP_NET_ADMIN = 1 << 12
CAP_SYS_PTRACE = 1 << 19

DENIED = [(ERROR, b"permission denied")]
WRONG_NAME = [(ERROR, b"you may not use this name")]
WRONG_MAP = [(ERROR, b"only root may map the host's user or group 0")]

MAPS = b"0 100000 1000\x000 100000 1000"
KINDS = (IPC, PID, USER, NET, UTS, CGROUP, MOUNT, TIME)
ALL = tuple((kind, MAPS if kind == USER else b"") for kind in KINDS)

SETTINGS = f"""
[[allow]]
users = [3001, "{pwd.getpwuid(1).pw_name}"]
names = ["web-*", "shared"]

[[allow]]
groups = [4001, "{grp.getgrgid(2).gr_name}"]
names = ["mail-?", "shared"]

[[allow]]
users = [3002]
groups = [4002]

[[allow]]
users = [3003]
names = []
"""


def names_in(packets: list[Packet]) -> list[bytes]:
    """Return the names that an answer to LIST tells of."""
    assert all(command == LISTED for command, _ in packets)
    return [payload[12:] for _, payload in packets]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Accessory]:
    """A daemon with rules."""
    with running_accessory("policy", SETTINGS) as daemon:
        yield daemon


@pytest.fixture
def root(guarded: Accessory) -> Iterator[Client]:
    """A connection of root to the daemon with rules."""
    with guarded.client() as client:
        yield client
        guarded.check_own_namespaces()


# Who may ask


def test_who_is_not_allowed_gets_an_error_and_nothing_else(
    guarded: Accessory, root: Client
) -> None:
    name = (NAME, b"denied")
    requests: list[tuple[Packet, ...]] = [(name, one) for one in (*ALL, (LEASE, b""))]
    requests += [(name, *ALL, (LEASE, b"")), ((LIST, b""),), ((STATUS, b""),), ((IPC, b""),)]
    asked = ask_as(Who(NOBODY), guarded.address, *requests)
    assert (asked.uid, asked.capabilities) == (NOBODY, 0)
    assert asked.answers == [(DENIED, [])] * len(requests)
    assert b"denied" not in root.names()


def test_who_is_not_allowed_cannot_reach_a_name_that_exists(
    guarded: Accessory, root: Client
) -> None:
    with root.ask((NAME, b"web-root"), *ALL, (LEASE, b"")):
        asked = ask_as(Who(NOBODY), guarded.address, ((NAME, b"web-root"), (IPC, b"")))
        assert asked.answers == [(DENIED, [])]


def test_a_rule_without_names_allows_nothing(guarded: Accessory) -> None:
    asked = ask_as(Who(3003), guarded.address, ((NAME, b"a"), (IPC, b"")), ((LIST, b""),))
    assert asked.answers == [(DENIED, [])] * 2


@pytest.mark.parametrize("uid", [3001, 1])
def test_an_allowed_user_has_the_names_of_the_rule_and_no_others(
    guarded: Accessory, root: Client, uid: int
) -> None:
    served, refused = [b"web-", b"web-1 x", b"shared"], [b"web", b"xweb-1", b"mail-1", b"shared2"]
    requests = [((NAME, name), *ALL, (LEASE, b"")) for name in (*served, *refused)]
    asked = ask_as(Who(uid), guarded.address, *requests)
    assert asked.counts() == [len(ALL) + 1] * len(served) + [0] * len(refused)
    assert asked.answers[len(served) :] == [(WRONG_NAME, [])] * len(refused)
    assert not set(refused) & set(root.names())


@pytest.mark.parametrize(
    "who",
    [
        Who(3100, gid=4001),
        Who(3100, groups=(4000, 4001, 4003)),
        Who(3100, groups=(2,)),
        Who(3100, groups=(*range(5000, 6000), 4001)),
    ],
    ids=["by number", "as a further one", "by name", "among many"],
)
def test_members_of_an_allowed_group_have_the_names_of_the_rule(
    guarded: Accessory, who: Who
) -> None:
    requests = [((NAME, name), (IPC, b"")) for name in (b"mail-1", b"shared", b"mail-10", b"web-1")]
    asked = ask_as(who, guarded.address, *requests)
    assert asked.counts() == [1, 1, 0, 0]


def test_who_is_in_several_rules_has_the_names_of_all_of_them(guarded: Accessory) -> None:
    requests = [((NAME, name), (IPC, b"")) for name in (b"web-1", b"mail-1", b"shared", b"other")]
    asked = ask_as(Who(3001, groups=(4001,)), guarded.address, *requests)
    assert asked.counts() == [1, 1, 1, 0]


@pytest.mark.parametrize("who", [Who(3002), Who(3100, gid=4002)])
def test_a_rule_that_says_no_names_is_for_all_of_them(guarded: Accessory, who: Who) -> None:
    names = (b"anything", b" \x7f", b"web-1", b"a\\*[")
    requests = [((NAME, name), (IPC, b"")) for name in names]
    asked = ask_as(who, guarded.address, *requests)
    assert asked.counts() == [1] * len(names)


def test_users_share_the_namespaces_of_a_name_that_both_may_use(
    guarded: Accessory, root: Client
) -> None:
    request = ((NAME, b"shared"), (IPC, b""))
    with root.ask(*request, (LEASE, b"")) as answer:
        for who in (Who(3001), Who(3100, gid=4001)):
            ((_, inodes),) = ask_as(who, guarded.address, request).answers
            assert inodes == answer.inodes()[:1]


def test_a_list_shows_only_what_its_asker_may_use(guarded: Accessory, root: Client) -> None:
    others = [b"v%03d-%s" % (number, bytes([120]) * 60) for number in range(100)]
    with ExitStack() as stack:
        for name in (b"web-A", b"shared", b"mail-1", b"zebra", *others):
            stack.enter_context(root.ask((NAME, name), (LEASE, b"")))
        theirs = ask_as(
            Who(3001), guarded.address, ((LIST, b""),), ((LIST, b"v"),), ((LIST, b"x"),)
        )
        lists = [names_in(packets) for packets, _ in theirs.answers]
        assert {b"shared", b"web-A"} <= set(lists[0])
        assert all(name == b"shared" or name.startswith(b"web-") for name in lists[0])
        assert lists[1:] == [[name for name in lists[0] if name > b"v"], []]
        ((packets, _),) = ask_as(Who(3002), guarded.address, ((LIST, b""),)).answers
        assert packets[-1] == (LIST_MORE, b"")  # all of them


def test_an_allowed_user_may_ask_for_the_status(guarded: Accessory) -> None:
    ((packets, _),) = ask_as(Who(3001), guarded.address, ((STATUS, b""),)).answers
    assert [command for command, _ in packets] == [STATUS_TEXT]


# Privileges


ADMINISTRATOR = CAP_SYS_ADMIN | CAP_SETUID | CAP_SETGID  # what the kernel wants for any map


def test_who_has_cap_sys_admin_is_served_as_if_it_did_it_itself(
    guarded: Accessory, root: Client
) -> None:
    who = Who(NOBODY, capabilities=ADMINISTRATOR)
    requests = (((NAME, b"admin"), *ALL, (LEASE, b"")), ((LIST, b""),), ((STATUS, b""),))
    asked = ask_as(who, guarded.address, *requests)
    assert (asked.uid, asked.capabilities) == (NOBODY, ADMINISTRATOR)
    assert asked.counts() == [len(ALL) + 1, 0, 0]
    assert b"admin" in root.names()


@pytest.mark.parametrize(
    "capabilities",
    [CAP_SYS_ADMIN, CAP_SYS_ADMIN | CAP_SETUID, CAP_SYS_ADMIN | CAP_SETGID],
    ids=["neither", "CAP_SETUID", "CAP_SETGID"],
)
def test_who_may_not_map_ids_itself_gets_no_user_namespace(
    guarded: Accessory, root: Client, capabilities: int
) -> None:
    name = (NAME, b"no-maps")
    without = tuple(packet for packet in ALL if packet[0] != USER)
    requests = ((name, *ALL), (name, (USER, b"\0")), (name, *without, (LEASE, b"")))
    with root.ask(name, (USER, MAPS)):  # also not if there is one already
        asked = ask_as(Who(NOBODY, capabilities=capabilities), guarded.address, *requests)
    refused = [(ERROR, b"only who has CAP_SETUID and CAP_SETGID may map ids")]
    assert asked.answers[:2] == [(refused, [])] * 2
    assert asked.counts() == [0, 0, len(ALL)]


CONNECT_AND_EXECUTE = """
import os, socket, sys
os.setgroups([])
os.setresgid(60001, 60001, 60001)
os.setresuid(60001, 60001, 60001)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
os.execv(sys.argv[2], ["sleep", "1000"])
"""


def test_who_executes_a_set_user_id_program_is_no_administrator(host: Host) -> None:
    program = host.directory / "sleep"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o4755)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(host.directory / "socket"))
        os.chmod(listener.getsockname(), 0o666)
        listener.settimeout(30)
        listener.listen()
        code = CONNECT_AND_EXECUTE
        command = [sys.executable, "-c", code, listener.getsockname(), str(program)]
        process = stack.enter_context(subprocess.Popen(command))
        stack.callback(process.kill)
        peer = stack.enter_context(listener.accept()[0])
        assert linux.peer_credentials(peer) == (process.pid, 60001, 60001)
        executed = Path(f"/proc/{process.pid}/exe")
        wait_for("it is executed", lambda: executed.readlink() == program)
        assert linux.capabilities(process.pid).effective & CAP_SYS_ADMIN
        assert Policy(Settings()).access(peer) is None


def test_other_capabilities_are_not_enough(guarded: Accessory) -> None:
    asked = ask_as(
        Who(NOBODY, capabilities=CAP_DAC_OVERRIDE | CAP_SETUID | CAP_NET_ADMIN | CAP_SYS_PTRACE),
        guarded.address,
        ((NAME, b"admin"), (IPC, b"")),
    )
    assert asked.capabilities
    assert asked.answers == [(DENIED, [])]


def test_who_is_root_in_a_user_namespace_of_its_own_is_not_served(guarded: Accessory) -> None:
    who = Who(NOBODY, contained=True)
    asked = ask_as(who, guarded.address, ((NAME, b"admin"), (IPC, b"")), ((LIST, b""),))
    assert asked.uid == 0
    assert asked.capabilities & CAP_SYS_ADMIN
    assert asked.answers == [(DENIED, [])] * 2


def test_an_allowed_user_is_served_from_a_user_namespace_of_its_own(guarded: Accessory) -> None:
    who = Who(3001, contained=True)
    asked = ask_as(who, guarded.address, ((NAME, b"web-1"), (IPC, b"")), ((NAME, b"x"), (IPC, b"")))
    assert asked.counts() == [1, 0]


FORBIDDEN_MAPS = [
    b"0 0 1\x000 100000 1",
    b"0 100000 1\x000 0 1",
    b"5 0 1\0",
    b"\x000 100000 1\n1 0 10",
    b"0 4294967294 1\n1 0 4294967294\0",
]
ALLOWED_MAPS = [MAPS, b"0 1 4294967290\x000 1 1", b"\0", b"0 100000 1\n1 200000 1\0"]


@pytest.mark.parametrize(
    "who", [Who(3002), Who(NOBODY, capabilities=ADMINISTRATOR)], ids=["allowed", "administrator"]
)
def test_only_root_may_map_the_hosts_root(guarded: Accessory, root: Client, who: Who) -> None:
    name = (NAME, b"maps-" + os.urandom(4).hex().encode())
    requests = [(name, (IPC, b""), (USER, maps)) for maps in (*FORBIDDEN_MAPS, *ALLOWED_MAPS)]
    asked = ask_as(who, guarded.address, *requests)
    assert asked.answers[: len(FORBIDDEN_MAPS)] == [(WRONG_MAP, [])] * len(FORBIDDEN_MAPS)
    assert asked.counts()[len(FORBIDDEN_MAPS) :] == [2] * len(ALLOWED_MAPS)
    for maps in FORBIDDEN_MAPS:
        with root.ask(name, (USER, maps)) as answer:
            assert len(answer.fds) == 1
    # Also not if there is such a namespace already.
    assert ask_as(who, guarded.address, requests[0]).answers == [(WRONG_MAP, [])]


def test_a_bad_map_is_refused_to_others_with_the_words_that_root_gets(
    guarded: Accessory, root: Client
) -> None:
    request = ((NAME, b"bad-map"), (USER, b"0 100000 1\n0 200000 1\x000 100000 1"))
    expected = [(ERROR, b"uid_map: line 2: the ids inside overlap line 1")]
    assert root.ask(*request).packets == expected
    assert ask_as(Who(3002), guarded.address, request).answers == [(expected, [])]


def test_refusals_are_logged_once_for_each_user(accessory: Accessory) -> None:
    for uid in (NOBODY, 3001, NOBODY):
        ask_as(Who(uid), accessory.address, *[((NAME, b"a"), (IPC, b""))] * 5)
    assert accessory.errors() == [
        f"refused to a process of user {uid}: permission denied" for uid in (NOBODY, 3001)
    ]


def test_many_silent_strangers_take_no_room_from_others(accessory: Accessory) -> None:
    with accessory.client() as client:
        client.names()
        before = accessory.descriptors()
        with connections_of(Who(NOBODY), accessory.address, 200):
            ask_as(Who(NOBODY), accessory.address, ((LIST, b""),))
            assert accessory.descriptors() < before + 100
            client.names()
        wait_for("they are gone", lambda: accessory.descriptors() == before)


# New settings


def reload(daemon: Accessory, settings: str) -> None:
    """Have the daemon load SETTINGS, and wait until it says that it has."""
    daemon.settings.write_text(settings)
    count = daemon.manager.notifications.count("READY=1")
    daemon.signal(signal.SIGHUP)
    wait_for(
        "the daemon has loaded its settings",
        lambda: daemon.manager.notifications.count("READY=1") > count,
    )


def test_sighup_takes_new_settings(accessory: Accessory) -> None:
    request = ((NAME, b"a"), (IPC, b""))
    assert ask_as(Who(3001), accessory.address, request).answers == [(DENIED, [])]
    reload(accessory, "[[allow]]\nusers = [3001]")
    assert "RELOADING=1" in accessory.manager.notifications
    assert ask_as(Who(3001), accessory.address, request).counts() == [1]
    reload(accessory, "")
    assert ask_as(Who(3001), accessory.address, request).answers == [(DENIED, [])]


def test_a_broken_file_leaves_the_settings_as_they_are_and_says_so(accessory: Accessory) -> None:
    reload(accessory, "[[allow]]\nusers = [3001]\n[limits]\nnames = 1")
    before = accessory.errors()
    reload(accessory, "expiry = 0.01\nlimits = 3\n\ncolour = 1")
    where = f"the settings stay as they are: {accessory.settings}"
    said = accessory.errors()[len(before) :]
    assert [line.split(" must ")[0].split(" unknown ")[0] for line in said] == [
        f"{where}:2: limits:",
        f"{where}:4: colour:",
    ]
    requests = [((NAME, name), (IPC, b"")) for name in (b"a", b"b")]
    asked = ask_as(Who(3001), accessory.address, *requests)
    assert asked.counts() == [1, 0]  # allowed, limited, and not expired


def test_a_file_that_is_gone_leaves_the_settings_as_they_are(accessory: Accessory) -> None:
    accessory.settings.unlink()
    accessory.signal(signal.SIGHUP)
    wait_for(
        "it says so",
        lambda: (
            accessory.errors()
            == [f"the settings stay as they are: {accessory.settings}: No such file or directory"]
        ),
    )


def test_another_expiry_holds_at_once(accessory: Accessory) -> None:
    with accessory.client() as client:
        client.ask((NAME, b"a"), *ALL).close()
        reload(accessory, "expiry = 0.05")
        wait_for("the name has expired", lambda: client.names() == {}, 10)


# Limits


def everything_of(daemon: Accessory, client: Client) -> tuple[object, ...]:
    """Return what a failed request must not change."""
    names = client.names()  # first: now everything before it is done
    return names, daemon.descriptors(), daemon.keeper_descriptors(), daemon.inits()


def test_beyond_the_limit_of_names_only_those_that_exist_are_served(accessory: Accessory) -> None:
    reload(accessory, "[limits]\nnames = 2")
    with accessory.client() as client:
        leased = client.ask((NAME, b"a"), (IPC, b""), (LEASE, b""))
        with leased, client.ask((NAME, b"b"), (LEASE, b"")):
            before = everything_of(accessory, client)
            for wanted in ((*ALL, (LEASE, b"")), ((LEASE, b""),)):
                answer = client.ask((NAME, b"c"), *wanted)
                assert answer.packets == [(ERROR, b"there are 2 names already (limits.names)")]
            assert everything_of(accessory, client) == before
            with client.ask((NAME, b"b"), *ALL, (LEASE, b"")) as answer:
                assert len(answer.fds) == len(ALL) + 1
            reload(accessory, "expiry = 0.05\n[limits]\nnames = 2")
        wait_for("both have expired", lambda: client.names() == {}, 10)
        with client.ask((NAME, b"c"), *ALL) as answer:
            assert len(answer.fds) == len(ALL)


def test_beyond_the_limit_of_namespaces_none_is_made(accessory: Accessory) -> None:
    reload(accessory, "[limits]\nnamespaces = 4")
    reason = [(ERROR, b"there are 3 namespaces already (limits.namespaces)")]
    with accessory.client() as client:
        client.ask((NAME, b"a"), *ALL[:3]).close()
        wait_for("the init has its name", lambda: len(accessory.inits()) == 1)
        before = everything_of(accessory, client)
        assert client.ask((NAME, b"a"), *ALL[:5], (LEASE, b"")).packets == reason
        assert client.ask((NAME, b"b"), *ALL[:2], (LEASE, b"")).packets == reason
        assert everything_of(accessory, client) == before
        for wanted in (ALL[:4], (*ALL[:4], (LEASE, b"")), ((LEASE, b""),)):
            with client.ask((NAME, b"a"), *wanted) as answer:
                assert len(answer.fds) == len(wanted)
        with client.ask((NAME, b"b"), (LEASE, b"")) as answer:  # takes no namespace
            assert len(answer.fds) == 1
        (full,) = client.ask((NAME, b"a"), (USER, b"\0")).packets
        assert full == (ERROR, b"there are 4 namespaces already (limits.namespaces)")


def test_what_exists_is_served_below_a_limit_that_came_later(accessory: Accessory) -> None:
    with accessory.client() as client:
        with client.ask((NAME, b"a"), *ALL) as answer:
            made = answer.inodes()
        reload(accessory, "[limits]\nnamespaces = 2\nnames = 1")
        for wanted in (ALL, ALL[:1], ((LEASE, b""),), (*ALL, (LEASE, b""))):
            with client.ask((NAME, b"a"), *wanted) as answer:
                assert len(answer.fds) == len(wanted)
        accessory.stop()
        accessory.start()
    with accessory.client() as client:
        with client.ask((NAME, b"a"), *ALL, (LEASE, b"")) as answer:
            assert answer.inodes()[:-1] == made
        reason = [(ERROR, b"there are 8 namespaces already (limits.namespaces)")]
        assert client.ask((NAME, b"a"), (USER, b"\0")).packets == reason


def test_a_namespace_whose_init_died_is_not_counted(accessory: Accessory) -> None:
    reload(accessory, "[limits]\nnamespaces = 1")
    with accessory.client() as client:
        client.ask((NAME, b"a"), (PID, b"")).close()
        wait_for("the init has its name", lambda: len(accessory.inits()) == 1)
        (pid,) = accessory.inits()
        os.kill(pid, signal.SIGTERM)
        wait_for("the init has ended", lambda: not Path(f"/proc/{pid}").exists())
        with client.ask((NAME, b"b"), (PID, b"")) as answer:
            assert len(answer.fds) == 1


TOO_MANY = [(ERROR, b"there are too many connections (limits.connections)")]


def test_a_connection_too_many_gets_an_error_and_the_others_go_on(accessory: Accessory) -> None:
    reload(accessory, "[limits]\nconnections = 2")
    with accessory.client() as one, accessory.client() as other:
        other.names()
        before = everything_of(accessory, one)
        for _ in range(3):
            with accessory.client() as third:
                answer = third.receive()
                assert answer is not None
                assert answer.packets == TOO_MANY
                assert third.dropped()
        assert everything_of(accessory, one) == before
        count = accessory.descriptors()
        other.close()
        wait_for("there is room", lambda: accessory.descriptors() < count)
        with accessory.client() as third:
            third.names()
        one.names()


def test_a_connection_too_many_gets_its_error_also_if_it_has_asked_at_once(
    accessory: Accessory,
) -> None:
    reload(accessory, "[limits]\nconnections = 1")
    with accessory.client() as one:
        one.names()
        accessory.signal(signal.SIGSTOP)
        with accessory.client() as other:
            other.send((NAME, b"a"), (IPC, b""))
            accessory.signal(signal.SIGCONT)
            one.names()  # now the daemon has done with the other connection
            answer = other.receive()
            assert answer is not None
            assert answer.packets == TOO_MANY
        assert one.names() == {}


def test_those_who_may_ask_for_nothing_do_not_count_as_connections(accessory: Accessory) -> None:
    reload(accessory, "[limits]\nconnections = 2")
    with connections_of(Who(NOBODY), accessory.address, 10), accessory.client() as one:
        one.names()
        with accessory.client() as other:
            other.names()
