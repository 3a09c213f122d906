"""THREATS classes 6, 7 and 9 at the door of the base branch: what the guard names of a pull request, and how it ends.

Each pull request is made in a clone of its own of one real repository, and the guard is the real `pytest` command. Its
author controls every file of HEAD, its modes, its history and its pytest configuration; the command line and the
environment are the CI's. Needs git, the fake runner of tests/plugin/lab.py, and the package to be installed.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_autoresearch.lockfile import HEADER
from tests.plugin.lab import RUNNER, TRAIN, WAIT_S, Lab, Night

pytestmark = pytest.mark.skipif(
    not [entry for entry in importlib.metadata.entry_points(group="pytest11") if entry.name == "autoresearch"],
    reason="the package is not installed here, so there is no pytest command with the plugin",
)

GUARD, ALLOW = "--autoresearch-guard=origin/main", "--autoresearch-allow-oracle-change"
SAFE = ("-c", os.devnull, "--rootdir", ".")  # nothing that HEAD's author configured is read
RUNS = "autoresearch_runner = {python} -I -S oracle/runner.py\n"
INI = f"[pytest]\n{RUNS}"
PROJECT = {
    "pytest.ini": INI,
    "train.py": TRAIN,
    "notes.md": "notes\n",
    "program.md": "Keep what is better.\n",
    "conftest.py": "# nothing yet\n",
    "lib/util.py": "UTIL = 1\n",
    "oracle/größe.py": "HEIGHT = 1\n",  # composed
    "oracle/judge.py": "SCALE = 1\n",
    "oracle/pack.py": "SIZE = 1\n",
    "oracle/runner.py": RUNNER,
    "tests/laws/test_law.py": "def test_law(): pass\n",
    "tests/test_other.py": "def test_other(): pass\n",
    ".github/workflows/autoresearch.yml": "on: pull_request\n",
}
LINK, SUBMODULE = "120000", "160000"

Contents = Mapping[str, str | None]  # of files; None for one that is removed


def build(top: Path, *commits: tuple[str, Mapping[str, str]]) -> Lab:
    """Return a repository with these commits on main, each with the branch that ends at it."""
    home = top.parent / f"{top.name} home"
    home.mkdir(parents=True)
    (home / ".gitconfig").write_text("[user]\nname = Ada\nemail = ada@example.org\n[advice]\ndetachedHead = false\n")
    env = {"HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1", "LAB_REQUESTS": str(home / "requests")}
    lab = Lab(top=top, env=env)
    top.mkdir()
    lab.git("init", "-q", "-b", "main")
    for branch, contents in commits:
        write(lab, contents)
        if branch != "main":
            lab.git("branch", branch)
    return lab


def clone(lab: Lab, path: Path, branch: str = "main") -> Lab:
    """Return a clone, as a CI makes it: HEAD detached, the branches as origin's."""
    lab.git("clone", "-q", str(lab.top), str(path))
    copy = Lab(top=path, env=lab.env)
    copy.git("checkout", "-q", "--detach", f"origin/{branch}")
    return copy


def write(lab: Lab, contents: Contents) -> None:
    """Write files, remove those without content, and commit."""
    for name, text in contents.items():
        if text is None:
            (lab.root / name).unlink()
        else:
            lab.write(name, text)
    lab.commit("files")


def stage(lab: Lab, entries: Mapping[str, tuple[str, str] | None]) -> None:
    """Commit {path: (mode, content)} past the file system; None removes a file or folder."""
    for name, entry in entries.items():
        if entry is None:
            lab.git("rm", "-q", "-r", "--cached", "--", name)
            continue
        mode, content = entry
        if mode == SUBMODULE:
            stored = lab.git("rev-parse", "HEAD")
        else:
            (lab.top.parent / "content").write_text(content)
            stored = lab.git("hash-object", "-w", "--no-filters", str(lab.top.parent / "content"))
        lab.git("update-index", "--add", "--replace", "--cacheinfo", f"{mode},{stored},{name}")
    lab.git("commit", "-q", "-m", "stage")


def run(lab: Lab, *args: str, env: Mapping[str, str] | None = None, plain: bool = False) -> Night:
    """Run pytest as a CI must, or plainly: then it reads HEAD's configuration and every installed plugin."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_", "CI", "GIT"))}
    clean["PYTHONDONTWRITEBYTECODE"] = "1"  # nothing is to be committed by accident
    if not plain:
        clean["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # for speed
        args = ("-p", "pytest_autoresearch.plugin", *SAFE, *args)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("pytest")), *args],
        cwd=lab.root,
        env={**clean, **lab.env, "COLUMNS": "140", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return Night(code=done.returncode, out=done.stdout)


def named(night: Night) -> list[str]:
    """Return the lines above the guard's last one, which must count them and say how to go on."""
    *lines, last = night.out.splitlines()
    assert night.code == int(bool(lines)), night.out
    count = {0: "no immutable file", 1: "1 immutable path"}.get(len(lines), f"{len(lines)} immutable paths")
    assert re.search(rf"^guard: HEAD \(\w{{7}}\) changes {count} of \S+ \(\w{{7}}\)", last), night.out
    assert not lines or "take that back (`git checkout " in last, night.out
    return lines


