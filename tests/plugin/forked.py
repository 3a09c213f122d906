"""The other side of forks.py: the warmed interpreter, and what its forks do instead of a whole pytest process.

1. The clock and the secret are fixed before anything has taken a reference to either; then everything is imported.
2. Each line on standard input asks for one night (`Nights.run`); its exit status is the answer on standard output.
3. In a fork, an audit hook and wrappers of `os` and `open` count the steps and kill; `supervise.run` is a function.
"""

import ast
import builtins
import gc
import importlib
import io
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

READING = {
    *("cat-file", "check-ref-format", "config", "diff", "for-each-ref", "log", "ls-files", "ls-tree", "merge-base"),
    *("rev-list", "rev-parse", "show"),
}
CHANGES = {f"os.{name}" for name in ("link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate")}
WARM = (  # what every night imports
    *(f"pytest_autoresearch.{name}" for name in ("plugin", "loop", "research", "hookspecs")),
    *(f"_pytest.{name}" for name in ("junitxml", "pastebin", "setuponly", "skipping", "unittest", "warnings")),
    *("unittest", "pdb", "rich.table", "rich.text", "rich.console", "xml.etree.ElementTree"),
)
SECRET = "5eed"
NOW = 1_795_392_000  # 2026-11-23


def _freeze() -> None:
    """Stop the clock and fix the secret, before anything has taken a reference to either."""
    import datetime

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Frozen":
            return cls.fromtimestamp(NOW, tz)

    datetime.datetime = Frozen  # type: ignore[misc]
    time.time = lambda: float(NOW)
    secrets.token_hex = lambda nbytes=None: (SECRET * 32)[: 2 * (nbytes or 32)]


