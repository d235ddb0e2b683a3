"""Datagrams for the accessory that are right, nearly right, or not right at all.

The same seed gives the same datagrams. As a command, it lets the protocol take them apart::

    python -m tests.tools.fuzz --count 1000000
"""

from __future__ import annotations

import argparse
import os
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from random import Random

from spawn_accessory.protocol import Malformed, pack_request, unpack_request
from tests.tools.wire import LIST, MAGIC, NAME, USER

NAMES = (b"a", b"bob", b"/x y/~\x7f", b"init-0123456789", b"n" * 200)
SEVERAL_NAMES = (b"", b"\0", b"a\0b", b"\x1f", b"\x80", b"m" * 4064, b"m" * 4065, b"m" * 4084)
MAPS = (
    b"\0",
    b"0 0 1\0000 0 1",
    b"0 100000 1000\0000 100000 1000\n",
    b"\0" + b"5 6 7",
    b"\n".join(b"%d %d 1" % (n, n) for n in range(100)) + b"\0",
    b"0 1 2\n1 5 1\0",
    b"0 4294967294 1\0000 0 4294967295",
    b"0 0 0\0",
    b"no map",
    b"\0\0",
    b"0 0 1\0" + b" " * 4000,
)
COMMANDS = (*range(6), *range(0x8001, 0x8008))
_NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF)


def datagrams(seed: int) -> Iterator[bytes]:
    """Yield datagrams without end."""
    random = Random(seed)
    chance = random.random
    while True:
        body = _body(random)
        if chance() < 0.3:
            body = _damaged(random, body)
        datagram = struct.pack("=II", MAGIC, zlib.crc32(body)) + body
        if chance() < 0.1:
            datagram = _damaged(random, datagram)
        yield datagram


def _body(random: Random) -> bytes:
    """Return the packets of a request, mostly right ones."""
    chance = random.random
    numbers = random.sample(COMMANDS, int(chance() * 6))
    if chance() < 0.9 and NAME not in numbers:
        numbers.append(NAME)
    if chance() < 0.05:
        numbers.append(int(chance() * 0x10000))
    if chance() < 0.03:
        numbers *= 2
    packets = []
    for number in numbers:
        payload = _payload(random, number)
        size = len(payload) if chance() < 0.98 else random.choice(_NUMBERS)
        padding = -len(payload) % 4
        packets.append(struct.pack("=HH", size, number) + payload + bytes(padding))
    return b"".join(packets)


def _payload(random: Random, number: int) -> bytes:
    chance = random.random
    if number in (NAME, LIST):
        return random.choice(NAMES if chance() < 0.95 else SEVERAL_NAMES)
    if number == USER:
        maps = random.choice(MAPS)
        return maps if chance() < 0.8 else _damaged(random, maps)
    if number in COMMANDS and chance() < 0.97:
        return b""
    return random.randbytes(int(chance() * 20))


def _damaged(random: Random, data: bytes) -> bytes:
    """Return DATA with some fault."""
    place = int(random.random() * (len(data) + 1))
    kind = int(random.random() * 8)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[place:]
    if kind == 2:
        return data[:place] + random.randbytes(1) + data[place + 1 :]
    if kind == 3:
        return data[:place] + random.randbytes(int(random.random() * 9)) + data[place:]
    if kind == 4:
        return data[:place] + struct.pack("=H", random.choice(_NUMBERS)) + data[place + 2 :]
    if kind == 5:
        return data + data[place:]
    if kind == 6:
        return (data + bytes(5000))[: random.choice((4092, 4095, 4096, 4097, 5000))]
    return random.randbytes(int(random.random() * 64))


def check_unpacking(seed: int, count: int) -> Counter[str]:
    """Take COUNT datagrams apart; return how many were malformed, asked for something, or did not.

    Each is either Malformed or a request that is the same when it is written and read again.
    """
    results: Counter[str] = Counter()
    for datagram in islice(datagrams(seed), count):
        try:
            request = unpack_request(datagram)
        except Malformed:
            results["malformed"] += 1
        else:
            assert unpack_request(pack_request(request)) == request
            results["asks" if request.wants_answer() else "asks for nothing"] += 1
    return results


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    began = time.monotonic()
    results = check_unpacking(arguments.seed, arguments.count)
    print(", ".join(f"{count} {what}" for what, count in sorted(results.items())))
    print(f"{time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
