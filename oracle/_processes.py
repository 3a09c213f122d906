"""Starting a candidate's process and ending its whole tree."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ._wire import Channel

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Make this process the parent of every orphan below it (Linux), so that nothing can fork its way out."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Kill every process below this one until there is none, and reap them.

    They are stopped first: a process that forks faster than it is found cannot do so while it is stopped.
    """
    me = psutil.Process()
    while children := me.children(recursive=True):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)
        psutil.wait_procs(children, timeout=10)
        _reap()
    _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


class Crash(Exception):
    """The candidate failed; `kind`, a one-line reason and the traceback's tail."""

    def __init__(self, kind: str, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.kind = kind
        self.detail = detail


class Child:
    """A process that runs candidate code: `python -m oracle.<module>`, a channel to it, and what it was told."""

    def __init__(self, module: str, *, cwd: Path, fds: Sequence[int], order: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        order = {**order, "channel": theirs.fileno()}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"oracle.{module}", json.dumps(order)],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), *fds),
            start_new_session=True,
        )
        theirs.close()
        self.channel = Channel(ours)

    def end(self) -> int:
        """End the process and everything that it started; return its exit status."""
        self.channel.close()
        status = self.process.poll()
        if status is None:
            self.process.kill()
            self.process.wait()
        end_children()
        return self.process.returncode if status is None else status
