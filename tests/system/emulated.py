"""The emulated machine: a kernel of its own with all controllers of cgroup v2, in QEMU.

It needs no help of the processor, and is slow: Python takes about 25 times as long. So it boots
once for each set of packages; what it was then, memory and disk, is kept, and every machine goes on
from there, which takes a few seconds. Commands go through QEMU's guest agent.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.system import image
from tests.system.machine import ENVIRONMENT, Failed

BOOT_SECONDS = 400.0
RESUME_SECONDS = 60.0

_DISK_KILOBYTES = 2 << 20
_POLL_SECONDS = 0.2

_MACHINE = [
    *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
    # With several threads, or a newer processor, the kernel panics in QEMU 7.2.
    *("-accel", "tcg,thread=single", "-smp", "1", "-cpu", "Nehalem", "-m", "1024"),
    *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
    *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent"),
    *("-mon", "chardev=monitor,mode=control"),
]
_MASKED = [
    *("systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket"),
    *("systemd-udev-trigger.service", "systemd-udev-load-credentials.service"),
    *("kmod-static-nodes.service", "systemd-random-seed.service", "systemd-pstore.service"),
]
_KERNEL_ARGUMENTS = [
    *("console=ttyS0", "quiet", "panic=-1", "mitigations=off", "apparmor=0", "audit=0"),
    *(f"systemd.mask={unit}" for unit in _MASKED),  # nothing here waits for a device
]


class EmulatedMachine:
    """A machine that has booted; it ends when it is closed, or when we are killed."""

    def __init__(self) -> None:
        """Go on from where a machine with all our packages had booted."""
        state = booted()
        self._qemu = _Qemu(state / "disk", "-snapshot", "-incoming", f"exec:cat {_memory(state)}")
        try:
            self._qemu.wait_alive(RESUME_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, *command: str, stdin: bytes = b"", seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine to its end; see machine.Host."""
        return self._qemu.run(command, stdin, seconds)

    def console(self) -> str:
        """Return what the machine wrote to its console since it went on."""
        return self._qemu.console()

    def close(self) -> None:
        """End it at once."""
        self._qemu.close()


def booted() -> Path:
    """Return a folder with "disk" and "memory" of a machine that has booted."""
    root = image.installed()

    def make(directory: Path) -> None:
        disk = directory / "disk"
        size = f"{_DISK_KILOBYTES}k"
        image.run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(disk), size)
        qemu = _Qemu(disk)
        try:
            qemu.wait_alive(BOOT_SECONDS)
            state = qemu.run(["systemctl", "is-system-running", "--wait"], b"", BOOT_SECONDS).stdout
            if state != "running\n":
                failed = qemu.run(["systemctl", "--failed", "--no-pager"], b"", 60).stdout
                raise Failed(f"the emulated machine is {state}{failed}")
            qemu.save(directory)
        finally:
            qemu.close()

    # One version of QEMU may not know what another one has saved.
    version = image.run("qemu-system-x86_64", "--version")
    ingredients = [version, str(root), str(image.kernel()), str(_DISK_KILOBYTES), *_MACHINE]
    return image.made("booted", [*ingredients, *_KERNEL_ARGUMENTS], make)


def _memory(state: Path) -> str:
    """Return the name of the file with a machine's memory, as a shell takes it."""
    return shlex.quote(str(state / "memory"))


class _Qemu:
    """A running QEMU, what it is told (QMP), and what is asked of the agent inside."""

    def __init__(self, disk: Path, *options: str) -> None:
        self._console = tempfile.TemporaryFile()  # noqa: SIM115 - for console()
        kernel = image.kernel()
        self._agent, self._monitor = _Channel(), _Channel()
        with self._agent.theirs as agent, self._monitor.theirs as monitor:
            command = [
                # Whoever started it may be killed at any time.
                *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),
                *("-chardev", f"socket,id=agent,fd={agent.fileno()}"),
                *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}"),
                *_MACHINE,
                *("-kernel", str(kernel / "vmlinuz"), "-initrd", str(kernel / "initrd.img")),
                *("-append", " ".join(_KERNEL_ARGUMENTS)),
                *("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"),
                *options,
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._console,
                stderr=self._console,
                pass_fds=[agent.fileno(), monitor.fileno()],
                start_new_session=True,  # Ctrl-C is for us
            )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._agent.close()
        self._monitor.close()

    def console(self) -> str:
        size = os.fstat(self._console.fileno()).st_size
        return os.pread(self._console.fileno(), size, 0).decode(errors="replace")

    def wait_alive(self, seconds: float) -> None:
        """Return when the agent answers."""
        self._ask("guest-sync", {"id": os.getpid()}, seconds)

    def run(
        self, command: Sequence[str], stdin: bytes, seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine to its end; see machine.Host."""
        deadline = time.monotonic() + seconds
        started = self._ask(
            "guest-exec",
            {
                "path": "/usr/bin/env",
                "arg": ["--chdir=/root", *command],
                "env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
                "input-data": base64.b64encode(stdin).decode(),
                "capture-output": True,
            },
        )
        while not (status := self._ask("guest-exec-status", started))["exited"]:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(command), seconds)
            time.sleep(_POLL_SECONDS)
        output, errors = (
            base64.b64decode(status.get(name, "")).decode(errors="replace")
            for name in ("out-data", "err-data")
        )
        code = status["exitcode"] if "exitcode" in status else -status["signal"]
        return subprocess.CompletedProcess(list(command), code, output, errors)

    def save(self, state: Path) -> None:
        """Write the machine's memory to STATE; it does not run any more then."""
        self._tell("qmp_capabilities", {})
        self._tell("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        self._tell("migrate", {"uri": f"exec:cat >{_memory(state)}"})
        while (status := self._tell("query-migrate", {}).get("status")) != "completed":
            if status in ("failed", "cancelled"):
                raise Failed("the emulated machine could not be saved")
            time.sleep(_POLL_SECONDS)
        self._tell("quit", {})
        self._process.wait()

    def _ask(self, command: str, arguments: dict[str, Any], seconds: float = 60) -> Any:
        return self._exchange(self._agent, command, arguments, seconds)

    def _tell(self, command: str, arguments: dict[str, Any]) -> Any:
        return self._exchange(self._monitor, command, arguments, 60)

    def _exchange(
        self, channel: _Channel, command: str, arguments: dict[str, Any], seconds: float
    ) -> Any:
        try:
            return channel.exchange(command, arguments, seconds)
        except TimeoutError:
            raise Failed(f"no answer to {command}\n{self.console()}") from None
        except ConnectionError:
            self._process.wait()
            raise Failed(f"the emulated machine has ended\n{self.console()}") from None


class _Channel:
    """Commands and answers in JSON, a line each, as QEMU and its agent speak it."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._answers = self._ours.makefile("rb")

    def close(self) -> None:
        self._answers.close()
        self._ours.close()

    def exchange(self, command: str, arguments: dict[str, Any], seconds: float) -> Any:
        """Send a command and return what it returns.

        Raises Failed if it was refused, TimeoutError if nothing came for SECONDS, and
        ConnectionError if nothing can come any more.
        """
        self._ours.settimeout(seconds)
        request = {"execute": command, "arguments": arguments}
        self._ours.sendall(json.dumps(request).encode() + b"\n")
        while line := self._answers.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise Failed(f"{command}: {answer['error']['desc']}")
            if "return" in answer:  # all else is events
                return answer["return"]
        raise ConnectionResetError
