"""Linux system calls and kernel file formats that the standard library lacks.

Owns: inotify, the birth time from statx, the lines of /proc/self/mountinfo, unshare, setns, clone,
mount, capabilities and other powers of a process, what a socket knows of its peer. Every function
raises OSError with the kernel's errno; nothing here decides what an error means. Constants carry
the name of the header they come from.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import socket
import struct
from contextlib import suppress
from typing import Final, NamedTuple

# <linux/inotify.h>
IN_MODIFY: Final = 0x00000002
IN_CREATE: Final = 0x00000100
IN_DELETE: Final = 0x00000200
IN_Q_OVERFLOW: Final = 0x00004000
IN_ONLYDIR: Final = 0x01000000
IN_DONT_FOLLOW: Final = 0x02000000
IN_ISDIR: Final = 0x40000000

# <fcntl.h>, <linux/stat.h>
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_STATX_BTIME: Final = 0x800

# <linux/sched.h>, <linux/wait.h>
_CLONE_VM: Final = 0x100
_CLONE_FILES: Final = 0x400
WALL: Final = 0x40000000

# <sys/mount.h>
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REC: Final = 0x4000
MS_SLAVE: Final = 0x80000

# <asm-generic/socket.h>
_SO_PEERGROUPS: Final = 59
_SO_PEERPIDFD: Final = 77
_SO_PASSRIGHTS: Final = 83

# <linux/prctl.h>
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

# <asm-generic/unistd.h>: the same number on all architectures
_SYS_LANDLOCK_CREATE_RULESET: Final = 444
_SYS_LANDLOCK_RESTRICT_SELF: Final = 446

# <linux/landlock.h>
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_LANDLOCK_SCOPE_SIGNAL: Final = 2
_SCOPES_SINCE: Final = 6  # version of the ABI, Linux 6.12
_LANDLOCK_RULESET: Final = struct.Struct("=3Q")  # handled_access_fs, handled_access_net, scoped

# <malloc.h>
_M_ARENA_MAX: Final = -8

# <linux/seccomp.h>, <linux/filter.h>, <linux/audit.h>; the numbers of prlimit64 by machine
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_SECCOMP_RET_ALLOW: Final = 0x7FFF0000
_SECCOMP_RET_ERRNO: Final = 0x00050000
_BPF_LOAD_WORD: Final = 0x20
_BPF_JUMP_EQUAL: Final = 0x15
_BPF_RETURN: Final = 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data
_PRLIMIT64: Final = {"x86_64": (0xC000003E, 302), "aarch64": (0xC00000B7, 261)}

# <linux/capability.h>
CAP_DAC_OVERRIDE: Final = 1
CAP_KILL: Final = 5
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SYS_ADMIN: Final = 21
CAP_SETFCAP: Final = 31
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_libc.inotify_rm_watch.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.prctl.argtypes = (ctypes.c_int, *4 * (ctypes.c_ulong,))
_libc.getsockopt.argtypes = (*3 * (ctypes.c_int,), ctypes.c_void_p, ctypes.c_void_p)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.clone.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.capget.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
_libc.capset.argtypes = (ctypes.c_char_p, ctypes.c_char_p)

# Bound once: looking a function up in the library again costs more than some of the calls do.
_inotify_add_watch = _libc.inotify_add_watch
_inotify_rm_watch = _libc.inotify_rm_watch
_capset = _libc.capset


def _error(call: str, path: bytes | None = None) -> OSError:
    number = ctypes.get_errno()
    text = f"{call}: {os.strerror(number)}"
    return OSError(number, text, path) if path is not None else OSError(number, text)


def inotify_init() -> int:
    """Return a new inotify descriptor, non-blocking and close-on-exec (inotify_init1(2))."""
    fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise _error("inotify_init1")
    return fd


def inotify_add_watch(fd: int, path: bytes, mask: int) -> int:
    """Watch PATH for the events in MASK and return the watch descriptor.

    A relative path starts at the working directory: the kernel has no ``dirfd`` variant. Adding a
    watch on an inode that has one returns the same number. ENOSPC means that
    ``fs.inotify.max_user_watches`` is reached (inotify_add_watch(2)).
    """
    watch: int = _inotify_add_watch(fd, path, mask)
    if watch < 0:
        raise _error("inotify_add_watch", path)
    return watch


def inotify_rm_watch(fd: int, watch: int) -> None:
    """Remove a watch, unless the kernel has done that already (inotify_rm_watch(2))."""
    if _inotify_rm_watch(fd, watch) < 0 and ctypes.get_errno() != errno.EINVAL:
        raise _error("inotify_rm_watch")


_EVENT_HEADER = struct.Struct("=iIII")


def parse_inotify_events(data: bytes) -> list[tuple[int, int, bytes]]:
    """Split what one read(2) of an inotify descriptor returned into (watch, mask, name).

    The name is empty when the watched object itself is meant (inotify(7)). Plain tuples, because a
    burst brings six of them per cgroup. The kernel never splits a record; a tail that is too short
    (which only a caller's mistake can produce) raises ValueError.
    """
    events: list[tuple[int, int, bytes]] = []
    unpack = _EVENT_HEADER.unpack_from
    offset, end = 0, len(data)
    try:
        while offset < end:
            watch, mask, _cookie, length = unpack(data, offset)
            offset += 16
            if length:
                if offset + length > end:
                    raise ValueError("truncated inotify event")
                events.append((watch, mask, data[offset : offset + length].rstrip(b"\0")))
                offset += length
            else:
                events.append((watch, mask, b""))
    except struct.error as error:
        raise ValueError("truncated inotify event") from error
    return events


def birth_time(fd: int, path: bytes) -> float | None:
    """Return when PATH (relative to the directory FD) was created, in seconds since the epoch.

    None where the file system does not say; mainline kernels do not for cgroups (statx(2)).
    """
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, path, _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, buffer) < 0:
        raise _error("statx", path)
    # struct statx: stx_mask at 0, stx_btime (s64 seconds, u32 nanoseconds) at 80
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_BTIME:
        return None
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, 80)
    result: float = seconds + nanoseconds / 1e9
    return result


class Mount(NamedTuple):
    """One mounted file system: its device, where, of which type, with its superblock's options."""

    device: int
    path: bytes
    fstype: bytes
    options: frozenset[bytes]


_OCTAL = re.compile(rb"\\([0-7]{3})")


def parse_mountinfo(data: bytes) -> list[Mount]:
    """Parse /proc/PID/mountinfo (proc_pid_mountinfo(5)), in the kernel's order."""
    mounts = []
    # Not splitlines(): a path may hold a carriage return.
    for line in data.removesuffix(b"\n").split(b"\n") if data else []:
        before, separator, after = line.partition(b" - ")
        fields, tail = before.split(b" "), after.split(b" ")
        major, _, minor = fields[2].partition(b":") if len(fields) > 5 else (b"", b"", b"")
        if not separator or len(tail) < 3 or not (major.isdigit() and minor.isdigit()):
            raise ValueError(f"malformed mountinfo line: {line!r}")
        path = _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), fields[4])
        device = os.makedev(int(major), int(minor))
        mounts.append(Mount(device, path, tail[0], frozenset(tail[2].split(b","))))
    return mounts


