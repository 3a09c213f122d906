"""The checkout that pytest was started in, the repository's lock, and the worktree that the loop makes."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ._files import is_regular, write
from ._git import Plumbing, WorkspaceError

FOLDER = ".autoresearch"
UNDER_WAY = {
    "rebase-merge": "rebase",
    "rebase-apply": "rebase",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
    "BISECT_LOG": "bisect",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkout:
    """A checkout that is fit to work with: on a branch with a commit, nothing half done."""

    top: Path
    prefix: str  # of the project below it: "" or "sub/folder/"
    common: Path  # the git directory that all worktrees share
    branch: str  # short name
    head: str
    git: Plumbing  # at the top


def check_ready(root: Path) -> Checkout:
    """Return the checkout around `root`; raise WorkspaceError if it cannot be worked with."""
    git = Plumbing(root)
    status, out, error = git.run("rev-parse", "--show-toplevel")
    if status:
        if "not a git repository" in error:
            error = "no git repository: `git init`, `git add -A` and `git commit` first"
        raise WorkspaceError(f"{root}: {error.removeprefix('fatal: ')}")
    top = Path(out.decode("utf-8", "surrogateescape").removesuffix("\n"))
    directory = Path(git("rev-parse", "--absolute-git-dir"))
    for name, what in UNDER_WAY.items():
        if (directory / name).exists():
            raise WorkspaceError(f"a {what} is under way in {top}: finish it or `git {what} --abort` first")
    head = git.maybe("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if head is None:
        raise WorkspaceError(f"{top} has no commit yet: `git add -A` and `git commit` first")
    branch = git.maybe("symbolic-ref", "--quiet", "--short", "HEAD")
    if branch is None:
        raise WorkspaceError(f"{top} has a detached HEAD: `git switch main`, or another branch, first")
    return Checkout(
        top=top,
        prefix=git("rev-parse", "--show-prefix"),
        common=Path(git("rev-parse", "--path-format=absolute", "--git-common-dir")),
        branch=branch,
        head=head,
        git=Plumbing(top),
    )


def loop_worktree(here: Checkout, branch: str, tag: str) -> Plumbing:
    """Return git in the worktree of `branch`, made or mended at need; raise if the branch is in use elsewhere."""
    path = here.top / FOLDER / tag
    if (path / ".git").is_file():
        here.git.run("worktree", "repair", str(path))  # the repository may have been moved
    for other, on in _branches(here.git).items():
        if on == f"refs/heads/{branch}" and other.exists() and other != path:
            if other.parent.name != FOLDER:
                raise WorkspaceError(
                    f"branch {branch} is checked out in {other}, where the loop does not work: "
                    f"`git switch main` there, or choose another --autoresearch-tag"
                )
            path = other  # made from another checkout, or we are in it
    git_dir = _git_dir(here.common, path)
    if git_dir is None or not (path / ".git").is_file():
        try:
            path.parent.mkdir(exist_ok=True)
            ignore = path.parent / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n")
            if path.exists() and any(path.iterdir()):
                raise WorkspaceError(f"{path} is in the way and no worktree of this repository: move it away")
        except OSError as error:
            raise WorkspaceError(f"cannot make the loop's work tree {path}: {error.strerror}") from error
        # Twice forced: the branch may be registered still with a folder that is gone, or that was being added
        # when killed.
        here.git("worktree", "add", "--force", "--force", str(path), branch)
        git_dir = _git_dir(here.common, path)
    git = Plumbing(path, git_dir)
    mend(git, branch)
    return git


def mend(git: Plumbing, branch: str) -> list[str]:
    """Put git's own files for the loop's worktree right; return a line for each thing that somebody did to them.

    A kill leaves them half made or locked. What holds the repository's lock may take a lock of git's for stale here.
    """
    top, git_dir = git.directory, git.git_dir
    assert git_dir is not None, "only the loop's own worktree is mended"
    common = git_dir.parent.parent
    lines = []
    try:
        top.mkdir(parents=True, exist_ok=True)
        pointer = top / ".git"
        if not is_regular(pointer) or pointer.read_text() != f"gitdir: {git_dir}\n":
            lines.append("changed: .git")
            if pointer.is_dir() and not pointer.is_symlink():
                shutil.move(pointer, tempfile.mkdtemp(prefix="aside-", dir=common / "autoresearch"))
            write(pointer, f"gitdir: {git_dir}\n".encode())
        for name, text in {"HEAD": f"ref: refs/heads/{branch}\n", "commondir": "../..\n"}.items():
            if not (git_dir / name).is_file():
                write(git_dir / name, text.encode())
        for lock in (git_dir / "index.lock", git_dir / "HEAD.lock", common / f"refs/heads/{branch}.lock"):
            lock.unlink(missing_ok=True)
        if (git_dir / "locked").is_file() and (git_dir / "locked").read_text().strip() == "initializing":
            (git_dir / "locked").unlink()  # by git, while it adds a worktree
        for name, what in UNDER_WAY.items():
            left = git_dir / name
            if os.path.lexists(left):
                lines.append(f"began: a {what}")
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError as error:
        raise WorkspaceError(f"cannot mend the loop's work tree {top}: {error.strerror}") from error
    return lines


def unlock(common: Path, branch: str, tag: str) -> None:
    """Remove the locks that a git that was killed left on the refs that only the holder of our lock moves."""
    for lock in (common / f"refs/heads/{branch}.lock", *(common / "refs/autoresearch" / tag).glob("*.lock")):
        try:
            lock.unlink(missing_ok=True)
        except OSError as error:
            raise WorkspaceError(f"cannot remove {lock}: {error.strerror}") from error


def _git_dir(common: Path, worktree: Path) -> Path | None:
    """Return where git keeps its files for a linked worktree, if it knows of it; its own `.git` could say anything."""
    for pointer in common.glob("worktrees/*/gitdir"):
        said = pointer.read_text(errors="surrogateescape").removesuffix("\n")
        if os.path.normpath(pointer.parent / said) == str(worktree / ".git"):
            return pointer.parent
    return None


def _branches(git: Plumbing) -> dict[Path, str]:
    """Return each worktree's branch, "" for a detached one."""
    found: dict[Path, str] = {}
    for block in git("worktree", "list", "--porcelain").split("\n\n"):
        words = dict(line.partition(" ")[::2] for line in block.splitlines())
        if "worktree" in words:
            found[Path(words["worktree"])] = words.get("branch", "")
    return found


