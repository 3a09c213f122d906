"""The workspace on real repositories: what a keep and a discard move, that nothing else is touched, that a kill at
any step is repaired, and one clear line for each repository that cannot be worked with. Needs git.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_autoresearch.ledger import Ledger, Record, results_tsv, run_record
from pytest_autoresearch.records import Candidate, Result, Verdict
from pytest_autoresearch.workspace import Workspace, WorkspaceError

TRAIN = b"LR = 0.04  # learning rate\nprint(LR)\n"
BETTER = b"LR = 0.08  # learning rate\n"
METRIC = "val_bpb"
ADA = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")


def git(at: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(at), *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give git a home without settings of the person who runs the tests."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith(("GIT_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "project")


def make(root: Path, train: str = "train.py", *options: str) -> Path:
    """Make a repository with one commit, by a person whom git knows only here."""
    (root / train).parent.mkdir(parents=True)
    git(root, "init", "-q", "-b", "main", *options)
    for name in (train, "oracle.py", "notes.md", "staged.md"):
        (root / name).write_bytes(TRAIN if name == train else f"{name}\n".encode())
    (root / ".gitignore").write_text("*.log\n")
    git(root, "add", "-A")
    git(root, *ADA, "commit", "-q", "-m", "begin")
    return root


def opened(how: str, root: Path, tag: str = "nov23", mutable: tuple[str, ...] = ("train.py",)) -> Workspace:
    openers: dict[str, Callable[..., Workspace]] = {"loop": Workspace.for_loop, "try": Workspace.for_try}
    return openers[how](root, mutable=mutable, prefix="autoresearch", tag=tag)


def record(candidate: Candidate, outcome: str | None, score: float = 0.99) -> Record:
    """Return a finished run's record at a fixed time."""
    return run_record(
        kind="experiment" if outcome else "baseline",
        candidate=candidate,
        run=1,
        seed=1,
        result=Result(status="ok", score=score, memory_gb=1.0),
        verdict=Verdict(outcome=outcome, reason="so") if outcome else None,  # type: ignore[arg-type]
        time="2026-11-23T01:02:03+00:00",
    )


class Night:
    """A workspace with its ledger, as the loop and the try use them."""

    def __init__(self, how: str, root: Path, **settings: Any) -> None:
        self.ws = opened(how, root, **settings)
        self.log = Ledger.open(self.ws.state / "ledger.jsonl")
        self.note = self.ws.resume(self.log.history, METRIC)
        if not self.log.runs:
            self.log.append(record(self.ws.baseline(), None, 1.0))

    def experiment(self, outcome: str, content: bytes, description: str = "an idea") -> Candidate:
        (self.ws.workdir / self.ws.mutable[0]).write_bytes(content)
        candidate = self.ws.candidate(self.log.next_number(), description)
        self.ws.hold(candidate)
        self.finish(record(candidate, outcome))
        return candidate

    def finish(self, final: Record) -> None:
        self.log.append(final)
        if final["verdict"]["outcome"] == "keep":
            self.ws.keep(self.log.history, METRIC)
        else:
            self.ws.restore()
            self.ws.write_results(results_tsv(self.log.history, METRIC))

    def __enter__(self) -> "Night":
        return self

    def __exit__(self, *_: object) -> None:
        self.ws.close()


