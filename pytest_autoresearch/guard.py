"""`--autoresearch-guard REF`: which immutable files HEAD changes, read from git's object database alone.

1. REF and HEAD become commits, and these their trees. Nothing of the checkout is looked at: HEAD's author made it.
2. What is immutable stands in the pytest configuration that REF has, so HEAD cannot narrow it.
3. A path is named when HEAD has another mode or content than REF and than a merge base: what REF changed since they
   parted is not HEAD's doing, but what a merge on the way took back is.
4. `--autoresearch-allow-oracle-change` lets a change pass whose oracle.lock was updated with it and is right, if the
   laws and determinism hold in a copy of HEAD's tree.

HEAD's author is taken for an adversary, who also wrote the configuration that this very pytest has read: only what
stands on the command line itself relaxes anything.
"""

import fnmatch
import glob
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import iniconfig
import pytest

from . import _trees
from ._git import Plumbing, WorkspaceError
from ._trees import KINDS, SUBMODULE, Tree, folded, shown
from .lock import Entry, LockError, match
from .lockfile import FILE, Lock
from .plugin import INI_KEYS
from .settings import immutable_patterns
from .supervise import clean_environment

GUARD, ALLOW = "--autoresearch-guard", "--autoresearch-allow-oracle-change"
UPDATE = "`pytest --autoresearch-lock=update`"
CACHE = "__pycache__"
# The files that pytest looks for its configuration in, in that order, and their section
CONFIGURATION = {
    **dict.fromkeys(("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini"), "pytest"),
    **{"pyproject.toml": "tool.pytest", "tox.ini": "pytest", "setup.cfg": "tool:pytest"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """What a commit says of the project. Names are compared as a file system without case or Unicode forms would."""

    folder: str  # from the repository's top: "" or "sub/folder/"
    table: Mapping[str, Any]  # pytest's configuration
    patterns: tuple[str, ...]  # of what is immutable, relative to the folder
    configurations: frozenset[str]  # from the top: files that would change where pytest finds folder and table
    projects: frozenset[str]  # from the top: configurations of other folders that pytest may have been started for

    def watches(self, path: str) -> bool:
        """Return whether `path` is immutable, or an import or file system takes it for something that is."""
        name, folder = folded(path), folded(self.folder)
        if name in map(folded, self.configurations):
            return True
        names = {name.removeprefix(folder), _source(name).removeprefix(folder)} if name.startswith(folder) else ()
        return any(match(name, folded(pattern)) for name in names for pattern in self.patterns)

    def leads_through(self, path: str) -> bool:
        """Return whether a link at `path` would bring what is immutable, or its compiled code, from elsewhere."""
        name, folder = folded(path), folded(self.folder)
        if name.startswith(folder) and name.rpartition("/")[2] == CACHE:
            return True
        files = map(glob.escape, [*self.configurations, *self.projects])
        ways = (*files, *(glob.escape(self.folder) + pattern for pattern in self.patterns))
        return any(_begins(folded(way).split("/"), name.split("/")) for way in ways)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One immutable path that HEAD changes."""

    path: str  # from the repository's top
    line: str


def main(config: pytest.Config) -> int:
    """Print a line for each immutable file that HEAD changes; return 1 where that is not allowed."""
    try:
        return _guard(config)
    except (WorkspaceError, LockError) as error:
        raise pytest.UsageError(f"{GUARD}: {error}") from None


def _guard(config: pytest.Config) -> int:
    ref = str(config.known_args_namespace.autoresearch_guard)
    git = _trees.repository(config.invocation_params.dir)
    _trees.refuse_shallow(git)
    base, head = _trees.commit(git, ref), _trees.commit(git, "HEAD")
    forks = [_trees.read(git, "a merge base", fork) for fork in _trees.merge_bases(git, ref, base, head)]
    old, new = _trees.read(git, ref, base), _trees.read(git, "HEAD", head)
    project = _project(git, old, ref, _start(config, git.directory))
    if not any(project.watches(path) for path in old):
        where = project.folder or "its top"
        raise WorkspaceError(f"{ref} has no immutable file below {where}: start pytest in the project's folder")
    _warn(config, git.directory)
    found = changes(old, new, forks, project)
    words = f"guard: HEAD ({head[:7]}) changes {{}} of {ref} ({base[:7]})"
    if not found:
        print(words.format("no immutable file"))
        return 0
    words = words.format("1 immutable path" if len(found) == 1 else f"{len(found)} immutable paths")
    allow = ALLOW in config.invocation_params.args
    problems = _unlocked(git, new, found, project) if allow else []
    for change in found:
        print(change.line)
        if os.environ.get("GITHUB_ACTIONS") == "true":
            print(annotation("warning" if allow and not problems else "error", change))
    for problem in problems:
        print(f"not allowed: {problem}")
    if problems or not allow:
        merge = f", or merge {ref} if it is not yours" if len(forks) > 1 else ""
        print(
            f"{words}: take that back (`git checkout {ref} -- PATH`){merge}; if it is meant, run {UPDATE}, commit, "
            f"and have the guard run with {ALLOW}"
        )
        return 1
    failed = _failed_checks(git, new, project)
    print(f"{words}, {FILE} is right for it, {failed or 'the laws and determinism hold'}")
    return int(bool(failed))


def _warn(config: pytest.Config, top: Path) -> None:
    """Say what was ignored, and what makes the answer worth less than it looks."""
    if config.known_args_namespace.autoresearch_allow_oracle_change and ALLOW not in config.invocation_params.args:
        print(f"{ALLOW} counts on the command line only, not in addopts or PYTEST_ADDOPTS: it is ignored")
    if os.environ.get("CI") and config.inipath is not None and config.inipath.is_relative_to(top):
        print(
            f"note: this pytest has read {config.inipath}, with which HEAD's author can keep it from guarding "
            f"anything: in CI run `pytest -c {os.devnull} --rootdir . {GUARD} REF`"
        )


# ---- what is changed ----


def changes(old: Tree, new: Tree, forks: Sequence[Tree], project: Project) -> list[Change]:
    """Return what HEAD (`new`) changes of what is immutable at REF (`old`), by path; `forks` are the merge bases."""
    touched = {
        path: fork.get(path)
        for fork in reversed(forks)
        for path in old.keys() | new.keys() | fork.keys()
        if new.get(path) not in (old.get(path), fork.get(path))
    }
    links = {path for path in touched if path in new and new[path][0] in KINDS}
    named = {path for path in touched if project.watches(path) or (path in links and project.leads_through(path))}
    moved = _moves(touched, new, named)
    found = [Change(path=there, line=f"renamed: {shown(path)} -> {shown(there)}") for path, there in moved.items()]
    for path in named - moved.keys() - set(moved.values()):
        was_folder = path in links and any(other.startswith(f"{path}/") for tree in (old, *forks) for other in tree)
        found.append(Change(path=path, line=_line(shown(path), touched[path], new.get(path), was_folder)))
    return sorted(found, key=lambda change: change.path)


def _moves(touched: Mapping[str, tuple[str, str] | None], new: Tree, named: set[str]) -> dict[str, str]:
    """Return {old path: new path} of files that moved, as they are, into, out of or within what is named."""
    fresh: dict[str, list[str]] = defaultdict(list)
    for path in sorted(touched):
        if touched[path] is None:
            fresh[new[path][1]].append(path)
    moved = {}
    for path, before in sorted(touched.items()):
        if before is None or path in new:
            continue
        candidates = [other for other in fresh[before[1]] if path in named or other in named]
        if candidates:
            name = path.rpartition("/")[2]
            moved[path] = min(candidates, key=lambda other: (other.rpartition("/")[2] != name, other))
            fresh[before[1]].remove(moved[path])
    return moved


def _line(name: str, before: tuple[str, str] | None, after: tuple[str, str] | None, was_folder: bool) -> str:
    if after is None:
        return f"missing: {name}"
    kind = KINDS.get(after[0])
    if before is None and not was_folder:
        return f"added: {name} ({kind})" if kind else f"added: {name}"
    if kind and (before is None or before[0] != after[0]):
        return f"became {kind}: {name}"
    if before is not None and before[1] == after[1]:
        return f"mode changed: {name} ({before[0]} -> {after[0]})"
    return f"changed: {name}"


def _begins(way: Sequence[str], parts: Sequence[str]) -> bool:
    return len(parts) < len(way) and all(map(fnmatch.fnmatchcase, parts, way))


def _source(path: str) -> str:
    """Return the file for which Python may run compiled code at `path`: a/x.py of a/__pycache__/x.cpython-311.pyc."""
    parts = [part for part in path.split("/") if part != CACHE]
    if parts and parts[-1].endswith(".pyc"):
        parts[-1] = parts[-1].partition(".")[0] + ".py"
    return "/".join(parts)


def annotation(level: str, change: Change) -> str:
    """Return GitHub's workflow command that marks a file.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """

    def escaped(text: str, signs: str) -> str:
        for sign in f"%\r\n{signs}":  # the percent sign first
            text = text.replace(sign, f"%{ord(sign):02X}")
        return text

    return f"::{level} file={escaped(shown(change.path), ':,')},title=immutable file::{escaped(change.line, '')}"


# ---- what is immutable ----


def _start(config: pytest.Config, top: Path) -> str:
    """Return the folder that pytest was started for: the command line's --rootdir, else the working directory."""
    given, args = "", [str(argument) for argument in config.invocation_params.args]
    for argument, following in zip(args, [*args[1:], ""], strict=True):
        if argument == "--rootdir":
            given = following
        elif argument.startswith("--rootdir="):
            given = argument.partition("=")[2]
    start = PurePosixPath(os.path.relpath(config.invocation_params.dir / given, top))
    if ".." in start.parts:
        raise WorkspaceError(f"--rootdir: {given!r} is not below {top}: name the project's folder")
    return f"{start}/" if start.parts else ""


def _project(git: Plumbing, tree: Tree, name: str, start: str) -> Project:
    """Return the project as pytest would find it in the tree of commit `name` from the folder `start` upwards."""
    folders = [start[: at + 1] for at in reversed(range(len(start))) if start[at] == "/"] + [""]
    looked: list[str] = []
    for folder in folders:
        files = [folder + file for file in CONFIGURATION]
        looked += files
        tables = (_table(git, tree[path], path, name) for path in files if path in tree)
        if (table := next((table for table in tables if table is not None), None)) is not None:
            break
    else:  # what pytest goes by where nothing is configured
        marked = [folder for marker in ("pyproject.toml", "setup.py") for folder in folders if folder + marker in tree]
        folder, table = (marked or [start])[0], {}
    others = (path for path in tree if start and path.rpartition("/")[2] in CONFIGURATION)
    return Project(
        folder=folder,
        table=table,
        patterns=_patterns(table, name),
        configurations=frozenset(looked),
        projects=frozenset(others),
    )


def _patterns(table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    given = table.get("autoresearch_immutable", [])
    listed = given.split("\n") if isinstance(given, str) else map(str, given)
    paths = [PurePosixPath(pattern.strip()) for pattern in listed if pattern.strip()]
    if odd := [path for path in paths if path.is_absolute() or ".." in path.parts or not path.parts]:
        raise WorkspaceError(f"autoresearch_immutable at {name}: '{odd[0]}' is not a path inside the project")
    return immutable_patterns([str(path) for path in paths])


def _table(git: Plumbing, entry: tuple[str, str], path: str, commit: str) -> Mapping[str, Any] | None:
    """Return what a configuration file says to pytest, None where it does not count as one."""
    mode, blob = entry
    if mode in KINDS:
        raise WorkspaceError(f"{path} at {commit} is {KINDS[mode]}: put the file in its place")
    name = path.rpartition("/")[2]
    own: Mapping[str, Any] | None = None
    if name.removeprefix(".").startswith("pytest."):
        own = {}  # these count even when they say nothing
    try:
        text = git.content(blob).decode().replace("\r\n", "\n")
        if not name.endswith(".toml"):
            return iniconfig.IniConfig(name, data=text).sections.get(CONFIGURATION[name], own)
        document = tomllib.loads(text)
        if own is not None:
            return dict(document.get("pytest", own))
        native = dict(document.get("tool", {}).get("pytest", {}))
        ini: Mapping[str, Any] | None = native.pop("ini_options", None)
        return native or ini
    except (ValueError, TypeError, AttributeError, iniconfig.ParseError) as error:
        raise WorkspaceError(f"{path} at {commit} cannot be read: {error}") from None


# ---- a change that is meant ----


def _unlocked(git: Plumbing, new: Tree, found: Sequence[Change], project: Project) -> list[str]:
    """Return why HEAD's oracle.lock does not stand for the change: it is the old one, or not right for HEAD's files."""
    path = project.folder + FILE
    if path not in new or path not in {change.path for change in found}:
        return [f"{path} is {'as it was' if path in new else 'missing'}: run {UPDATE}"]
    if new[path][0] in KINDS:
        return [f"{path} is {KINDS[new[path][0]]}: put the file in its place"]
    text = git.content(new[path][1]).decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    lock = Lock.parse(text, f"{path} at HEAD")
    if lock.text() != text:
        return [f"{path} is not as {UPDATE} writes it: run that"]
    now = replace(_project(git, new, "HEAD", project.folder), folder=project.folder)
    for pattern in project.patterns:
        if pattern not in now.patterns:
            print(f"no longer immutable: {pattern}")
    entries, problems = {}, []
    for name, (mode, blob) in new.items():
        if now.watches(name) and mode == SUBMODULE:
            problems.append(f"{shown(name)} is a submodule, which cannot be locked: put its files in place")
        elif now.watches(name):
            entries[name.removeprefix(project.folder)] = Entry.of(git.content(blob), mode)
    return problems + [f"{path} does not fit: {shown(line)}" for line in lock.file_differences(entries)]


def _failed_checks(git: Plumbing, new: Tree, project: Project) -> str:
    """Run the laws and determinism in a copy of HEAD's project; return what failed.

    Of HEAD's configuration only our own keys count: no addopts, pythonpath or conftest.py of its making.
    """
    table = _project(git, new, "HEAD", project.folder).table
    options = [word for key, kind, _, _ in INI_KEYS if key in table for word in ("-o", _setting(key, kind, table[key]))]
    failed = []
    with tempfile.TemporaryDirectory(prefix="autoresearch-guard-") as home:
        root = Path(home) / "HEAD"
        _trees.export(git, new, project.folder, root)
        command = [sys.executable, "-P", "-s", "-m", "pytest", "-c", os.devnull, "--rootdir", str(root)]
        command += ["--noconftest", "-p", "no:cacheprovider", *options]
        for check in ("--autoresearch-laws", "--autoresearch-determinism"):
            sys.stdout.flush()
            done = subprocess.run([*command, check], cwd=root, env=clean_environment("PYTHON"), check=False)
            if done.returncode:
                failed.append(f"{check} failed with exit code {done.returncode}")
    return " and ".join(failed)


def _setting(key: str, kind: str, value: object) -> str:
    """Return a configured value as pytest's -o takes it."""
    if isinstance(value, list):
        value = shlex.join(map(str, value)) if kind == "args" else "\n".join(map(str, value))
    return f"{key}={value}"
