"""The lock: every change under the locked paths is named, and the copy is of what was locked. Needs a file system."""

import os
from pathlib import Path

import pytest

from pytest_autoresearch.lock import LockError, Snapshot

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
    assert list(lock.digests) == [
        "conftest.py",
        "laws/one.toml",
        "oracle/alias.py",
        "oracle/deep/er/clock.py",
        "oracle/evaluate.py",
    ]
    assert lock.links == {"oracle/alias.py": "evaluate.py"}
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
    assert lock.changed(root) == [
        "changed: conftest.py",
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


def test_a_pattern_without_files_is_refused(root: Path) -> None:
    with pytest.raises(LockError, match=r"'orcale' names no file in .*: correct or remove it"):
        Snapshot.take(root, ("orcale",))


def test_a_pipe_is_refused(root: Path) -> None:
    os.mkfifo(root / "oracle/pipe.py")
    with pytest.raises(LockError, match="no regular file"):
        Snapshot.take(root, PATTERNS)
