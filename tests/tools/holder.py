"""Makes names and holds leases, as a spawner does: ADDRESS PREFIX NAMES LEASES (of each name).

Writes the inodes of the PID namespaces, one in a line, and an empty line; ends with its input.
"""

from __future__ import annotations

import resource
import sys

from tests.tools.wire import LEASE, NAME, PID, Answer, Client


def main() -> None:
    """Run the program."""
    address, prefix, names, leases = sys.argv[1:]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = []
    with Client(address) as client:
        for n in range(int(names)):
            name = (NAME, f"{prefix}{n}".encode())
            with client.ask(name, (PID, b"")) as answer:
                print(answer.inodes()[0])
            held += [_lease(client.ask(name, (LEASE, b""))) for _ in range(int(leases))]
    print(flush=True)
    sys.stdin.read()


def _lease(answer: Answer) -> int:
    assert answer.error is None, answer.error
    return answer.lease


if __name__ == "__main__":
    main()
