#!/usr/bin/python3
"""cm4all-spawn-netns@.service makes a namespace with a link, has it set up, and removes it all."""

from __future__ import annotations

import os
from pathlib import Path

from netns import NAMES, Instance, flags, host, inode, inside
from support import Unit, attempt, keep, run, wait_for

BLUE = Instance("blue")
OUTPUT = Path(os.environ["AUTOPKGTEST_TMP"])
NOTHING = host()


def the_unit_has_no_fault() -> None:
    assert run("systemd-analyze", "verify", "--man=no", BLUE.name) == ""


def the_script_is_called_with_net0_in_the_namespace() -> None:
    BLUE.set_up_by(
        f'echo "$# $1" >>{OUTPUT}/arguments',
        f"stat -L -c %i /proc/self/ns/net >{OUTPUT}/inode",
        f"ip -o link show dev net0 >{OUTPUT}/net0",
        "ip address add 10.9.0.2/30 dev $1",
    )
    BLUE.start()
    assert BLUE.state == "active"
    assert (OUTPUT / "arguments").read_text() == "1 net0\n"
    assert int((OUTPUT / "inode").read_text()) == inode(NAMES / "blue")
    assert inode(NAMES / "blue") != inode(Path("/proc/1/ns/net"))
    assert "UP" in flags((OUTPUT / "net0").read_text())


def the_links_inside_are_up() -> None:
    assert inside("blue", "ls", "/sys/class/net").split() == ["lo", "net0"]
    for link in ("lo", "net0"):
        assert "UP" in flags(inside("blue", "ip", "-o", "link", "show", "dev", link)), link


def the_other_end_is_outside_and_left_to_the_host() -> None:
    shown = run("ip", "-o", "-d", "link", "show", "dev", "blue")
    assert " veth " in shown
    assert "link-netns blue" in shown
    assert "UP" not in flags(shown)


def the_service_manager_of_networks_can_set_up_the_other_end() -> None:
    """Packets pass when it has done so."""
    network = Path("/etc/systemd/network/blue.network")
    network.parent.mkdir(exist_ok=True)
    network.write_text("[Match]\nName=blue\n[Network]\nAddress=10.9.0.1/30\n")
    run("networkctl", "reload")
    wait_for("an address outside", lambda: "10.9.0.1/30" in run("ip", "address"))
    client = "import socket; socket.create_connection(('10.9.0.1', 1), 5)"
    wait_for(
        "an answer from outside",
        lambda: "refused" in attempt("ip", "netns", "exec", "blue", "python3", "-c", client).stdout,
    )


def services_can_run_in_it() -> None:
    shown = run(
        "systemd-run",
        "--wait",
        "--pipe",
        "--quiet",
        "--property=NetworkNamespacePath=/run/netns/blue",
        "--property=PrivateTmp=yes",
        "stat",
        "-L",
        "-c",
        "%i",
        "/proc/self/ns/net",
    )
    assert int(shown) == inode(NAMES / "blue")


def starting_it_twice_is_starting_it_once() -> None:
    before = inode(NAMES / "blue")
    BLUE.start()
    assert inode(NAMES / "blue") == before
    assert (OUTPUT / "arguments").read_text() == "1 net0\n"


def a_stop_leaves_nothing() -> None:
    BLUE.stop()
    assert BLUE.state == "inactive"
    assert host() == NOTHING, host()


def restarts_work() -> None:
    BLUE.start()
    for _ in range(4):
        BLUE.restart()
    assert (OUTPUT / "arguments").read_text() == "1 net0\n" * 6
    BLUE.stop()
    assert host() == NOTHING, host()


def what_the_script_leaves_running_ends_before_the_link_goes() -> None:
    last = OUTPUT / "last"
    script = OUTPUT / "stays"
    # Only what the shell does itself: a program that it starts now may be told to end, too.
    script.write_text(
        "#!/bin/sh\n"
        'copy() { while read -r line; do echo "$line"; done; }\n'
        f"trap 'copy </proc/net/dev >{last}; exit' TERM\n"
        f"touch {last}\n"
        "while :; do sleep 0.02; done\n"
    )
    BLUE.set_up_by(f"sh {script} &", f"until [ -e {last} ]; do sleep 0.02; done")
    BLUE.start()
    assert f"sh {script}" in host()["processes"]
    BLUE.stop()
    assert host() == NOTHING, host()
    assert "\nnet0:" in last.read_text()


def processes_of_others_keep_it_without_link_and_name() -> None:
    BLUE.set_up_by(":")
    BLUE.start()
    before = inode(NAMES / "blue")
    run(
        "systemd-run",
        "--unit=guest",
        "--property=NetworkNamespacePath=/run/netns/blue",
        "sleep",
        "infinity",
    )
    guest = Unit("guest.service")
    try:
        BLUE.stop()
        assert host() == NOTHING, host()
        assert guest.state == "active"
        namespace = Path(f"/proc/{guest.pid}/ns/net")
        assert inode(namespace) == before
        assert "net0" not in run("nsenter", f"--net={namespace}", "ip", "link")
        BLUE.start()
        assert inode(NAMES / "blue") != before
    finally:
        guest.stop()
        BLUE.stop()
    assert host() == NOTHING, host()


def a_link_that_the_script_has_renamed_is_removed() -> None:
    BLUE.set_up_by("ip link set dev net0 down", "ip link set dev net0 name wan")
    BLUE.start()
    BLUE.stop()
    assert host() == NOTHING, host()


def instances_do_not_disturb_each_other() -> None:
    instances = [Instance(name) for name in ("blue", "a-b", "0123456789", "42", "net0")]
    for one in instances:
        one.set_up_by(":")
    run("systemctl", "start", *(one.name for one in instances))
    assert len({inode(NAMES / one.instance) for one in instances}) == len(instances)
    for one in instances:
        assert "UP" in flags(inside(one.instance, "ip", "-o", "link", "show", "dev", "net0"))
    instances[0].stop()
    assert {one.state for one in instances[1:]} == {"active"}
    assert host()["names"] == sorted(one.instance for one in instances[1:])
    run("systemctl", "stop", *(one.name for one in instances))
    assert host() == NOTHING, host()


if __name__ == "__main__":
    # A machine that needs no network to boot may have it masked.
    run("systemctl", "unmask", "systemd-networkd.service", "systemd-networkd.socket")
    keep(
        the_unit_has_no_fault,
        the_script_is_called_with_net0_in_the_namespace,
        the_links_inside_are_up,
        the_other_end_is_outside_and_left_to_the_host,
        the_service_manager_of_networks_can_set_up_the_other_end,
        services_can_run_in_it,
        starting_it_twice_is_starting_it_once,
        a_stop_leaves_nothing,
        restarts_work,
        what_the_script_leaves_running_ends_before_the_link_goes,
        processes_of_others_keep_it_without_link_and_name,
        a_link_that_the_script_has_renamed_is_removed,
        instances_do_not_disturb_each_other,
    )
