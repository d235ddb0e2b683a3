#!/usr/bin/python3
"""Where the C++ suite is installed, these packages take its place without a question or a loss.

Its packages are made here: with their names, their version, and what matters of their contents.
"""

from __future__ import annotations

import pwd
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import accessory
import reaper
from netns import NAMES, SUITE_UNIT, Instance, host, inode
from packages import ACCESSORY, ALL, DOC, MODULES, NETNS, REAPER, SLICE, apt, installed
from reaper import Scope
from support import Unit, keep, packed, run, version_of, wait_for

CURRENT = {package: version_of(package) for package in ALL}
SUITE: Final = dict.fromkeys((ACCESSORY, DOC, NETNS, REAPER, SLICE), "0.27")

PROXY = Unit("beng-proxy.service")
BLUE = Instance("blue")
DAEMONS = (accessory.SERVICE, reaper.SERVICE)
NOTHING = host()

SHIPPED: Final = "function cgroup_released(cgroup)\nend\n"
CHANGED: Final = 'function cgroup_released(cgroup)\n  print("gone:", cgroup.path)\nend\n'

# Tells the service manager that it is ready, and waits.
DAEMON: Final = "#!/bin/sh\nexec systemd-notify --ready --exec ';' sleep infinity\n"
# As the init of a PID namespace, which the daemon leaves behind.
WITH_INIT: Final = DAEMON.replace("exec", "sleep infinity &\nexec", 1)

SERVICE_UNIT: Final = """
[Service]
Type=notify
ExecStart=/usr/sbin/{package}
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
Slice=system-cm4all.slice
TimerSlackNSec=100ms
LimitNOFILE=65536
"""
PROXY_UNIT: Final = f"""
[Unit]
Wants={accessory.SOCKET.name} {reaper.SERVICE.name}
After={accessory.SOCKET.name} {reaper.SERVICE.name}
[Service]
ExecStart=sleep infinity
Slice=system-cm4all.slice
"""

# What debhelper writes for "--no-start --restart-after-upgrade".
POSTINST: Final = """#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
{user}
systemctl daemon-reload
[ -z "$2" ] || deb-systemd-invoke try-restart {units}
"""
POSTRM: Final = '#!/bin/sh\nset -e\n[ "$1" != remove ] || systemctl daemon-reload\n'


def everything_is_upgraded_and_nothing_removed() -> None:
    upgrade_from_the_suite("usr/lib/systemd/system", CHANGED)


def a_changed_script_is_kept_and_used() -> None:
    assert reaper.SCRIPT.read_text() == CHANGED
    assert [file.name for file in reaper.SCRIPT.parent.glob("reaper.lua*")] == ["reaper.lua"]
    with Scope() as scope:
        scope.run("job")
        scope.wait_empty()
        said = f"gone:\t{scope.path}/job"
        wait_for("the script says so", lambda: said in reaper.SERVICE.journal())


def the_accessory_works_at_its_old_address() -> None:
    assert accessory.inodes_of("alice") == accessory.inodes_of("alice")


def network_namespaces_live_on_until_they_are_stopped() -> None:
    BLUE.stop()
    assert host() == NOTHING


def what_the_accessory_of_the_suite_has_left_lives_until_the_package_is_removed() -> None:
    """Programs of its clients may still be in there."""
    processes = accessory.SERVICE.processes()
    assert "sleep" in processes.values(), processes
    apt("remove", ACCESSORY)
    wait_for("all of it ends", lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))


def so_is_what_was_built_for_older_releases_of_debian() -> None:
    """There, units were below /lib: the same directory, but not to dpkg."""
    PROXY.stop()
    apt("purge", *ALL)
    upgrade_from_the_suite("lib/systemd/system", SHIPPED)
    assert reaper.SCRIPT.read_text() == SHIPPED
    BLUE.stop()
    assert host() == NOTHING