def find_cgroup2_mount() -> Mount | None:
    """Return the first cgroup v2 mount that is not hidden below a later mount."""
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = parse_mountinfo(file.read())
    return next((m for m in mounts if m.fstype == b"cgroup2" and _reachable(m)), None)


def _reachable(mount: Mount) -> bool:
    try:
        return os.stat(mount.path).st_dev == mount.device
    except OSError:
        return False


def unshare(flags: int) -> None:
    """Move this thread into new namespaces, those of the CLONE_NEW* in FLAGS (unshare(2))."""
    if _libc.unshare(flags) < 0:
        raise _error("unshare")


def setns(fd: int, kind: int) -> None:
    """Move this thread into the namespace FD, which must be of KIND, a CLONE_NEW* (setns(2))."""
    if _libc.setns(fd, kind) < 0:
        raise _error("setns")


_SLEEP: Final = ctypes.cast(_libc.sleep, ctypes.c_void_p)
_stack: Final = ctypes.create_string_buffer(32768)


def clone_sleeper(flags: int, seconds: int) -> int:
    """Start a process in new namespaces, those of the CLONE_NEW* in FLAGS, and return its pid.

    It sleeps, ends after SECONDS by itself, and sends no signal then: wait for it with WALL. It
    shares our memory, so there can be one at a time, and nobody else must get hold of its
    namespaces before it is dead; a signal that comes to it is noted as if it had come to us. That
    takes a tenth of the time of fork(2): neither an interpreter nor a table of thousands of
    descriptors is copied (clone(2)).
    """
    top = ctypes.addressof(_stack) + len(_stack)
    pid: int = _libc.clone(_SLEEP, top & ~15, _CLONE_VM | _CLONE_FILES | flags, seconds)
    if pid < 0:
        raise _error("clone")
    return pid