# ---- pull requests ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """What its author does in a clone whose HEAD is at `since`, and what is named of it: nothing, and it passes."""

    make: Callable[[Lab], object]
    says: Sequence[str] = ()
    since: str = "main"


def files(contents: Contents, *says: str, since: str = "main") -> Pull:
    return Pull(make=lambda lab: write(lab, contents), says=says, since=since)


def staged(entries: Mapping[str, tuple[str, str] | None], *says: str) -> Pull:
    return Pull(make=lambda lab: stage(lab, entries), says=says)


def merge(contents: Contents, *args: str) -> Callable[[Lab], None]:
    """Return the act of a branch that changes train.py, merges main, and writes `contents` into the merge."""

    def make(lab: Lab) -> None:
        write(lab, MINE)
        lab.git("merge", "-q", "--no-commit", *args, "origin/main")
        write(lab, contents)

    return make


def moved(old: str, new: str) -> Callable[[Lab], None]:
    """Return the act of moving a folder and leaving a symlink in its place."""

    def make(lab: Lab) -> None:
        (lab.root / old).rename(lab.root / new)
        (lab.root / old).symlink_to(new)
        lab.commit("moved")

    return make


MINE = {"train.py": TRAIN.replace("0.04", "0.03")}
JUDGE = PROJECT["oracle/judge.py"]
CODE = ("100644", "compiled")
LOUD = "oracle/x\n::error::all is well ##[group]y"

