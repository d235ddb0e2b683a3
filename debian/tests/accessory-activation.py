#!/usr/bin/python3
"""The accessory as the service manager runs it: on demand, where its clients are, reloadable."""

from __future__ import annotations

import os
import subprocess

from accessory import (
    KINDS,
    MAP,
    OPTIONS,
    SERVICE,
    SETTINGS,
    SOCKET,
    client,
    inodes_of,
    keeper,
    namespaces_of,
)
from support import attempt, keep, run

from spawn_client.accessory import Accessory, Refused

USER = 12345  # an ordinary one
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
SHOW_IPC = """
import os
from spawn_client.accessory import Accessory
namespaces = Accessory().namespaces("web-1", ipc=True)
print(os.fstat(namespaces.ipc).st_ino)
"""
AS_SPAWNER = (*AS_USER, "--inh-caps=+sys_admin", "--ambient-caps=+sys_admin")


def the_first_clients_start_the_daemon() -> None:
    SOCKET.start()
    assert (SOCKET.state, SERVICE.state) == ("active", "inactive")
    command = ["cm4all-spawn-client", "first", "--ipc", "--", "readlink", "/proc/self/ns/ipc"]
    first = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(10)]
    answers = {(one.communicate()[0], one.returncode) for one in first}
    assert len(answers) == 1, answers
    assert answers.pop()[1] == 0
    assert (SOCKET.state, SERVICE.state) == ("active", "active")
    assert SERVICE.restarts == 0


def starting_the_service_brings_the_socket_along() -> None:
    """Else the daemon would listen by itself, and clients would notice each restart of it."""
    run("systemctl", "stop", SOCKET.name, SERVICE.name)
    SERVICE.start()
    assert (SOCKET.state, SERVICE.state) == ("active", "active")


def the_daemon_is_in_the_namespaces_of_the_host() -> None:
    kinds = sorted(os.listdir("/proc/1/ns"))
    assert len(kinds) >= len(KINDS)
    for pid in (SERVICE.pid, keeper()):
        for kind in kinds:
            theirs, ours = (os.readlink(f"/proc/{one}/ns/{kind}") for one in (pid, 1))
            assert theirs == ours, f"process {pid} is in a {kind} namespace of its own"


def each_kind_of_namespace_can_be_made_and_joined() -> None:
    for kind in KINDS:
        option = ["--user", MAP] if kind == "user" else [f"--{kind}"]
        file = {"mount": "mnt"}.get(kind, kind)
        first = client(kind, *option, "--", "readlink", f"/proc/self/ns/{file}")
        assert first != os.readlink(f"/proc/self/ns/{file}") + "\n", kind
        assert client(kind, *option, "--", "readlink", f"/proc/self/ns/{file}") == first


def all_kinds_can_be_joined_at_once() -> None:
    inside = client("all", *OPTIONS, "--", "sh", "-c", "id -u; ls -Li /proc/self/ns")
    uid, *lines = inside.splitlines()
    assert uid == "0"
    expected = dict(inodes_of("all"))
    assert set(expected.values()).isdisjoint(namespaces_of(1).values())
    del expected["mount"]  # a copy of it has the /proc of the PID namespace
    assert set(expected.values()) <= {int(line.split()[0]) for line in lines}


def root_may_map_all_ids() -> None:
    assert client("zero", "--user", "0 0 4294967295", "--", "id", "-u") == "0\n"


def others_are_refused() -> None:
    done = attempt(*AS_USER, "cm4all-spawn-client", "all", "--ipc", "--", "true")
    assert done.returncode == 125
    assert done.stdout == "cm4all-spawn-client: permission denied\n"


def an_ordinary_user_gets_namespaces_if_the_settings_say_so() -> None:
    SETTINGS.write_text(f'[[allow]]\nusers = [{USER}]\nnames = ["web-*"]\n')
    SERVICE.reload()
    shown = run(*AS_USER, "python3", "-c", SHOW_IPC)
    assert int(shown) == inodes_of("web-1")["ipc"]
    for arguments, reason in (
        (["all", "--ipc"], "you may not use this name"),
        (["web-1", "--user", "0 0 1"], "only root may map the host's user or group 0"),
    ):
        done = attempt(*AS_USER, "cm4all-spawn-client", *arguments, "--", "true")
        assert done.stdout == f"cm4all-spawn-client: {reason}\n"
        assert done.returncode == 125


def a_spawner_without_root_can_join_them() -> None:
    kinds = [kind for kind in KINDS if kind not in ("user", "mount")]
    inside = run(
        *AS_SPAWNER,
        "cm4all-spawn-client",
        "web-1",
        *(f"--{kind}" for kind in kinds),
        *("--", "ls", "-Li", "/proc/self/ns"),
    )
    expected = inodes_of("web-1")
    found = {int(line.split()[0]) for line in inside.splitlines()}
    assert {expected[kind] for kind in kinds} <= found


def a_reload_has_happened_when_systemctl_returns() -> None:
    pid = SERVICE.pid
    with Accessory() as accessory:
        for number in range(10):
            SETTINGS.write_text(f"[limits]\nnames = {1 if number % 2 else 1000}\n")
            SERVICE.reload()
            refused = ""
            try:
                accessory.namespaces(f"number {number}", ipc=True).close()
            except Refused as error:
                refused = str(error)
            assert ("limits.names" in refused) == bool(number % 2)
    assert (SERVICE.state, SERVICE.pid, SERVICE.restarts) == ("active", pid, 0)


def the_status_says_what_there_is() -> None:
    with Accessory() as accessory:
        status = accessory.status()
    SERVICE.reload()
    expected = f'Status: "{status["names"]} names, {status["namespaces"]} namespaces"'
    assert expected in SERVICE.status()


def settings_that_are_wrong_change_nothing() -> None:
    SETTINGS.write_text(f"[[allow]]\nusers = [{USER}]\n")
    SERVICE.reload()
    pid = SERVICE.pid
    SETTINGS.write_text("\n[limits]\nnames = 0\n")
    SERVICE.reload()
    problem = f"the settings stay as they are: {SETTINGS}:3: limits.names: Expected `int` >= 1"
    assert problem in SERVICE.journal()
    assert (SERVICE.state, SERVICE.pid) == ("active", pid)
    run(*AS_USER, "python3", "-c", SHOW_IPC)


if __name__ == "__main__":
    keep(
        the_first_clients_start_the_daemon,
        starting_the_service_brings_the_socket_along,
        the_daemon_is_in_the_namespaces_of_the_host,
        each_kind_of_namespace_can_be_made_and_joined,
        all_kinds_can_be_joined_at_once,
        root_may_map_all_ids,
        others_are_refused,
        an_ordinary_user_gets_namespaces_if_the_settings_say_so,
        a_spawner_without_root_can_join_them,
        a_reload_has_happened_when_systemctl_returns,
        the_status_says_what_there_is,
        settings_that_are_wrong_change_nothing,
    )
