"""What the accessory promises about restarts: nobody notices, whatever died, at any instant."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.tools.accessory import KEEPER, Accessory, make_accessory
from tests.tools.forked import Forked, Forks
from tests.tools.harness import Host, many_descriptors, wait_for
from tests.tools.native import ROOT
from tests.tools.wire import (
    CGROUP,
    IPC,
    LEASE,
    MOUNT,
    NAME,
    NET,
    PID,
    TIME,
    USER,
    UTS,
    Answer,
    Client,
    Packet,
)

NEWPID = 0x20000000
KINDS = ("ipc", "pid", "user", "net", "uts", "cgroup", "mount", "time")  # in an answer's order
MAPS = (USER, b"0 100000 1000\x000 100000 1000")
ALL = (MAPS, *((kind, b"") for kind in (IPC, PID, NET, UTS, CGROUP, MOUNT, TIME)))
LEASED = (*ALL, (LEASE, b""))


def named(name: str, *packets: Packet) -> tuple[Packet, ...]:
    return ((NAME, name.encode()), *packets)


def get(accessory: Accessory, name: str, *packets: Packet) -> Answer:
    """Ask on a connection of its own, for what must be there."""
    with accessory.client() as client:
        answer = client.ask(*named(name, *packets))
    assert answer.error is None, answer.error
    return answer


def inodes(accessory: Accessory, name: str, *packets: Packet) -> list[int]:
    with get(accessory, name, *packets) as answer:
        return answer.inodes()


def names(accessory: Accessory) -> dict[str, tuple[int, int, int]]:
    """Return flags, leases and age of all names."""
    with accessory.client() as client:
        return {
            name.decode(): (one.flags, one.leases, one.age) for name, one in client.names().items()
        }


def check_that_all_inits_are_known(accessory: Accessory) -> None:
    """For names of at most ten characters, all different."""
    listed = names(accessory).items()
    known = sorted(f"init-{name}" for name, (flags, _, _) in listed if flags & NEWPID)
    # A moment after an init was made it does not have its name yet.
    wait_for(f"inits are {known}", lambda: sorted(accessory.inits().values()) == known, 5)


def lost_inits(accessory: Accessory) -> list[str]:
    """Return what a start wrote about inits that it had to end: none while the keeper lives."""
    return [line for line in accessory.errors() if "lost PID namespace" in line]


def check_that_all_expires(accessory: Accessory, keeper_had: int) -> None:
    """Start a daemon that lets names expire soon, and wait until it has nothing any more."""
    accessory.settings.write_text("expiry = 0.1\n")
    accessory.start()
    wait_for("all names expire", lambda: not names(accessory))
    wait_for("all inits end", lambda: not accessory.inits())
    wait_for("the keeper keeps nothing", lambda: accessory.keeper_descriptors() == keeper_had)


@contextmanager
def process_inside(answer: Answer) -> Iterator[int]:
    """Run a process inside all of an answer's namespaces; it must live to the end."""
    options = [f"--{kind}=/proc/self/fd/{fd}" for kind, fd in zip(KINDS, answer.fds, strict=False)]
    with subprocess.Popen(
        ["nsenter", *options, "sh", "-c", "echo; exec sleep 1000"],
        pass_fds=answer.fds,
        stdout=subprocess.PIPE,
    ) as entered:
        assert entered.stdout is not None
        assert entered.stdout.read(1) == b"\n"
        children = Path(f"/proc/{entered.pid}/task/{entered.pid}/children").read_text()
        child = int(children)
        try:
            yield child
            assert entered.poll() is None
        finally:
            entered.kill()
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)


def namespaces_of(pid: int) -> list[int]:
    files = ("ipc", "pid", "user", "net", "uts", "cgroup", "mnt", "time")
    return [os.stat(f"/proc/{pid}/ns/{file}").st_ino for file in files]


# Ends of the daemon


def terminated(accessory: Accessory) -> None:
    accessory.stop()
    accessory.start()


def killed(accessory: Accessory) -> None:
    accessory.kill()
    accessory.start()


def killed_five_times(accessory: Accessory) -> None:
    for _ in range(5):
        killed(accessory)


def killed_while_it_starts(accessory: Accessory) -> None:
    """At instants from before the daemon's first system call until after it is ready."""
    accessory.kill()
    with Forks(accessory) as forks:
        for n in range(40):
            daemon = forks.begin()
            time.sleep(n / 4000)
            daemon.kill()
    accessory.start()


Restart = Callable[[Accessory], None]


