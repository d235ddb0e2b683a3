"""Gives each test a place of its own in the real cgroup hierarchy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from spawn_common import linux
from tests.tools.accessory import Accessory, make_accessory, running_accessory
from tests.tools.harness import Cgroup, Host
from tests.tools.harness import host as make_host
from tests.tools.native import ROOT
from tests.tools.postgresql import Postgresql, running_server


@pytest.fixture(scope="session", autouse=True)
def usable_kernel() -> None:
    """Without root and cgroup v2 nothing here can be tested; in CI that is a failure."""
    problem = None
    if os.geteuid() != 0:
        problem = "the integration tests need root"
    elif linux.find_cgroup2_mount() is None:
        problem = "the integration tests need a cgroup v2 hierarchy"
    if problem:
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A place for scopes and reapers, cleaned up afterwards; its files are for all to read."""
    with TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        with make_host(Path(directory), request.node.name[:60]) as place:
            yield place


@pytest.fixture
def scope(host: Host) -> Iterator[Cgroup]:
    """A scope that a process lives in, as a spawner does, so that the grace time applies."""
    scope = host.scope()
    spawner = scope.make("_").start()
    yield scope
    spawner.kill()
    spawner.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what waits for the real time to pass behind everything else."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session", autouse=True)
def real_minute(
    request: pytest.FixtureRequest, usable_kernel: None
) -> Iterator[subprocess.Popen[str] | None]:
    """A minute in the life of an accessory, which passes while the other tests run."""
    if not any(item.get_closest_marker("slow") for item in request.session.items):
        yield None
        return
    with running_accessory("minute") as daemon:
        place = [daemon.address, str(daemon.cgroup.directory)]
        command = [sys.executable, "-m", "tests.tools.minute", *place]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as watcher:
            yield watcher
            watcher.kill()


@pytest.fixture
def stopped_accessory(host: Host) -> Iterator[Accessory]:
    """An accessory daemon that a test starts itself, and everything that it makes."""
    with make_accessory(host.directory, host.scope("accessory.service")) as place:
        yield place


@pytest.fixture
def accessory(stopped_accessory: Accessory) -> Accessory:
    """An accessory daemon that is ready."""
    return stopped_accessory.start()


@pytest.fixture(scope="module")
def module_server() -> Iterator[Postgresql]:
    """One server for all tests of this module."""
    with running_server() as server:
        yield server
