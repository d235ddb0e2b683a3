"""Every script of debian/tests, in a freshly booted machine of its own."""

from __future__ import annotations

import os
from functools import partial

import pytest

from tests.system.job import Job, Outcome
from tests.system.scripts import CONTROL, read_control, run_in_fresh_machine

JOBS = [
    Job(script.name, partial(run_in_fresh_machine, script), slow=script.controllers)
    for script in read_control()
]


def test_every_script_is_listed() -> None:
    executable = {path.name for path in CONTROL.parent.iterdir() if os.access(path, os.X_OK)}
    assert executable == {job.name for job in JOBS}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_script(outcome: Outcome) -> None:
    if not outcome.passed:
        pytest.fail(outcome.report, pytrace=False)
