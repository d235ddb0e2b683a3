"""What the runner's process gives up before any code of the script's runs in it.

It has the core's user, since scripts read that user's files, but none of its capabilities. It can
send signals to nobody but its own children, and cannot change the core's limits.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from spawn_common import linux
from spawn_common.linux import Capabilities

_log = logging.getLogger(__name__)

_STACK: Final = 100 << 20  # bytes
_THREAD_STACK: Final = 1 << 20  # bytes; more than looking up a name takes
_BASE: Final = 384 << 20  # bytes of address space for what is not the script's: threads, libraries
_OUT_OF_MEMORY: Final = 70  # EX_SOFTWARE of <sysexits.h>
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)


def confine(core: int) -> None:
    """Give up all rights, and die with the process that started us, whose id is CORE."""
    linux.die_with_parent()
    if os.getppid() != core:
        sys.exit(1)  # it died before
    _leave_signals_to_the_core()
    linux.forbid_new_privileges()
    linux.clear_ambient_capabilities()
    if any(linux.capabilities()):
        linux.set_capabilities(Capabilities(0, 0, 0).pack())
    _protect(core)
    _allow_deep_recursion()
    threading.stack_size(_THREAD_STACK)
    linux.share_one_arena()


def _protect(core: int) -> None:
    """Keep a script from ending the core by mistake, as far as this kernel can."""
    protected = False
    with suppress(OSError):  # a filter of system calls, in a container for example
        protected = linux.confine_signals() and linux.protect_limits_of(core)
    if not protected:
        _log.info("this kernel cannot keep a script from sending signals to its own daemon")


def _leave_signals_to_the_core() -> None:
    """Do nothing about signals that a service manager or a terminal sends to all of us.

    Not by ignoring them, which the script's children would inherit.
    """
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)  # Lua's input and output do not try again
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it keeps os.execute from working
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _allow_deep_recursion() -> None:
    """Let a script's endless recursion end in an error of Lua, not in a crash.

    Lua's limit for functions that C calls, such as those that string.gsub calls, is reached at
    about 60 MB of stack. The kernel leaves room for 128 MB, and asks for the limit only when the
    stack grows.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    with suppress(ValueError, OSError):  # the hard limit is lower
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK, hard))


def limit_memory(megabytes: float) -> None:
    """Let the script have so much memory, whichever way it asks for it.

    The script's own limit is looked after between its instructions. This one holds within them:
    what asks for too much gets an error.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _BASE + int(megabytes * 1e6)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def end_without_memory() -> NoReturn:
    """End the process, whose Python got no memory: nobody knows what it could still do."""
    os.write(2, b"the script's process has no memory left\n")
    os._exit(_OUT_OF_MEMORY)
