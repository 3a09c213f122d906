"""What must hold of the pytest process before it checks anything: installed code alone, and the project asked for.

It sees what has happened already; code that ran at start and covered its tracks it does not see (docs/threats.md).
"""

import os
import shlex
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lock import STARTUP_FILES

START = "start `pytest` (not `python -m pytest`) from a virtual environment, without PYTHONPATH and PYTHONUSERBASE"


def refuse(config: pytest.Config) -> None:
    """Raise a UsageError where code or options that the checkout, the home or the environment brought are at work."""
    if sys.pycache_prefix is not None:
        raise pytest.UsageError(
            f"PYTHONPYCACHEPREFIX is {sys.pycache_prefix!r}: bytecode from there would run in place of what is "
            "installed; unset it"
        )
    if addopts := os.environ.get("PYTEST_ADDOPTS"):
        chosen = config._parser.parse_known_args(shlex.split(addopts))
        if chosen.rootdir or chosen.inifilename or chosen.file_or_dir:
            raise pytest.UsageError(
                f"PYTEST_ADDOPTS is {addopts!r}: only the command line itself may choose the project; "
                "give --rootdir, -c and paths there"
            )
    if site.ENABLE_USER_SITE:
        found = [path for pattern in STARTUP_FILES for path in Path(site.getusersitepackages()).glob(pattern)]
        if found:
            raise pytest.UsageError(f"{min(found)} runs whenever Python starts: {START}, or set PYTHONNOUSERSITE=1")
    if foreign := next(_foreign_modules(config), None):
        name, path = foreign
        raise pytest.UsageError(f"module {name} of this process is {path}, which is no installed package: {START}")


def _foreign_modules(config: pytest.Config) -> Iterator[tuple[str, str]]:
    """Yield name and file of each loaded module that the checkout, PYTHONPATH or the user site provides."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [str(config.rootpath), str(config.invocation_params.dir), *filter(None, entries)]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    ours = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    installed = _real([*ours, *site.getsitepackages(), str(Path(__file__).parent)])
    foreign = _real(folders)
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and os.path.isabs(path):  # torch.classes says "_classes.py", which is no file
            real = os.path.realpath(path)
            if real.startswith(foreign) and not real.startswith(installed):
                yield name, path


def _real(folders: list[str]) -> tuple[str, ...]:
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
