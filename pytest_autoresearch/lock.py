"""The files that decide a score as they are at one moment: compared later, copied pristine, put back."""

import fnmatch
import hashlib
import json
import os
import posixpath
import shutil
import site
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ._files import clear

LINK = "120000"  # git's mode of a symlink
STARTUP_FILES = ("*.pth", "sitecustomize*", "usercustomize*")  # what Python runs of a site folder at every start


class LockError(Exception):
    """A locked path that cannot be locked, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is locked of one file. Of text the line ends do not count: CRLF is taken for LF where there is no NUL."""

    sha256: str
    size: int
    mode: str  # as git writes it: 100644, 100755, 120000

    @classmethod
    def of(cls, content: bytes, mode: str) -> "Entry":
        """Return the entry of a file's content, or of where a symlink points."""
        if mode != LINK and b"\0" not in content:
            content = content.replace(b"\r\n", b"\n")
        return cls(sha256=hashlib.sha256(content).hexdigest(), size=len(content), mode=mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The locked files as they were at one moment, bytes included."""

    patterns: tuple[str, ...]
    contents: Mapping[str, bytes]  # relative POSIX path -> content; of a symlink, where it points
    entries: Mapping[str, Entry]  # the same paths, sorted

    @classmethod
    def take(cls, root: Path, patterns: Sequence[str]) -> "Snapshot":
        """Read every file under `patterns`: files, folders (recursively) or globs, relative to `root`.

        `__pycache__` and `*.pyc` are left out: they are no source and must not be run. A pattern may name nothing
        yet. Raises LockError for a symlink that leads out of the locked files.
        """
        found = {path.relative_to(root).as_posix(): _read(path) for path in _paths(root, patterns)}
        for name, (content, mode) in found.items():
            if mode == LINK:
                target = os.fsdecode(content)
                inside = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                files = (other for other, (_, kind) in found.items() if kind != LINK)
                if not any(other == inside or other.startswith(inside + "/") for other in files):
                    raise LockError(f"{name} is a symlink to {target}, outside the locked files: put the file in place")
        return cls(
            patterns=tuple(patterns),
            contents={name: content for name, (content, _) in found.items()},
            entries={name: Entry.of(*found[name]) for name in sorted(found)},
        )

    @property
    def digest(self) -> str:
        """Return one sha256 over all names, contents and modes."""
        listed = [[name, entry.sha256, entry.mode] for name, entry in self.entries.items()]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def changed(self, root: Path) -> list[str]:
        """Return one line for each locked file that is not as it was under `root`, sorted by name."""
        return list(differences(self.entries, self.now(root)).values())

    def marks(self, root: Path) -> dict[str, tuple[int, ...]]:
        """Return what the file system knows of each locked file: it changes with every edit, also one undone."""
        marks: dict[str, tuple[int, ...]] = {}
        for path in _paths(root, self.patterns):
            seen = path.lstat()
            marks[path.relative_to(root).as_posix()] = (seen.st_dev, seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns)
        return marks

    def touched(self, root: Path, marks: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return one line for each locked file that is not as it was, now or at any time since `marks`."""
        lines, now = differences(self.entries, self.now(root)), self.marks(root)
        again = {name: f"edited and restored: {name}" for name in self.entries if now.get(name) != marks.get(name)}
        return [line for _, line in sorted({**again, **lines}.items())]

    def write(self, directory: Path) -> None:
        """Write the files, as they were when the snapshot was taken, into an empty or new `directory`."""
        for name in self.contents:
            self._write(directory / name, name)

    def restore(self, root: Path, aside: Path) -> None:
        """Put the locked files under `root` back; what was added or is in the way moves to a new folder in `aside`."""
        wrong = differences(self.entries, self.now(root))
        for name in wrong:
            clear(root, name, aside)
            if os.path.lexists(root / name):
                shutil.move(root / name, tempfile.mkdtemp(prefix="aside-", dir=aside))
        for name in wrong.keys() & self.contents.keys():
            self._write(root / name, name)

    def now(self, root: Path) -> dict[str, Entry]:
        """Return the entries of what the patterns name under `root` now."""
        now = {}
        for path in _paths(root, self.patterns):
            name = path.relative_to(root).as_posix()
            try:
                now[name] = Entry.of(*_read(path))
            except LockError:  # unreadable, or a pipe: differs from every file
                now[name] = Entry(sha256="", size=0, mode="")
        return now

    def _write(self, target: Path, name: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.entries[name].mode == LINK:
            target.symlink_to(os.fsdecode(self.contents[name]))
            return
        with open(target, "xb") as file:
            file.write(self.contents[name])
        target.chmod(0o755 if self.entries[name].mode == "100755" else 0o644)


def differences(before: Mapping[str, Entry], now: Mapping[str, Entry]) -> dict[str, str]:
    """Return {name: line} of each file that is not the same, sorted by name."""
    lines = {}
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if new is None:
            lines[name] = f"missing: {name}"
        elif old is None:
            lines[name] = f"added: {name}"
        elif new.mode == LINK != old.mode:
            lines[name] = f"became a symlink: {name}"
        elif old.sha256 != new.sha256:
            lines[name] = f"changed: {name}"
        elif old.mode != new.mode:
            lines[name] = f"mode changed: {name} ({old.mode} -> {new.mode})"
    return lines


def startup_files() -> dict[str, Entry]:
    """Return what Python runs of itself at every start: `.pth` files and customization modules of its site folders."""
    folders = {*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])}
    found = (path for folder in folders for pattern in STARTUP_FILES for path in Path(folder).glob(pattern))
    return {str(path): Entry.of(*_read(path)) for path in sorted(found) if not path.is_dir()}


def match(path: str, pattern: str) -> bool:
    """Return whether `pattern` (a file, a folder or a glob) names the POSIX path or a folder that it is in."""
    parts, wanted = path.split("/"), pattern.split("/")
    return any(_match(parts[:end], wanted) for end in range(1, len(parts) + 1))


def _match(parts: list[str], wanted: list[str]) -> bool:
    if not wanted or not parts:
        return all(part == "**" for part in wanted) and not parts
    if wanted[0] == "**":
        return _match(parts, wanted[1:]) or _match(parts[1:], wanted)
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _match(parts[1:], wanted[1:])


def _paths(root: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Yield the files and symlinks that `patterns` name, each once, folders walked without following links."""
    tops = (
        top
        for pattern in patterns
        for top in ([root / pattern] if os.path.lexists(root / pattern) else sorted(root.glob(pattern)))
    )
    seen = set()
    for top in tops:
        for path in _walk(top):
            if path not in seen:
                seen.add(path)
                yield path


def _walk(top: Path) -> Iterator[Path]:
    if top.is_symlink() or not top.is_dir():
        yield top
        return
    for folder, folders, names in os.walk(top):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if name != "__pycache__" and name not in linked]
        for name in [*linked, *names]:
            if not name.endswith(".pyc"):
                yield Path(folder, name)


def _read(path: Path) -> tuple[bytes, str]:
    """Return a file's bytes, or where a symlink points, and its mode as git writes it."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return os.fsencode(os.readlink(path)), LINK
        if not stat.S_ISREG(mode):
            raise LockError(f"{path} is no regular file and cannot be locked: remove it")
        return path.read_bytes(), "100755" if mode & 0o100 else "100644"
    except OSError as error:
        raise LockError(f"cannot read the locked file {path}: {error.strerror}") from error
