"""Root folders of machines: Debian 13, and in one of them the packages built from this tree.

Each is made once and kept in build/system/ under the hash of what it was made from; those that
nobody needs any more are removed. Several processes may ask for the same one at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.tools.native import ROOT

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "system"
PACKAGES = ROOT / "build" / "deb"
SUITE = "trixie"
REPOSITORY = "srv/packages"

# A server as one installs it, what the scripts use, and what answers in the emulated machine.
_SYSTEM = [
    *("init", "systemd", "systemd-sysv", "dbus", "udev", "libpam-systemd"),
    *("iproute2", "procps", "util-linux", "python3", "man-db", "qemu-guest-agent"),
]
_KERNEL = "linux-image-cloud-amd64"

_in_use: list[int] = []  # descriptors whose locks keep images from being removed, until we end


class Unusable(Exception):
    """Something is missing that the machines are made from."""


def built_packages() -> list[Path]:
    """Return the packages that `make deb` has built."""
    packages = sorted(PACKAGES.glob("*.deb"))
    if not packages:
        raise Unusable(f"there are no packages in {PACKAGES}: run 'make deb'")
    return packages


def package_name(package: Path) -> str:
    """Return the name of the package in a file."""
    return _field(package, "Package")


def dependencies(packages: Sequence[Path]) -> list[str]:
    """Return the names of the packages that PACKAGES depend on and that are not among them."""
    needed = {
        # The first alternative of each, without version and architecture.
        re.split(r"[\s|:(]", dependency.strip())[0]
        for package in packages
        for field in ("Depends", "Pre-Depends")
        for dependency in _field(package, field).split(",")
    }
    return sorted(needed - {package_name(package) for package in packages} - {""})


def base() -> Path:
    """Return a folder with "root", all that our packages need, and "kernel" for emulation."""
    include = ",".join([*_SYSTEM, *dependencies(built_packages())])

    def make(directory: Path) -> None:
        root, kernel = directory / "root", directory / "kernel"
        kernel.mkdir()
        _mmdebstrap(
            *("--variant=apt", f"--include={include},busybox-static"),
            *(f"--customize-hook=sh '{HERE}/kernel' {_KERNEL} '{kernel}' \"$1\"",),
            f"--customize-hook=sh '{HERE}/customize' \"$1\"",
            *(SUITE, str(root)),
        )

    return made("base", [include, *_texts("image.py", "kernel", "customize")], make)


def kernel() -> Path:
    """Return a folder with "vmlinuz" and "initrd.img", which mounts the first disk."""
    return base() / "kernel"


def minimal() -> Path:
    """Return the smallest Debian that has apt, which knows Debian's packages."""

    def make(directory: Path) -> None:
        _mmdebstrap("--variant=apt", "--skip=cleanup/apt/lists", SUITE, str(directory))

    return made("minimal", _texts("image.py"), make)


def installed() -> Path:
    """Return a root folder in which all our packages are installed, from /srv/packages."""
    system = base()
    packages = built_packages()

    def make(directory: Path) -> None:
        root = directory / "root"
        run("cp", "-a", "--reflink=auto", str(system / "root"), str(root))
        (root / "etc/apt/sources.list").unlink(missing_ok=True)
        shutil.rmtree(root / "etc/apt/sources.list.d")
        write_repository(root, packages)
        names = [package_name(package) for package in packages]
        run("sh", str(HERE / "enter"), str(root), "apt-get", "update", "-q")
        run("sh", str(HERE / "enter"), str(root), "apt-get", "install", "-q", "-y", *names)

    ingredients = [system.name, *(f"{package.name} {_digest(package)}" for package in packages)]
    return made("installed", [*ingredients, *_texts("image.py", "enter")], make) / "root"


def write_repository(root: Path, packages: Sequence[Path]) -> None:
    """Put PACKAGES into /srv/packages of a root folder, and tell its apt of them."""
    repository = root / REPOSITORY
    repository.mkdir(parents=True, exist_ok=True)
    index = []
    for package in packages:
        shutil.copy(package, repository)
        control = run("dpkg-deb", "--field", str(package)).rstrip("\n")
        index.append(
            f"{control}\nFilename: ./{package.name}\nSize: {package.stat().st_size}\n"
            f"SHA256: {_digest(package)}\n"
        )
    (repository / "Packages").write_text("\n".join(index))
    sources = root / "etc/apt/sources.list.d"
    sources.mkdir(parents=True, exist_ok=True)
    (sources / "local.list").write_text(f"deb [trusted=yes] file:/{REPOSITORY} ./\n")


def made(kind: str, ingredients: Sequence[str], make: Callable[[Path], None]) -> Path:
    """Return the folder that MAKE fills from INGREDIENTS, made now unless it exists.

    KIND names it. It stays until we end, also if another process makes one of the same kind.
    """
    key = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    directory = BUILD / f"{kind}-{key}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with _locked(BUILD / f"{kind}.lock"):
        if not directory.exists():
            for unused in BUILD.glob(f"{kind}-*"):
                _remove_unless_used(unused)
            unfinished = BUILD / f"{kind}-unfinished"
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(directory)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _in_use.append(descriptor)
    return directory


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_unless_used(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
    finally:
        os.close(descriptor)


def _field(package: Path, name: str) -> str:
    return run("dpkg-deb", "--field", str(package), name).strip()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _texts(*names: str) -> list[str]:
    return [(HERE / name).read_text() for name in names]


def _mmdebstrap(*arguments: str) -> None:
    # It mounts the host's /dev/shm and others in the new root: nobody else must find them there.
    run(
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("mmdebstrap", "--quiet"),
        '--aptopt=Acquire::Retries "3"',
        "--dpkgopt=force-unsafe-io",
        *arguments,
    )


def run(*command: str) -> str:
    """Run a command to its end; return what it printed, and raise Unusable if it failed.

    If we are killed, so is it: nothing goes on that other processes do not know of.
    """
    result = subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
    )
    if result.returncode != 0:
        raise Unusable(
            f"{' '.join(command)}: status {result.returncode}\n{result.stdout}{result.stderr}"
        )
    return result.stdout
