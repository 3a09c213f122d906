"""THREATS class 6, the identity of the code: what runs is the candidate's commit under the locked files' own code.

Needs git and the fake runner of tests/plugin/lab.py, whose score tells which version of train.py it read, and which
rules. One night runs all acts of a proposer in an environment that is hostile itself; each act stands beside an honest
edit, which must end as if nothing else had been done, or else as a crash that says what was.
"""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.attacks.nights import Acted, act, run
from tests.plugin.lab import RUNNER, Lab

TAMPER = 'text = (workdir / "rules.py").read_text().replace("0.0", "0.9")\n'

ACTS = {
    "an honest edit": act(""),
    "a dirty tree": act(
        TAMPER + 'write("rules.py", text)', "crash", "^changed what is not its own: changed: rules.py$"
    ),
    "assume-unchanged": act(
        TAMPER + 'git("update-index", "--assume-unchanged", "rules.py")\nwrite("rules.py", text)',
        "crash",
        "changed: rules.py$",
    ),
    "skip-worktree": act(
        TAMPER + 'git("update-index", "--skip-worktree", "rules.py")\nwrite("rules.py", text)',
        "crash",
        "changed: rules.py$",
    ),
    "a restored mtime": act(
        TAMPER
        + """
        git("config", "core.trustctime", "false")
        git("config", "core.checkStat", "minimal")
        git("update-index", "-q", "--refresh")
        stat = os.stat(workdir / "rules.py")
        write("rules.py", text)
        os.utime(workdir / "rules.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        """.replace("\n        ", "\n"),
        "crash",
        "changed: rules.py$",
    ),
    "a link in the place of train.py": act(
        """
        (workdir / "train.py").rename(workdir / "real.py")
        (workdir / "train.py").symlink_to("real.py")
        """,
        "",
        "train.py is missing or no regular file",
    ),
    "an executable train.py": act('os.chmod(workdir / "train.py", 0o755)'),
    "a repository in the place of train.py": act(
        """
        text = (workdir / "train.py").read_text()
        (workdir / "train.py").unlink()
        write("train.py/train.py", text)
        git("init", "-q", "train.py")
        """,
        "",
        "train.py is missing or no regular file",
    ),
    "a submodule beside it": act(
        """
        git("init", "-q", "library")
        git("-C", "library", "commit", "-q", "--allow-empty", "-m", "x")
        git("-c", "protocol.file.allow=always", "submodule", "add", "-q", "./library", "module")
        """
    ),
    "a smudge filter for train.py": act(
        r"""
        git("config", "filter.better.smudge", "sed s/^RATE.*/RATE=0.02/")
        git("config", "filter.better.clean", "sed s/^RATE.*/RATE=0.02/")
        (common / "info").mkdir(exist_ok=True)
        (common / "info/attributes").write_text("train.py filter=better\n")
        """
    ),
    "a replaced object": act(
        """
        mine = git("hash-object", "-w", "--no-filters", "train.py")
        git("replace", "-f", mine, git("hash-object", "-w", "--no-filters", "rules.py"))
        """
    ),
    "an object with other bytes": act(
        """
        mine = git("hash-object", "-w", "--no-filters", "train.py")
        other = git("hash-object", "-w", "--no-filters", "rules.py")
        path = common / "objects" / mine[:2] / mine[2:]
        path.chmod(0o644)
        path.write_bytes((common / "objects" / other[:2] / other[2:]).read_bytes())
        """,
        "",
        "object [0-9a-f]{40} of the repository is damaged",
    ),
    "hooks": act(
        r"""
        (common / "hooks").mkdir(exist_ok=True)
        for name in ("reference-transaction", "post-checkout", "post-index-change", "pre-commit", "update"):
            hook = common / "hooks" / name
            hook.write_text(f"#!/bin/sh\ntouch {common}/HOOKED\nexit 1\n")
            hook.chmod(0o755)
        git("config", "core.hooksPath", str(common / "hooks"))
        git("config", "core.fsmonitor", str(common / "hooks/update"))
        """
    ),
    "bytecode that nothing checks": act(
        """
        import importlib.util, py_compile
        write("other.py", "PENALTY = -0.5")
        for source in ("rules.py", "runner.py"):
            py_compile.compile(
                str(workdir / "other.py"),
                importlib.util.cache_from_source(str(workdir / source)),
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
        """
    ),
    "modules that shadow": act(
        """
        for name in ("json", "ast", "rules_", "sitecustomize", "usercustomize", "torch", "oracle"):
            write(f"{name}.py", "open(__file__ + '.IMPORTED', 'w'); raise SystemExit(1)")
        write("evil.pth", "import sitecustomize")
        """
    ),
    "a clean filter for a locked file": act(  # git sees nothing; the digests do
        TAMPER
        + """
(common / "info").mkdir(exist_ok=True)
(common / "info/attributes").write_text("rules.py filter=hide\\n")
git("config", "filter.hide.clean", "git show HEAD:rules.py")
write("rules.py", text)
""",
        "crash",
        "^changed what is not its own: changed: rules.py$",
    ),
    "another honest edit": act(""),
}