@pytest.mark.parametrize("restart", [terminated, killed, killed_five_times, killed_while_it_starts])
def test_all_outlives_the_daemon(accessory: Accessory, restart: Restart) -> None:
    """All kinds of namespaces, processes inside, and leases."""
    held = accessory.keeper_descriptors()
    with (
        get(accessory, "alice", *LEASED) as alice,
        get(accessory, "bob", *ALL) as bob,
        process_inside(alice) as pid,
    ):
        assert namespaces_of(pid) == alice.inodes()[:-1]
        processes = accessory.processes()
        del processes[accessory.pid]
        restart(accessory)
        assert inodes(accessory, "alice", *LEASED) == alice.inodes()
        assert inodes(accessory, "bob", *ALL) == bob.inodes()
        assert namespaces_of(pid) == alice.inodes()[:-1]
        with get(accessory, "alice", *ALL) as again, process_inside(again) as other:
            assert namespaces_of(other) == namespaces_of(pid)
        assert accessory.processes().keys() == {accessory.pid} | processes.keys()
        # The next request for something new has the keeper read all; two are of a PID namespace.
        assert accessory.keeper_descriptors() == held + 9 + 1 + 9


def test_names_are_listed_as_before(accessory: Accessory) -> None:
    with get(accessory, "alice", *LEASED), get(accessory, "bob", (UTS, b"")):
        wait_for("a second passes", lambda: names(accessory)["alice"][2] > 0)
        before = names(accessory)
        for restart in (terminated, killed):
            restart(accessory)
            after = names(accessory)
            assert list(after) == ["alice", "bob"]
            for name, (flags, leases, age) in before.items():
                assert after[name][0] == flags
                assert after[name][1] == leases
                assert age <= after[name][2] < age + 10


def test_restarts_leak_no_descriptor(accessory: Accessory) -> None:
    with get(accessory, "alice", *LEASED), get(accessory, "bob", *ALL):
        terminated(accessory)
        counts = accessory.descriptors(), accessory.keeper_descriptors()
        for _ in range(3):
            killed(accessory)
            assert (accessory.descriptors(), accessory.keeper_descriptors()) == counts


# Leases


def wait_out(accessory: Accessory, witness: str) -> None:
    """Wait as long as a name lives that nobody leases."""
    get(accessory, witness, (IPC, b"")).close()
    wait_for("a name expires", lambda: witness not in names(accessory))


def test_a_name_lives_while_it_is_leased(stopped_accessory: Accessory) -> None:
    stopped_accessory.settings.write_text("expiry = 0.1\n")
    accessory = stopped_accessory.start()
    held = accessory.keeper_descriptors()
    before = get(accessory, "alice", *LEASED)
    killed(accessory)
    after = get(accessory, "alice", *LEASED)
    assert after.inodes() == before.inodes()
    before.close()
    wait_out(accessory, "witness of the second lease")
    assert set(names(accessory)) == {"alice"}
    terminated(accessory)
    wait_out(accessory, "witness of the second lease after a restart")
    assert set(names(accessory)) == {"alice"}
    after.close()
    wait_for("the name expires", lambda: not names(accessory))
    wait_for("its init ends", lambda: not accessory.inits())
    wait_for("nothing of it is kept", lambda: accessory.keeper_descriptors() == held)


def test_a_lease_that_is_closed_while_no_daemon_runs_counts_as_closed(
    stopped_accessory: Accessory,
) -> None:
    stopped_accessory.settings.write_text("expiry = 0.3\n")
    accessory = stopped_accessory.start()
    with get(accessory, "alice", *LEASED):
        for end in (accessory.stop, accessory.kill):
            bob = get(accessory, "bob", *LEASED)
            end()
            bob.close()
            accessory.start()
            assert names(accessory).get("bob", (0, 0, 0))[1] == 0
            wait_for("bob expires", lambda: "bob" not in names(accessory))
            wait_for("bob's init ends", lambda: [*accessory.inits().values()] == ["init-alice"])
            assert names(accessory)["alice"][1] == 1


def test_a_name_that_nobody_ever_leased_expires_after_a_restart(
    stopped_accessory: Accessory,
) -> None:
    accessory = stopped_accessory.start()
    held = accessory.keeper_descriptors()
    get(accessory, "alice", *ALL).close()
    accessory.kill()
    check_that_all_expires(accessory, held)


# Clients


def ask_all_the_while(
    accessory: Accessory, number: int, done: threading.Event, problems: list[str], counts: list[int]
) -> None:
    """Ask for some names again and again, on another connection when the one was closed.

    COUNTS are how many requests were answered on each connection.
    """
    known: dict[str, list[int]] = {}
    client = accessory.client()
    counts.append(0)
    while not done.is_set():
        name = f"c{number}-{sum(counts) % 100 // 10}"
        try:
            answer = None
            with suppress(ConnectionError):
                answer = client.ask(*named(name, (IPC, b""), (PID, b""), MAPS, LEASED[-1]))
        except AssertionError:
            pass  # the connection was closed
        if answer is None:
            client.close()
            client = accessory.client()
            counts.append(0)
            continue
        with answer:
            if answer.error is not None:
                problems.append(answer.error)
            elif known.setdefault(name, answer.inodes()) != answer.inodes():
                problems.append(f"{name} has changed")
        counts[-1] += 1
        time.sleep(0.001)  # so that there are two processors for all of them
    client.close()