PULLS = {
    # what an experiment may do
    "train.py": files(MINE),
    "anything else": files({"notes.md": "more\n", "lib/new.py": "", "tests/test_other.py": None, "lib/oracle/x": ""}),
    "compiled code of train.py": staged({"__pycache__/train.cpython-311.pyc": CODE}),
    # one immutable file
    "an edit": files({**MINE, "oracle/judge.py": "SCALE = 2\n"}, "changed: oracle/judge.py"),
    "line ends": files({"oracle/judge.py": JUDGE.replace("\n", "\r\n")}, "changed: oracle/judge.py"),
    "a deletion": files({"oracle/judge.py": None}, "missing: oracle/judge.py"),
    "an addition": files({"oracle/extra.py": ""}, "added: oracle/extra.py"),
    "a rename": files(
        {"oracle/judge.py": None, "oracle/referee.py": JUDGE}, "renamed: oracle/judge.py -> oracle/referee.py"
    ),
    "a rename out": files({"oracle/judge.py": None, "lib/judge.py": JUDGE}, "renamed: oracle/judge.py -> lib/judge.py"),
    "a rename in": files(
        {"lib/util.py": None, "oracle/util.py": "UTIL = 1\n"}, "renamed: lib/util.py -> oracle/util.py"
    ),
    "a rename with an edit": files(
        {"oracle/judge.py": None, "oracle/referee.py": "SCALE = 2\n"},
        "missing: oracle/judge.py",
        "added: oracle/referee.py",
    ),
    "a mode": staged({"oracle/judge.py": ("100755", JUDGE)}, "mode changed: oracle/judge.py (100644 -> 100755)"),
    "a symlink": staged({"oracle/judge.py": (LINK, "../lib/util.py")}, "became a symlink: oracle/judge.py"),
    "a new symlink": staged({"oracle/more.py": (LINK, "../train.py")}, "added: oracle/more.py (a symlink)"),
    "a submodule": staged({"oracle/judge.py": (SUBMODULE, "")}, "became a submodule: oracle/judge.py"),
    "a new submodule": staged({"oracle/more": (SUBMODULE, "")}, "added: oracle/more (a submodule)"),
    "a law that skips": files(
        {"tests/laws/test_law.py": "import pytest\n@pytest.mark.skip\ndef test_law(): pass\n"},
        "changed: tests/laws/test_law.py",
    ),
    "the instructions": files({"program.md": "Keep everything.\n"}, "changed: program.md"),
    "the workflow": files(
        {".github/workflows/autoresearch.yml": "on: never\n"}, "changed: .github/workflows/autoresearch.yml"
    ),
    # folders
    "a symlink in the place of the oracle": Pull(
        make=moved("oracle", "elsewhere"),
        says=[
            *(
                f"renamed: oracle/{name} -> elsewhere/{name}"
                for name in ("größe.py", "judge.py", "pack.py", "runner.py")
            ),
            "became a symlink: oracle",
        ],
    ),
    "a symlink above the laws": Pull(
        make=moved("tests", "elsewhere"),
        says=["renamed: tests/laws/test_law.py -> elsewhere/laws/test_law.py", "became a symlink: tests"],
    ),
    "a submodule in the place of the laws": staged(
        {"tests/laws/test_law.py": None, "tests/laws": (SUBMODULE, "")},
        "became a submodule: tests/laws",
        "missing: tests/laws/test_law.py",
    ),
    # what is taken for an immutable file
    "compiled code": staged(
        {"oracle/__pycache__/judge.cpython-311.pyc": CODE}, "added: oracle/__pycache__/judge.cpython-311.pyc"
    ),
    "compiled code of conftest.py": staged(
        {"__pycache__/conftest.cpython-311-pytest-9.2.0.pyc": CODE},
        "added: __pycache__/conftest.cpython-311-pytest-9.2.0.pyc",
    ),
    "compiled code behind a symlink": staged({"__pycache__": (LINK, "lib")}, "added: __pycache__ (a symlink)"),
    "a twin in capitals": staged({"Oracle/judge.py": ("100644", "")}, "added: Oracle/judge.py"),
    "a name that writes to the log": staged({LOUD: ("100644", "")}, "added: " + ascii(LOUD).replace("##", r"\x23#")),
    # what pytest does by itself
    "hooks that fake success": files({"conftest.py": "import os\nos._exit(0)\n"}, "changed: conftest.py"),
    "a configuration that comes first": files({"pytest.toml": "[pytest]\n"}, "added: pytest.toml"),
    "no configuration": files({"pytest.ini": None}, "missing: pytest.ini"),
    "a smaller set": files(
        {"pytest.ini": f"{INI}autoresearch_immutable = notes.md\n", "oracle/judge.py": ""},
        "changed: oracle/judge.py",
        "changed: pytest.ini",
    ),
    # history
    "an old branch": files(MINE, since="old"),
    "an old branch with an edit": files({"oracle/judge.py": ""}, "changed: oracle/judge.py", since="old"),
    "an old branch with main's edit": files({"oracle/pack.py": "SIZE = 2\n"}, since="old"),
    "main's edit undone": files({"oracle/pack.py": "SIZE = 1\n"}, "changed: oracle/pack.py"),
    "a merge of main": Pull(make=merge({"notes.md": "merged\n"}), since="old"),
    "a merge with an edit": Pull(
        make=merge({"oracle/judge.py": "SCALE = 2\n"}), says=["changed: oracle/judge.py"], since="old"
    ),
    "a merge that undoes main's edit": Pull(
        make=merge({"notes.md": "merged\n"}, "-s", "ours"), says=["changed: oracle/pack.py"], since="old"
    ),
}


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The base's repository: `first` has nothing immutable, `old` the project, main one edit of the oracle more."""
    return build(
        tmp_path_factory.mktemp("guard") / "base",
        ("first", {"notes.md": ""}),
        ("old", PROJECT),
        ("main", {"oracle/pack.py": "SIZE = 2\n"}),
    )


@pytest.fixture
def lab(history: Lab, tmp_path: Path) -> Lab:
    return clone(history, tmp_path / "clone")


@pytest.mark.parametrize("name", PULLS)
def test_a_pull_request(name: str, history: Lab, tmp_path: Path) -> None:
    pull = PULLS[name]
    lab = clone(history, tmp_path / "clone", pull.since)
    pull.make(lab)
    assert named(run(lab, GUARD)) == list(pull.says)


def test_what_is_not_committed_is_not_looked_at(lab: Lab) -> None:
    lab.write("oracle/judge.py", "SCALE = 2\n")
    lab.write("pytest.toml", "[pytest]\n")
    lab.git("add", "-A")
    assert named(run(lab, GUARD)) == []
    lab.git("commit", "-q", "-m", "edit")
    lab.git("checkout", "-q", "origin/main", "--", "oracle/judge.py")
    (lab.root / "pytest.toml").unlink()
    assert named(run(lab, GUARD)) == ["changed: oracle/judge.py", "added: pytest.toml"]


def test_line_ends_of_a_checkout_do_not_count(lab: Lab) -> None:
    lab.git("config", "core.autocrlf", "true")
    lab.git("rm", "-q", "-r", "--cached", ".")
    lab.git("reset", "-q", "--hard")
    assert b"\r\n" in (lab.root / "oracle/judge.py").read_bytes()
    assert named(run(lab, GUARD)) == []


