"""One end of the connection between core and runner: waits for what ``wire`` understands.

Never blocks: what the peer does not take is kept until it does. How much that may be is the
business of those who send.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from spawn_reaper.wire import Frames, Garbage

_READ_SIZE: Final = 65536


class Channel:
    """A stream socket in an event loop."""

    def __init__(
        self,
        plain: socket.socket,
        receive: Callable[[int], bytes],
        longest: int,
        received: Callable[[bytes], None],
        ended: Callable[[str], None],
    ) -> None:
        """RECEIVE reads from the socket, at most so many bytes; LONGEST is that of a frame.

        RECEIVED gets the body of each frame. ENDED is called once, when no more will come, and says
        what was wrong: nothing, if the peer has closed its end.
        """
        plain.setblocking(False)
        self._socket = plain
        self._receive = receive
        self._frames = Frames(longest)
        self._received = received
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._left: deque[tuple[memoryview, Sequence[int]]] = deque()  # to be sent
        self._open = True
        self._loop.add_reader(plain, self.read)

    def close(self) -> None:
        """Close it; nothing is called any more."""
        if self._open:
            self._open = False
            self._left.clear()
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()

    def read(self) -> bool:
        """Handle what has arrived, or some of it; return whether there was anything."""
        try:
            data = self._receive(_READ_SIZE) if self._open else b""
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end("")
            return False
        try:
            for body in self._frames.feed(data):
                self._received(body)
        except Garbage as error:
            self._end(str(error))
            return False
        return True

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame, now or when there is room; DESCRIPTORS must stay open until then."""
        if self._open:
            self._left.append((memoryview(frame), descriptors))
            if len(self._left) == 1 and not self._send_left():
                self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        if self._send_left():
            self._loop.remove_writer(self._socket)

    def _send_left(self) -> bool:
        """Send what can be sent now; return whether that was all."""
        while self._left:
            data, descriptors = self._left[0]
            try:
                sent = self._send(data, descriptors)
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                self._left.clear()  # the peer is gone; what it has left to say can still be read
                break
            except OSError as error:  # no memory, say: nobody knows what the peer has got
                self._loop.call_soon(self._end, str(error))
                return True
            if sent < len(data):
                self._left[0] = (data[sent:], ())
            else:
                self._left.popleft()
        return True

    def _send(self, data: memoryview, descriptors: Sequence[int]) -> int:
        if descriptors:
            return socket.send_fds(self._socket, [data], descriptors)
        return self._socket.send(data, socket.MSG_NOSIGNAL)

    def _end(self, reason: str) -> None:
        if self._open:
            self.close()
            self._ended(reason)