class _Steps:
    """Counts what changes files below `top`, and kills this process before step `kill`."""

    def __init__(self, top: str, kill: int | None, images: str, log: str, after: str) -> None:
        self.top, self.kill, self.images, self.after, self.count, self.armed = top, kill, images, after, 0, False
        self._seen: object = None
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._write = os.write
        sys.addaudithook(self._audit)
        self._wrap_write()
        self._wrap_open(os)
        self._wrap_open(io)
        builtins.open = io.open

    def begin(self, name: str) -> None:
        """Count from here on if `name` is what the first step waits for."""
        self.armed = self.armed or name == self.after

    def step(self, name: str) -> None:
        """Count one step that is about to be done."""
        if not self.armed:
            return
        if self.count == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.images:
            self.armed = False  # what copies is no step
            if (seen := self._files()) != self._seen:
                self._seen = seen
                shutil.copytree(self.top, Path(self.images, str(self.count)), symlinks=True)
            self.armed = True
        self.count += 1
        self._write(self.log, name.replace("\n", " ").encode("utf-8", "replace") + b"\n")

    def _files(self) -> dict[str, bytes]:
        """Return what the next start may find different: all files, but not git's objects, which a name must lead to,
        nor what is in a scratch index or a run's folders, which are removed whatever is in them."""
        found = {}
        for folder, folders, names in os.walk(self.top):
            if os.path.basename(folder) == "objects":
                folders.clear()
                continue
            run = os.path.basename(os.path.dirname(folder)) == "runs"
            if run and folders:
                folders.clear()
                found[folder] = b""
            for name in names:
                path = os.path.join(folder, name)
                if name == "index" and "worktrees" not in path:
                    found[path] = b""
                    continue
                with open(path, "rb") as file:
                    found[path] = file.read()
        return found

    def _ours(self, path: object) -> str:
        """Return where `path` is below the repository, or nothing."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        name = os.path.abspath(os.fsdecode(cast("str | bytes", path)))
        return os.path.relpath(name, self.top) if name.startswith(self.top + "/") else ""

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            if words := _changing([os.fsdecode(word) for word in args[1]]):
                self.step(" ".join(words)[:100])
        elif event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR) and (where := self._ours(path)):
                self.step(f"open {where}")
        elif event in CHANGES:
            inside = isinstance(args[-1], int) and args[-1] != -1 and event in ("os.remove", "os.rmdir", "os.mkdir")
            where = str(args[0]) if inside else self._ours(args[0])
            vain = not inside and not isinstance(args[0], int) and os.path.lexists(args[0]) == (event == "os.mkdir")
            if where and not vain:
                self.step(f"{event} {where}")

    def _wrap_write(self) -> None:
        """Make a step of the moment in which half of what is written is in the file, and of every sync."""
        write, sync = os.write, os.fsync

        def halves(descriptor: int, data: bytes) -> int:
            if not (where := self._ours(descriptor)):
                return write(descriptor, data)
            half = len(data) // 2
            done = write(descriptor, data[:half])
            self.step(f"write the rest of {where}")
            return done + write(descriptor, data[half:])

        def synced(descriptor: int) -> None:
            self.step(f"sync {self._ours(descriptor)}")
            sync(descriptor)

        os.write, os.fsync = halves, synced  # type: ignore[assignment]

    def _wrap_open(self, module: Any) -> None:
        """Make a step of the moment in which a file that was opened is still empty."""
        real = module.open

        def call(file: Any, *args: Any, **kwargs: Any) -> Any:
            opened = real(file, *args, **kwargs)
            mode = args[0] if args else kwargs.get("mode", kwargs.get("flags", "r"))
            writing = mode & os.O_CREAT if isinstance(mode, int) else "w" in mode or "x" in mode
            if writing and not isinstance(file, int) and (where := self._ours(os.fspath(file))):
                self.step(f"opened {where}")
            return opened

        module.open = call


def _changing(words: list[str]) -> list[str]:
    """Return the git command in `words` from its name on, or nothing where it is none or only reads."""
    if "git" not in words:
        return []
    words = words[words.index("git") + 1 :]
    while words and words[0].startswith("-"):
        words = words[2:] if words[0] in ("-c", "-C") else words[1:]
    reads = {"symbolic-ref": "--quiet" in words, "worktree": "list" in words, "hash-object": "-w" not in words}
    return [] if not words or reads.get(words[0], words[0] in READING) else words


def _fake(steps: _Steps, machine: str) -> Callable[..., Any]:
    """Return what stands in for `supervise.run`."""
    from pytest_autoresearch.supervise import Outcome

    def run(
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: bytes,
        log: Path,
        timeout_s: float,
        on_event: Any = None,
    ) -> Outcome:
        request = json.loads(stdin)
        said = {"event": "result", "schema": 1, "status": "ok", "fingerprint": {"machine": machine}}
        if request["op"] == "check":
            said["budget_s"] = 30.0
        else:
            tree = ast.parse((Path(request["candidate"]) / "train.py").read_text()).body
            constants = {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in tree
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                if isinstance(node.targets[0], ast.Name)
            }
            steps.begin("run")
            steps.step("run")
            Path(request["scratch"], "weights").write_text(str(request["seed"]))
            log.write_text("training\n")
            mode = constants["MODE"]
            if mode == "busy at first" and not Path(request["scratch"]).parent.name.endswith("-1"):
                mode = "ok"
            if mode == "elsewhere":
                said["fingerprint"] = {"machine": "elsewhere"}
            if mode in ("ok", "elsewhere"):
                score = constants["SCORE"] + constants["NOISE"] * (request["seed"] % 2001 / 1000 - 1)
                metrics = {"val_bpb": score / 2 if machine == "fast" else score}
                said |= {"metrics": metrics, "memory_gb": 1.0}
            else:
                kind = "busy" if mode.startswith("busy") else "error"
                said |= {"status": "crash", "kind": kind, "reason": f"ValueError: {mode}"}
        return Outcome(
            returncode=0, timed_out=False, phase="score", results=(said,), garbled=0, elapsed_s=1.0, survivors=()
        )

    return run


class _Proposer:
    """Writes the idea of the number that it is asked for, and ends pytest when there is none."""

    def __init__(self, ideas: Sequence[Sequence[str]], steps: _Steps) -> None:
        self.ideas, self.steps = ideas, steps

    def pytest_autoresearch_propose(self, workdir: Path, number: int, refused: Sequence[str]) -> str:
        import pytest

        self.steps.begin("proposal")
        at = number - 1 + len(refused)
        if at >= len(self.ideas):
            raise pytest.Session.Failed("out of ideas")  # the quickest end: pytest shows no traceback
        description, text = self.ideas[at]
        (workdir / "train.py").write_text(text)
        return description


def _night(ask: dict[str, Any]) -> int:
    import pytest

    from pytest_autoresearch import supervise

    log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ask["top"])
    steps = _Steps(ask["top"], ask["kill"], ask["images"], ask["steps"], ask["after"])
    supervise.run = _fake(steps, ask["machine"])
    if ask["plant"]:
        from tests.plugin.plants import PLANTS

        PLANTS[ask["plant"]]()
    steps.begin("")
    options = ["-p", "pytest_autoresearch.plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    return int(pytest.main([*options, *ask["args"]], plugins=[_Proposer(ask["ideas"], steps)]))


def _serve() -> None:
    _freeze()
    for module in WARM:
        importlib.import_module(module)
    gc.disable()
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            code = 70
            try:
                code = _night(json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
