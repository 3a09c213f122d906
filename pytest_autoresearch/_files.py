"""Files of a work tree, read and replaced without following a symlink out of it."""

import os
import shutil
import stat
import tempfile
from pathlib import Path


class WorkspaceError(Exception):
    """What stands in the way of working with files and repository, and what to do, in one line."""


def place(top: Path, path: str) -> Path:
    """Return where `path` lies below `top`; raise WorkspaceError if a symlinked folder leads elsewhere."""
    target = top / path
    if os.path.realpath(target.parent) != os.path.join(os.path.realpath(top), *Path(path).parent.parts):
        raise WorkspaceError(f"{target.parent} leads through a symlink: put the folder back in its place")
    return target


def read(top: Path, path: str) -> bytes:
    """Return the bytes of a regular file; raise WorkspaceError if it is anything else."""
    target = place(top, path)
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if not (target.is_symlink() or isinstance(error, FileNotFoundError)):
            raise WorkspaceError(f"cannot read {target}: {error.strerror}") from error
    else:
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read()
        finally:
            os.close(descriptor)
    raise WorkspaceError(f"mutable file {target} is missing or no regular file: put it back as one")


def is_regular(path: Path) -> bool:
    """Return whether `path` is a file and no symlink to one."""
    return path.is_file() and not path.is_symlink()


def clear(top: Path, path: str, aside: Path) -> None:
    """Move what keeps a regular file from being written at `path` below `top` into a new folder in `aside`.

    That is a folder in the file's place, or anything but a folder in the place of one that leads to it.
    """
    target = top / path
    leading = [folder for folder in reversed(target.parents) if folder.is_relative_to(top) and folder != top]
    wrong = [folder for folder in leading if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir())]
    if not wrong and target.is_dir() and not target.is_symlink():
        wrong = [target]
    for found in wrong[:1]:
        try:
            shutil.move(found, tempfile.mkdtemp(prefix="aside-", dir=aside))
        except OSError as error:
            raise WorkspaceError(f"{found} is in the way: {error.strerror}") from error


def write(path: Path, data: bytes, *, executable: bool = False) -> None:
    """Replace the file at `path` in one step; an equal one is left as it is."""
    try:
        if is_regular(path) and path.read_bytes() == data and bool(path.stat().st_mode & 0o100) == executable:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.autoresearch-new")
        new.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(new, flags, 0o777 if executable else 0o666), "wb") as file:
            file.write(data)
        os.replace(new, path)
    except OSError as error:
        raise WorkspaceError(f"cannot write {path}: {error.strerror}") from error