HIDE: dict[str, Callable[[Lab, str, str], object]] = {  # given the commits main and HEAD
    "a replaced file": lambda lab, main, head: lab.git("replace", f"{head}:oracle/judge.py", f"{main}:oracle/judge.py"),
    "a replaced commit": lambda lab, main, head: lab.git("replace", head, main),
    "a replaced base": lambda lab, main, head: lab.git("replace", main, head),
    "made-up parents": lambda lab, main, head: lab.write(".git/info/grafts", f"{main} {head}\n"),
    "a blind index": lambda lab, main, head: lab.git("update-index", "--assume-unchanged", "oracle/judge.py"),
    "a tag like HEAD": lambda lab, main, head: lab.git("update-ref", "refs/tags/HEAD", main),
}


@pytest.mark.parametrize("name", HIDE)
def test_what_hides_an_edit_from_git(name: str, lab: Lab) -> None:
    main = lab.git("rev-parse", "HEAD")
    write(lab, {"oracle/judge.py": "SCALE = 2\n"})
    HIDE[name](lab, main, lab.git("rev-parse", "HEAD"))
    assert named(run(lab, GUARD)) == ["changed: oracle/judge.py"]


def test_the_environment_does_not_lead_elsewhere(history: Lab, lab: Lab) -> None:
    write(lab, {"oracle/judge.py": "SCALE = 2\n"})
    elsewhere = str(history.top / ".git")
    hostile = {
        **dict.fromkeys(("GIT_DIR", "GIT_COMMON_DIR", "GIT_CEILING_DIRECTORIES"), elsewhere),
        **{"GIT_OBJECT_DIRECTORY": f"{elsewhere}/objects", "GIT_WORK_TREE": "/", "GIT_NAMESPACE": "x"},
        **{"GIT_INDEX_FILE": "/dev/null", "GIT_EXTERNAL_DIFF": "false", "GIT_REPLACE_REF_BASE": "refs/heads"},
    }
    assert named(run(lab, GUARD, env=hostile)) == ["changed: oracle/judge.py"]


def test_several_merge_bases(lab: Lab) -> None:
    lab.git("checkout", "-q", "-b", "topic", "origin/old")
    write(lab, {"oracle/judge.py": "SCALE = 2\n"})
    lab.git("checkout", "-q", "-b", "theirs", "origin/main")
    lab.git("merge", "-q", "--no-edit", "topic")
    lab.git("checkout", "-q", "-b", "mine", "topic")
    lab.git("merge", "-q", "--no-edit", "origin/main")
    assert len(lab.git("merge-base", "--all", "theirs", "mine").splitlines()) == 2
    args = "--autoresearch-guard=theirs"
    assert named(run(lab, args)) == []
    write(lab, {"oracle/judge.py": JUDGE, "oracle/pack.py": "SIZE = 1\n"})  # each as one of the merge bases has it
    night = run(lab, args)
    assert named(night) == ["changed: oracle/judge.py", "changed: oracle/pack.py"]
    assert "or merge theirs if it is not yours" in night.out


def test_annotations_are_escaped_as_github_documents(lab: Lab) -> None:
    stage(lab, {"oracle/judge.py": None, "oracle/100%, a:b.py": ("100644", ""), LOUD: ("100644", "")})
    out = run(lab, GUARD, env={"GITHUB_ACTIONS": "true"}).out
    commands = [line for line in out.splitlines() if line.startswith("::")]
    assert commands[:2] == [
        "::error file=oracle/100%25%2C a%3Ab.py,title=immutable file::added: oracle/100%25, a:b.py",
        "::error file=oracle/judge.py,title=immutable file::missing: oracle/judge.py",
    ]
    assert commands[2].startswith(r"::error file='oracle/x\n%3A%3Aerror%3A%3Aall is well \x23#[group]y',title=")
    assert len(commands) == 3 and "##[" not in out


# ---- what cannot be answered: one line, exit code 4 ----


def cut(lab: Lab) -> Lab:
    path = lab.top.parent / "shallow"
    lab.git("clone", "-q", "--depth=1", f"file://{lab.top}", str(path))
    return Lab(top=path, env=lab.env)


def orphan(lab: Lab) -> None:
    lab.git("checkout", "-q", "--orphan", "elsewhere")
    lab.git("commit", "-q", "-m", "another history")


def broken(lab: Lab) -> None:
    lab.git("checkout", "-q", "-b", "broken")
    write(lab, {"pytest.ini": "autoresearch_immutable = oracle\n"})


