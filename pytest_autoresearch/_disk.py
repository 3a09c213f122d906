"""Folders that candidates write in: removed whatever they hold, and told full or not."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


def remove(folder: Path) -> None:
    """Remove a folder, also one whose subfolders a candidate made read-only; a link is removed as such."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.is_dir():
        folder.chmod(0o700)
    for top, names, _ in os.walk(folder):
        for path in (Path(top, name) for name in names):
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def has_room(folder: Path, megabytes: int) -> bool:
    """Tell whether so many MiB can be written in `folder`, by writing them: what is free says nothing of quotas."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(megabytes):
                file.write(bytes(2**20))
    except OSError as error:
        return error.errno not in FULL
    return True
