"""What somebody who waits for the figures is told."""

import sys


def progress(text: str) -> None:
    """Write a line to standard error."""
    print(text, file=sys.stderr, flush=True)