def test_clients_notice_no_restart(stopped_accessory: Accessory) -> None:
    stopped_accessory.activate()
    accessory = stopped_accessory.start()
    done = threading.Event()
    problems: list[str] = []
    counts: list[list[int]] = [[] for _ in range(4)]
    askers = [
        threading.Thread(target=ask_all_the_while, args=(accessory, n, done, problems, counts[n]))
        for n in range(4)
    ]
    for asker in askers:
        asker.start()

    def all_were_answered(connections: int) -> bool:
        return all(len(count) >= connections and count[-1] > 10 for count in counts)

    try:
        for n in range(5):
            wait_for("all are answered", partial(all_were_answered, n + 1))
            (killed if n % 2 else terminated)(accessory)
        wait_for("all are answered", lambda: all_were_answered(6))
    finally:
        done.set()
        for asker in askers:
            asker.join()
    assert problems == []
    assert len(names(accessory)) <= 40
    check_that_all_inits_are_known(accessory)


def test_what_was_asked_before_sigterm_is_answered(accessory: Accessory) -> None:
    with accessory.client() as client, accessory.client() as other:
        for one in (client, other):
            one.ask(*named("alice", (IPC, b""))).close()  # the connection is accepted
        accessory.signal(signal.SIGSTOP)
        for n in range(50):
            client.send(*named(f"n{n}", (IPC, b""), LEASED[-1]))
            other.send(*named(f"n{n}", MAPS))
        accessory.signal(signal.SIGTERM)
        accessory.signal(signal.SIGCONT)
        for one, count in ((client, 2), (other, 1)):
            for _ in range(50):
                answer = one.receive()
                assert answer is not None
                with answer:
                    assert answer.error is None
                    assert len(answer.fds) == count
            assert one.dropped()
    assert accessory.process is not None
    assert accessory.process.wait(10) == 0


def test_whatever_could_be_sent_before_the_end_is_answered(accessory: Accessory) -> None:
    """As a client sees it that sends ahead: what a daemon took it must not lose."""
    for _ in range(3):
        room = threading.Semaphore(20)
        sent: list[int] = []
        with accessory.client() as client:
            client.ask(*named("alice", (IPC, b""))).close()

            def send(
                client: Client = client, room: threading.Semaphore = room, sent: list[int] = sent
            ) -> None:
                with suppress(BrokenPipeError):
                    while room.acquire(timeout=10):
                        client.send(*named("alice", (IPC, b"")))
                        sent.append(1)

            sender = threading.Thread(target=send)
            sender.start()
            answers = 0
            while (answer := client.receive()) is not None:
                answer.close()
                answers += 1
                room.release()
                if answers == 100:
                    accessory.signal(signal.SIGTERM)
            sender.join()
            assert answers == len(sent)
        assert accessory.process is not None
        assert accessory.process.wait(10) == 0
        accessory.start()


def test_who_is_still_in_the_queue_of_a_daemon_that_ends_is_answered(accessory: Accessory) -> None:
    with many_descriptors(), ExitStack() as stack:
        accessory.signal(signal.SIGSTOP)
        clients = [stack.enter_context(accessory.client()) for _ in range(1000)]
        for client in clients:
            client.send(*named("alice", (IPC, b"")))
        accessory.signal(signal.SIGTERM)
        accessory.signal(signal.SIGCONT)
        for client in clients:
            answer = client.receive()
            assert answer is not None
            with answer:
                assert len(answer.fds) == 1
            assert client.dropped()
    assert accessory.process is not None
    assert accessory.process.wait(10) == 0


# The daemon killed while it works


class Witness:
    """Remembers what was answered, and holds the leases."""

    def __init__(self, accessory: Accessory) -> None:
        self.wanted = LEASED
        self._accessory = accessory
        self.answered: dict[str, list[int]] = {}
        self._leases: list[int] = []

    def take(self, name: str, client: Client) -> bool:
        """Take the answer of a daemon that may have died before; whether there was one."""
        answer = None
        with suppress(ConnectionError, BlockingIOError):
            answer = client.receive()
        if answer is None:
            return False
        with answer:
            assert answer.error is None, answer.error
            self.answered[name] = answer.inodes()
            self._leases.append(os.dup(answer.lease))
        return True

    def check(self) -> None:
        """Check that nothing has changed, and that there is nothing that nobody knows of."""
        check_that_all_inits_are_known(self._accessory)
        self.check_answers()

    def check_answers(self) -> None:
        """Check that all names have what they had."""
        for name, known in self.answered.items():
            assert inodes(self._accessory, name, *self.wanted) == known

    def close(self) -> None:
        """Give the leases back."""
        while self._leases:
            os.close(self._leases.pop())