def linked(lab: Lab) -> None:
    lab.git("checkout", "-q", "-b", "linked")
    stage(lab, {"pytest.ini": (LINK, "notes.md")})


def submodule(lab: Lab) -> Lab:
    outer = build(lab.top.parent / "outer", ("main", {"notes.md": ""}))
    outer.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(lab.top), "inner")
    outer.commit("a submodule")
    return Lab(top=outer.top / "inner", env=lab.env)


def forge(*entries: bytes) -> Callable[[Lab], None]:
    """Return the act of a commit whose tree has entries that git would not write, each before its 20 bytes of hash."""

    def make(lab: Lab) -> None:
        tree = subprocess.run(["git", "cat-file", "tree", "HEAD"], cwd=lab.top, capture_output=True, check=True).stdout
        blob = bytes.fromhex(lab.git("rev-parse", "HEAD:train.py"))
        tree = b"".join(entry + b"\0" + blob for entry in entries) + tree
        command = ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"]
        done = subprocess.run(command, cwd=lab.top, input=tree, capture_output=True, check=True)
        commit = lab.git("commit-tree", "-p", "HEAD", "-m", "forged", done.stdout.decode().strip())
        lab.git("update-ref", "--no-deref", "HEAD", commit)

    return make


REFUSED: dict[str, tuple[Callable[[Lab], object], str, str]] = {  # act, REF, what is said
    "a shallow clone": (cut, "origin/main", "is a shallow clone: `git fetch --unshallow`, or .* fetch-depth: 0"),
    "no such branch": (
        lambda lab: None,
        "origin/next",
        "there is no commit 'origin/next' in .*: `git fetch origin next` and give origin/next; .* fetch-depth: 0",
    ),
    "an option": (lambda lab: None, "--all", "'--all' is no commit"),
    "a tag like the base": (
        lambda lab: lab.git("tag", "origin/main", "HEAD"),
        "origin/main",
        "'origin/main' may mean refs/remotes/origin/main or refs/tags/origin/main: give one of these names",
    ),
    "no common history": (orphan, "origin/main", "HEAD and origin/main have no commit in common"),
    "a base without anything immutable": (
        lambda lab: None,
        "origin/first",
        "origin/first has no immutable file below its top: start pytest in the project's folder",
    ),
    "a base whose configuration is broken": (broken, "broken", "pytest.ini at broken cannot be read: .*no section"),
    "a base whose configuration is a symlink": (linked, "linked", "pytest.ini at linked is a symlink"),
    "a submodule": (submodule, "origin/main", "inner is a submodule of .*outer: start pytest there"),
    "no repository": (
        lambda lab: (lab.top / ".git").rename(lab.top.parent / "gone"),
        "origin/main",
        "clone is in no git repository",
    ),
    "a file twice": (forge(b"100644 train.py"), "origin/main", "the tree of HEAD .* is forged: see .* of train.py"),
    "a file and a folder": (forge(b"100644 oracle"), "origin/main", "the tree of HEAD .* is forged: see .* of oracle$"),
    "a way out": (forge(b"100644 .."), "origin/main", r"the tree of HEAD .* is forged: see .* of \.\.$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_one_line(name: str, lab: Lab) -> None:
    act, ref, says = REFUSED[name]
    made = act(lab)
    lab = made if isinstance(made, Lab) else lab
    night = run(lab, f"--autoresearch-guard={ref}", env={"GIT_CEILING_DIRECTORIES": str(lab.top.parent)})
    assert night.code == 4, night.out
    assert re.search(f"^ERROR: --autoresearch-guard: .*{says}", night.error), night.out


def test_the_full_name_of_the_base_is_not_mistaken(lab: Lab) -> None:
    write(lab, {"oracle/judge.py": ""})
    for place in ("refs/tags/origin/main", "refs/refs/remotes/origin/main"):
        lab.git("update-ref", place, "HEAD")
    for ref in ("refs/remotes/origin/main", lab.git("rev-parse", "refs/remotes/origin/main")):
        assert named(run(lab, f"--autoresearch-guard={ref}")) == ["changed: oracle/judge.py"]


# ---- what pytest reads before the guard can do anything ----

PLAIN = {  # addopts, exit code, what is printed
    "--version": (1, "changed: pytest.ini"),
    "--help": (1, "changed: pytest.ini"),
    "--collect-only": (1, "changed: pytest.ini"),
    "--rootdir=lib": (1, "changed: pytest.ini"),
    "-o autoresearch_immutable=notes.md": (1, "changed: pytest.ini"),
    "--autoresearch-guard=HEAD": (1, "changed: pytest.ini"),
    ALLOW: (1, f"{ALLOW} counts on the command line only, not in addopts or PYTEST_ADDOPTS: it is ignored"),
    "--autoresearch-lock=check": (4, "exclude each other"),
    "-p no:autoresearch": (4, "unrecognized arguments: --autoresearch-guard"),
    "--": (4, "--autoresearch-guard is on the command line"),
}


@pytest.mark.parametrize("addopts", PLAIN)
def test_addopts_of_a_pull_request(addopts: str, lab: Lab) -> None:
    write(lab, {"pytest.ini": f"{INI}addopts = {addopts}\n"})
    code, says = PLAIN[addopts]
    night = run(lab, GUARD, plain=True)
    assert night.code == code and says in night.out, night.out


EXIT = "import os\nos._exit(0)\n"
FOOLED: dict[str, Mapping[str, str]] = {
    "help instead of the plugin": {"pytest.ini": f"{INI}addopts = -p no:autoresearch --help\n"},
    "code that comes first": {"pytest.ini": f"{INI}pythonpath = .\naddopts = -p first\n", "first.py": EXIT},
    "a plugin of our name": {
        "pytest.ini": f"{INI}pythonpath = .\n",
        "pytest_autoresearch/__init__.py": "",
        "pytest_autoresearch/plugin.py": EXIT,
    },
}


@pytest.mark.parametrize("name", FOOLED)
def test_only_a_pytest_that_reads_no_configuration_of_head_is_safe(name: str, lab: Lab) -> None:
    write(lab, FOOLED[name])
    assert run(lab, GUARD, plain=True).code == 0  # a limit, not a wish: nothing that pytest loads can hold it off
    assert named(run(lab, GUARD)) == ["changed: pytest.ini"]


def test_a_ci_whose_pytest_reads_configuration_of_head_is_told(lab: Lab) -> None:
    write(lab, MINE)
    note = "in CI run `pytest -c /dev/null --rootdir . --autoresearch-guard REF`"
    assert note in run(lab, GUARD, plain=True, env={"CI": "true"}).out
    for night in (run(lab, GUARD, plain=True), run(lab, GUARD, env={"CI": "true"})):
        assert named(night) == [] and note not in night.out


# ---- where the project stands ----

SETS = {
    "pytest.toml": '[pytest]\nautoresearch_immutable = ["rules.py"]\n',
    ".pytest.toml": '[pytest]\nautoresearch_immutable = ["./rules.py"]\n',
    "pytest.ini": "[pytest]\nautoresearch_immutable =\n    rules.py\n    other/\n",
    ".pytest.ini": "[pytest]\nautoresearch_immutable = rules.py\n",
    "pyproject.toml": '[tool.pytest]\nautoresearch_immutable = ["rules.py"]\n',
    "tox.ini": "[tox]\n[pytest]\nautoresearch_immutable = rul*.py\n",
    "setup.cfg": "[tool:pytest]\nautoresearch_immutable = rules.py\n",
}
KINDS = [*SETS.items(), ("pyproject.toml", '[tool.pytest.ini_options]\nautoresearch_immutable = "rules.py"\n')]


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A repository of many projects: one for each place that pytest is configured in, two with their defaults."""
    contents = {"README.md": "", "a [b]/pytest.ini": INI, "a [b]/oracle/judge.py": JUDGE, "c/pytest.ini": "[pytest]\n"}
    for at, (name, text) in enumerate(KINDS):
        contents |= {f"kind{at}/{name}": text, f"kind{at}/rules.py": "", f"kind{at}/src/x.py": ""}
    contents |= {
        "kind1/tox.ini": "[pytest]\n",
        "kind5/setup.cfg": "[tool:pytest]\n",
        "kind6/pyproject.toml": "[tool.x]\n",
        "empty/pytest.ini": "",
        "empty/pyproject.toml": SETS["pyproject.toml"],
        "empty/rules.py": "",
        "ä/pytest.ini": INI,
    }
    return build(tmp_path_factory.mktemp("mono") / "base", ("main", contents))


@pytest.mark.parametrize("at", range(len(KINDS)))
def test_the_set_is_what_the_base_configures(at: int, mono: Lab, tmp_path: Path) -> None:
    top = clone(mono, tmp_path / "clone")
    write(top, {f"kind{n}/{name}": "changed" for n in range(len(KINDS)) for name in ("rules.py", "src/x.py")})
    assert named(run(below(top, f"kind{at}/src"), GUARD)) == [f"changed: kind{at}/rules.py"]


def test_a_configuration_that_says_nothing_is_one(mono: Lab, tmp_path: Path) -> None:
    top = clone(mono, tmp_path / "clone")
    write(top, {"empty/rules.py": "changed", "empty/program.md": ""})
    assert named(run(below(top, "empty"), GUARD)) == ["added: empty/program.md"]


def below(top: Lab, folder: str) -> Lab:
    return Lab(top=top.top, folder=folder, env=top.env)


def test_a_project_in_a_folder(mono: Lab, tmp_path: Path) -> None:
    top = clone(mono, tmp_path / "clone")
    write(top, {"a [b]/oracle/judge.py": ""})
    changed = ["changed: a [b]/oracle/judge.py"]
    assert named(run(below(top, "a [b]"), GUARD)) == changed
    assert named(run(below(top, "a [b]/oracle"), GUARD)) == changed
    assert named(run(top, "--rootdir", "a [b]", GUARD)) == changed
    assert named(run(below(top, "c"), GUARD)) == []
    stage(top, {"a [b]/tests": (LINK, "../c")})
    assert named(run(below(top, "a [b]"), GUARD)) == [*changed, "added: a [b]/tests (a symlink)"]


def test_twins_of_the_projects_folder(mono: Lab, tmp_path: Path) -> None:
    top = clone(mono, tmp_path / "clone")
    twins = ["a\N{COMBINING DIAERESIS}/program.md", "Ä/oracle/judge.py", "Ä/setup.cfg"]
    stage(top, {twin: ("100644", "") for twin in [*twins, "Ä/other.py"]})
    assert named(run(below(top, "ä"), GUARD)) == [f"added: {twin}" for twin in twins]


def test_a_project_that_moves_its_root(mono: Lab, tmp_path: Path) -> None:
    top = clone(mono, tmp_path / "clone")
    write(top, {"a [b]/pytest.ini": None, "a [b]/oracle/judge.py": "", "pytest.ini": "[pytest]\naddopts=\n"})
    for plain in (True, False):
        night = run(below(top, "a [b]"), GUARD, plain=plain)
        assert named(night) == ["changed: a [b]/oracle/judge.py", "missing: a [b]/pytest.ini"]


def test_a_root_that_moves_below_the_project(mono: Lab, tmp_path: Path) -> None:
    top = clone(mono, tmp_path / "clone")
    write(top, {"kind0/src/pytest.ini": "[pytest]\n"})
    assert named(run(below(top, "kind0/src"), GUARD)) == ["added: kind0/src/pytest.ini"]


def test_a_project_that_is_a_repository_of_its_own(mono: Lab, tmp_path: Path) -> None:
    top, bare = clone(mono, tmp_path / "clone"), tmp_path / "bare"
    write(top, {"a [b]/oracle/judge.py": ""})
    top.git("clone", "-q", "--bare", ".", str(bare))
    Lab(top=bare, env=top.env).git("update-ref", "refs/remotes/origin/main", "HEAD")  # there, HEAD changed nothing
    for path in bare.rglob("*"):
        if path.is_file():
            target = top.top / "a [b]" / path.relative_to(bare)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    top.commit("a repository, as files")
    project = below(top, "a [b]")
    assert project.git("-c", "safe.bareRepository=all", "rev-parse", "--is-bare-repository") == "true"
    assert named(run(project, GUARD)) == ["changed: a [b]/oracle/judge.py"]


def test_a_project_that_is_a_link_to_another(mono: Lab, tmp_path: Path) -> None:
    top = clone(mono, tmp_path / "clone")
    shutil.rmtree(top.top / "a [b]")
    (top.top / "a [b]").symlink_to("c")
    top.commit("a link")
    assert named(run(below(top, "a [b]"), GUARD)) == ["became a symlink: a [b]"]
    gone = ["missing: a [b]/oracle/judge.py", "missing: a [b]/pytest.ini"]
    assert named(run(top, "--rootdir=a [b]", GUARD)) == ["became a symlink: a [b]", *gone]


# ---- a change that is meant ----


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The base's repository with an oracle.lock."""
    lab = build(tmp_path_factory.mktemp("locked") / "base", ("project", PROJECT))
    update(lab)
    return lab


def update(lab: Lab, *options: str) -> None:
    """Update oracle.lock under HEAD's own configuration, or under these options alone, and commit it."""
    night = run(lab, *options, "--autoresearch-lock=update", plain=not options)
    assert night.code == 0 and "oracle.lock is written" in night.out, night.out
    lab.commit("lock")


def change(contents: Contents, *options: str, then: Contents | None = None) -> Callable[[Lab], None]:
    """Return the act of a change, an update of oracle.lock, and what is written after it."""

    def make(lab: Lab) -> None:
        write(lab, contents)
        update(lab, *options)
        if then:
            write(lab, then)

    return make


HOLD = "oracle.lock is right for it, the laws and determinism hold"
FAIL = "def test_law(): assert False\n"
BREAKS = TRAIN.replace('"ok"', '"broken"')
RUNS_ALONE = RUNS.replace(" = ", "=").strip()
FIRST = {"pytest.ini": f"{INI}pythonpath = .\naddopts = -p first\n", "first.py": EXIT}
MEANT: dict[str, tuple[Callable[[Lab], object], int, Sequence[str]]] = {  # act, exit code, what is printed
    "train.py alone": (lambda lab: write(lab, MINE), 0, ["changes no immutable file"]),
    "a change with its lock": (change({"oracle/judge.py": "SCALE = 2\n"}), 0, ["changed: oracle/judge.py", HOLD]),
    "a new law with its lock": (
        change({"tests/laws/test_new.py": "def test_new(): pass\n"}),
        0,
        ["added: tests/laws/test_new.py", HOLD],
    ),
    "a smaller set with its lock": (
        change({"pytest.ini": f"{INI}autoresearch_immutable =\n    oracle\n    tests/laws\n"}),
        0,
        ["no longer immutable: conftest.py", "changed: pytest.ini", HOLD],
    ),
    "a change without its lock": (
        lambda lab: write(lab, {"oracle/judge.py": ""}),
        1,
        ["not allowed: oracle.lock is as it was: run `pytest --autoresearch-lock=update`"],
    ),
    "no lock": (
        lambda lab: write(lab, {"oracle/judge.py": "", "oracle.lock": None}),
        1,
        ["missing: oracle.lock", "not allowed: oracle.lock is missing"],
    ),
    "a change after its lock": (
        change({"oracle/judge.py": ""}, then={"oracle/pack.py": ""}),
        1,
        ["not allowed: oracle.lock does not fit: changed: oracle/pack.py"],
    ),
    "compiled code": (
        change({"oracle/judge.py": ""}, then={"oracle/__pycache__/pack.cpython-311.pyc": ""}),
        1,
        ["not allowed: oracle.lock does not fit: added: oracle/__pycache__/pack.cpython-311.pyc"],
    ),
    "a law that fails": (change({"tests/laws/test_law.py": FAIL}), 1, ["--autoresearch-laws failed with exit code 1"]),
    "a guarantee that breaks": (
        change({"oracle/judge.py": "", "train.py": BREAKS}),
        1,
        ["--autoresearch-determinism failed with exit code 1"],
    ),
    "code that comes first": (
        change({**FIRST, "conftest.py": EXIT, "tests/laws/test_law.py": FAIL, "train.py": BREAKS}, "-o", RUNS_ALONE),
        1,
        ["--autoresearch-laws failed with exit code 1 and --autoresearch-determinism failed with exit code 1"],
    ),
    "a lock that says a thing twice": (
        change({"oracle/judge.py": ""}, then={"oracle.lock": "law    1 tests/laws/test_law.py::test_law\n" * 2}),
        1,
        ["not allowed: oracle.lock is not as `pytest --autoresearch-lock=update` writes it"],
    ),
    "no lock at all": (
        change({"oracle/judge.py": ""}, then={"oracle.lock": "all is well\n"}),
        4,
        ["ERROR: --autoresearch-guard: oracle.lock at HEAD, line 1: 'all is well' is no entry"],
    ),
    "a submodule": (
        lambda lab: stage(lab, {"oracle/more": (SUBMODULE, ""), "oracle.lock": ("100644", HEADER)}),
        1,
        ["not allowed: oracle/more is a submodule, which cannot be locked"],
    ),
}


@pytest.mark.parametrize("name", MEANT)
def test_a_change_that_is_meant(name: str, locked: Lab, tmp_path: Path) -> None:
    act, code, says = MEANT[name]
    lab = clone(locked, tmp_path / "clone")
    act(lab)
    requests = Path(lab.env["LAB_REQUESTS"])
    before = requests.stat().st_size
    night = run(lab, GUARD, ALLOW)
    assert night.code == code, night.out
    for line in says:
        assert line in night.out, night.out
    assert (requests.stat().st_size > before) == (HOLD in night.out or "failed" in night.out)


def test_the_environment_does_not_allow_a_change(locked: Lab, tmp_path: Path) -> None:
    lab = clone(locked, tmp_path / "clone")
    change({"oracle/judge.py": "SCALE = 2\n"})(lab)
    night = run(lab, GUARD, env={"PYTEST_ADDOPTS": ALLOW})
    assert night.code == 1 and "it is ignored" in night.out and HOLD not in night.out, night.out