def user_view(root: Path) -> dict[str, Any]:
    """Return all that is the user's: HEAD, index, and every file outside .git and .autoresearch."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        "HEAD": (root / ".git/HEAD").read_text(),
        "main": git(root, "rev-parse", "main"),
        "index": git(root, "ls-files", "--stage"),
        "files": {
            str(path.relative_to(root)): path.read_bytes()
            for path in files
            if path.relative_to(root).parts[0] not in (".git", ".autoresearch")
        },
    }


def make_a_mess(root: Path) -> None:
    """Leave a modified, a staged, an untracked and an ignored file."""
    (root / "notes.md").write_text("modified\n")
    (root / "staged.md").write_text("staged\n")
    git(root, "add", "staged.md")
    (root / "staged.md").write_text("staged, then modified\n")
    (root / "untracked.txt").write_text("mine\n")
    (root / "run.log").write_text("ignored\n")


def test_a_loop_keeps_and_discards_in_its_own_worktree(root: Path) -> None:
    make_a_mess(root)
    before = user_view(root)
    with Night("loop", root) as night:
        ws = night.ws
        assert ws.workdir == root / ".autoresearch/nov23"
        assert ws.state == root / ".git/autoresearch/nov23"
        assert (ws.head, ws.champion) == (git(root, "rev-parse", "main"),) * 2
        dropped = night.experiment("discard", b"LR = 9\n")
        assert (ws.workdir / "train.py").read_bytes() == TRAIN
        assert git(root, "rev-parse", "autoresearch/nov23") == git(root, "rev-parse", "main")
        kept = night.experiment("keep", BETTER, "raise\tthe LR\nto 0.08")
        night.experiment("crash", b"LR = 7\n")
        assert ws.champion == kept.commit
        assert ws.head == git(root, "rev-parse", "autoresearch/nov23")
        assert (dropped.lines_added, kept.lines_added) == (-1, -1)
        assert ws.files(dropped.commit) == {"train.py": b"LR = 9\n"}
        assert ws.foreign_changes() == []
    assert git(root, "log", "-1", "--format=%B", "autoresearch/nov23") == (
        f"raise the LR to 0.08\n\nAutoresearch-Candidate: {kept.commit}\nAutoresearch-Val-Bpb: 0.990000\n"
    )
    assert git(root, "diff", "--name-only", "main", "autoresearch/nov23") == "results.tsv\ntrain.py"
    table = git(root, "show", "autoresearch/nov23:results.tsv")
    assert table.splitlines()[-1] == f"{kept.commit[:7]}\t0.990000\t1.0\tkeep\traise the LR to 0.08"
    assert (root / ".autoresearch/nov23/results.tsv").read_text().splitlines()[-1].endswith("crash\tan idea")
    assert git(root, "for-each-ref", "--format=%(refname)", "refs/autoresearch") == "\n".join(
        f"refs/autoresearch/nov23/{number:04d}" for number in (1, 2, 3)
    )
    assert git(root / ".autoresearch/nov23", "status", "--porcelain") == " M results.tsv"
    assert user_view(root) == before


def test_the_next_start_goes_on(root: Path) -> None:
    with Night("loop", root) as night:
        kept = night.experiment("keep", BETTER)
        head = night.ws.head
        (night.ws.workdir / "train.py").write_bytes(b"half an edit")
    with Night("loop", root) as night:
        assert (night.ws.head, night.ws.champion, night.note) == (head, kept.commit, None)
        assert (night.ws.workdir / "train.py").read_bytes() == BETTER
        assert night.ws.baseline().commit == kept.commit


def test_a_try_beside_another_branch_moves_only_its_own(root: Path) -> None:
    make_a_mess(root)
    before = user_view(root)
    for outcome, content in [("discard", b"LR = 9\n"), ("keep", BETTER), ("crash", b"LR = 7\n")]:
        (root / "train.py").write_bytes(content)
        with Night("try", root) as night:
            assert (root / "train.py").read_bytes() == content
            night.experiment(outcome, content)
            assert night.ws.results_path == root / ".git/autoresearch/nov23/results.tsv"
    assert git(root, "show", "autoresearch/nov23:train.py") + "\n" == BETTER.decode()
    assert (root / ".git/autoresearch/nov23/results.tsv").read_text().count("\n") == 5
    after = user_view(root)
    assert after["files"].pop("train.py") == BETTER  # the discarded edit gives way to the champion
    before["files"].pop("train.py")
    assert after == before


def test_a_try_on_the_branch_keeps_the_checkout_in_step(root: Path) -> None:
    git(root, "switch", "-q", "-c", "autoresearch/mine")
    make_a_mess(root)
    git(root, "config", "core.quotePath", "false")
    status = git(root, "status", "--porcelain")
    for outcome, content in [("discard", b"LR = 9\n"), ("keep", BETTER), ("crash", b"LR = 7\n")]:
        (root / "train.py").write_bytes(content)
        git(root, "add", "train.py")
        with Night("try", root, tag="ignored") as night:
            assert (night.ws.tag, night.ws.workdir) == ("mine", root)
            night.experiment(outcome, content)
        if outcome == "keep":
            assert git(root, "status", "--porcelain") == status
    assert (root / "train.py").read_bytes() == BETTER
    assert git(root, "status", "--porcelain") == " M notes.md\n M results.tsv\nMM staged.md\n?? untracked.txt"
    assert (root / "results.tsv").read_text().splitlines()[-1].split("\t")[3] == "crash"
    assert git(root, "log", "--format=%s") == "an idea\nbegin"


def test_an_edit_made_during_the_run_of_a_try_survives(root: Path) -> None:
    (root / "train.py").write_bytes(b"LR = 9\n")
    with Night("try", root) as night:
        night.ws.candidate(1, "nine")
        (root / "train.py").write_bytes(b"LR = 10\n")
        assert night.ws.restore() == ["train.py was edited during the run: left as it is"]
        assert (root / "train.py").read_bytes() == b"LR = 10\n"


def test_a_candidate_has_the_champions_mode(root: Path) -> None:
    with Night("loop", root) as night:
        (night.ws.workdir / "train.py").write_bytes(BETTER)
        (night.ws.workdir / "train.py").chmod(0o755)
        candidate = night.ws.candidate(1, "")
        assert candidate.description == "no description"
        assert git(root, "ls-tree", candidate.commit, "train.py").startswith("100644 ")


def test_a_candidate_differs_from_the_champion_in_mutable_files_only(root: Path) -> None:
    with Night("loop", root) as night:
        at = night.ws.workdir
        (at / "notes.md").write_text("edited\n")
        (at / "new.py").write_text("new\n")
        git(at, "add", "-A")
        (at / "train.py").write_bytes(BETTER)
        candidate = night.ws.candidate(1, "much at once")
        assert git(root, "diff", "--raw", "--abbrev=4", candidate.parent, candidate.commit).split()[-1] == "train.py"
        assert git(root, "diff", "--name-only", candidate.parent, candidate.commit) == "train.py"


def test_every_attempt_stays_retrievable(root: Path) -> None:
    contents = {"0001": b"LR = 1\n", "0001-2": b"LR = 2\n", "0001-3": b"LR = 3\n", "0002": b"LR = 5\n"}
    with Night("loop", root) as night:
        ws = night.ws
        for attempt in (1, 2, 3):
            (ws.workdir / "train.py").write_bytes(b"LR = %d\n" % attempt)
            candidate = ws.candidate(1, "an idea", attempt)
            assert candidate.attempt == attempt
            ws.hold(candidate)
        for content in (b"LR = 4\n", contents["0002"]):  # the first was killed before it was recorded
            (ws.workdir / "train.py").write_bytes(content)
            ws.hold(ws.candidate(2, "another"))
        ws.load(git(root, "rev-parse", "refs/autoresearch/nov23/0001-2"))
        assert (ws.workdir / "train.py").read_bytes() == b"LR = 2\n"
    git(root, "reflog", "expire", "--expire=now", "HEAD", "main")
    git(root, "gc", "-q")
    for name, content in contents.items():
        assert git(root, "show", f"refs/autoresearch/nov23/{name}:train.py").encode() + b"\n" == content
    assert git(root, "show", "refs/autoresearch/nov23/0002@{1}:train.py") == "LR = 4"
    assert len(git(root, "for-each-ref", "refs/autoresearch").splitlines()) == len(contents)


def test_an_object_whose_bytes_are_not_its_own_is_named(root: Path) -> None:
    with Night("loop", root) as night:
        (night.ws.workdir / "train.py").write_bytes(BETTER)
        candidate = night.ws.candidate(1, "better")
        names = [git(root, "rev-parse", f"{commit}:train.py") for commit in (candidate.commit, "main")]
        better, plain = (root / ".git/objects" / name[:2] / name[2:] for name in names)
        better.chmod(0o644)
        better.write_bytes(plain.read_bytes())
        assert git(root, "cat-file", "blob", names[0]) + "\n" == TRAIN.decode()  # git does not mind
        with pytest.raises(WorkspaceError, match=rf"^object {names[0]} of the repository is damaged: `git fsck` "):
            night.ws.files(candidate.commit)


# ---- repositories as people have them


def failing_hooks(root: Path, home: Path) -> None:
    for name in ("pre-commit", "commit-msg", "post-checkout", "reference-transaction", "post-index-change"):
        hook = root / ".git/hooks" / name
        hook.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
        hook.chmod(0o755)


def signing(root: Path, home: Path) -> None:
    (home / ".gitconfig").write_text("[commit]\n\tgpgSign = true\n[gpg]\n\tprogram = /bin/false\n")


def nobody(root: Path, home: Path) -> None:
    (home / ".gitconfig").write_text("[user]\n\tuseConfigOnly = true\n")


def autocrlf(root: Path, home: Path) -> None:
    (home / ".gitconfig").write_text("[core]\n\tautocrlf = true\n")
    (root / "train.py").unlink()
    git(root, "checkout", "--", "train.py")
    assert (root / "train.py").read_bytes() == TRAIN.replace(b"\n", b"\r\n")


def inherited(root: Path, home: Path) -> None:
    os.environ.update(GIT_DIR="/nowhere", GIT_INDEX_FILE="/nowhere/index", GIT_WORK_TREE="/", GIT_PREFIX="x/")


def filters(root: Path, home: Path) -> None:
    (home / ".gitconfig").write_text(
        '[filter "up"]\n\tclean = tr a-z A-Z\n\tsmudge = tr A-Z a-z\n[core]\n\tattributesFile = ~/attributes\n'
    )
    (home / "attributes").write_text("train.py filter=up\n")


def replaced(root: Path, home: Path) -> None:
    blob = git(root, "rev-parse", "main:train.py")
    other = git(root, "rev-parse", "main:oracle.py")
    git(root, "replace", blob, other)


def in_rebase_elsewhere(root: Path, home: Path) -> None:
    other = home / "other"
    git(root, "worktree", "add", "-q", "-b", "topic", str(other))
    for text in ("one\n", "two\n"):
        (other / "notes.md").write_text(text)
        git(other, *ADA, "commit", "-q", "-m", text, "notes.md")
    git(other, "-c", "sequence.editor=sed -i s/pick/edit/", *ADA, "rebase", "-q", "-i", "main")
    assert (root / ".git/worktrees/other/rebase-merge").is_dir()


def submodule(root: Path, home: Path) -> None:
    other = make(home / "library")
    git(root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other), "library")
    git(root, *ADA, "commit", "-q", "-m", "library")


def recursing(root: Path, home: Path) -> None:
    submodule(root, home)
    (home / ".gitconfig").write_text("[submodule]\n\trecurse = true\n")


def crlf_by_attribute(root: Path, home: Path) -> None:
    (root / ".gitattributes").write_text("*.py text eol=crlf\n")
    git(root, "add", "-A")
    git(root, *ADA, "commit", "-q", "-m", "line ends")
    (home / ".gitconfig").write_text("[core]\n\tsafecrlf = true\n")
    (root / "train.py").unlink()
    git(root, "checkout", "--", "train.py")
    assert b"\r\n" in (root / "train.py").read_bytes()


def sparse(root: Path, home: Path) -> None:
    git(root, "sparse-checkout", "set", "--no-cone", "train.py")
    assert not (root / "oracle.py").exists()


def elsewhere(root: Path, home: Path) -> None:
    git(root, "init", "-q", "--separate-git-dir", str(home / "repository.git"))


@pytest.mark.parametrize("how", ["loop", "try"])
@pytest.mark.parametrize(
    "condition",
    [
        *(failing_hooks, signing, nobody, autocrlf, crlf_by_attribute, inherited, filters, replaced),
        *(in_rebase_elsewhere, submodule, recursing, elsewhere),
    ],
)
def test_a_keep_and_a_discard_in(
    how: str, condition: Callable[[Path, Path], None], root: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_PREFIX"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes away what a condition sets
        del os.environ[name]
    condition(root, home)
    with Night(how, root) as night:
        assert night.ws.files(night.ws.head) == {"train.py": TRAIN}
        kept = night.experiment("keep", b"LR = 1\r\nx = 'Y'\n")
        night.experiment("discard", b"LR = 2\n")
        assert (night.ws.workdir / "train.py").read_bytes() == b"LR = 1\r\nx = 'Y'\n"
        assert night.ws.files(night.ws.head) == night.ws.files(kept.commit) == {"train.py": b"LR = 1\r\nx = 'Y'\n"}
        assert night.ws.foreign_changes() == []
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    author = git(root, "log", "-1", "--format=%an <%ae> %cn <%ce>", "autoresearch/nov23")
    assert author == "autoresearch <autoresearch@localhost> autoresearch <autoresearch@localhost>"
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/main"


@pytest.mark.parametrize("how", ["loop", "try"])
def test_a_repository_of_longer_hashes(how: str, tmp_path: Path) -> None:
    root = make(tmp_path / "project", "train.py", "--object-format=sha256")
    with Night(how, root) as night:
        kept = night.experiment("keep", BETTER)
        assert len(kept.commit) == 64
        night.experiment("discard", b"LR = 2\n")
        assert night.ws.files(night.ws.head) == {"train.py": BETTER}


@pytest.mark.parametrize("how", ["loop", "try"])
def test_a_subfolder_with_spaces_and_unicode(how: str, tmp_path: Path) -> None:
    name = "pakete/größe & co/träin *.py"
    root = make(tmp_path / "mono repo ✓", name)
    git(root, "config", "user.name", "Grace")
    git(root, "config", "user.email", "grace@example.org")
    with Night(how, root / "pakete", mutable=("größe & co/träin *.py",)) as night:
        assert night.ws.workdir == (root / ".autoresearch/nov23/pakete" if how == "loop" else root / "pakete")
        night.experiment("keep", BETTER)
        night.experiment("discard", b"LR = 2\n")
        assert night.ws.files(night.ws.head) == {"größe & co/träin *.py": BETTER}
    names = git(root, "-c", "core.quotePath=false", "diff", "--name-only", "main", "autoresearch/nov23")
    assert names == f"{name}\npakete/results.tsv"
    assert git(root, "log", "-1", "--format=%an <%ae>", "autoresearch/nov23") == "Grace <grace@example.org>"


# ---- what a proposer may do to the loop's worktree


def test_a_proposers_other_doings_are_named_and_undone(root: Path) -> None:
    with Night("loop", root) as night:
        ws, at = night.ws, night.ws.workdir
        head = ws.head
        (at / "oracle.py").write_text("score = 0\n")
        (at / "notes.md").unlink()
        (at / "train.py").write_bytes(BETTER)
        (at / "scratch.txt").write_text("keep me\n")
        git(at, "add", "-A")
        git(at, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "an agent's own commit")
        moved = git(at, "rev-parse", "--short=7", "HEAD")
        git(at, "switch", "-q", "-c", "elsewhere")
        assert ws.foreign_changes() == [
            "changed: notes.md",
            "changed: oracle.py",
            f"moved: branch autoresearch/nov23 to {moved}",
            "moved: HEAD off branch autoresearch/nov23",
        ]
        ws.restore_foreign()
        assert ws.foreign_changes() == []
        assert git(root, "rev-parse", "autoresearch/nov23") == head
        assert (at / "oracle.py").read_text() == "oracle.py\n"
        assert (at / "scratch.txt").read_text() == "keep me\n"
        assert (at / "train.py").read_bytes() == BETTER  # still the candidate
        assert night.ws.files(ws.candidate(1, "mine").commit) == {"train.py": BETTER}


@pytest.mark.parametrize("shape", ["missing", "symlink", "folder", "pipe", "outside"])
def test_a_candidate_must_be_a_regular_file(shape: str, tmp_path: Path) -> None:
    root = make(tmp_path / "project", "src/train.py")
    with Night("loop", root, mutable=("src/train.py",)) as night:
        path = night.ws.workdir / "src/train.py"
        path.unlink()
        if shape == "symlink":
            path.symlink_to(root / "oracle.py")
        elif shape == "folder":
            path.mkdir()
            (path / "thesis.tex").write_text("precious")
        elif shape == "pipe":
            os.mkfifo(path)
        elif shape == "outside":
            path.parent.rmdir()
            (tmp_path / "away").mkdir()
            (tmp_path / "away/train.py").write_bytes(BETTER)
            path.parent.symlink_to(tmp_path / "away")
        with pytest.raises(WorkspaceError, match=r"missing or no regular file: put it back|leads through a symlink"):
            night.ws.candidate(1, "odd")
        night.ws.restore()
        assert path.read_bytes() == TRAIN and not path.is_symlink() and not path.parent.is_symlink()
        assert (root / "oracle.py").read_text() == "oracle.py\n"
        if shape == "outside":
            assert (tmp_path / "away/train.py").read_bytes() == BETTER
        if shape == "folder":
            (aside,) = night.ws.state.glob("aside-*")
            assert (aside / "train.py/thesis.tex").read_text() == "precious"


def test_a_folder_in_the_place_of_results_is_moved_aside(root: Path) -> None:
    with Night("loop", root) as night:
        (night.ws.workdir / "results.tsv").unlink(missing_ok=True)
        (night.ws.workdir / "results.tsv").mkdir()
        night.experiment("keep", BETTER)
        assert (night.ws.workdir / "results.tsv").read_text().count("\n") == 3


def test_without_its_git_file_the_worktree_is_not_taken_for_the_repository_around_it(root: Path) -> None:
    make_a_mess(root)
    before = user_view(root)
    with Night("loop", root) as night:
        ws = night.ws
        for spoil in ("removed", "another", "folder"):
            (ws.workdir / ".git").unlink()
            if spoil == "another":
                (ws.workdir / ".git").write_text(f"gitdir: {root / '.git'}\n")
            elif spoil == "folder":
                git(ws.workdir, "init", "-q", str(ws.workdir))
            (ws.workdir / "oracle.py").write_text("changed")
            (ws.workdir / "train.py").write_bytes(BETTER)
            assert ws.foreign_changes() == ["changed: .git", "changed: oracle.py"]
            ws.restore_foreign()
            assert ws.foreign_changes() == []
            assert (ws.workdir / "train.py").read_bytes() == BETTER
        (ws.workdir / ".git").unlink()  # by a candidate, while it runs
        night.experiment("keep", BETTER)
        assert (ws.workdir / "results.tsv").read_text().endswith("keep\tan idea\n")
    assert user_view(root) == before
    assert git(root, "log", "--format=%s", "autoresearch/nov23") == "an idea\nbegin"


def test_a_worktree_that_goes_while_the_loop_runs_comes_back(root: Path) -> None:
    before = user_view(root)
    with Night("loop", root) as night:
        shutil.rmtree(root / ".autoresearch")
        lines = night.ws.foreign_changes()
        assert lines[0] == "changed: .git" and "changed: oracle.py" in lines
        night.ws.restore_foreign()
        with pytest.raises(WorkspaceError, match="missing or no regular file"):
            night.ws.candidate(1, "nothing")
        night.ws.restore()
        night.experiment("keep", BETTER)
    after = user_view(root)
    assert after == before


def hide_by_assume_unchanged(at: Path) -> None:
    git(at, "update-index", "--assume-unchanged", "oracle.py")
    (at / "oracle.py").write_text("changed")


def hide_by_skip_worktree(at: Path) -> None:
    git(at, "update-index", "--skip-worktree", "oracle.py")
    (at / "oracle.py").write_text("changed")


def hide_by_time(at: Path) -> None:
    git(at, "config", "core.trustctime", "false")
    git(at, "config", "core.checkStat", "minimal")
    git(at, "update-index", "--refresh")
    stat = (at / "oracle.py").stat()
    (at / "oracle.py").write_text("oracle_py\n")  # as long as before
    os.utime(at / "oracle.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("hide", [hide_by_assume_unchanged, hide_by_skip_worktree, hide_by_time])
def test_a_change_that_git_was_told_not_to_see(hide: Callable[[Path], None], root: Path) -> None:
    with Night("loop", root) as night:
        at = night.ws.workdir
        hide(at)
        if hide is not hide_by_time:  # its blind spot depends on the clock's grain
            assert git(at, "status", "--porcelain", "oracle.py") == ""
        assert night.ws.foreign_changes() == ["changed: oracle.py"]
        night.ws.restore_foreign()
        assert (at / "oracle.py").read_text() == "oracle.py\n"
        hide(at)
    with Night("loop", root) as night:
        assert (at / "oracle.py").read_text() == "oracle.py\n"


def test_what_a_sparse_checkout_leaves_out_stays_out(root: Path, home: Path) -> None:
    sparse(root, home)
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
        assert night.ws.foreign_changes() == []
        assert not (night.ws.workdir / "oracle.py").exists()


def test_a_branch_that_was_deleted_and_a_merge_that_was_begun(root: Path) -> None:
    with Night("loop", root) as night:
        at, head = night.ws.workdir, night.ws.head
        git(root, "update-ref", "-d", "refs/heads/autoresearch/nov23")
        (root / ".git/worktrees/nov23/MERGE_HEAD").write_text(head + "\n")
        (root / ".git/worktrees/nov23/rebase-merge").mkdir()
        assert night.ws.foreign_changes() == [
            "began: a rebase",
            "began: a merge",
            "deleted: branch autoresearch/nov23",
        ]
        night.ws.restore_foreign()
        assert night.ws.foreign_changes() == []
        night.experiment("keep", BETTER)
        assert "merg" not in git(at, "status") and "rebas" not in git(at, "status")


@pytest.mark.parametrize("how", ["loop", "try"])
def test_locks_that_a_killed_git_left(how: str, root: Path) -> None:
    with Night(how, root) as night:
        night.experiment("keep", BETTER)
    locks = [".git/refs/heads/autoresearch/nov23.lock", ".git/refs/autoresearch/nov23/0002.lock"]
    if how == "loop":
        locks += [".git/worktrees/nov23/index.lock", ".git/worktrees/nov23/HEAD.lock"]
    for lock in locks:
        (root / lock).touch()
    with Night(how, root) as night:
        night.experiment("keep", b"LR = 3\n")
        night.experiment("discard", b"LR = 4\n")
    assert not any((root / lock).exists() for lock in locks)


def test_a_lock_on_the_users_own_index_is_left_and_named(root: Path) -> None:
    checked_out(root)
    with Night("try", root) as night:
        night.experiment("keep", BETTER)
        lock = root / ".git/index.lock"
        lock.touch()
        line = r"index.lock': File exists \(another git is at work, or was killed: if none is, remove that file\)$"
        with pytest.raises(WorkspaceError, match=line):
            night.experiment("keep", b"LR = 3\n")
    assert lock.exists()
    lock.unlink()
    with Night("try", root) as night:
        assert git(root, "status", "--porcelain") == ""
        assert [run["verdict"]["outcome"] for run in night.log.runs[1:]] == ["keep", "keep"]


GIT_DIR = ".git/worktrees/nov23"
FOLDER = ".autoresearch/nov23"
HALF_MADE = {  # what `git worktree add` has not done yet when it is killed, latest first
    "still locked": [],
    "no files": [f"{FOLDER}/*"],
    "no index": [f"{FOLDER}/*", f"{GIT_DIR}/index"],
    "no commondir": [f"{FOLDER}/*", f"{GIT_DIR}/index", f"{GIT_DIR}/commondir"],
    "no HEAD": [f"{FOLDER}/*", f"{GIT_DIR}/index", f"{GIT_DIR}/commondir", f"{GIT_DIR}/HEAD"],
    "no .git": [f"{FOLDER}/*", f"{FOLDER}/.git", f"{GIT_DIR}/index", f"{GIT_DIR}/commondir", f"{GIT_DIR}/HEAD"],
    "no gitdir": [f"{FOLDER}/*", f"{FOLDER}/.git", f"{GIT_DIR}/*"],
    "no folder": [FOLDER, f"{GIT_DIR}/*"],
}


@pytest.mark.parametrize("state", HALF_MADE)
def test_a_half_made_worktree_is_finished(state: str, root: Path) -> None:
    opened("loop", root).close()
    (root / GIT_DIR / "locked").write_text("initializing")
    for pattern in HALF_MADE[state]:
        for path in root.glob(pattern):
            if path.name != "locked":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if state == "no index":
        (root / GIT_DIR / "index.lock").touch()
    with Night("loop", root) as night:
        assert (night.ws.workdir / "oracle.py").read_text() == "oracle.py\n"
        night.experiment("keep", BETTER)
        assert night.ws.foreign_changes() == []
    assert "locked" not in git(root, "worktree", "list", "--porcelain")
    assert git(root / FOLDER, "status", "--porcelain") == ""
    git(root, "worktree", "remove", FOLDER)


def test_a_deleted_worktree_is_made_anew(root: Path) -> None:
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
    shutil.rmtree(root / ".autoresearch")
    with Night("loop", root) as night:
        assert (night.ws.workdir / "train.py").read_bytes() == BETTER
        assert (night.ws.workdir / "results.tsv").exists()


def test_a_moved_repository_is_mended(root: Path, tmp_path: Path) -> None:
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
    moved = tmp_path / "moved"
    root.rename(moved)
    with Night("loop", moved) as night:
        assert night.ws.workdir == moved / ".autoresearch/nov23"
        night.experiment("keep", b"LR = 3\n")
    assert git(moved, "show", "autoresearch/nov23:train.py") == "LR = 3"


def test_a_loop_started_in_its_own_worktree_works_there(root: Path) -> None:
    with Night("loop", root) as night:
        at = night.ws.workdir
    with Night("loop", at) as night:
        assert night.ws.workdir == at
    (at / "train.py").write_bytes(BETTER)
    with Night("try", at) as night:
        assert (night.ws.workdir, night.ws.tag) == (at, "nov23")
        night.experiment("keep", BETTER)
    assert git(at, "status", "--porcelain") == ""


# ---- one clear line


def dirty(root: Path) -> None:
    (root / "train.py").write_bytes(BETTER)


def removed(root: Path) -> None:
    (root / "train.py").unlink()


def linked(root: Path) -> None:
    (root / "train.py").rename(root / "real.py")
    (root / "train.py").symlink_to("real.py")


def uncommitted(root: Path) -> None:
    git(root, "rm", "-q", "--cached", "train.py")
    git(root, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "forget it")


def committed_link(root: Path) -> None:
    linked(root)
    git(root, "add", "-A")
    git(root, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "link it")


def detached(root: Path) -> None:
    git(root, "switch", "-q", "--detach")


def merging(root: Path) -> None:
    (root / ".git/MERGE_HEAD").write_text(git(root, "rev-parse", "HEAD") + "\n")


def rebasing(root: Path) -> None:
    (root / ".git/rebase-merge").mkdir()


def no_repository(root: Path) -> None:
    shutil.rmtree(root / ".git")


def no_commit(root: Path) -> None:
    shutil.rmtree(root / ".git")
    git(root, "init", "-q")


def checked_out(root: Path) -> None:
    git(root, "switch", "-q", "-c", "autoresearch/nov23")


def in_the_way(root: Path) -> None:
    (root / ".autoresearch/nov23").mkdir(parents=True)
    (root / ".autoresearch/nov23/thesis.tex").write_text("precious")


@pytest.mark.parametrize(
    ("how", "condition", "line"),
    [
        ("loop", no_repository, r": no git repository: `git init`, `git add -A` and `git commit` first$"),
        ("try", no_repository, r": no git repository: "),
        ("loop", no_commit, r" has no commit yet: `git add -A` and `git commit` first$"),
        ("loop", detached, r" has a detached HEAD: `git switch main`, or another branch, first$"),
        ("try", detached, r" has a detached HEAD: "),
        ("loop", rebasing, r"^a rebase is under way in .*: finish it or `git rebase --abort` first$"),
        ("try", merging, r"^a merge is under way in .*: finish it or `git merge --abort` first$"),
        ("loop", dirty, r"^train.py has uncommitted changes, .* `git commit`, .* `git stash`, .* --autoresearch-try "),
        ("loop", removed, r"^train.py is missing or no regular file: `git checkout -- train.py`$"),
        ("loop", linked, r"^train.py is missing or no regular file: "),
        ("try", removed, r"^mutable file .*train.py is missing or no regular file: put it back as one$"),
        ("try", linked, r"^mutable file .*train.py is missing or no regular file: "),
        ("loop", uncommitted, r"^mutable file train.py is not in commit .{7} of autoresearch/nov23: commit it "),
        ("try", uncommitted, r"^mutable file train.py is not in commit .{7} of autoresearch/nov23: commit it "),
        ("loop", committed_link, r"^mutable file train.py is no regular file in commit "),
        ("loop", checked_out, r"^branch autoresearch/nov23 is checked out in .*: `git switch main` there, or "),
        ("loop", in_the_way, r"nov23 is in the way and no worktree of this repository: move it away$"),
    ],
)
def test_what_cannot_be_worked_with(how: str, condition: Callable[[Path], None], line: str, root: Path) -> None:
    condition(root)
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and ".git" not in path.parts}
    with pytest.raises(WorkspaceError, match=line) as caught:
        opened(how, root)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("tag", ["a b", "../up", "a/b", "x.lock", ""])
def test_a_bad_tag(tag: str, root: Path) -> None:
    with pytest.raises(WorkspaceError, match="cannot be a tag: choose letters, digits and dashes"):
        opened("loop", root, tag=tag)


@pytest.mark.parametrize("path", ["/etc/passwd", "../train.py"])
def test_a_mutable_path_outside(path: str, root: Path) -> None:
    with pytest.raises(WorkspaceError, match="must be a path inside the project"):
        opened("loop", root, mutable=(path,))


def test_one_at_a_time(root: Path) -> None:
    with opened("loop", root), pytest.raises(WorkspaceError, match=rf"another loop or try \(pid {os.getpid()}\) is at"):
        opened("try", root, tag="other")
    opened("try", root).close()


def test_a_branch_that_the_ledger_does_not_know(root: Path) -> None:
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
        head = night.ws.head
    at = night.ws.workdir
    who = ("-c", "user.name=A", "-c", "user.email=a@b")
    (at / "notes.md").write_text("a word about it\n")
    git(at, *who, "commit", "-q", "-m", "a note", "notes.md")
    with Night("loop", root) as night:  # ahead with the same mutable files: the same champion
        assert night.ws.head == git(at, "rev-parse", "HEAD") != head
        assert night.ws.champion == night.log.runs[-1]["commit"]
        night.experiment("keep", b"LR = 5\n")
        head = night.ws.head
    (at / "train.py").write_bytes(b"LR = 6\n")
    git(at, *who, "commit", "-q", "-m", "slipped in", "train.py")
    with pytest.raises(WorkspaceError, match=rf"no experiment made: undo them with `git reset --soft {head[:7]}` "):
        Night("try", at)


def test_a_branch_that_was_set_back(root: Path) -> None:
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
        night.experiment("keep", b"LR = 5\n")
        head = night.ws.head
    git(root, "update-ref", "refs/heads/autoresearch/nov23", "main")
    with pytest.raises(
        WorkspaceError, match=rf"is at .{{7}}, but the ledger's champion is {head[:7]}: `git branch -f "
    ):
        Night("loop", root)


def test_a_results_table_of_somebody_else_is_not_overwritten(root: Path) -> None:
    checked_out(root)
    (root / "results.tsv").write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n1234567\t0.9\t1\tkeep\tmine\n")
    with pytest.raises(WorkspaceError, match="holds rows that are not this ledger's: move it away"):
        Night("try", root)


# ---- kill -9 between any two steps of a try (of a loop: test_kill.py)

CHILD = """
# Forks once for each line of stdin: the number of steps that the fork may do before it is killed.
import json, os, signal, sys
from pathlib import Path
from pytest_autoresearch import _git, ledger
from pytest_autoresearch.ledger import Ledger
from pytest_autoresearch.workspace import Workspace

