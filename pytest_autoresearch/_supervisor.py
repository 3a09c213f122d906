"""The supervisor: a small program between `supervise.run` and the command, which outlives neither.

It reads one JSON line on stdin (the lifeline), starts the command, and when the command ends, a signal comes or the
lifeline closes, it kills everything below itself and prints one JSON line: exit code and what could not be ended.
It is run by path, in isolated mode: nothing of the package is imported.
"""

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

CHANNEL = "AUTORESEARCH_CHANNEL"  # names the file descriptor that the command reports on
LOG_BYTES = 10_000_000  # of output kept; the rest is counted, and its end kept
TAIL_BYTES = 64_000
SURVIVOR_S = 30.0  # until a process that SIGKILL does not end (stuck in a driver) is reported instead of waited for
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class _Log:
    """A log file that keeps its first LOG_BYTES and its last TAIL_BYTES."""

    def __init__(self, path: str) -> None:
        self._stream: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._room = LOG_BYTES
        self._left_out = 0
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0

    def write(self, data: bytes) -> None:
        head, rest = data[: self._room], data[self._room :]
        self._room -= len(head)
        with suppress(OSError):  # a full disk must not stop the command
            self._stream.write(head)
        if rest:
            self._tail.append(rest)
            self._tail_bytes += len(rest)
            while self._tail_bytes - len(self._tail[0]) >= TAIL_BYTES:
                dropped = self._tail.popleft()
                self._tail_bytes -= len(dropped)
                self._left_out += len(dropped)

    def close(self) -> None:
        with suppress(OSError):
            if self._left_out:
                self._stream.write(f"\n[{self._left_out} bytes of output left out]\n".encode())
            self._stream.write(b"".join(self._tail))
            self._stream.close()


def _supervise(channel: int) -> dict[str, Any]:
    import psutil  # before anything can go wrong

    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return {"returncode": None, "survivors": []}
    spec = json.loads(line)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans below become our children
    wakeup, on_signal = os.pipe()
    for end in (wakeup, on_signal):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(on_signal)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # the wakeup pipe says it
    output, their_output = os.pipe()
    log = _Log(spec["log"])
    with tempfile.TemporaryFile() as message:
        message.write(spec["stdin"].encode("latin-1"))
        message.seek(0)
        try:
            child = subprocess.Popen(
                spec["command"],
                cwd=spec["cwd"],
                env={**spec["env"], CHANNEL: str(channel)} if spec["listen"] else spec["env"],
                stdin=message,
                stdout=their_output,
                stderr=their_output,
                pass_fds=[channel] if spec["listen"] else [],
                start_new_session=True,
                preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # ends with us
            )
        except OSError as exc:
            return {"error": f"{spec['command'][0]}: {exc.strerror}"}
    os.close(their_output)
    os.close(channel)
    ended: list[int] = []  # the child's exit status, once known

    def reap() -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == child.pid:
                    child.returncode = os.waitstatus_to_exitcode(status)
                    ended.append(child.returncode)

    selector = selectors.DefaultSelector()
    for stream in (0, wakeup, output):
        selector.register(stream, selectors.EVENT_READ)
    stop = False
    while not stop and not ended:
        for key, _ in selector.select():
            if key.fd == output:
                data = os.read(output, 65_536)
                log.write(data)
                if not data:
                    selector.unregister(output)
            elif key.fd == wakeup:
                stop = bool(set(os.read(wakeup, 512)) - {signal.SIGCHLD}) or stop
                reap()
            else:
                stop = True  # nothing is ever sent: the lifeline is closed
    returncode = ended[0] if ended else None
    survivors = _end_tree(psutil, child.pid, reap)
    os.set_blocking(output, False)
    while data := _read_fd(output):
        log.write(data)
    log.close()
    return {"returncode": returncode, "survivors": survivors}


def _read_fd(fd: int) -> bytes:
    try:
        return os.read(fd, 65_536)
    except OSError:
        return b""


def _end_tree(psutil: Any, group: int, reap: Callable[[], None]) -> list[int]:
    """Kill everything below this process until nothing is left; return what SIGKILL does not end."""
    deadline = time.monotonic() + SURVIVOR_S
    me = psutil.Process()
    while True:
        if sys.platform != "linux":  # no subreaper there: the group is what orphans can still be found by
            with suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        reap()
        below = [process for process in me.children(recursive=True) if process.pid != me.pid]
        if not below or time.monotonic() > deadline:
            return [process.pid for process in below]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: nobody forks while the others die
            for process in below:
                with suppress(psutil.Error):
                    process.send_signal(number)
        psutil.wait_procs(below, timeout=0.05)


if __name__ == "__main__":
    said = _supervise(int(sys.argv[1]))
    sys.stdout.write(json.dumps(said) + "\n")
