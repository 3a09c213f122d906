"""What the judge, the trainer and the scorer share: a channel of JSON lines and anonymous shared memory."""

import fcntl
import json
import mmap
import os
import socket
import sys
import tempfile
import time
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAX_LINE = 65_536  # bytes; a longer line is not one of ours
SEND_S = 5.0  # for the other side to take a message
RING_BYTES = 8 * 2**20  # room for a training batch: 4 M tokens; the pages that are never touched cost nothing


class WireError(Exception):
    """The other side sent something that is not a message."""


class Channel:
    """JSON objects, one a line, over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        """Wrap an inherited socket."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The socket's file descriptor, for select."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; the other side reads the end of the stream."""
        self._socket.close()

    def send(self, **message: Any) -> None:
        """Send one message; raises OSError when the other side is gone or does not read."""
        self._socket.settimeout(SEND_S)
        self._socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def send_descriptor(self, fd: int) -> None:
        """Hand a descriptor over; the other side must be in `receive_descriptor`."""
        self._socket.settimeout(SEND_S)
        socket.send_fds(self._socket, [b"\n"], [fd])

    def receive_descriptor(self) -> int | None:
        """Block for a descriptor; None when the other side is gone."""
        self._socket.settimeout(None)
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        return descriptors[0] if descriptors else None

    def receive(self, deadline: float | None = None) -> dict[str, Any] | None:
        """Block for the next message; None when the other side is gone.

        Raises TimeoutError at `deadline` (a reading of time.monotonic), however busy the other side keeps the channel,
        and WireError for anything that is no message.
        """
        while True:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise TimeoutError
            head, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                return _parse(head)
            if len(self._buffer) > MAX_LINE:
                raise WireError(f"a message of more than {MAX_LINE} bytes")
            self._socket.settimeout(remaining)
            try:
                chunk = self._socket.recv(MAX_LINE)
            except TimeoutError:
                raise
            except OSError:
                return None
            if not chunk:
                return None
            self._buffer += chunk


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError("a line that is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a message that is not an object")
    return message


def shared_memory(n_bytes: int) -> int:
    """Return the descriptor of `n_bytes` of anonymous shared memory: no name, so nothing is left behind.

    On Linux its size is sealed: memory that the other side cut off would end this process when it looks at it (SIGBUS).
    """
    if sys.platform == "linux":
        fd = os.memfd_create("autoresearch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, n_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
            os.ftruncate(fd, n_bytes)
    return fd


def sealed_copy(data: bytes) -> int:
    """Return the descriptor of an anonymous copy of `data`, which on Linux nobody can change, its maker included."""
    if sys.platform == "linux":
        fd = os.memfd_create("autoresearch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    if sys.platform == "linux":
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def shared_array(fd: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Map shared memory from its beginning as an array; both sides see each other's writes."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(fd, n_bytes), dtype=dtype).reshape(shape)
