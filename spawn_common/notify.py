"""Telling the service manager what a daemon is doing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def notifier() -> Callable[..., Any]:
    """Return sd_notify with its variables as keyword arguments; nothing without a manager.

    The library is imported only where it is of use: it brings ten megabytes along.
    """
    if "NOTIFY_SOCKET" not in os.environ:
        return lambda **_: None
    from pystemd.daemon import notify

    return lambda **variables: notify(False, **variables)
