"""Starting a candidate's process and ending its whole tree."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from . import sandbox
from ._wire import Channel

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
REASON_CHARS = 300  # of a crash
OUT_OF_MEMORY = "signal 9, from a system that is out of memory"
GOODBYE_S = 10.0  # for a process to end that has nothing left to do


class DeviceError(Exception):
    """The user asks for a device that is not there."""


def select_device(name: str | None) -> None:
    """Let this process and all that it starts see the device `name` and no other, before any of them imports torch.

    None, auto and cuda: the first GPU that there is. `cuda:N` counts as nvidia-smi does. Raises DeviceError for a name
    of another form.
    """
    match (name or "auto").partition(":"):
        case ("cpu", "", "") if sys.platform == "darwin":
            raise DeviceError("device cpu: PyTorch has no way to hide a Mac's GPU; choose auto")
        case ("cpu", "", ""):
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        case (("auto" | "cuda"), "", ""):
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        case ("cuda", ":", number) if number.isascii() and number.isdigit():
            os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            os.environ["CUDA_VISIBLE_DEVICES"] = str(int(number))
        case _:
            raise DeviceError(f"no device is called {name!r}: choose auto, cpu, cuda or cuda:N")


def memory_limit_gb() -> float | None:
    """Return what AUTORESEARCH_MEMORY_GB (GiB) leaves each process of a GPU's memory, as a smaller one would; or None.

    It is for trying what fits: a candidate that lifts it gets the whole GPU. Raises DeviceError for another value.
    """
    if not (given := os.environ.get("AUTORESEARCH_MEMORY_GB", "")):
        return None
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise DeviceError(f"AUTORESEARCH_MEMORY_GB is {given!r}: give a number of GiB above 0, or unset it")
    return limit


def adopt_orphans() -> None:
    """Make this process the parent of every orphan below it (Linux), so that nothing can fork its way out."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(spare: Collection[int] = ()) -> None:
    """Kill every process below this one until there is none, and reap them; leave alone the trees of children `spare`.

    They are stopped first: a process that forks faster than it is found cannot do so while it is stopped.
    """
    while children := list(_below(spare)):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)
        psutil.wait_procs(children, timeout=10)
        _reap()
    _reap()


def _below(spare: Collection[int]) -> Iterator[psutil.Process]:
    for child in psutil.Process().children():
        if child.pid not in spare:
            yield child
            with contextlib.suppress(psutil.NoSuchProcess):
                yield from child.children(recursive=True)


def _still(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


class Crash(Exception):
    """A run without a score; `kind`, a reason (made one short line: it may be the candidate's), the traceback's tail.

    Kinds killed, disk and busy are the machine's failures; they rest on what the judge saw, never on a process's word.
    """

    def __init__(self, kind: str, reason: str, detail: str = "") -> None:
        super().__init__(" ".join(reason.split())[:REASON_CHARS])
        self.kind = kind
        self.detail = detail


def memory_kills() -> int:
    """Return a count that grows whenever Linux kills a process for want of memory, here or in this control group."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = next((group / line[3:].lstrip("/") for line in lines if line.startswith("0::")), group)
    count = 0
    for path in (Path("/proc/vmstat"), group / "memory.events"):  # a container may show only one of them
        with contextlib.suppress(OSError):
            count += sum(int(s.split()[1]) for s in path.read_text().splitlines() if s.startswith("oom_kill "))
    return count


_running: set[int] = set()  # process ids of the children that have not been ended


class Child:
    """A process that runs candidate code: `python -m oracle.<module>`, a channel to it, and what it was told.

    It runs in the best sandbox of this machine: besides Python and the oracle's code it reads `readable`, and it writes
    in `cwd` only; `env` is added to its environment. Start it in the thread that ends it: bubblewrap ends its processes
    with the thread that started them.
    """

    def __init__(
        self,
        module: str,
        *,
        cwd: Path,
        readable: Sequence[Path],
        fds: Sequence[int],
        order: dict[str, Any],
        env: Mapping[str, str],
    ) -> None:
        self._level = sandbox.available()
        self._frozen = False
        self._memory_kills = memory_kills()
        ours, theirs = socket.socketpair()
        order = {**order, "channel": theirs.fileno()}
        command = [sys.executable, "-P", "-m", f"oracle.{module}", json.dumps(order)]
        self.process = subprocess.Popen(
            sandbox.wrap(command, self._level, writable=cwd, readable=readable),
            cwd=cwd,
            env={**sandbox.environment(self._level, writable=cwd), **env},
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), *fds),
            start_new_session=True,
        )
        theirs.close()
        self.channel = Channel(ours)
        _running.add(self.process.pid)

    def crash(self, kind: str, reason: str) -> Crash:
        """Return the crash of a process that has closed its channel; `{how}` in the reason becomes how it ended.

        The kind is killed instead where the system did that, short of memory; a SIGKILL alone anybody can send.
        """
        how = self._ending()
        if how == "signal 9" and memory_kills() > self._memory_kills:
            kind, how = "killed", OUT_OF_MEMORY
        return Crash(kind, reason.format(how=how))

    def _ending(self) -> str:
        """Say how the process ended: `exit code 1`, `signal 9`."""
        try:
            status = self.process.wait(timeout=GOODBYE_S)
        except subprocess.TimeoutExpired:
            return "its channel closed"
        if self._level == "bubblewrap" and status > 128:
            status = 128 - status
        return f"exit code {status}" if status >= 0 else f"signal {-status}"

    def freeze(self) -> None:
        """Stop the process and everything that it started, until `thaw`; Crash for what cannot be stopped."""
        self._frozen = True
        deadline = time.monotonic() + GOODBYE_S
        while running := [process for process in self._tree() if not _still(process)]:
            if time.monotonic() > deadline:
                raise Crash("score", "the scoring process does not stand still")
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()

    def thaw(self) -> None:
        """Let what was stopped go on."""
        for process in self._tree() if self._frozen else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = False

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def end(self) -> None:
        """End the process and everything that it started."""
        self.channel.close()
        self.thaw()  # a stopped bubblewrap would not end with what is inside it
        if self.process.poll() is None and self._level == "bubblewrap":
            # Not bubblewrap's own two processes: they end by themselves once they have waited for the candidate's,
            # whose memory then counts in this process's usage. What the kernel kills after them counts nowhere.
            with contextlib.suppress(psutil.NoSuchProcess, subprocess.TimeoutExpired):
                for inside in psutil.Process(self.process.pid).children(recursive=True)[1:]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        inside.kill()
                self.process.wait(timeout=GOODBYE_S)
        self.process.kill()
        self.process.wait()
        _running.discard(self.process.pid)
        end_children(spare=_running)