root, record = Path(sys.argv[1]), json.loads(sys.argv[2])
for line in sys.stdin:
    point = int(line)
    if (pid := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()

ws = Workspace.for_try(root, mutable=("train.py",), prefix="autoresearch", tag="nov23")
log = Ledger.open(ws.state / "ledger.jsonl")
ws.resume(log.history, "val_bpb")

steps = 0
READING = {"rev-parse", "ls-tree", "cat-file", "log", "symbolic-ref", "ls-files"}  # before or after is the same
def deadly(real):
    def call(*args, **kwargs):
        global steps
        if READING.isdisjoint(map(str, args)):
            if steps == point:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
        return real(*args, **kwargs)
    return call

_git.Plumbing.run = deadly(_git.Plumbing.run)
for name in ("write", "fsync", "replace", "unlink"):
    setattr(os, name, deadly(getattr(os, name)))

ws.head = record["parent"]
log.append(record)
ws.keep(log.history, "val_bpb")
"""


def test_a_kill_at_any_step_of_a_keep_is_repaired(root: Path) -> None:
    checked_out(root)
    with Night("try", root) as night:
        ws = night.ws
        (ws.workdir / "train.py").write_bytes(BETTER)
        candidate = ws.candidate(1, "raise the LR")
        final = record(candidate, "keep")
    ledger_before = {path: path.read_bytes() for path in ws.state.glob("ledger.*")}
    index = Path(git(ws.workdir, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    index_before = index.read_bytes()

    def finish(night: Night) -> None:
        (ws.workdir / "train.py").write_bytes(BETTER)
        night.finish(final)

    def rewind() -> None:
        git(root, "update-ref", f"refs/heads/{ws.branch}", candidate.parent)
        (ws.workdir / "train.py").write_bytes(BETTER)
        (ws.workdir / "results.tsv").unlink(missing_ok=True)
        for path, content in ledger_before.items():
            path.write_bytes(content)
        index.write_bytes(index_before)

    def seen() -> dict[str, Any]:
        return {
            "branch": git(root, "rev-parse", ws.branch),
            "ledger": (ws.state / "ledger.jsonl").read_bytes(),
            "results": (ws.workdir / "results.tsv").read_bytes(),
            "train.py": (ws.workdir / "train.py").read_bytes(),
            "index": git(ws.workdir, "ls-files", "--stage"),
            "status": git(ws.workdir, "status", "--porcelain"),
        }

    rewind()
    with Night("try", root) as night:
        finish(night)
    whole = seen()
    assert whole["train.py"] == BETTER

    command = [sys.executable, "-c", CHILD, str(root), json.dumps(final)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        points, status = 0, -signal.SIGKILL
        while status:
            rewind()
            print(points, file=child.stdin, flush=True)
            status = int(child.stdout.readline())
            assert status in (0, -signal.SIGKILL)
            with Night("try", root) as night:
                if len(night.log.runs) == 1:  # killed before it was on disk: the experiment is run again
                    finish(night)
            assert seen() == whole, f"killed at step {points}"
            points += 1
        child.stdin.close()
    assert points > 5