@pytest.fixture
def witness(stopped_accessory: Accessory) -> Iterator[Witness]:
    witness = Witness(stopped_accessory)
    yield witness
    witness.close()


def spin(seconds: float) -> None:
    """Wait more exactly than the kernel's timers."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def seeded() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed:", seed)
    return random.Random(seed)


def test_the_daemon_may_die_at_each_step_of_a_request(
    stopped_accessory: Accessory, witness: Witness
) -> None:
    accessory = stopped_accessory
    accessory.activate()
    with Forks(accessory) as forks:
        daemon = forks.start()
        held = accessory.keeper_descriptors()
        survived = False
        step = 0
        while not survived:
            daemon.kill()
            step += 1
            daemon = forks.start(die_at=step)
            with accessory.client() as client:
                client.send(*named(f"s{step}", *LEASED))
                wait_until_it_answers_or_dies(client, daemon)
                if witness.take(f"s{step}", client):
                    client.socket.settimeout(30)
                    with suppress(ConnectionError, AssertionError):
                        survived = bool(client.names())
        print(f"{step} steps, {len(witness.answered)} answered")
        assert step > 30
        witness.check()
    assert not lost_inits(accessory)
    witness.close()
    check_that_all_expires(accessory, held)


def wait_until_it_answers_or_dies(client: Client, daemon: Forked) -> None:
    """A daemon that died may leave a process that has its connections for a second."""
    poll = select.poll()
    poll.register(client.socket, select.POLLIN)
    wait_for("it answers or dies", lambda: bool(poll.poll(0)) or daemon.ended())
    client.socket.setblocking(False)


# Runs a daemon that dies when it has a process for a new user namespace, which shares what it has.
DYING = """
import os, runpy, signal, sys
from spawn_accessory import namespaces
namespaces._write_map = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
del sys.argv[1:3]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_a_killed_daemons_address_is_free_again_at_once(stopped_accessory: Accessory) -> None:
    accessory = stopped_accessory
    accessory.wrapper = [sys.executable, "-c", DYING]
    accessory.start()
    accessory.wrapper = []
    with get(accessory, "alice", (IPC, b"")) as alice, accessory.client() as client:
        client.send(*named("alice", MAPS))
        assert accessory.process is not None
        assert accessory.process.wait(10) == -signal.SIGKILL

        def is_free() -> bool:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                try:
                    listener.bind("\0" + accessory.address[1:])
                except OSError:
                    return False
                return True

        wait_for("the address is free", is_free, 2)
        accessory.start()
        assert inodes(accessory, "alice", (IPC, b"")) == alice.inodes()


def test_the_daemon_may_be_killed_at_any_instant(
    stopped_accessory: Accessory, witness: Witness
) -> None:
    accessory, instants = stopped_accessory, seeded()
    witness.wanted = ((IPC, b""), (PID, b""), MAPS, (LEASE, b""))
    accessory.activate()
    with Forks(accessory) as forks:
        daemon = forks.start()
        held = accessory.keeper_descriptors()
        for n in range(60):
            with accessory.client() as client:
                client.send(*named(f"r{n}", *witness.wanted))
                spin(instants.uniform(0, 0.005))
                daemon.kill()
                client.socket.setblocking(False)  # see wait_until_it_answers_or_dies
                witness.take(f"r{n}", client)
            daemon = forks.start()
            if n % 10 == 0:
                check_that_all_inits_are_known(accessory)
        print(f"{len(witness.answered)} of 60 answered")
        assert 0 < len(witness.answered) < 60
        witness.check()
    assert not lost_inits(accessory)
    witness.close()
    check_that_all_expires(accessory, held)


# The keeper dies


def wait_for_another_keeper(accessory: Accessory, old: int) -> None:
    def is_there() -> bool:
        processes = accessory.processes()
        return old not in processes and "spawn-keeper" in processes.values()

    wait_for("there is another keeper", is_there)


def kill_keeper(accessory: Accessory) -> None:
    keeper = accessory.keeper()
    os.kill(keeper, signal.SIGKILL)
    wait_for_another_keeper(accessory, keeper)


