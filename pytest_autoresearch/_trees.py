"""Commits read as trees of paths from git's object database: no checkout, filter, graft or replaced object counts.

Who wrote a commit chose every name, mode and byte of it, and the names of tags and folders too.
"""

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from ._git import Plumbing, WorkspaceError

LINK, SUBMODULE = "120000", "160000"  # modes, as git writes them
KINDS = {LINK: "a symlink", SUBMODULE: "a submodule"}
ACTIONS = "in GitHub Actions, fetch-depth: 0 of actions/checkout"

Tree = Mapping[str, tuple[str, str]]  # path from the repository's top -> mode, hash


def repository(directory: Path) -> Plumbing:
    """Return git at the top of the repository around `directory`; raise WorkspaceError where there is none.

    Git is not asked where that is: a folder may hold the files of a bare repository, which git would take for one.
    """
    top = next((folder for folder in (directory, *directory.parents) if (folder / ".git").exists()), None)
    if top is None:
        raise WorkspaceError(f"{directory} is in no git repository: start pytest in a clone of one")
    git = Plumbing(top, top / ".git")
    if outer := git.maybe("rev-parse", "--show-superproject-working-tree"):
        raise WorkspaceError(f"{top} is a submodule of {outer}: start pytest there, or in a clone of its own")
    return git


def refuse_shallow(git: Plumbing) -> None:
    """Raise WorkspaceError for a clone without the history that merge bases are found in."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        raise WorkspaceError(f"{git.directory} is a shallow clone: `git fetch --unshallow`, or {ACTIONS}")


def commit(git: Plumbing, ref: str) -> str:
    """Return the hash of the commit that `ref` names; raise WorkspaceError where there is none or could be two."""
    if ref.startswith("-"):
        raise WorkspaceError(f"{ref!r} is no commit: name one, like origin/main")
    name = re.split(r"[\^~:]|@\{", ref)[0]
    if name != "HEAD" and not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name):  # git takes these for what they are
        places = [name, f"refs/{name}", *(f"refs/{kind}/{name}" for kind in ("tags", "heads", "remotes"))]
        known = set(git("for-each-ref", "--format=%(refname)", *places).splitlines()).intersection(places)
        if len(known) > 1 and name not in known:
            raise WorkspaceError(f"{ref!r} may mean {' or '.join(sorted(known))}: give one of these names")
    found = git.maybe("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if found is None and ref == "HEAD":
        raise WorkspaceError(f"{git.directory} has no commit yet: `git add -A` and `git commit` first")
    if found is None:
        branch = ref.removeprefix("origin/")
        raise WorkspaceError(
            f"there is no commit {ref!r} in {git.directory}: `git fetch origin {branch}` and give origin/{branch}; "
            f"{ACTIONS} fetches it"
        )
    return found


def merge_bases(git: Plumbing, ref: str, base: str, head: str) -> list[str]:
    """Return the commits where `head` left `base`, which `ref` names; raise WorkspaceError where they share none."""
    status, out, error = git.run("merge-base", "--all", base, head, env={"GIT_GRAFT_FILE": os.devnull})
    if status > 1:
        raise WorkspaceError(f"git merge-base failed in {git.directory}: {error.removeprefix('fatal: ')}")
    if not out:
        raise WorkspaceError(f"HEAD and {ref} have no commit in common: begin HEAD's branch at {ref}")
    return out.decode().split()


def read(git: Plumbing, name: str, commit: str) -> dict[str, tuple[str, str]]:
    """Return every path of a commit; raise WorkspaceError for a tree that git itself would never have written."""
    entries: dict[str, tuple[str, str]] = {}
    odd = []
    for row in git("ls-tree", "-r", "-z", "--full-tree", commit).split("\0")[:-1]:
        meta, _, path = row.partition("\t")
        mode, _, digest = meta.split()
        if path in entries or not {"", ".", "..", ".git"}.isdisjoint(path.lower().split("/")):
            odd.append(path)
        entries[path] = mode, digest
    folders = {path[: slash.start()] for path in entries for slash in re.finditer("/", path)}
    if odd := sorted([*odd, *folders & entries.keys()]):  # a folder that is a file too
        raise WorkspaceError(f"the tree of {name} ({commit[:7]}) is forged: see what it says of {shown(odd[0])}")
    return entries


def export(git: Plumbing, tree: Tree, folder: str, root: Path) -> None:
    """Write what is in `folder` ("" or "sub/folder/") of a tree to `root`, byte for byte as git has it."""
    inside = {path.removeprefix(folder): entry for path, entry in tree.items() if path.startswith(folder)}
    links_last = sorted(inside.items(), key=lambda item: item[1][0] == LINK)  # nothing is written through one
    try:
        root.mkdir()
        for path, (mode, blob) in links_last:
            place = root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if mode == SUBMODULE:
                place.mkdir()
            elif mode == LINK:
                place.symlink_to(os.fsdecode(git.content(blob)))
            else:
                with open(place, "xb") as file:
                    file.write(git.content(blob))
                place.chmod(0o755 if mode == "100755" else 0o644)
    except OSError as error:
        raise WorkspaceError(f"cannot write a copy of HEAD: {error.filename}: {error.strerror}") from error


def folded(path: str) -> str:
    """Return what is equal for names that a file system without case or Unicode forms takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def shown(path: str) -> str:
    """Return a path as it can be printed: no line of its own, no command to the runner that reads a CI's log."""
    if path.isprintable() and path == path.strip() and "##[" not in path:
        return path
    return ascii(path).replace("##[", r"\x23#[")