def upgrade_from_the_suite(units: str, script: str) -> None:
    """Install the suite with its UNITS in that directory, let all of it run, and upgrade."""
    run("dpkg", "--install", *packages_of_the_suite(units))
    assert installed() == SUITE
    reaper.SCRIPT.write_text(script)
    for unit in (PROXY, accessory.SERVICE, BLUE):
        unit.start()
    user = pwd.getpwnam(reaper.USER)
    others = (accessory.SOCKET, PROXY, BLUE)
    invocations = {unit: unit["InvocationID"] for unit in others}
    namespace = inode(NAMES / BLUE.instance)

    # The repository here has nothing but our own packages, so not all that they recommend.
    apt("--with-new-pkgs", "--no-install-recommends", "upgrade")

    assert installed() == {package: CURRENT[package] for package in (*SUITE, MODULES)}
    assert version_of("beng-proxy") == "20"
    changed = [] if script == SHIPPED else [f"??5?????? c {reaper.SCRIPT}"]
    assert run("dpkg", "--verify", *SUITE, "beng-proxy").splitlines() == changed
    for unit in DAEMONS:
        assert (unit.state, unit.restarts) == ("active", 0)
        assert unit["Type"] in ("notify", "notify-reload")
        assert unit["FragmentPath"] == f"/usr/lib/systemd/system/{unit.name}"
        assert Path(f"/proc/{unit.pid}/exe").readlink().name.startswith("python3")
    for unit, invocation in invocations.items():
        assert (unit.state, unit["InvocationID"]) == ("active", invocation), unit.name
    assert inode(NAMES / BLUE.instance) == namespace
    assert pwd.getpwnam(reaper.USER) == user


def packages_of_the_suite(units: str) -> list[Path]:
    """Return files of its packages, and of one that depends on them."""
    return [
        package(SLICE, {f"{units}/system-cm4all.slice": "[Unit]\nDescription=CM4all\n"}),
        package(
            ACCESSORY,
            {
                "usr/sbin/cm4all-spawn-accessory": WITH_INIT,
                f"{units}/{accessory.SERVICE.name}": unit_of(ACCESSORY) + "KillMode=process\n",
                f"{units}/{accessory.SOCKET.name}": "[Socket]\n"
                "ListenSequentialPacket=@cm4all-spawn\nPassCredentials=yes\n",
            },
            POSTINST.format(user="", units=f"{accessory.SOCKET.name} {accessory.SERVICE.name}"),
        ),
        package(
            REAPER,
            {
                "usr/sbin/cm4all-spawn-reaper": DAEMON,
                f"{units}/{reaper.SERVICE.name}": unit_of(REAPER) + f"User={reaper.USER}\n",
                "usr/lib/sysusers.d/cm4all-spawn-reaper.conf": f"u {reaper.USER} - -\n",
                "etc/cm4all/spawn/reaper.lua": SHIPPED,
            },
            POSTINST.format(
                user="systemd-sysusers cm4all-spawn-reaper.conf", units=reaper.SERVICE.name
            ),
        ),
        package(NETNS, {f"{units}/cm4all-spawn-netns@.service": SUITE_UNIT}),
        package(DOC, {"usr/share/doc/cm4all-spawn-doc/html/index.html": ""}),
        package(
            "beng-proxy",
            {f"{units}/{PROXY.name}": PROXY_UNIT},
            version="20",
            depends=f"{SLICE} (>= 0.6), {ACCESSORY}, {REAPER}",
        ),
    ]


def package(
    name: str,
    files: Mapping[str, str],
    postinst: str = "#!/bin/sh\nsystemctl daemon-reload\n",
    *,
    version: str = SUITE[SLICE],
    depends: str = "init-system-helpers",
) -> Path:
    """Return the file of a package with these FILES; what is in /etc are conffiles."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        directory.chmod(0o755)
        for path, text in files.items():
            file = directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755 if text.startswith("#!") else 0o644)
        control = directory / "DEBIAN"
        control.mkdir()
        (control / "control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nDepends: {depends}\n"
            "Maintainer: Nobody <nobody@localhost>\nDescription: stand-in\n"
        )
        conffiles = [f"/{path}\n" for path in files if path.startswith("etc/")]
        (control / "conffiles").write_text("".join(conffiles))
        for script, text in (("postinst", postinst), ("postrm", POSTRM)):
            (control / script).write_text(text)
            (control / script).chmod(0o755)
        return packed(directory)


def unit_of(name: str) -> str:
    return SERVICE_UNIT.format(package=name)


if __name__ == "__main__":
    BLUE.set_up_by(":")
    apt("purge", *ALL)
    keep(
        everything_is_upgraded_and_nothing_removed,
        a_changed_script_is_kept_and_used,
        the_accessory_works_at_its_old_address,
        network_namespaces_live_on_until_they_are_stopped,
        what_the_accessory_of_the_suite_has_left_lives_until_the_package_is_removed,
        so_is_what_was_built_for_older_releases_of_debian,
    )