def test_nothing_is_lost_with_the_keeper(accessory: Accessory) -> None:
    held = accessory.keeper_descriptors() + len(ALL) + 2  # the pidfd of an init, and a lease
    with get(accessory, "alice", *LEASED) as alice, process_inside(alice) as pid:
        inside, inits = namespaces_of(pid), accessory.inits()
        had = accessory.descriptors()
        for _ in range(3):
            kill_keeper(accessory)
            assert inodes(accessory, "alice", *ALL) == alice.inodes()[:-1]
            assert accessory.inits() == inits
            wait_for("all is held", lambda: accessory.keeper_descriptors() == held)
            wait_for("nothing is left open", lambda: accessory.descriptors() == had)
        assert len(accessory.manager.passed()) == 1
        for restart in (terminated, killed):
            restart(accessory)
            assert inodes(accessory, "alice", *ALL) == alice.inodes()[:-1]
            assert accessory.inits() == inits
            assert namespaces_of(pid) == inside


def test_a_keeper_that_died_unnoticed_is_replaced_by_the_next_request(accessory: Accessory) -> None:
    with get(accessory, "alice", *LEASED) as alice, accessory.client() as client:
        accessory.signal(signal.SIGSTOP)
        client.send(*named("alice", *ALL))
        client.send(*named("bob", *ALL))
        os.kill(accessory.keeper(), signal.SIGKILL)
        accessory.signal(signal.SIGCONT)
        for known in (alice.inodes()[:-1], None):
            answer = client.receive()
            assert answer is not None
            with answer:
                assert answer.error is None
                assert known is None or answer.inodes() == known
        check_that_all_inits_are_known(accessory)


def test_the_keeper_may_be_killed_at_any_instant(
    stopped_accessory: Accessory, witness: Witness
) -> None:
    accessory, instants = stopped_accessory.start(), seeded()
    held = accessory.keeper_descriptors()
    refused = []
    for n in range(50):
        with accessory.client() as client:
            keeper = accessory.keeper()
            client.send(*named(f"k{n}", *LEASED))
            spin(instants.uniform(0, 0.003))
            os.kill(keeper, signal.SIGKILL)
            try:
                assert witness.take(f"k{n}", client)
            except AssertionError as error:
                refused.append(str(error))
        wait_for_another_keeper(accessory, keeper)
    witness.check_answers()  # the daemon has told the keeper everything
    print(f"{len(witness.answered)} of 50 answered; else: {set(refused)}")
    assert len(witness.answered) > 0
    killed(accessory)
    witness.check()
    accessory.stop()
    witness.close()
    check_that_all_expires(accessory, held)


def test_keepers_may_die_one_after_the_other(
    stopped_accessory: Accessory, witness: Witness
) -> None:
    accessory = stopped_accessory.start()
    held = accessory.keeper_descriptors()
    done = threading.Event()
    keepers = set()

    def kill_all() -> None:
        while not done.is_set():
            for pid, name in accessory.processes().items():
                if name == "spawn-keeper":
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        keepers.add(pid)

    killer = threading.Thread(target=kill_all)
    killer.start()
    refused = []
    try:
        for n in range(10):
            with accessory.client() as client:
                client.send(*named(f"k{n}", *LEASED))
                try:
                    assert witness.take(f"k{n}", client)
                except AssertionError as error:
                    refused.append(str(error))
    finally:
        done.set()
        killer.join()
    print(f"{len(keepers)} keepers, {len(witness.answered)} answered; else: {set(refused)}")
    assert len(keepers) > 5
    wait_until_served(accessory)
    witness.check_answers()
    check_that_all_inits_are_known(accessory)
    killed(accessory)
    witness.check()
    accessory.stop()
    witness.close()
    check_that_all_expires(accessory, held)


def is_granted(client: Client, *packets: Packet) -> bool:
    with client.ask(*packets) as answer:
        return answer.error is None


def wait_until_served(accessory: Accessory) -> None:
    """Wait until something new can be had, which takes a keeper that does not die."""
    with accessory.client() as client:
        new = named("new", (PID, b""))
        wait_for("there is a keeper that does not die", lambda: is_granted(client, *new))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_request_of_which_keepers_die_leaves_nothing_unknown(
    stopped_accessory: Accessory, host: Host, count: int
) -> None:
    deaths, real, script = (host.directory / name for name in ("deaths", "real", "script"))
    shutil.copy(KEEPER, real)
    script.write_text(
        f"""#!/bin/sh
        read n < {deaths}
        [ $n -gt 0 ] || exec {real} "$@"
        echo $((n - 1)) > {deaths}
        """
    )
    script.chmod(0o755)
    deaths.write_text("0\n")
    accessory = stopped_accessory
    mount = f'mount --bind {script} {KEEPER}; exec "$@"'
    accessory.wrapper = ["unshare", "--mount", "sh", "-ec", mount, "sh"]
    accessory.start()
    keeper = accessory.keeper()
    with accessory.client() as client:
        client.names()
        accessory.signal(signal.SIGSTOP)
        client.send(*named("alice", (PID, b"")))
        deaths.write_text(f"{count}\n")
        os.kill(keeper, signal.SIGKILL)
        wait_for("the keeper is dead", lambda: keeper not in accessory.processes())
        accessory.signal(signal.SIGCONT)
        answer = client.receive()
        assert answer is not None
        with answer:
            print(answer.error or "answered")
            if answer.error is not None:
                wait_for("nothing is left", lambda: not accessory.inits())

        wait_until_served(accessory)
        assert deaths.read_text() == "0\n"
        check_that_all_inits_are_known(accessory)