def mount(source: bytes, target: bytes, fstype: bytes | None, flags: int) -> None:
    """Mount a file system, or change how changes of a mount propagate (mount(2))."""
    if _libc.mount(source, target, fstype, flags, None) < 0:
        raise _error("mount", target)


def _prctl(option: int, *arguments: int) -> None:
    values = (*arguments, 0, 0, 0, 0)[:4]
    if _libc.prctl(option, *values) < 0:
        raise _error("prctl")


def forbid_tracing() -> None:
    """Let nobody without CAP_SYS_PTRACE trace this process, until it executes a program.

    See PR_SET_DUMPABLE in prctl(2).
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def allow_tracing() -> None:
    """Let those trace this process who have its user id and all its capabilities.

    That is the normal state; a change of the user id ends it, and with it the access to much of
    our own /proc/self (PR_SET_DUMPABLE in prctl(2), ptrace(2)).
    """
    _prctl(_PR_SET_DUMPABLE, 1)


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends (PR_SET_PDEATHSIG)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def forbid_new_privileges() -> None:
    """Let no program that we execute have more privileges than we do (PR_SET_NO_NEW_PRIVS)."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def can_confine_signals() -> bool:
    """Whether the kernel has what confine_signals() takes."""
    version: int = _libc.syscall(
        _SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION
    )
    return version >= _SCOPES_SINCE


def confine_signals() -> bool:
    """Let this process and its children send signals to nobody else (landlock(7), scoped).

    It must have no new privileges. False before Linux 6.12, or where Landlock is not in use.
    """
    if not can_confine_signals():
        return False
    attributes = _LANDLOCK_RULESET.pack(0, 0, _LANDLOCK_SCOPE_SIGNAL)
    size = ctypes.c_size_t(len(attributes))
    fd = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, size, 0)
    if fd < 0:
        raise _error("landlock_create_ruleset")
    try:
        if _libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, fd, 0) < 0:
            raise _error("landlock_restrict_self")
    finally:
        os.close(fd)
    return True


def protect_limits_of(pid: int) -> bool:
    """Let this process and its children not change the resource limits of another, PID.

    Whoever has the same user could: that is how to end a process without a signal (RLIMIT_CPU,
    prlimit(2)). A filter of system calls, so it must have no new privileges. False on machines
    whose numbers are not known here.
    """
    if os.uname().machine not in _PRLIMIT64:
        return False
    architecture, number = _PRLIMIT64[os.uname().machine]
    steps = (  # code, how many to skip if equal, if not, operand (seccomp(2))
        (_BPF_LOAD_WORD, 0, 0, _ARCHITECTURE_AT),
        (_BPF_JUMP_EQUAL, 0, 4, architecture),
        (_BPF_LOAD_WORD, 0, 0, _NUMBER_AT),
        (_BPF_JUMP_EQUAL, 0, 2, number),
        (_BPF_LOAD_WORD, 0, 0, _FIRST_ARGUMENT_AT),
        (_BPF_JUMP_EQUAL, 1, 0, pid),
        (_BPF_RETURN, 0, 0, _SECCOMP_RET_ALLOW),
        (_BPF_RETURN, 0, 0, _SECCOMP_RET_ERRNO | errno.EPERM),
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = struct.pack("@HP", len(steps), ctypes.addressof(program))
    filter_ = ctypes.create_string_buffer(header)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_))
    return True


