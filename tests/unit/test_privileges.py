"""Looking up accounts, and in which sets capabilities are when; what the kernel does is assumed.

That the kernel does so is tested with real daemons, see tests/integration/test_privileges.py.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable

import pytest

from spawn_common import linux
from spawn_common.linux import CAP_DAC_OVERRIDE, CAP_KILL, CAP_SYS_ADMIN, Capabilities
from spawn_common.privileges import Account, find_account, keep, pass_on

NOBODY = pwd.getpwnam("nobody")
GROUP = grp.getgrgid(2)
UNKNOWN = 54321
HIS = {"HOME": NOBODY.pw_dir, "USER": NOBODY.pw_name, "LOGNAME": NOBODY.pw_name}

DAC, KILL, ADMIN = (1 << number for number in (CAP_DAC_OVERRIDE, CAP_KILL, CAP_SYS_ADMIN))


# Accounts


@pytest.mark.parametrize("user", [NOBODY.pw_name, str(NOBODY.pw_uid)])
def test_a_user_brings_his_groups_along(user: str) -> None:
    groups = os.getgrouplist(NOBODY.pw_name, NOBODY.pw_gid)
    assert find_account(user, None) == Account(NOBODY.pw_uid, NOBODY.pw_gid, groups, HIS)


@pytest.mark.parametrize("group", [GROUP.gr_name, str(GROUP.gr_gid)])
def test_a_group_is_in_the_place_of_the_user_s_own(group: str) -> None:
    groups = os.getgrouplist(NOBODY.pw_name, GROUP.gr_gid)
    assert find_account("nobody", group) == Account(NOBODY.pw_uid, GROUP.gr_gid, groups, HIS)
    assert NOBODY.pw_gid not in groups


def test_a_group_alone_has_no_others_beside_it() -> None:
    assert find_account(None, GROUP.gr_name) == Account(None, GROUP.gr_gid, [], {})


def test_a_user_whose_number_is_not_known_needs_a_group_and_is_at_home_nowhere() -> None:
    number = str(UNKNOWN)
    environment = {"HOME": "/", "USER": number, "LOGNAME": number}
    account = Account(UNKNOWN, GROUP.gr_gid, [GROUP.gr_gid], environment)
    assert find_account(number, GROUP.gr_name) == account
    with pytest.raises(LookupError, match=f"there is no user '{number}'"):
        find_account(number, None)


def test_the_number_of_a_group_need_not_be_known() -> None:
    number = str(UNKNOWN)
    assert find_account(None, number) == Account(None, UNKNOWN, [], {})
    account = find_account(number, number)
    assert account is not None
    assert account[:3] == (UNKNOWN, UNKNOWN, [UNKNOWN])


def test_without_user_and_group_there_is_nobody_to_become() -> None:
    assert find_account(None, None) is None


@pytest.mark.parametrize("name", ["no-such-one", "", "-1", "4294967295", "9" * 30, "a:b", "\udcff"])
def test_who_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(LookupError) as user:
        find_account(name, None)
    assert str(user.value) == f"there is no user {name!r}"
    with pytest.raises(LookupError) as group:
        find_account("nobody", name)
    assert str(group.value) == f"there is no group {name!r}"


# Capabilities


class Kernel:
    """What the kernel knows of a process that is not root."""

    def __init__(self, permitted: int) -> None:
        """PERMITTED is also effective, inheritable and ambient: as a service manager has it."""
        self.sets = Capabilities(permitted, permitted, permitted)
        self.ambient = permitted
        self.calls = 0

    def set(self, packed: bytes) -> None:
        """Do as capset(2)."""
        (new,) = (
            sets for sets in map(Capabilities._make, _subsets(self.sets)) if sets.pack() == packed
        )
        self.sets = new
        self.ambient &= new.permitted & new.inheritable
        self.calls += 1

    def clear_ambient(self) -> None:
        """Do as PR_CAP_AMBIENT_CLEAR_ALL."""
        self.ambient = 0

    def raise_ambient(self, capability: int) -> None:
        """Do as PR_CAP_AMBIENT_RAISE."""
        assert self.sets.permitted & self.sets.inheritable & 1 << capability
        self.ambient |= 1 << capability


def _subsets(sets: Capabilities) -> list[tuple[int, int, int]]:
    """Return what a process may make of its sets, of the capabilities that are used here."""
    some = [a | b | c for a in (0, DAC) for b in (0, KILL) for c in (0, ADMIN)]
    return [
        (effective, permitted, inheritable)
        for permitted in some
        if permitted & ~sets.permitted == 0
        for effective in some
        if effective & ~permitted == 0
        for inheritable in some
        if inheritable & ~(sets.inheritable | sets.permitted) == 0
    ]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Kernel]:
    """Return a function that makes us a process of UID with capabilities."""

    def make(uid: int, permitted: int) -> Kernel:
        kernel = Kernel(permitted)
        monkeypatch.setattr(os, "geteuid", lambda: uid)
        monkeypatch.setattr(linux, "capabilities", lambda: kernel.sets)
        monkeypatch.setattr(linux, "set_capabilities", kernel.set)
        monkeypatch.setattr(linux, "clear_ambient_capabilities", kernel.clear_ambient)
        monkeypatch.setattr(linux, "raise_ambient_capability", kernel.raise_ambient)
        return kernel

    return make


def test_what_is_kept_is_effective_and_passed_on_to_nobody(
    process: Callable[[int, int], Kernel],
) -> None:
    kernel = process(NOBODY.pw_uid, DAC | KILL | ADMIN)
    keep(CAP_DAC_OVERRIDE)
    assert (kernel.sets, kernel.ambient) == (Capabilities(DAC, DAC, 0), 0)


def test_nothing_is_kept_that_we_do_not_have(process: Callable[[int, int], Kernel]) -> None:
    kernel = process(NOBODY.pw_uid, KILL)
    keep(CAP_DAC_OVERRIDE)
    assert (kernel.sets, kernel.ambient) == (Capabilities(0, 0, 0), 0)


def test_what_is_passed_on_is_in_all_sets_and_nothing_else_is(
    process: Callable[[int, int], Kernel],
) -> None:
    kernel = process(NOBODY.pw_uid, KILL | DAC)
    pass_on(CAP_KILL, CAP_SYS_ADMIN)  # which we do not have
    assert (kernel.sets, kernel.ambient) == (Capabilities(KILL, KILL, KILL), KILL)


def test_root_keeps_what_it_has(process: Callable[[int, int], Kernel]) -> None:
    kernel = process(0, DAC | KILL)
    pass_on(CAP_SYS_ADMIN)
    keep(CAP_SYS_ADMIN)
    assert kernel.calls == 0