# The keeper does not answer


def test_a_keeper_that_hangs_delays_only_what_is_new(stopped_accessory: Accessory) -> None:
    accessory = stopped_accessory
    with Forks(accessory) as forks:
        daemon = forks.start(patience=1.0)
        held = accessory.keeper_descriptors()
        with get(accessory, "alice", *LEASED) as alice:
            os.kill(accessory.keeper(), signal.SIGSTOP)
            assert inodes(accessory, "alice", *LEASED) == alice.inodes()
            with accessory.client() as client:
                answer = client.ask(*named("bob", (IPC, b""), (PID, b"")))
            assert answer.error is not None
            assert answer.error == "no PID namespace: the keeper does not answer"
            assert set(names(accessory)) == {"alice"}
            os.kill(accessory.keeper(), signal.SIGCONT)
            assert inodes(accessory, "alice", *LEASED) == alice.inodes()
            with accessory.client() as client:
                wait_for("the keeper answers", lambda: is_granted(client, *named("bob", *ALL)))
            daemon.kill()
            forks.start()
            check_that_all_inits_are_known(accessory)
            assert accessory.keeper_descriptors() == held + 9 + 1 + 9
    check_that_all_expires(accessory, held)


def test_what_expires_while_the_keeper_hangs_delays_nobody(stopped_accessory: Accessory) -> None:
    accessory = stopped_accessory
    accessory.settings.write_text("expiry = 1\n")
    accessory.start()
    held = accessory.keeper_descriptors()
    with get(accessory, "alice", *LEASED) as alice, accessory.client() as client:
        for n in range(400):
            client.ask(*named(f"n{n}", (UTS, b""))).close()
        keeper = accessory.keeper()
        os.kill(keeper, signal.SIGSTOP)
        began = time.monotonic()
        wait_for("the others expire", lambda: len(client.names()) == 1)
        assert inodes(accessory, "alice", *LEASED) == alice.inodes()
        assert time.monotonic() - began < 5
        os.kill(keeper, signal.SIGCONT)
        wait_for("only one is kept", lambda: accessory.keeper_descriptors() == held + 9 + 1)


def test_what_a_keeper_makes_too_late_replaces_nothing(stopped_accessory: Accessory) -> None:
    accessory = stopped_accessory
    with Forks(accessory) as forks, ExitStack() as stack:
        daemon = forks.start(patience=1.0)
        held = accessory.keeper_descriptors()
        with accessory.client() as client:
            keeper = accessory.keeper()
            os.kill(keeper, signal.SIGSTOP)
            for kind in (PID, MOUNT, TIME):
                answer = client.ask(*named("late", (kind, b"")))
                assert answer.error is not None
                assert answer.error.endswith("the keeper does not answer")
            wanted = ((IPC, b""), (UTS, b""), LEASED[-1])
            made = {
                f"n{n}": stack.enter_context(get(accessory, f"n{n}", *wanted)) for n in range(3)
            }
            os.kill(keeper, signal.SIGCONT)
            # As soon as there is an answer, the keeper is done with all that was before.
            wait_for("the keeper answers", lambda: is_granted(client, *named("n0", (MOUNT, b""))))
        daemon.kill()
        forks.start()
        assert names(accessory).keys() == made.keys()
        for name, answer in made.items():
            assert inodes(accessory, name, *wanted) == answer.inodes()
        wait_for("what came too late ends", lambda: not accessory.inits())
        assert accessory.keeper_descriptors() == held + 3 * len(wanted) + 1


def test_what_a_hanging_keeper_made_too_late_is_known_to_the_next_daemon(
    stopped_accessory: Accessory,
) -> None:
    accessory = stopped_accessory
    with Forks(accessory) as forks:
        daemon = forks.start()
        held = accessory.keeper_descriptors()
        keeper = accessory.keeper()
        with accessory.client() as client:
            os.kill(keeper, signal.SIGSTOP)
            client.send(*named("alice", *ALL))
            wait_for("the daemon waits for the keeper", lambda: waits_in_recvmsg(daemon))
            daemon.kill()
        os.kill(keeper, signal.SIGCONT)
        forks.start()
        assert accessory.keeper() == keeper
        assert list(names(accessory)) == ["alice"]
        check_that_all_inits_are_known(accessory)
    check_that_all_expires(accessory, held)


