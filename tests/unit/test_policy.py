"""What a peer may do: names by pattern, and no map of the host's root."""

from __future__ import annotations

import errno
import fnmatch
import os
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spawn_accessory.idmaps import BadMap
from spawn_accessory.policy import Access, Policy, Refused
from spawn_accessory.protocol import Maps, Namespace, Request
from spawn_accessory.settings import Allow, Settings
from spawn_common import linux

GRANTED = Maps(b"0 100000 1000", b"0 100000 1000")

Be = Callable[..., None]  # uid, gid, groups, pid


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Be:
    """Return a function that says who the peer is, without privileges and far away."""

    def become(uid: int, gid: int = 60000, groups: tuple[int, ...] = (), pid: int = 0) -> None:
        monkeypatch.setattr(linux, "peer_credentials", lambda _: (pid, uid, gid))
        monkeypatch.setattr(linux, "peer_groups", lambda _: frozenset(groups))

    return become


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """One end of a connection to ourselves."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one


def policy(*rules: Allow) -> Policy:
    return Policy(Settings(allow=rules))


def access(*patterns: str) -> Access:
    """Return the access of a user whom a rule with these patterns allows to ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linux, "peer_credentials", lambda _: (0, 3001, 3001))
        with socket.socket(socket.AF_UNIX) as peer:
            found = policy(Allow(users=(3001,), names=patterns)).access(peer)
    assert found is not None
    return found


# Names


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("a", [b"a"], [b"A", b"aa", b"a ", b" a", b"b"]),
        ("*", [b"a", b" ", b"\x7f", b"a/b*", b".hidden"], []),
        ("a*", [b"a", b"a/b", b"a b"], [b"ba"]),
        ("a?", [b"ab", b"a?", b"a*"], [b"a", b"abc"]),
        ("[a-c]x", [b"ax", b"cx"], [b"dx", b"[a-c]x", b"x"]),
        ("[!a]x", [b"bx", b"!x"], [b"ax"]),
        ("a.c", [b"a.c"], [b"abc"]),
        ("a|b", [b"a|b"], [b"a", b"b"]),
        ("[*]", [b"*"], [b"a"]),
        ("a[", [b"a["], [b"a"]),
        ("", [], [b"a"]),
    ],
)
def test_patterns_are_those_of_the_shell(
    pattern: str, matching: list[bytes], others: list[bytes]
) -> None:
    rights = access(pattern)
    assert [name for name in (*matching, *others) if rights.may_use(name)] == matching


def test_one_of_several_patterns_is_enough() -> None:
    rights = access("web-*", "shared")
    assert [rights.may_use(name) for name in (b"web-1", b"shared", b"mail")] == [True, True, False]


NAMES = st.binary(min_size=1, max_size=10).map(lambda raw: bytes(0x20 + b % 0x60 for b in raw))


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7F), max_size=10), NAMES)
def test_every_text_is_a_pattern(pattern: str, name: bytes) -> None:
    assert access(pattern).may_use(name) == fnmatch.fnmatchcase(name.decode(), pattern)


def test_root_may_use_every_name_and_map_everything() -> None:
    zero = Maps(b"0 0 4294967295", b"0 0 1")
    Access(root=True).check(Request(b"any", (Namespace.USER,), zero))


def test_a_name_that_may_not_be_used_is_refused() -> None:
    with pytest.raises(Refused, match=r"^you may not use this name$"):
        access("web-*").check(Request(b"mail", (Namespace.IPC,)))


# Maps


@pytest.mark.parametrize("rights", [Access(), access("*")], ids=["administrator", "allowed"])
@pytest.mark.parametrize(
    "text", [b"0 0 1", b"7 0 1\n", b"0 100000 1\n1 0 1", b"\t1 0000000000 5 ", b"0 0 4294967295"]
)
def test_only_root_may_map_the_hosts_root(rights: Access, text: bytes) -> None:
    for maps in (Maps(text, b""), Maps(b"", text), Maps(GRANTED.uid, text)):
        with pytest.raises(Refused, match="only root may map the host's user or group 0"):
            rights.check(Request(b"a", (Namespace.USER,), maps))


@pytest.mark.parametrize("maps", [GRANTED, Maps(b"", b""), Maps(b"0 1 4294967294", b"0 1 1\n")])
def test_others_may_map_everything_else(maps: Maps) -> None:
    Access().check(Request(b"a", (Namespace.USER,), maps))


@pytest.mark.parametrize(
    ("maps", "reason"),
    [
        (Maps(b"0 0x0 1", b""), "uid_map: line 1: three numbers expected"),
        (Maps(b"", b"0 1 1\n-1 0 1"), "gid_map: line 2: three numbers expected"),
    ],
)
def test_a_map_that_cannot_be_read_is_refused(maps: Maps, reason: str) -> None:
    with pytest.raises(BadMap, match=f"^{reason}$"):
        Access().check(Request(b"a", (Namespace.USER,), maps))


# Peers


def test_root_is_root(peer: socket.socket, be: Be) -> None:
    be(0)
    assert policy().access(peer) == Access(root=True)


def test_who_is_in_no_rule_may_nothing(peer: socket.socket, be: Be) -> None:
    be(3001)
    assert policy().access(peer) is None
    assert policy(Allow(users=(3002,), groups=(3001,))).access(peer) is None
    assert policy(Allow(users=(3001,), names=())).access(peer) is None


def test_users_and_groups_are_not_mixed_up(peer: socket.socket, be: Be) -> None:
    be(5, gid=6, groups=(7, 8))
    rules = {
        "user": Allow(users=(5,)),
        "group": Allow(groups=(6,)),
        "further group": Allow(groups=(8,)),
        "not the user": Allow(users=(6, 7, 8)),
        "not the group": Allow(groups=(5,)),
    }
    allowed = [what for what, rule in rules.items() if policy(rule).access(peer) is not None]
    assert allowed == ["user", "group", "further group"]


def test_the_names_of_all_rules_add_up(peer: socket.socket, be: Be) -> None:
    be(5, gid=6)
    rights = policy(
        Allow(users=(5,), names=("a",)),
        Allow(groups=(6,), names=("b", "c")),
        Allow(users=(7,), names=("d",)),
    ).access(peer)
    assert rights is not None
    assert [name for name in (b"a", b"b", b"c", b"d") if rights.may_use(name)] == [b"a", b"b", b"c"]
    assert not rights.root


def test_a_peer_that_cannot_be_seen_is_no_administrator(peer: socket.socket, be: Be) -> None:
    """Of a process in a foreign PID namespace the number is 0, which capget takes for ourselves."""
    be(3001, pid=0)
    assert policy().access(peer) is None


def test_a_peer_that_is_gone_is_no_administrator(peer: socket.socket, be: Be) -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    be(3001, pid=child)
    assert policy().access(peer) is None


def test_groups_that_cannot_be_had_are_an_error_and_no_refusal(
    peer: socket.socket, be: Be, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: socket.socket) -> frozenset[int]:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    be(3001, gid=6)
    monkeypatch.setattr(linux, "peer_groups", fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        policy(Allow(groups=(7,))).access(peer)
