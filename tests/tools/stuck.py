"""A plugin of pytest: each test hangs at its end, with all that it has made, and says so."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Run a test, and do not return."""
    yield
    Path(os.environ["STUCK"]).touch()
    return threading.Event().wait()
