"""For developers: scripts of debian/tests, each in a fresh machine, or a shell in one.

.venv/bin/python -m tests.system run NAME...
.venv/bin/python -m tests.system shell
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.system import image
from tests.system.machine import Failed, Machine
from tests.system.scripts import Script, read_control, run_in_fresh_machine


def main() -> int:
    """Do what the command line says; return 0 if all scripts passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.system")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("shell", help="boot the quick machine, and end it after the shell")
    run = commands.add_parser("run", help="run scripts of debian/tests")
    run.add_argument("name", nargs="+")
    run.add_argument("--emulated", action="store_true", help="in the emulated machine, all of them")
    arguments = parser.parse_args()
    if arguments.command == "shell":
        return _shell()
    listed = {script.name: script for script in read_control()}
    scripts = [
        Script(name, arguments.emulated or (name in listed and listed[name].controllers))
        for name in arguments.name
    ]
    return max([_run(script) for script in scripts])


def _shell() -> int:
    with Machine(image.installed()) as machine:
        return machine.shell()


def _run(script: Script) -> int:
    outcome = run_in_fresh_machine(script)
    print(outcome.report)
    print(f"{script.name}: {'passed' if outcome.passed else 'FAILED'}")
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("machines need root")
    try:
        sys.exit(main())
    except (Failed, image.Unusable) as error:
        sys.exit(str(error))
