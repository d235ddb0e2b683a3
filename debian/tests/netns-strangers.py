#!/usr/bin/python3
"""cm4all-spawn-netns@.service leaves alone what others have made, whatever its name."""

from __future__ import annotations

from pathlib import Path

from netns import NAMES, SUITE_UNIT, Instance, forgive, host, inode
from support import keep, run

BLUE = Instance("blue")
NOTHING = host()
TEMPLATE = Path("/etc/systemd/system/cm4all-spawn-netns@.service")


def identity(link: str) -> str:
    """Tell a link from others that have the name later."""
    return Path(f"/sys/class/net/{link}/ifindex").read_text()


def is_refused(path: str) -> None:
    """Neither the start that fails nor a stop removes what is at PATH."""
    before = host()
    line = BLUE.fail()
    assert line == f"{path} exists, and is left alone: it was not made by this unit"
    assert host() == before
    BLUE.stop()
    assert host() == before


def works_again() -> None:
    forgive(BLUE)
    BLUE.start()
    BLUE.stop()
    assert host() == NOTHING, host()


def a_namespace_of_that_name_is_left_alone() -> None:
    run("ip", "netns", "add", "blue")
    before = inode(NAMES / "blue")
    is_refused("/run/netns/blue")
    assert inode(NAMES / "blue") == before
    run("ip", "netns", "delete", "blue")
    works_again()


def a_link_of_that_name_is_left_alone() -> None:
    run("ip", "link", "add", "name", "blue", "type", "veth", "peer", "name", "other")
    before = identity("blue"), identity("other")
    is_refused("/sys/class/net/blue")
    assert (identity("blue"), identity("other")) == before
    run("ip", "link", "delete", "dev", "blue")
    works_again()


def a_link_that_is_called_so_besides_is_left_alone() -> None:
    run("ip", "link", "add", "name", "first", "type", "veth", "peer", "name", "other")
    run("ip", "link", "property", "add", "dev", "first", "altname", "blue")
    before = host()
    assert BLUE.fail() == "cannot make the link blue: RTNETLINK answers: File exists"
    assert host() == before
    run("ip", "link", "delete", "dev", "first")
    works_again()


def a_link_called_like_the_inner_end_is_not_in_the_way() -> None:
    run("ip", "link", "add", "name", "blue_peer", "type", "veth", "peer", "name", "net0")
    before = host()
    BLUE.start()
    BLUE.stop()
    assert host() == before
    run("ip", "link", "delete", "dev", "blue_peer")


def a_file_without_a_namespace_is_left_to_who_made_it() -> None:
    """A killed "ip netns add" leaves it, and the manual says how to get rid of it."""
    (NAMES / "blue").touch()
    is_refused("/run/netns/blue")
    run("ip", "netns", "delete", "blue")
    works_again()


def what_was_deleted_meanwhile_is_not_missed() -> None:
    for deletions in (["link"], ["netns"], ["link", "netns"], ["netns", "link"]):
        BLUE.start()
        for kind in deletions:
            run("ip", kind, "delete", "blue")
        BLUE.stop()
        assert (BLUE.state, host()) == ("inactive", NOTHING), deletions
    works_again()


def what_has_taken_our_place_is_left_alone() -> None:
    BLUE.start()
    run("ip", "link", "delete", "dev", "blue")
    run("ip", "netns", "delete", "blue")
    run("ip", "netns", "add", "blue")
    run(
        "ip", "link", "add", "name", "blue", "type", "veth", "peer", "name", "net0", "netns", "blue"
    )
    before = inode(NAMES / "blue"), identity("blue")
    BLUE.stop()
    assert (inode(NAMES / "blue"), identity("blue")) == before
    is_refused("/run/netns/blue")
    run("ip", "link", "delete", "dev", "blue")
    run("ip", "netns", "delete", "blue")
    works_again()


def what_the_suite_has_made_can_be_adopted() -> None:
    """So that after an upgrade from its packages the running instances can be stopped."""
    TEMPLATE.write_text(SUITE_UNIT)
    run("systemctl", "daemon-reload")
    BLUE.start()
    TEMPLATE.unlink()
    run("systemctl", "daemon-reload")
    before = inode(NAMES / "blue")
    for _ in range(2):
        run("/usr/libexec/cm4all-spawn/netns", "adopt", "blue")
    assert (BLUE.state, inode(NAMES / "blue")) == ("active", before)
    BLUE.restart()
    assert BLUE.state == "active"
    BLUE.stop()
    assert host() == NOTHING, host()


if __name__ == "__main__":
    BLUE.set_up_by(":")
    keep(
        a_namespace_of_that_name_is_left_alone,
        a_link_of_that_name_is_left_alone,
        a_link_that_is_called_so_besides_is_left_alone,
        a_link_called_like_the_inner_end_is_not_in_the_way,
        a_file_without_a_namespace_is_left_to_who_made_it,
        what_was_deleted_meanwhile_is_not_missed,
        what_has_taken_our_place_is_left_alone,
        what_the_suite_has_made_can_be_adopted,
    )