def waits_in_recvmsg(daemon: Forked) -> bool:
    """Whether a daemon waits for a message, of which clients' sockets never make it."""
    return "skb_wait" in Path(f"/proc/{daemon.pid}/wchan").read_text()


# Both die, or the manager lets go


def test_inits_that_nobody_knows_of_are_ended(accessory: Accessory, host: Host) -> None:
    with ExitStack() as stack:
        stack.enter_context(get(accessory, "alice", *LEASED))
        mine, keeper = accessory.inits(), accessory.keeper()
        directory = host.directory / "other"
        directory.mkdir()
        other = stack.enter_context(make_accessory(directory, accessory.cgroup)).start()
        stack.enter_context(get(other, "bob", *LEASED))
        others = {pid: name for pid, name in other.inits().items() if pid not in mine}
        assert list(others.values()) == ["init-bob"]
        accessory.kill()
        os.kill(keeper, signal.SIGKILL)
        wait_for("the keeper is dead", lambda: keeper not in accessory.processes())
        assert accessory.inits() == mine | others  # else there is nothing to be ended
        accessory.start()
        wait_for("its inits end", lambda: accessory.inits() == others)
        assert names(accessory) == {}
        assert list(names(other)) == ["bob"]
        get(accessory, "alice", *LEASED).close()
        killed(other)
        assert list(names(other)) == ["bob"]
        assert sorted(accessory.inits().values()) == ["init-alice", "init-bob"]


def test_inits_of_a_program_below_a_symbolic_link_are_ended_as_well(
    stopped_accessory: Accessory, host: Host
) -> None:
    accessory, link = stopped_accessory, host.directory / "link"
    link.symlink_to(ROOT)
    accessory.wrapper = ["env", f"PYTHONPATH={link}"]
    accessory.start()
    keeper = accessory.keeper()
    assert f"{link}/".encode() in Path(f"/proc/{keeper}/cmdline").read_bytes()
    get(accessory, "alice", (PID, b"")).close()
    accessory.kill()
    os.kill(keeper, signal.SIGKILL)
    wait_for("the keeper is dead", lambda: keeper not in accessory.processes())
    assert accessory.inits()  # else there is nothing to be ended
    accessory.start()
    wait_for("its init ends", lambda: not accessory.inits())


def test_all_ends_when_the_manager_forgets_the_keeper(accessory: Accessory) -> None:
    with get(accessory, "alice", *LEASED), get(accessory, "bob", *ALL) as bob:
        with process_inside(bob):
            accessory.stop()
            assert len(accessory.processes()) == 3
        accessory.manager.discard()
        wait_for("keeper and inits end", lambda: not accessory.processes())
    accessory.start()
    assert names(accessory) == {}
    get(accessory, "alice", *LEASED).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_all_ends_with_the_daemon_without_a_manager(
    stopped_accessory: Accessory, number: signal.Signals
) -> None:
    accessory = stopped_accessory
    accessory.wrapper = ["env", "-u", "NOTIFY_SOCKET"]
    accessory.begin()
    assert accessory.process is not None

    def connects() -> bool:
        with suppress(ConnectionRefusedError), accessory.client():
            return True
        return False

    wait_for("the daemon listens", connects)
    with get(accessory, "alice", *LEASED):
        assert len(accessory.processes()) == 3
        accessory.signal(number)
        accessory.process.wait(10)
        wait_for("keeper and inits end", lambda: not accessory.processes())


# Much for the keeper


LONG_NAMES = [(f"{n:04}" + 3996 * "x", (IPC, b"")) for n in range(300)]
LINES = b"".join(b"%d %d 1\n" % (n, 100_000 + n) for n in range(145))
LONG_MAPS = [(f"n{n}", (USER, LINES + b"\0" + LINES)) for n in range(100)]


@pytest.mark.parametrize("wanted", [LONG_NAMES, LONG_MAPS], ids=["names", "maps"])
def test_many_long_records_delay_nobody_and_outlive_the_keeper_and_the_daemon(
    accessory: Accessory, wanted: list[tuple[str, Packet]]
) -> None:
    slowest = 0.0

    def ask_for_all() -> list[list[int]]:
        nonlocal slowest
        found = []
        with accessory.client() as client:
            for name, packet in wanted:
                began = time.monotonic()
                with client.ask(*named(name, packet)) as answer:
                    assert answer.error is None
                    found.append(answer.inodes())
                slowest = max(slowest, time.monotonic() - began)
            began = time.monotonic()
            client.ask(*named("new", (UTS, b""))).close()
            slowest = max(slowest, time.monotonic() - began)
        return found

    made = ask_for_all()
    kill_keeper(accessory)
    assert ask_for_all() == made
    killed(accessory)
    assert ask_for_all() == made
    assert slowest < 2


