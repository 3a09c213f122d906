"""Digests of the files that decide a score, and a pristine copy of them taken when the loop starts."""

import hashlib
import json
import os
import posixpath
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class LockError(Exception):
    """A locked path that cannot be locked, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The locked files as they were at one moment, bytes included."""

    patterns: tuple[str, ...]
    files: Mapping[str, bytes]  # relative POSIX path -> content
    links: Mapping[str, str]  # relative POSIX path -> where the symlink points
    digests: Mapping[str, str]  # relative POSIX path -> sha256, sorted

    @classmethod
    def take(cls, root: Path, patterns: Sequence[str]) -> "Snapshot":
        """Read every file under `patterns`: files, folders (recursively) or globs, relative to `root`.

        `__pycache__` and `*.pyc` are left out: they are no source and must not be run. Raises LockError for a
        pattern without a file and for a symlink that leads out of the locked files.
        """
        files: dict[str, bytes] = {}
        links: dict[str, str] = {}
        for pattern in patterns:
            found = list(_paths(root, pattern))
            if not found:
                raise LockError(f"immutable path {pattern!r} names no file in {root}: correct or remove it")
            for path in found:
                name = path.relative_to(root).as_posix()
                content = _content(path)
                if isinstance(content, str):
                    links[name] = content
                else:
                    files[name] = content
        for name, target in links.items():
            inside = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            if not any(other == inside or other.startswith(inside + "/") for other in files):
                raise LockError(f"{name} is a symlink to {target}, outside the locked files: put the file in place")
        contents: dict[str, bytes | str] = {**files, **links}
        digests = {name: _sha256(contents[name]) for name in sorted(contents)}
        return cls(patterns=tuple(patterns), files=files, links=links, digests=digests)

    @property
    def digest(self) -> str:
        """Return one sha256 over all names and contents."""
        return hashlib.sha256(json.dumps(dict(self.digests), sort_keys=True).encode()).hexdigest()

    def changed(self, root: Path) -> list[str]:
        """Return one line for each locked file that is changed, missing or new under `root`, sorted by name."""
        now = {path.relative_to(root).as_posix(): path for p in self.patterns for path in _paths(root, p)}
        lines: list[str] = []
        for name in sorted(now.keys() | self.digests.keys()):
            if name not in now:
                lines.append(f"missing: {name}")
            elif name not in self.digests:
                lines.append(f"added: {name}")
            elif not _matches(now[name], self.digests[name]):
                lines.append(f"changed: {name}")
        return lines

    def write(self, directory: Path) -> None:
        """Write the files, as they were when the snapshot was taken, into an empty or new `directory`."""
        for name, content in self.files.items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as file:
                file.write(content)
        for name, link in self.links.items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(link)


def _paths(root: Path, pattern: str) -> Iterator[Path]:
    """Yield the files and symlinks that `pattern` names, folders walked without following links."""
    start = root / pattern
    for top in [start] if os.path.lexists(start) else sorted(root.glob(pattern)):
        if top.is_symlink() or not top.is_dir():
            yield top
            continue
        for folder, folders, names in os.walk(top):
            linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            folders[:] = [name for name in folders if name != "__pycache__" and name not in linked]
            for name in [*linked, *names]:
                if not name.endswith(".pyc"):
                    yield Path(folder, name)


def _content(path: Path) -> bytes | str:
    """Return a file's bytes, or where a symlink points."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return os.readlink(path)
        if not stat.S_ISREG(mode):
            raise LockError(f"{path} is no regular file and cannot be locked: remove it")
        return path.read_bytes()
    except OSError as error:
        raise LockError(f"cannot read the locked file {path}: {error.strerror}") from error


def _sha256(content: bytes | str) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else b"link:" + os.fsencode(content)).hexdigest()


def _matches(path: Path, digest: str) -> bool:
    try:
        return _sha256(_content(path)) == digest
    except LockError:  # now unreadable or no file any more: changed
        return False
