"""The lock: every change under the locked paths is named, and the copy is of what was locked. Needs a file system."""

import os
import shutil
from pathlib import Path

import pytest

from pytest_autoresearch.lock import LockError, Snapshot, match

PATTERNS = ("oracle", "conftest.py", "laws/*.toml")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pröject root"
    for name, text in {
        "oracle/evaluate.py": "bpb = 1\n",
        "oracle/deep/er/clock.py": "now = 2\r\n",
        "oracle/__pycache__/evaluate.cpython-311.pyc": "stale",
        "oracle/loose.pyc": "stale",
        "conftest.py": "",
        "laws/one.toml": "a = 1\n",
        "train.py": "mutable\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / "oracle/alias.py").symlink_to("evaluate.py")
    return root


def test_files_and_digest(root: Path) -> None:
    lock = Snapshot.take(root, PATTERNS)
    assert list(lock.entries) == [
        "conftest.py",
        "laws/one.toml",
        "oracle/alias.py",
        "oracle/deep/er/clock.py",
        "oracle/evaluate.py",
    ]
    assert lock.contents["oracle/alias.py"] == b"evaluate.py"
    assert lock.changed(root) == []
    assert Snapshot.take(root, tuple(reversed(PATTERNS))).digest == lock.digest


def test_every_kind_of_change_is_named(root: Path) -> None:
    lock = Snapshot.take(root, PATTERNS)
    before = (root / "oracle/evaluate.py").stat()
    (root / "oracle/evaluate.py").write_text("bpb = 0\n")
    os.utime(root / "oracle/evaluate.py", ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    (root / "oracle/deep/er/clock.py").unlink()
    (root / "oracle/torch.py").write_text("")
    (root / "laws/two.toml").write_text("")
    (root / "oracle/__pycache__/new.pyc").write_text("ignored")
    (root / "train.py").write_text("free to change")
    (root / "conftest.py").unlink()
    (root / "conftest.py").symlink_to("train.py")
    (root / "laws/one.toml").chmod(0o755)
    assert lock.changed(root) == [
        "became a symlink: conftest.py",
        "mode changed: laws/one.toml (100644 -> 100755)",
        "added: laws/two.toml",
        "missing: oracle/deep/er/clock.py",
        "changed: oracle/evaluate.py",
        "added: oracle/torch.py",
    ]
    assert Snapshot.take(root, ("oracle",)).digest != Snapshot.take(root, ("laws",)).digest


def test_a_link_that_points_elsewhere_is_a_change(root: Path) -> None:
    lock = Snapshot.take(root, PATTERNS)
    (root / "oracle/alias.py").unlink()
    (root / "oracle/alias.py").symlink_to("deep/er/clock.py")
    assert lock.changed(root) == ["changed: oracle/alias.py"]


def test_the_copy_is_of_what_was_locked(root: Path, tmp_path: Path) -> None:
    lock = Snapshot.take(root, PATTERNS)
    (root / "oracle/evaluate.py").write_text("bpb = 0\n")
    lock.write(tmp_path / "copy")
    copied = Snapshot.take(tmp_path / "copy", PATTERNS)
    assert copied == lock
    assert not (tmp_path / "copy/train.py").exists()


@pytest.mark.parametrize("target", ["../train.py", "/etc/hostname", "nowhere.py"])
def test_a_link_out_of_the_lock_is_refused(root: Path, target: str) -> None:
    (root / "oracle/hole.py").symlink_to(target)
    with pytest.raises(LockError, match=r"oracle/hole.py is a symlink to .*, outside the locked files"):
        Snapshot.take(root, PATTERNS)


def test_what_turns_up_under_a_pattern_that_named_nothing_is_added(root: Path) -> None:
    lock = Snapshot.take(root, ("oracle", "pytest.ini"))
    (root / "pytest.ini").write_text("[pytest]\n")
    assert lock.changed(root) == ["added: pytest.ini"]


def test_line_ends_do_not_count(root: Path) -> None:
    lock = Snapshot.take(root, PATTERNS)
    (root / "oracle/evaluate.py").write_bytes(b"bpb = 1\r\n")
    (root / "oracle/deep/er/clock.py").write_bytes(b"now = 2\n")
    assert lock.changed(root) == []
    assert Snapshot.take(root, PATTERNS).digest == lock.digest
    (root / "oracle/evaluate.py").write_bytes(b"bpb = 1\r")
    assert lock.changed(root) == ["changed: oracle/evaluate.py"]


def test_a_binary_files_line_ends_count(root: Path) -> None:
    (root / "oracle/table.npy").write_bytes(b"\0\r\n")
    lock = Snapshot.take(root, PATTERNS)
    (root / "oracle/table.npy").write_bytes(b"\0\n")
    assert lock.changed(root) == ["changed: oracle/table.npy"]


@pytest.mark.parametrize("edit", ["in place", "by another file", "mode"])
def test_an_edit_that_was_undone_is_named(root: Path, edit: str) -> None:
    lock, path = Snapshot.take(root, PATTERNS), root / "oracle/evaluate.py"
    marks, before = lock.marks(root), path.stat()
    assert lock.touched(root, marks) == []
    if edit == "in place":
        path.write_text("bpb = 0\n")
        path.write_text("bpb = 1\n")
    elif edit == "by another file":
        path.rename(root / "aside")
        path.write_text("bpb = 1\n")
    else:
        path.chmod(0o777)
        path.chmod(0o644)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (root / "conftest.py").write_text("broken = True\n")
    assert lock.touched(root, marks) == ["changed: conftest.py", "edited and restored: oracle/evaluate.py"]


def test_everything_is_put_back(root: Path, tmp_path: Path) -> None:
    lock = Snapshot.take(root, PATTERNS)
    (root / "oracle/evaluate.py").unlink()
    (root / "oracle/evaluate.py").mkdir()
    (root / "oracle/evaluate.py/x").write_text("in the way")
    (root / "oracle/torch.py").write_text("added")
    (root / "oracle/alias.py").unlink()
    shutil.rmtree(root / "laws")
    (root / "laws").symlink_to(tmp_path)
    (root / "conftest.py").chmod(0o755)
    (root / "train.py").write_text("free to change")
    (aside := tmp_path / "aside").mkdir()
    lock.restore(root, aside)
    assert lock.changed(root) == []
    assert (root / "train.py").read_text() == "free to change"
    assert "added" in {path.read_text() for path in aside.rglob("*") if path.is_file()}
    lock.restore(root, aside)
    assert lock.changed(root) == []


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("oracle", "oracle/deep/er/clock.py", True),
        ("oracle", "oracles/clock.py", False),
        ("oracle/*.py", "oracle/clock.py", True),
        ("oracle/*.py", "oracle/deep/clock.py", False),
        ("**/*.toml", "laws/one.toml", True),
        ("**/*.toml", "one.toml", True),
        ("laws/*", "laws/deep/one.toml", True),
        ("conftest.py", "tests/conftest.py", False),
    ],
)
def test_a_pattern_matches_what_a_walk_finds(tmp_path: Path, pattern: str, path: str, expected: bool) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    assert match(path, pattern) is expected
    assert (path in Snapshot.take(tmp_path, (pattern,)).entries) is expected


def test_a_pipe_is_refused(root: Path) -> None:
    os.mkfifo(root / "oracle/pipe.py")
    with pytest.raises(LockError, match="no regular file"):
        Snapshot.take(root, PATTERNS)
