"""The compile cache: what torch.compile and Triton made for the first baseline, lent to every later run.

1. `lend` gives each process of a candidate a cache folder of its own, with a copy of what is kept for its role.
2. `take` copies the folder of the first baseline's trainer when its clock starts, so that nothing in it was trained,
   and that of its scorer, which no trainer is ever lent.
3. `keep` puts these copies in their place once the run has a score. The first baseline is the user's own commit.

So nothing that a later candidate compiles outlives its run. What is kept has pickles and machine code in it: processes
in the sandbox load them, the judge never does; it only copies.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

FOLDER = "compiled"  # in a process's own home
MAX_BYTES = 2**30
MAX_FILES = 50_000  # folders included

Role = Literal["trainer", "scorer"]
Compiled = Mapping[str, Any]  # of a request: "path" of what is kept, and whether to "keep" it where there is none


class _Unfit(Exception):
    """A cache that is not kept."""


def lend(compiled: Compiled | None, role: Role, home: Path) -> dict[str, str]:
    """Fill a process's cache folder below its `home`; return the environment that names it."""
    folder = home / FOLDER
    if compiled is not None and (kept := Path(compiled["path"], role)).is_dir():
        with _without(folder):
            _copy(kept, folder)
            _move_groups(folder)
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


def take(compiled: Compiled | None, role: Role, home: Path) -> None:
    """Copy the cache of the process at `home`, which may still run, if it is to be kept."""
    if compiled is None or not compiled["keep"] or Path(compiled["path"]).exists():
        return
    new = _new(compiled) / role
    shutil.rmtree(new, ignore_errors=True)
    try:
        with _without(new):
            _copy(home / FOLDER, new)
    except OSError as error:  # also a full disk: a run needs no cache
        shutil.rmtree(new, ignore_errors=True)
        print(f"compile cache not kept: {error}", flush=True)


def keep(compiled: Compiled | None) -> None:
    """Put what `take` copied in its place, in one step."""
    if compiled is not None and compiled["keep"] and (new := _new(compiled)).is_dir():
        try:
            if any(new.iterdir()):
                new.rename(compiled["path"])
            else:
                new.rmdir()
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            print(f"compile cache not kept: {error}", flush=True)


def _new(compiled: Compiled) -> Path:
    return Path(f"{compiled['path']}.new")


@contextmanager
def _without(folder: Path) -> Iterator[None]:
    """Leave no `folder` where what fills it finds something unfit."""
    try:
        yield
    except _Unfit as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"compile cache left out: {error}", flush=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a tree of regular files; raise _Unfit for anything else in it, and for more than there may be.

    Whoever owns it may change it meanwhile: every name is looked up in an open folder, and no link is followed.
    """
    files, size = 0, 0
    for folder, folders, names, fd in os.fwalk(source, follow_symlinks=False):
        place = target / os.path.relpath(folder, source)
        place.mkdir(parents=True)
        files += len(folders) + len(names)
        if files > MAX_FILES or len(place.parts) - len(target.parts) > 50:
            raise _Unfit(f"more than {MAX_FILES} files, or folders more than 50 deep")
        for name in (*folders, *names):
            mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            if not (stat.S_ISDIR(mode) if name in folders else stat.S_ISREG(mode)):
                raise _Unfit(f"{place / name} is no regular file")
        for name in names:
            opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
            with open(opened, "rb") as file:
                if not stat.S_ISREG(os.fstat(opened).st_mode):
                    raise _Unfit(f"{place / name} is no regular file")
                data = file.read(MAX_BYTES - size + 1)
            size += len(data)
            if size > MAX_BYTES:
                raise _Unfit(f"more than {MAX_BYTES} bytes")
            (place / name).write_bytes(data)


def _move_groups(folder: Path) -> None:
    """Let Triton's lists of files that belong together name these here: they hold full paths of where they were made.

    See FileCacheManager.get_group in triton/runtime/cache.py.
    """
    for path in folder.rglob("__grp__*.json"):
        try:
            names = [Path(name).name for name in json.loads(path.read_bytes())["child_paths"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _Unfit(f"{path.name} is no list of files") from error
        path.write_text(json.dumps({"child_paths": {name: str(path.with_name(name)) for name in names if name}}))
