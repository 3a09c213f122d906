"""Real shortage, as far as this machine lets a test make it: a small file system, a small control group.

Both need root's rights; a test that cannot have them is skipped.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs with `options` (size=1m, nr_inodes=1) on a folder, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def little_memory(name: str, megabytes: int) -> Iterator[Path]:
    """Make a control group (version 1 or 2) whose processes have so many MiB together, and must end with the block."""
    groups = Path("/sys/fs/cgroup")
    old = (groups / "memory").is_dir()
    group = (groups / "memory" if old else groups) / name
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        limit = group / ("memory.limit_in_bytes" if old else "memory.max")
        try:
            limit.write_text(str(megabytes * 2**20))
        except OSError as error:
            pytest.skip(f"memory cannot be limited here: {error}")
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(int(pid)).wait(timeout=10)
        group.rmdir()
