#!/usr/bin/python3
"""What is in the packages; installing them starts nothing, and brings along what is needed."""

from __future__ import annotations

import hashlib
import pwd
from pathlib import Path
from typing import Final

import accessory
import reaper
from netns import Instance
from packages import ACCESSORY, ALL, CLIENT, DOC, MODULES, NETNS, REAPER, SLICE, apt, installed
from support import attempt, keep, run

UNITS: Final = "/usr/lib/systemd/system"

# All files outside of /usr/share and of the modules: what others rely on, and nothing else.
PLACES: Final = {
    ACCESSORY: {
        f"{UNITS}/cm4all-spawn-accessory.service",
        f"{UNITS}/cm4all-spawn-accessory.socket",
        "/usr/lib/sysusers.d/cm4all-spawn-accessory.conf",
        "/usr/libexec/cm4all-spawn/cm4all-spawn-init",
        "/usr/libexec/cm4all-spawn/cm4all-spawn-keeper",
        "/usr/sbin/cm4all-spawn-accessory",
    },
    CLIENT: {"/usr/bin/cm4all-spawn-client"},
    DOC: set(),
    MODULES: set(),
    NETNS: {
        f"{UNITS}/cm4all-spawn-netns@.service",
        "/usr/libexec/cm4all-spawn/netns",
    },
    REAPER: {
        "/etc/cm4all/spawn/reaper.lua",
        f"{UNITS}/cm4all-spawn-reaper.service",
        "/usr/lib/sysusers.d/cm4all-spawn-reaper.conf",
        "/usr/sbin/cm4all-spawn-reaper",
    },
    SLICE: {f"{UNITS}/system-cm4all.slice"},
}

BROUGHT_ALONG: Final = {
    ACCESSORY: {SLICE, MODULES},
    CLIENT: {MODULES},
    DOC: set(),
    MODULES: set(),
    NETNS: set(),
    REAPER: {SLICE, MODULES},
    SLICE: set(),
}

MANUALS: Final = {
    ("8", "cm4all-spawn-accessory"),
    ("8", "cm4all-spawn-reaper"),
    ("8", "cm4all-spawn-netns@.service"),
    ("5", "reaper.lua"),
    ("1", "cm4all-spawn-client"),
}
USERS: Final = ("cm4all-spawn-accessory", "cm4all-spawn-reaper")
PROGRAMS: Final = ("cm4all-spawn-accessory", "cm4all-spawn-client", "cm4all-spawn-reaper")


def nothing_is_started_or_enabled() -> None:
    services = accessory.SOCKET, accessory.SERVICE, reaper.SERVICE
    assert [unit.state for unit in services] == ["inactive"] * len(services)
    # Spawners pull them in: there is nothing to enable.
    assert [unit["UnitFileState"] for unit in services] == ["static"] * len(services)
    assert Instance("blue")["UnitFileState"] == "disabled"
    assert not [*Path("/etc/systemd/system").rglob("*cm4all*")]


def everything_is_where_others_expect_it() -> None:
    for package, expected in PLACES.items():
        assert places(package) == expected, package
    assert Path("/etc/cm4all/spawn/netns/setup.d").is_dir()


def everything_is_as_it_was_packaged() -> None:
    assert run("dpkg", "--verify", *ALL) == ""


def only_the_script_is_kept_in_an_upgrade() -> None:
    """It has the bytes that the C++ suite ships: who changed theirs is not asked about ours."""
    conffiles = run("dpkg-query", "--show", "--showformat", "${Conffiles}", *ALL).split()
    path, digest = conffiles
    assert path == str(reaper.SCRIPT)
    assert digest == hashlib.md5(reaper.SCRIPT.read_bytes()).hexdigest()
    assert digest.startswith("1688646b")


def the_users_of_the_daemons_have_nothing_but_their_names() -> None:
    for name in USERS:
        user = pwd.getpwnam(name)
        assert 0 < user.pw_uid < 1000
        assert user.pw_shell == "/usr/sbin/nologin"
        assert not Path(user.pw_dir).is_relative_to("/home")
        assert run("id", "--groups", "--name", name) == f"{name}\n"
        _, password, *_ = run("getent", "shadow", name).split(":")
        assert password.startswith("!"), "there is a password that opens it"


def the_manual_pages_can_be_read() -> None:
    for section, page in MANUALS:
        assert run("man", "--where", section, page).startswith(f"/usr/share/man/man{section}/")
        done = attempt("man", "--warnings", section, page)
        assert page in done.stdout
        assert not [line for line in done.stdout.splitlines() if "warning:" in line], page


def bash_completes_the_options() -> None:
    for program in PROGRAMS:
        script = f"""
            . /usr/share/bash-completion/completions/{program}
            COMP_WORDS=({program} --vers) COMP_CWORD=1 COMPREPLY=()
            compopt() {{ :; }}
            "$(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
            echo "${{COMPREPLY[@]}}"
        """
        assert run("bash", "-c", script).split() == ["--version"], program


def each_brings_along_what_it_needs_and_nothing_is_started() -> None:
    for package, others in BROUGHT_ALONG.items():
        apt("purge", *ALL)
        apt("install", "--no-install-recommends", package)
        assert installed().keys() == {package, *others}, package
        for program in PROGRAMS:
            if program == package:
                assert run(program, "--version") == f"{program} {installed()[package]}\n"
    apt("install", *ALL)
    nothing_is_started_or_enabled()


def accessory_and_client_do_without_the_libraries_of_the_reaper() -> None:
    apt("purge", "python3-lupa", "python3-nacl", "python3-psycopg")
    assert {ACCESSORY, CLIENT} <= installed().keys()
    assert REAPER not in installed()
    accessory.SOCKET.start()
    assert accessory.client("alice", "--ipc", "--", "echo", "inside") == "inside\n"
    assert accessory.SERVICE.state == "active"


def the_client_does_without_the_libraries_of_the_accessory() -> None:
    apt("purge", "python3-daemon", "python3-pystemd")
    assert CLIENT in installed()
    assert ACCESSORY not in installed()
    run("cm4all-spawn-client", "--version")
    run("python3", "-c", "import spawn_client.accessory")


def places(package: str) -> set[str]:
    """Return the files of a package as in PLACES."""
    elsewhere = ("/usr/share/", "/usr/lib/python3/dist-packages/")
    found = run("dpkg", "--listfiles", package).splitlines()
    return {file for file in found if not file.startswith(elsewhere) and not Path(file).is_dir()}


if __name__ == "__main__":
    keep(
        nothing_is_started_or_enabled,
        everything_is_where_others_expect_it,
        everything_is_as_it_was_packaged,
        only_the_script_is_kept_in_an_upgrade,
        the_users_of_the_daemons_have_nothing_but_their_names,
        the_manual_pages_can_be_read,
        bash_completes_the_options,
        each_brings_along_what_it_needs_and_nothing_is_started,
        accessory_and_client_do_without_the_libraries_of_the_reaper,
        the_client_does_without_the_libraries_of_the_accessory,
    )
