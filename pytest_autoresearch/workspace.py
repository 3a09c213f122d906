"""The git side of the ratchet: candidate commits, keep and restore; never touches what it did not make.

A kept commit K is new: the parent champion's tree with the candidate's mutable files and results.tsv. The runs that
earned it are the ledger's records of candidate commit C, so a champion has two names: `head` is the branch's commit
(what the next candidate derives from) and `champion` is C (what the ledger's scores are looked up by). K depends
on nothing but the ledger up to its record and C, so making it again gives the same hash.

A keep walks these steps, and `resume` repeats them from the last keep's record when a start finds them unfinished:
1. the record is on disk (the caller, before `keep`)
2. K is stored
3. the branch moves from its parent to K, if it is still there
4. index and files of the work tree follow, mutable files and results.tsv only
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import TracebackType

from . import ledger
from ._branches import CANDIDATE, score_trailer
from ._files import clear, is_regular, place, read, write
from ._git import Plumbing, WorkspaceError, cacheinfo
from ._worktree import check_ready, loop_worktree, mend, refuse_dirty, take_lock, unlock
from .records import Candidate

__all__ = ["Workspace", "WorkspaceError"]

RESULTS = "results.tsv"
REGULAR = ("100644", "100755")


@dataclass(slots=True, kw_only=True)
class Workspace:
    """One branch of kept commits and the work tree in which its next candidate is made."""

    top: Path  # of the work tree
    prefix: str  # of the project below it: "" or "sub/folder/"
    mutable: tuple[str, ...]  # POSIX paths relative to the project
    branch: str
    tag: str
    state: Path
    in_place: bool  # the user's own checkout, for a try
    head: str
    champion: str = ""
    _lock: int | None
    _git: Plumbing
    _tried: dict[str, str] = field(default_factory=dict)  # path -> blob of the last candidate

    @classmethod
    def for_loop(cls, root: Path, *, mutable: Sequence[str], prefix: str, tag: str) -> "Workspace":
        """Open the loop's own worktree `.autoresearch/<tag>`, making it and branch `<prefix>/<tag>` at need.

        The branch begins at HEAD of the checkout of `root`. Raises WorkspaceError.
        """
        return cls._open(root, mutable, prefix, tag, in_place=False)

    @classmethod
    def for_try(cls, root: Path, *, mutable: Sequence[str], prefix: str, tag: str) -> "Workspace":
        """Open the checkout of `root` itself, whose edit of the mutable files is to be tried.

        Where a branch `<prefix>/...` is checked out, that is the branch and its tag. Otherwise `<prefix>/<tag>`
        advances beside the checkout, whose HEAD, index and other files stay as they are. Raises WorkspaceError.
        """
        return cls._open(root, mutable, prefix, tag, in_place=True)

    @classmethod
    def _open(cls, root: Path, mutable: Sequence[str], prefix: str, tag: str, *, in_place: bool) -> "Workspace":
        here = check_ready(root)
        if in_place and here.branch.startswith(prefix + "/"):
            tag = here.branch.removeprefix(prefix + "/")
        branch = f"{prefix}/{tag}"
        if "/" in tag or here.git.maybe("check-ref-format", "--branch", branch) is None:
            raise WorkspaceError(f"{tag!r} cannot be a tag: choose letters, digits and dashes (--autoresearch-tag)")
        for path in mutable:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise WorkspaceError(f"mutable file {path!r} must be a path inside the project: correct the setting")
        state = here.common / "autoresearch" / tag
        lock = take_lock(state)
        try:
            ref = f"refs/heads/{branch}"
            unlock(here.common, branch, tag)
            if here.git.maybe("rev-parse", "--verify", "--quiet", ref) is None:
                here.git("update-ref", ref, here.head, "0" * len(here.head))
            git = here.git if in_place else loop_worktree(here, branch, tag)
            top = git.directory
            self = cls(
                top=top,
                prefix=here.prefix,
                mutable=tuple(str(PurePosixPath(path)) for path in mutable),
                branch=branch,
                tag=tag,
                state=state,
                in_place=in_place,
                head=git("rev-parse", ref),
                _lock=lock,
                _git=git,
            )
            self._entries(self.head)
            if in_place:
                for path in self._paths:
                    read(top, path)
            elif top != here.top:
                refuse_dirty(here, self._entries(self.head))
            return self
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Let other loops and tries in; the workspace is of no use afterwards."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def workdir(self) -> Path:
        """Return the project's folder in the work tree: the mutable files are edited there."""
        return self.top / self.prefix

    @property
    def checked_out(self) -> bool:
        """Return whether the work tree's HEAD is on the branch."""
        return self._git.maybe("symbolic-ref", "--quiet", "HEAD") == f"refs/heads/{self.branch}"

    @property
    def results_path(self) -> Path:
        """Return where results.tsv is shown: beside the mutable files if the branch is checked out there."""
        return (self.workdir if self.checked_out else self.state) / RESULTS

    def resume(self, runs: Sequence[ledger.Record], metric: str) -> str | None:
        """Bring branch and work tree to what the ledger says; return a line if a keep had to be completed.

        Sets `head` and `champion`. In a try the user's edit stays. Raises WorkspaceError if the branch is
        neither at the ledger's champion nor ahead of it with the same mutable files.
        """
        note = None
        record = ledger.champion_record(runs)
        self.champion = self.head
        if record is not None:
            made = record["parent"]
            if record["verdict"]:
                upto = runs[: runs.index(record) + 1]
                made = self._kept(upto, metric)
                if self.head == record["parent"]:
                    self._move(made, record["parent"])
                    note = f"completed the keep of experiment {record['number']}, which had been interrupted"
            self._check_ahead(made)
            self.champion = record["commit"]
        if not self.in_place:
            self.restore_foreign()
            self.restore()
        elif self.checked_out:
            self._follow(record["parent"] if record else self.head)
            self._refuse_strange_results(ledger.results_tsv(runs, metric))
        if runs:
            self.write_results(ledger.results_tsv(runs, metric))
        return note

    def baseline(self) -> Candidate:
        """Return the champion as the candidate of a baseline; stores nothing."""
        return Candidate(number=0, commit=self.champion, parent=self.head, description="baseline", lines_added=0)

    def candidate(self, number: int, description: str, attempt: int = 1) -> Candidate:
        """Store the work tree's mutable files as a commit on the champion, which nothing points to before `hold`.

        Neither branch nor index moves. Raises WorkspaceError for a mutable file that is missing or not regular.
        """
        old = self._entries(self.head)
        self._tried = {path: self._git.blob(read(self.top, path)) for path in old}
        changes = {path: (mode, self._tried[path]) for path, (mode, _) in old.items()}
        tree = self._git.tree(self.head, changes, self.state / "index")
        description = ledger.one_line(description) or "no description"
        commit = self._git.commit(tree, self.head, description, self._git.identity(), int(time.time()))
        before = {path: self._git.content(old[self.prefix + path][1]) for path in self.mutable}
        after = self.files(commit)
        return Candidate(
            number=number,
            commit=commit,
            parent=self.head,
            description=description,
            lines_added=sum(len(after[path].splitlines()) - len(before[path].splitlines()) for path in self.mutable),
            attempt=attempt,
        )

    def hold(self, candidate: Candidate) -> None:
        """Keep a candidate's commit for good, by a ref of its own."""
        again = f"-{candidate.attempt}" if candidate.attempt > 1 else ""
        ref, commit = f"refs/autoresearch/{self.tag}/{candidate.number:04d}{again}", candidate.commit
        if self._git.maybe("update-ref", ref, commit, "0" * len(commit)) is None:
            # A run that was killed before it was recorded had this number: the ref's log keeps that candidate.
            self._git("update-ref", "--create-reflog", "-m", "autoresearch: number used again", ref, commit)

    def files(self, commit: str) -> dict[str, bytes]:
        """Return the mutable files of `commit` as the object database holds them."""
        entries = self._entries(commit)
        return {path: self._git.content(entries[self.prefix + path][1]) for path in self.mutable}

    def load(self, commit: str) -> None:
        """Put the mutable files of the candidate `commit` into the loop's worktree."""
        assert not self.in_place, "a try's files are the user's"
        for path, (mode, blob) in self._entries(commit).items():
            self._write(path, self._git.content(blob), executable=mode == "100755")

    def keep(self, runs: Sequence[ledger.Record], metric: str) -> str:
        """Advance the branch to the kept commit of the last of `runs`, a keep already in the ledger; return it."""
        kept = self._kept(runs, metric)
        self._move(kept, runs[-1]["parent"])
        self.champion = runs[-1]["commit"]
        if self.in_place:
            if self.checked_out:
                self._follow(runs[-1]["parent"])
                self.write_results(ledger.results_tsv(runs, metric))
        else:
            self.restore()
            self.write_results(ledger.results_tsv(runs, metric))
        return kept

    def restore(self) -> list[str]:
        """Bring the mutable files, and their index entries, back to the champion's; nothing else is touched.

        In a try, a file that was edited since its candidate was made is left alone; returns a line for each.
        """
        left: list[str] = []
        for path, (mode, blob) in self._entries(self.head).items():
            if self.in_place and path in self._tried:
                now = self._git.blob(read(self.top, path)) if is_regular(self.top / path) else None
                if now not in (self._tried[path], blob, None):
                    left.append(f"{path} was edited during the run: left as it is")
                    continue
            self._write(path, self._git.content(blob), executable=mode == "100755")
        if self.checked_out:
            own = self._git.entries(self.head, [*self._paths, self.prefix + RESULTS])
            self._git("update-index", "--add", *cacheinfo(own))
        return left

    def write_results(self, text: str) -> None:
        """Replace results.tsv at `results_path` in one step."""
        if self.checked_out:
            self._write(self.prefix + RESULTS, text.encode())
        else:
            write(self.results_path, text.encode())

    def foreign_changes(self) -> list[str]:
        """Return one line for each thing done in the loop's worktree beyond editing mutable files.

        Git's own files of the worktree are put right at once, as nothing can be told without them.
        """
        if self.in_place:
            return []
        lines = mend(self._git, self.branch)
        lines += [f"changed: {path}" for path in self._foreign_paths()]
        if (at := self._git.maybe("rev-parse", "--verify", "--quiet", f"refs/heads/{self.branch}")) != self.head:
            lines.append(f"moved: branch {self.branch} to {at[:7]}" if at else f"deleted: branch {self.branch}")
        if not self.checked_out:
            lines.append(f"moved: HEAD off branch {self.branch}")
        return lines

    def restore_foreign(self) -> None:
        """Undo `foreign_changes` in the loop's own worktree; untracked files stay."""
        assert not self.in_place, "a try never resets the user's checkout"
        mend(self._git, self.branch)
        self._git("update-ref", f"refs/heads/{self.branch}", self.head)
        self._git("symbolic-ref", "HEAD", f"refs/heads/{self.branch}")
        paths = self._foreign_paths()
        self._git("read-tree", "--reset", self.head)
        for at in range(0, len(paths), 500):  # the command line is finite
            self._git("restore", "--source", self.head, "--worktree", "--", *paths[at : at + 500])

    def _foreign_paths(self) -> list[str]:
        """Return the champion's tracked files, mutable ones and results.tsv aside, that the work tree changed."""
        rows = [(row[0], row[2:]) for row in self._git("ls-files", "-v", "-z").split("\0") if row]
        # A file that is there, flagged so that git does not look at it: assume-unchanged (small), skip-worktree (S)
        if any(flag.islower() or (flag == "S" and os.path.lexists(self.top / path)) for flag, path in rows):
            (Path(self._git("rev-parse", "--absolute-git-dir")) / "index").unlink()
            self._git("read-tree", self.head)
        diff = ("diff", "--no-ext-diff", "--no-textconv", "--ignore-submodules=all", "--diff-filter=a")
        own = {*self._paths, self.prefix + RESULTS}
        listed = self._git(*diff, "--no-renames", "--name-only", "-z", self.head).split("\0")
        return [path for path in listed if path and path not in own]

    def _write(self, path: str, data: bytes, *, executable: bool = False) -> None:
        """Replace a file of the work tree; in the loop's own, what is in its way is moved aside."""
        if not self.in_place:
            clear(self.top, path, self.state)
        write(place(self.top, path), data, executable=executable)

    def _kept(self, runs: Sequence[ledger.Record], metric: str) -> str:
        """Store the kept commit of the last of `runs` and return its hash, the same for the same records."""
        record = runs[-1]
        results = self._git.blob(ledger.results_tsv(runs, metric).encode())
        changes = self._entries(record["commit"]) | {self.prefix + RESULTS: ("100644", results)}
        tree = self._git.tree(record["parent"], changes, self.state / "index")
        who = self._git("log", "-1", "--format=%an%x00%ae", record["commit"]).split("\0")
        message = (
            f"{record['description']}\n\n{CANDIDATE}: {record['commit']}\n"
            f"{score_trailer(metric)}: {record['result']['score']:.6f}"
        )
        when = int(datetime.fromisoformat(record["time"]).timestamp())
        return self._git.commit(tree, record["parent"], message, (who[0], who[1]), when)

    def _move(self, new: str, old: str) -> None:
        """Advance the branch from `old` to `new`, unless it is there already."""
        ref = f"refs/heads/{self.branch}"
        if self._git("rev-parse", ref) != new:
            self._git("update-ref", "-m", "autoresearch: keep", ref, new, old)
        self.head = new

    def _follow(self, parent: str) -> None:
        """Bring the checkout's index entries that are still `parent`'s to the head's; files stay."""
        paths = [*self._paths, self.prefix + RESULTS]
        before, after = self._git.entries(parent, paths), self._git.entries(self.head, paths)
        staged = self._git("ls-files", "--stage", "-z", "--", *(str(self.top / path) for path in paths))
        rows = (line.split("\t", 1) for line in staged.split("\0") if line)
        index = {path: meta.split()[1] for meta, path in rows}
        behind = {
            path: entry
            for path, entry in after.items()
            if entry != before.get(path) and index.get(path) == before.get(path, (None, None))[1]
        }
        if behind:
            self._git("update-index", "--add", *cacheinfo(behind))

    def _check_ahead(self, made: str) -> None:
        """Raise unless the branch is at commit `made`, or ahead of it with the same mutable files."""
        if self.head == made:
            return
        ahead = self._git.maybe("merge-base", "--is-ancestor", made, self.head) is not None
        if not ahead:
            raise WorkspaceError(
                f"branch {self.branch} is at {self.head[:7]}, but the ledger's champion is {made[:7]}: "
                f"`git branch -f {self.branch} {made[:7]}`, or begin another with --autoresearch-tag"
            )
        if self._entries(made) != self._entries(self.head):
            raise WorkspaceError(
                f"branch {self.branch} has commits to {', '.join(self.mutable)} that no experiment made: undo them "
                f"with `git reset --soft {made[:7]}` there and try the edit, or begin another with --autoresearch-tag"
            )

    def _refuse_strange_results(self, view: str) -> None:
        """Raise if results.tsv in the user's checkout is neither tracked nor ours: it would be overwritten."""
        path = self.results_path
        tracked = self._git.entries(self.head, [self.prefix + RESULTS])
        if not tracked and os.path.lexists(path) and not view.encode().startswith(path.read_bytes()):
            raise WorkspaceError(f"{path} holds rows that are not this ledger's: move it away, then start again")

    @property
    def _paths(self) -> list[str]:
        return [self.prefix + path for path in self.mutable]

    def _entries(self, commit: str) -> dict[str, tuple[str, str]]:
        """Return (mode, blob) of each mutable file in `commit`, by path from the top."""
        entries = self._git.entries(commit, self._paths)
        for path in self._paths:
            mode = entries.get(path, ("", ""))[0]
            if mode not in REGULAR:
                what = "no regular file" if mode else "not"
                raise WorkspaceError(
                    f"mutable file {path} is {what} in commit {commit[:7]} of {self.branch}: "
                    f"commit it as a regular file, or correct the setting of mutable files"
                )
        return entries