def refuse_dirty(here: Checkout, champion: Mapping[str, tuple[str, str]]) -> None:
    """Raise if a mutable file of the user's checkout holds an edit, which a loop elsewhere would not see.

    `champion` is {path from the top: (mode, blob)} of the mutable files on the loop's branch.
    """
    committed = here.git.entries(here.head, list(champion))
    for path, (_, blob) in champion.items():
        if path not in committed:
            raise WorkspaceError(f"{path} is not committed: `git add {path} && git commit`, then start again")
        if not is_regular(here.top / path):
            raise WorkspaceError(f"{path} is missing or no regular file: `git checkout -- {path}`")
        # Through git's filters as well: one that differs by its line ends only is clean for git.
        hashes = {here.git("hash-object", how, "--", path) for how in ("--no-filters", f"--path={path}")}
        if not hashes & {committed[path][1], blob}:
            raise WorkspaceError(
                f"{path} has uncommitted changes, which the loop would not see: keep them with `git commit`, "
                f'put them aside with `git stash`, or try them with pytest --autoresearch-try "what I changed"'
            )


def take_lock(state: Path) -> int:
    """Return the held lock of the repository, which one loop or try may have at a time."""
    path = state.parent / "loop.lock"
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise WorkspaceError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise WorkspaceError(
            f"another loop or try (pid {holder}) is at work in this repository: wait for it or stop it"
        ) from error
    try:
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except OSError as error:
        os.close(lock)
        raise WorkspaceError(f"cannot write {path}: {error.strerror}") from error
    return lock
