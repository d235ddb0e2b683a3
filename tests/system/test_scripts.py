"""Every script of debian/tests, in a freshly booted machine of its own."""

from __future__ import annotations

from functools import partial

import pytest

from tests.system.job import Job, Outcome
from tests.system.scripts import read_control, run_in_fresh_machine

JOBS = [
    Job(script.name, partial(run_in_fresh_machine, script), slow=script.controllers)
    for script in read_control()
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_script(outcome: Outcome) -> None:
    if not outcome.passed:
        pytest.fail(outcome.report, pytrace=False)
