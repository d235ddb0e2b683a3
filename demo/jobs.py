"""The jobs that the demo runs: of every kind that a hosting machine sees, for several accounts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final

from demo.namespaces import KINDS


@dataclass(frozen=True, slots=True)
class Shared:
    """Namespaces of a NAME, which the accessory keeps for all who ask for it."""

    name: str
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {'all' if self.kinds == KINDS else ' '.join(self.kinds)}"


@dataclass(frozen=True, slots=True)
class Job:
    """A command to be run in a cgroup, NAME or NAME/SESSION, on behalf of an account.

    ``times`` says how often: each time directly after the last, in the cgroup of the same name.
    ``status`` is the exit status that it should have, negative for a signal. ``shared`` says which
    namespaces it runs in if not the host's, ``after`` in which cgroup a job has to end before.
    """

    cgroup: str
    account: str | None
    what: str
    command: tuple[str, ...]
    times: int = 1
    status: int = 0
    shared: Shared | None = None
    after: str | None = None


def _python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", code)


def _shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


def _burn(seconds: float) -> tuple[str, ...]:
    return _python(f"import time\nwhile time.process_time() < {seconds}: pass")


def _fill(megabytes: int) -> tuple[str, ...]:
    return _python(f"b'x' * ({megabytes} << 20)")  # written to, or it would take no memory


def _fork(times: int) -> tuple[str, ...]:
    return _shell(f"i=0; while [ $i -lt {times} ]; do (:); i=$((i+1)); done")


USER_MAP: Final = "0 100000 65536"
"""Of users and groups: root in a user namespace of the demo is 100000 outside."""

_SHOP: Final = Shared("shop", ("ipc", "pid"))
_WIKI: Final = Shared("wiki", ("ipc", "net"))
_TENANT: Final = Shared("tenant", ("user",))
_LONELY: Final = Shared("lonely", KINDS)

_LEAVE_MEMORY: Final = ("ipcmk", "--shmem", "4711")
_FIND_MEMORY: Final = _shell("ipcs --shmems | grep -qw 4711")
_SET_ADDRESS: Final = _shell("PATH=$PATH:/sbin; ip address add 192.0.2.1/32 dev lo")
_FIND_ADDRESS: Final = _shell("PATH=$PATH:/sbin; ip address show dev lo | grep -qwF 192.0.2.1/32")
_SEE_INIT: Final = ("unshare", "--mount-proc", *_shell('[ "$(cat /proc/1/comm)" = init-shop ]'))
_SMALL_PID: Final = _shell("[ $$ -lt 10 ]")
_BE_ROOT: Final = _shell(
    'read _ outside _ </proc/self/uid_map; [ "$(id -u) $outside" = "0 100000" ]'
)

_TRUE: Final = ("/bin/true",)
_BURN_TWICE: Final = _shell('"$0" "$@" & "$0" "$@"; wait') + _burn(0.8)

# A name may hold any byte but NUL, newline and "/": this one breaks a field, a terminal and UTF-8.
_AWKWARD: Final = "tab\tred\033[31m\udcff"

JOBS: Final = (
    Job("render-1", "alice", "burns 2 s of CPU", _burn(2)),
    Job("mail-1", "bob", "/bin/true", _TRUE),
    Job("wiki/fcgi-1", "carol", "session: burns 0.2 s", _burn(0.2), shared=_WIKI),
    Job("wiki/fcgi-2", "carol", "session: makes 50 forks", _fork(50), shared=_WIKI),
    Job("wiki/fcgi-3", "carol", "session: adds an IP address", _SET_ADDRESS, shared=_WIKI),
    Job("cron", "alice", "burns 10 ms", _burn(0.01), times=6),
    Job("import", "bob", "fills 64 MiB", _fill(64)),
    Job("mail-2", "bob", "/bin/true", _TRUE),
    Job("build", "bob", "makes 400 forks", _fork(400)),
    Job("tenant", "bob", "is root in there", _BE_ROOT, times=2, shared=_TENANT),
    Job("daemon", "carol", "leaves a child for 0.5 s", _shell("sleep 0.5 &")),
    Job("health-1", None, "/bin/true", _TRUE),
    Job("backup", "alice", "hashes 100 MB", _shell("head -c 100M /dev/zero | sha256sum")),
    Job("mail-3", "bob", "/bin/true", _TRUE),
    Job("shop/fcgi-1", "alice", "session: leaves shared memory", _LEAVE_MEMORY, shared=_SHOP),
    Job("shop/fcgi-2", "alice", "session: fills 32 MiB", _fill(32), shared=_SHOP),
    Job("shop/fcgi-3/upload", "alice", "below a session: /bin/true", _TRUE, shared=_SHOP),
    Job("shop/fcgi-4", "alice", "session: has init-shop as PID 1", _SEE_INIT, shared=_SHOP),
    Job("copy", "carol", "copies 1 GB", _shell("dd if=/dev/zero of=/dev/null bs=1M count=1000")),
    Job("crash", "carol", "kills itself", _shell("kill -9 $$"), status=-9),
    Job("render-2", "alice", "burns 0.8 s twice, in parallel", _BURN_TWICE),
    Job("poll", "bob", "/bin/true", _TRUE, times=10),
    Job("health-2", None, "/bin/true", _TRUE),
    Job("idle", "carol", "sleeps 2 s", ("sleep", "2")),
    Job(
        "shop/fcgi-5",
        "alice",
        "session: finds fcgi-1's memory",
        _FIND_MEMORY,
        shared=_SHOP,
        after="shop/fcgi-1",
    ),
    Job(
        "wiki-backup",
        "carol",
        "finds the wiki's IP address",
        _FIND_ADDRESS,
        shared=_WIKI,
        after="wiki/fcgi-3",
    ),
    Job("lonely", "carol", "is alone, with a small PID", _SMALL_PID, shared=_LONELY),
    Job("mail-4", "bob", "/bin/true", _TRUE),
    Job("thumbs", "alice", "fills 48 MiB", _fill(48)),
    Job(_AWKWARD, "carol", "has an awkward name", _burn(0.05)),
    Job("fails", "bob", "exits with status 3", _shell("exit 3"), status=3),
    Job("health-3", None, "burns 50 ms", _burn(0.05)),
    Job("mail-5", "bob", "makes 20 forks", _fork(20)),
)