# What else can be in the store


def test_a_keeper_of_another_version_is_left_alone(accessory: Accessory) -> None:
    with get(accessory, "alice", *LEASED) as alice:
        accessory.stop()
        left = accessory.processes()
        _, (stored, *_) = accessory.passed()
        with socket.socket(fileno=os.dup(stored)) as end:
            enqueue(end, UNKNOWN, os.open("/dev/null", os.O_RDONLY))
            for _ in range(2):
                accessory.begin()
                assert accessory.process is not None
                assert accessory.process.wait(10) == 1
            assert accessory.processes() == left
            end.send(header(3, UNKNOWN))
        problem = "cannot take over the keeper: it is of another version"
        assert accessory.errors() == [f"cm4all-spawn-accessory: {problem}"] * 2
        accessory.start()
        assert inodes(accessory, "alice", *LEASED) == alice.inodes()


UNKNOWN = (0x100, 77, 1)  # kind, slot, and when it was made


def header(operation: int, record: tuple[int, int, int] = (0, 0, 1)) -> bytes:
    """Return the beginning of a message to a keeper (see keeper.c)."""
    kind, slot, since = record
    return struct.pack("=IIIiQ", operation, kind, slot, 0, since)


def enqueue(end: socket.socket, record: tuple[int, int, int], fd: int) -> None:
    """Have the keeper at END keep FD, which is closed."""
    end.send(header(4))
    while True:
        message, fds, _, _ = socket.recv_fds(end, 8192, 2)
        if message[0] == 4:
            break
        for its in fds:
            os.close(its)
    with socket.socket(fileno=fds[0]) as queue:
        socket.send_fds(queue, [header(1, record) + b"alice"], [fd])
    os.close(fd)


def test_a_start_passes_over_what_else_is_stored(accessory: Accessory) -> None:
    with get(accessory, "alice", *LEASED) as alice:
        keeper = accessory.keeper()
        accessory.stop()
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read_end, write_end = os.pipe()
        stored = accessory.manager.stored
        stored[:0] = [
            ("foreign", one.detach()),
            ("keeper", read_end),
            ("", os.open("/dev/null", os.O_RDONLY)),
        ]
        stored.append(("stored", os.dup(other.fileno())))
        try:
            accessory.start()
            assert accessory.keeper() == keeper
            assert inodes(accessory, "alice", *LEASED) == alice.inodes()
        finally:
            other.close()
            os.close(write_end)


def test_a_start_passes_over_a_dead_keeper(accessory: Accessory) -> None:
    """A manager may not have noticed yet."""
    dead, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with get(accessory, "alice", *LEASED) as alice:
        keeper = accessory.keeper()
        accessory.stop()
        accessory.manager.stored.insert(0, ("keeper", dead.detach()))
        names_passed, _ = accessory.passed()
        assert names_passed == ["keeper", "keeper"]
        accessory.begin()
        its.close()
        wait_for("the daemon is ready", lambda: "READY=1" in accessory.manager.notifications)
        assert accessory.keeper() == keeper
        assert inodes(accessory, "alice", *LEASED) == alice.inodes()


def test_only_one_keeper_is_stored(accessory: Accessory) -> None:
    for _ in range(3):
        kill_keeper(accessory)
    get(accessory, "alice", *LEASED).close()  # the daemon is done with it
    accessory.manager.passed()
    assert [name for name, _ in accessory.manager.stored] == ["keeper"]


# Inits


def test_an_init_that_died_while_no_daemon_ran_is_noticed(accessory: Accessory) -> None:
    held = accessory.keeper_descriptors()
    with get(accessory, "alice", *LEASED) as alice:
        ((init, _),) = accessory.inits().items()
        accessory.stop()
        os.kill(init, signal.SIGKILL)
        wait_for("the init is dead", lambda: not accessory.inits())
        accessory.start()
        assert not names(accessory)["alice"][0] & NEWPID
        wait_for("it is forgotten", lambda: accessory.keeper_descriptors() == held + 7 + 1)
        with get(accessory, "alice", *LEASED) as again:
            changed = [a != b for a, b in zip(alice.inodes(), again.inodes(), strict=True)]
            assert changed == [False, True] + [False] * 7
            killed(accessory)
            check_that_all_inits_are_known(accessory)
            assert accessory.keeper_descriptors() == held + 9 + 1
            assert inodes(accessory, "alice", *LEASED) == again.inodes()
