"""Runs what takes a machine in the background, two at a time; the tests wait, in their order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.job import Job, Outcome

HERE = Path(__file__).parent
AT_A_TIME = 2
SECONDS = 1800.0  # for a test, which may be the one that waits for all images and all jobs

Outcomes = dict[str, Future[Outcome]]


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    """Without root there are no machines. Nothing here is ever skipped."""
    if os.geteuid() != 0:
        pytest.exit("the system tests need root", 1)


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, root: None) -> Iterator[Outcomes]:
    """What comes of the jobs of all tests that were selected, those that take longest first."""
    jobs = [(item.nodeid, job) for item in request.session.items if (job := _job(item))]
    jobs.sort(key=lambda named: not named[1].slow)
    with ThreadPoolExecutor(AT_A_TIME) as executor:
        yield {nodeid: executor.submit(job.run) for nodeid, job in jobs}
        executor.shutdown(cancel_futures=True)


@pytest.fixture
def outcome(request: pytest.FixtureRequest, outcomes: Outcomes, job: Job) -> Outcome:
    """What came of this test's job."""
    return outcomes[request.node.nodeid].result()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what runs in the foreground behind what runs in the background: not both at a time."""
    items.sort(key=lambda item: _job(item) is None)
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(SECONDS))


def _job(item: pytest.Item) -> Job | None:
    """Return what a test runs in the background, if it is one of those."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("job") if callspec else None
