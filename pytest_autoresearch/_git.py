"""Git's plumbing through GitPython, deaf to the caller's environment, hooks, filters and replaced objects."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from git import Git

from ._files import WorkspaceError

__all__ = ["Plumbing", "WorkspaceError", "cacheinfo"]

SETTINGS = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.trustctime": "true",  # a change whose mtime was put back is a change
    "core.checkStat": "default",
    "core.safecrlf": "false",
    "submodule.recurse": "false",
    "safe.bareRepository": "explicit",  # or a folder that looks like one would be taken for the repository
    "commit.gpgSign": "false",
    "log.showSignature": "false",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "advice.graftFileDeprecated": "false",
}
FALLBACK = ("autoresearch", "autoresearch@localhost")  # for a user without user.name or user.email


class Plumbing:
    """Git commands run in one directory.

    `git_dir` fixes the repository that they work on. Without it git looks for one from the directory upwards, so
    that in a folder whose `.git` was taken away a command would work on the repository around it.
    """

    def __init__(self, directory: Path, git_dir: Path | None = None) -> None:
        self.directory = directory
        self.git_dir = git_dir
        self._git = Git(directory)
        self._settings = {"GIT_LITERAL_PATHSPECS": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        if git_dir is not None:
            self._settings |= {"GIT_DIR": str(git_dir), "GIT_WORK_TREE": str(directory)}

    def run(
        self, *args: str, stdin: BinaryIO | None = None, env: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, str]:
        """Return exit status, stdout and the line of stderr that says what went wrong, of one git command."""
        # Git.execute() adds to os.environ and cannot take away, so env(1) does: a GIT_DIR or GIT_INDEX_FILE
        # inherited from a hook would send our commits elsewhere.
        command = ["env"]
        for name in os.environ:
            if name.startswith("GIT_"):
                command += ["-u", name]
        command += [f"{name}={value}" for name, value in {**self._settings, **(env or {})}.items()]
        # GitPython runs a command elsewhere when its directory is gone; -C fails
        command += ["git", "-C", str(self.directory), "--no-replace-objects"]
        for name, value in SETTINGS.items():
            command += ["-c", f"{name}={value}"]
        status, out, err = self._git.execute(
            [*command, *args],
            istream=stdin,
            with_extended_output=True,
            with_exceptions=False,
            stdout_as_string=False,
            strip_newline_in_stdout=False,
        )
        said = err.strip().splitlines() or [""]
        return status, out, next((line for line in said if line.startswith(("fatal:", "error:"))), said[0])

    def raw(self, *args: str, stdin: BinaryIO | None = None, env: Mapping[str, str] | None = None) -> bytes:
        """Return a command's stdout; raise WorkspaceError with what git said if it failed."""
        status, out, err = self.run(*args, stdin=stdin, env=env)
        if status:
            reason = err.removeprefix("fatal: ").removeprefix("error: ").rstrip(".")
            if ".lock': File exists" in err:
                reason += " (another git is at work, or was killed: if none is, remove that file)"
            raise WorkspaceError(f"git {args[0]} failed in {self.directory}: {reason}")
        return out

    def __call__(self, *args: str, stdin: BinaryIO | None = None, env: Mapping[str, str] | None = None) -> str:
        """Return a command's stdout as text without its last newline."""
        return os.fsdecode(self.raw(*args, stdin=stdin, env=env)).removesuffix("\n")

    def maybe(self, *args: str) -> str | None:
        """Return a command's stdout as text, or None if it failed."""
        status, out, _ = self.run(*args)
        return None if status else os.fsdecode(out).removesuffix("\n")

    def blob(self, data: bytes) -> str:
        """Store `data` as it is and return its hash."""
        try:
            with tempfile.TemporaryFile() as file:
                file.write(data)
                file.seek(0)
                return self("hash-object", "-w", "--no-filters", "--stdin", stdin=file)
        except OSError as error:
            raise WorkspaceError(f"cannot write a temporary file: {error.strerror}") from error

    def content(self, blob: str) -> bytes:
        """Return the bytes of a blob; raise WorkspaceError if they are not those that its hash names."""
        data = self.raw("cat-file", "blob", blob)
        algorithm = "sha1" if len(blob) == 40 else "sha256"
        if hashlib.new(algorithm, b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() != blob:
            raise WorkspaceError(f"object {blob} of the repository is damaged: `git fsck` says more")
        return data

    def entries(self, tree: str, paths: list[str]) -> dict[str, tuple[str, str]]:
        """Return (mode, hash) of those of `paths` (from the top) that `tree` holds."""
        listed = self("ls-tree", "-z", "--full-tree", tree, "--", *paths)
        rows = (line.split("\t", 1) for line in listed.split("\0") if line)
        return {path: (meta.split()[0], meta.split()[2]) for meta, path in rows}

    def tree(self, base: str, changes: Mapping[str, tuple[str, str]], index: Path) -> str:
        """Return the tree of commit `base` with `changes` {path: (mode, hash)}; `index` is scratch."""
        for path in (index, index.with_name(index.name + ".lock")):  # left by a killed run
            path.unlink(missing_ok=True)
        env = {"GIT_INDEX_FILE": str(index)}
        self("read-tree", base, env=env)
        self("update-index", "--add", *cacheinfo(changes), env=env)
        tree = self("write-tree", env=env)
        index.unlink()
        return tree

    def identity(self) -> tuple[str, str]:
        """Return the user's name and email as git knows them, or our own."""
        said = (self.maybe("config", "-z", "--get-regexp", r"^user\.(name|email)$") or "").split("\0")
        known = dict(row.split("\n", 1) for row in said if "\n" in row)  # the last one of a name counts
        return known.get("user.name") or FALLBACK[0], known.get("user.email") or FALLBACK[1]

    def commit(self, tree: str, parent: str, message: str, who: tuple[str, str], when: int) -> str:
        """Store a commit, made wholly of the arguments, and return its hash; `when` in seconds since 1970."""
        env = {
            f"GIT_{role}_{part}": value
            for role in ("AUTHOR", "COMMITTER")
            for part, value in zip(("NAME", "EMAIL", "DATE"), (*who, f"@{when} +0000"), strict=True)
        }
        return self("commit-tree", tree, "-p", parent, "-m", message, env=env)


def cacheinfo(changes: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return the arguments with which update-index takes `changes` {path: (mode, hash)}."""
    return [word for path, (mode, blob) in changes.items() for word in ("--cacheinfo", f"{mode},{blob},{path}")]