def share_one_arena() -> None:
    """Let all threads share one heap (M_ARENA_MAX of mallopt(3)).

    Each of its own would take 64 MB of address space, used or not, from RLIMIT_AS.
    """
    with suppress(AttributeError):  # another C library has none
        _libc.mallopt(_M_ARENA_MAX, 1)


# capget(2) and capset(2): effective, permitted, inheritable; first the lower 32 bits of each
_CAPABILITIES: Final = struct.Struct("=6I")
_CAPABILITY_HEADER: Final = struct.Struct("=Ii")
_OURS: Final = _CAPABILITY_HEADER.pack(_LINUX_CAPABILITY_VERSION_3, 0)


class Capabilities(NamedTuple):
    """The sets of a process, bit N for CAP_* N (capabilities(7))."""

    effective: int
    permitted: int
    inheritable: int

    def pack(self) -> bytes:
        """Return what set_capabilities() takes."""
        return _CAPABILITIES.pack(
            *(member & 0xFFFFFFFF for member in self), *(member >> 32 for member in self)
        )


def capabilities(pid: int = 0) -> Capabilities:
    """Return what a process, or this thread, holds in its own user namespace (capget(2))."""
    data = ctypes.create_string_buffer(_CAPABILITIES.size)
    if _libc.capget(_CAPABILITY_HEADER.pack(_LINUX_CAPABILITY_VERSION_3, pid), data) < 0:
        raise _error("capget")
    words = _CAPABILITIES.unpack(data.raw)
    return Capabilities(*(words[i] | words[i + 3] << 32 for i in range(3)))


def set_capabilities(packed: bytes) -> None:
    """Make PACKED, see Capabilities.pack(), the sets of this thread (capset(2))."""
    if _capset(_OURS, packed) < 0:
        raise _error("capset")


def keep_capabilities() -> None:
    """Let the permitted set survive that the user id becomes another than 0 (PR_SET_KEEPCAPS)."""
    _prctl(_PR_SET_KEEPCAPS, 1)


def clear_ambient_capabilities() -> None:
    """Pass no capability on to a program that we execute as a user who is not root."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def raise_ambient_capability(capability: int) -> None:
    """Pass a capability on that is permitted and inheritable (PR_CAP_AMBIENT_RAISE)."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


_PEER = struct.Struct("=iII")


def peer_credentials(peer: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of who connected, as they were then (SO_PEERCRED, unix(7)).

    The pid is 0 where the peer is in another PID namespace that is not below ours.
    """
    pid, uid, gid = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid, gid


def peer_pidfd(peer: socket.socket, pid: int) -> int:
    """Return a pidfd of who connected, whose pid was PID; ESRCH if it is gone.

    Before Linux 6.5 it is opened by its number, which may have been given to another process.
    """
    try:
        return peer.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    return os.pidfd_open(pid)


def peer_groups(peer: socket.socket) -> frozenset[int]:
    """Return the supplementary groups of who connected, as they were then (SO_PEERGROUPS)."""
    # socket.getsockopt() takes no more than a kilobyte.
    groups = (ctypes.c_uint32 * 65536)()  # NGROUPS_MAX
    size = ctypes.c_uint32(ctypes.sizeof(groups))
    option = socket.SOL_SOCKET, _SO_PEERGROUPS
    if _libc.getsockopt(peer.fileno(), *option, groups, ctypes.byref(size)) < 0:
        raise _error("getsockopt")
    return frozenset(groups[: size.value // 4])


def refuse_descriptors(receiver: socket.socket) -> None:
    """Let those who send descriptors to a socket, or to one accepted from it, fail with EPERM.

    Else those that nobody takes are closed by who reads the message, which can take as long as
    their sender likes (SO_LINGER). Nothing before Linux 6.16, which has no SO_PASSRIGHTS.
    """
    try:
        receiver.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