@pytest.fixture(scope="module")
def acted(tmp_path_factory: pytest.TempPathFactory) -> Acted:
    """The night of all acts, in an environment that points git and Python elsewhere."""
    home = tmp_path_factory.mktemp("identity")
    lab = Lab.build(home / "project")
    lab.write("rules.py", "PENALTY = 0.0\n")
    rules = "import rules\n" + RUNNER.replace("+ noise\n", "+ noise - rules.PENALTY\n", 1)
    lab.write("runner.py", rules)
    runner = "autoresearch_runner = {python} runner.py\nautoresearch_immutable =\n    runner.py\n    rules.py\n"
    lab.write("pytest.ini", "[pytest]\n" + runner)
    lab.commit("rules")
    evil = home / "evil"
    evil.mkdir()
    mark = f"import sys\nif 'runner.py' in sys.argv + sys.orig_argv: open({str(evil / 'IMPORTED')!r}, 'w')\n"
    for name in ("sitecustomize", "usercustomize"):
        (evil / f"{name}.py").write_text(mark)
    (evil / "rules.py").write_text("PENALTY = 0.7\n")
    hostile = {
        **dict.fromkeys(("GIT_DIR", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"), str(evil)),
        **{"GIT_WORK_TREE": "/", "GIT_INDEX_FILE": str(evil / "index"), "GIT_PREFIX": "x/", "GIT_NAMESPACE": "n"},
        **{"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Mallory"},
        **{"GIT_AUTHOR_NAME": "Mallory", "GIT_COMMITTER_DATE": "2001-01-01T00:00:00", "GIT_TRACE": str(evil / "t")},
        **{"PYTHONPATH": os.pathsep.join([str(evil), *sys.path[1:]]), "PYTHONINSPECT": "", "PYTHONSTARTUP": str(evil)},
    }
    return run(lab, ACTS, env=hostile)


@pytest.mark.parametrize("name", ACTS)
def test_what_runs_is_what_the_commit_says(name: str, acted: Acted) -> None:
    acted.check(name, ACTS[name])


def test_nothing_of_the_environment_or_the_work_tree_was_run(acted: Acted) -> None:
    lab = acted.lab
    assert not list(lab.top.parent.rglob("*IMPORTED")) and not (lab.top / ".git/HOOKED").exists()
    assert lab.git("diff", "--name-only", "main", "autoresearch/lab") == "results.tsv\ntrain.py"
    authors = lab.git("log", "--format=%an %cn", "main..autoresearch/lab").splitlines()
    assert set(authors) == {"Ada Ada"}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab.build(tmp_path / "project")


@pytest.mark.parametrize("file", ["train.py", "runner.py"])
def test_a_candidate_that_rewrites_files_while_it_runs(file: str, lab: Lab) -> None:
    path = lab.top / ".autoresearch/lab" / file
    lab.env["LAB_MEDDLE"] = str(path)
    lab.plan(("meddle", '"ok"', '"meddle"'), ("honest", "RATE = 0.04", "RATE = 0.03"))
    out = lab.loop(experiments=2).out
    assert lab.verdicts == (["discard", "keep"] if file == "train.py" else ["crash", "keep"]), out
    assert (file == "runner.py") == bool(re.search("crash: locked files changed: changed: runner.py", out))
    assert path.read_text().rstrip("\n") == lab.git("show", f"autoresearch/lab:{file}")


def test_a_locked_link_to_elsewhere_is_refused(lab: Lab) -> None:
    (lab.root / "runner.py").rename(lab.top.parent / "elsewhere.py")
    (lab.root / "runner.py").symlink_to(lab.top.parent / "elsewhere.py")
    lab.commit("link")
    assert "runner.py is a symlink to" in lab.loop().error
