"""oracle.lock: made and refreshed by one option, and held against everything before, during and after a run.

Needs git and the fake runner of lab.py.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_autoresearch.lock import LockError, startup_files
from pytest_autoresearch.lockfile import Lock
from tests.plugin.lab import Lab

DATA = {
    "val.npy": {"sha256": "a" * 64, "bytes": 4_112, "seen": [1, 2]},
    "train-00000.npy": {"sha256": "b" * 64, "bytes": 9_000_000, "seen": [3, 4]},
}
VERSIONS = {"torch": "2.13.0", "numpy": "2.3.5"}
NIGHT = ("--autoresearch-loop", "--autoresearch-tag=lab", "--autoresearch-max=1")
MARK = "import pathlib\npathlib.Path(__file__).with_name('loaded').touch()\n"


@pytest.fixture
def locked(lab: Lab) -> Lab:
    """A project whose lock is committed."""
    lab.write(
        "pytest.ini", lab.read("pytest.ini").replace("    runner.py", "    runner.py\n    rules\n    conftest.py")
    )
    lab.write("rules/räte.py", "RATE = 1\n")
    lab.write("rules/table.bin", "\0\r\n")
    lab.plan(("slower", "RATE = 0.04", "RATE = 0.03"), ("wider", "WIDTH = 64", "WIDTH = 65"))
    lab.promise(data=DATA, versions=VERSIONS)
    assert lab.pytest("--autoresearch-lock=update").code == 0
    lab.commit("lock")
    return lab


def digest(lab: Lab) -> str:
    return hashlib.sha256((lab.root / "oracle.lock").read_bytes()).hexdigest()


def test_the_lock_reads_as_a_table(locked: Lab) -> None:
    lines = [re.sub(r"[0-9a-f]{64} +\d+", "SHA BYTES", line) for line in locked.read("oracle.lock").splitlines()]
    assert lines[0].startswith("# ")
    plugin = [line for line in lines if line.startswith("version pytest-autoresearch ")]
    assert lines[1:] == [
        "version numpy 2.3.5",
        *plugin,
        "version torch 2.13.0",
        "data SHA BYTES tiny/train-00000.npy",
        "data SHA BYTES tiny/val.npy",
        "file SHA BYTES 100644 conftest.py",
        "file SHA BYTES 100644 pytest.ini",
        "file SHA BYTES 100644 rules/räte.py",
        "file SHA BYTES 100644 rules/table.bin",
        "file SHA BYTES 100644 runner.py",
    ]
    assert Lock.parse(locked.read("oracle.lock"), "x").text() == locked.read("oracle.lock")


def test_a_lock_that_holds(locked: Lab) -> None:
    checked = locked.pytest("--autoresearch-lock=check")
    assert (checked.code, checked.out.splitlines()) == (
        0,
        ["oracle.lock holds: 5 files, 2 files of data of profile tiny, 3 versions", f"digest {digest(locked)}"],
    )
    again = locked.pytest("--autoresearch-lock=update")
    assert (again.code, again.out.splitlines()) == (0, ["oracle.lock is as it was", f"digest {digest(locked)}"])
    night = locked.loop()
    assert night.code == 0, night.out
    assert f"locked: oracle.lock {digest(locked)}" in night.out


def chmod(lab: Lab) -> None:
    (lab.root / "rules/räte.py").chmod(0o755)


def link(lab: Lab) -> None:
    (lab.root / "rules/räte.py").unlink()
    (lab.root / "rules/räte.py").symlink_to("table.bin")


CHANGES: dict[str, tuple[Callable[[Lab], object], str]] = {
    "an edit": (lambda lab: lab.write("rules/räte.py", "RATE = 2\n"), "changed: rules/räte.py"),
    "an edit of the runner": (lambda lab: lab.write("runner.py", "print()\n"), "changed: runner.py"),
    "line ends of a binary": (lambda lab: lab.write("rules/table.bin", "\0\n"), "changed: rules/table.bin"),
    "a deletion": (lambda lab: (lab.root / "rules/räte.py").unlink(), "missing: rules/räte.py"),
    "an addition": (lambda lab: lab.write("rules/torch.py", ""), "added: rules/torch.py"),
    "a mode": (chmod, "mode changed: rules/räte.py (100644 -> 100755)"),
    "a link": (link, "became a symlink: rules/räte.py"),
    "a configuration that goes first": (lambda lab: lab.write("pytest.toml", "[pytest]\n"), "added: pytest.toml"),
    "a configuration that locks less": (
        lambda lab: lab.write("pytest.ini", "[pytest]\nautoresearch_immutable = runner.py\n"),
        "changed: pytest.ini",
    ),
    "other data": (
        lambda lab: lab.promise(data=DATA | {"val.npy": {"sha256": "c" * 64, "bytes": 4_112}}, versions=VERSIONS),
        "changed: data tiny/val.npy",
    ),
    "less data": (
        lambda lab: lab.promise(data={"val.npy": DATA["val.npy"]}, versions=VERSIONS),
        "missing: data tiny/train-00000.npy",
    ),
    "no data": (lambda lab: lab.promise(versions=VERSIONS), "missing: data tiny/train-00000.npy"),
    "another torch": (
        lambda lab: lab.promise(data=DATA, versions=VERSIONS | {"torch": "2.12.1"}),
        "changed: version of torch (2.13.0 -> 2.12.1)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_named_and_nothing_runs(locked: Lab, name: str) -> None:
    change, line = CHANGES[name]
    change(locked)
    if name != "a configuration that goes first":  # then there is another rootdir's runner to ask
        checked = locked.pytest("--autoresearch-lock=check")
        assert checked.code == 1, checked.out
        assert line in checked.out.splitlines()
    if name.startswith(("other", "less", "no ", "another")):
        return _refused(locked, line)
    _refused(locked, line)
    locked.git("checkout", "-q", "--", ".")
    locked.git("clean", "-qfd")
    assert locked.loop().code == 0


def _refused(lab: Lab, line: str) -> None:
    night = lab.pytest(*NIGHT)
    assert night.code == 4, night.out
    assert line in night.error
    assert "pytest --autoresearch-lock=update" in night.error
    assert not lab.requests("run") and not lab.runs


def test_a_changed_conftest_is_not_even_loaded(locked: Lab) -> None:
    locked.write("conftest.py", MARK + locked.read("conftest.py"))
    _refused(locked, "changed: conftest.py")
    locked.pytest("--autoresearch-lock=check")
    assert not (locked.root / "loaded").exists()
    assert locked.pytest("--autoresearch-lock=update").code == 0
    assert not (locked.root / "loaded").exists()
    locked.commit("meant")
    assert locked.loop().code == 0
    assert (locked.root / "loaded").exists()


def test_an_update_says_what_changed_and_keeps_other_profiles(locked: Lab) -> None:
    locked.promise(data={"val.npy": DATA["val.npy"] | {"sha256": "d" * 64}}, versions=VERSIONS, profile="big")
    locked.write("rules/new.py", "")
    updated = locked.pytest("--autoresearch-lock=update")
    assert updated.code == 0, updated.out
    assert updated.out.splitlines() == [
        "added: rules/new.py",
        "oracle.lock is written: read it, and commit it",
        f"digest {digest(locked)}",
    ]
    data = Lock.parse(locked.read("oracle.lock"), "x").data
    assert data == {
        "big/val.npy": ("d" * 64, 4_112),
        "tiny/train-00000.npy": ("b" * 64, 9_000_000),
        "tiny/val.npy": ("a" * 64, 4_112),
    }


def test_a_profile_that_is_not_locked_is_said(locked: Lab) -> None:
    locked.promise(data=DATA, versions=VERSIONS, profile="big")
    night = locked.loop()
    assert night.code == 0, night.out
    assert "the data of profile big is not in oracle.lock" in night.out


def test_a_checkout_with_other_line_ends_holds(locked: Lab) -> None:
    locked.git("config", "core.autocrlf", "true")
    for name in ("rules/räte.py", "oracle.lock", "conftest.py"):
        (locked.root / name).unlink()
    locked.git("checkout", "-q", "--", ".")
    assert b"\r\n" in (locked.root / "rules/räte.py").read_bytes()
    assert b"\r\n" in (locked.root / "oracle.lock").read_bytes()
    assert locked.pytest("--autoresearch-lock=check").code == 0
    night = locked.loop()
    assert night.code == 0, night.out


def test_a_pinned_digest(locked: Lab) -> None:
    pinned = f"--autoresearch-lock-digest={digest(locked)}"
    assert locked.pytest(*NIGHT, pinned).code == 0
    assert locked.pytest("--autoresearch-lock=check", pinned).code == 0
    locked.write("rules/räte.py", "RATE = 2\n")
    assert locked.pytest("--autoresearch-lock=update").code == 0
    locked.commit("files and lock together")
    refused = locked.pytest(*NIGHT, "--autoresearch-tag=other", pinned)
    assert refused.code == 4
    assert f"oracle.lock in {locked.root / '.autoresearch/other'} has digest {digest(locked)}, not" in refused.error
    checked = locked.pytest("--autoresearch-lock=check", pinned)
    assert checked.code == 1
    assert "changed: the lock itself" in checked.out


def test_a_digest_is_pinned_without_a_lock_too(lab: Lab) -> None:
    lab.plan(("slower", "RATE = 0.04", "RATE = 0.03"))
    night = lab.loop()
    found = re.search("locked: the files as they are, as there is no oracle.lock: ([0-9a-f]{64})", night.out)
    assert found is not None, night.out
    assert lab.loop(f"--autoresearch-lock-digest={found[1]}").code == 0
    refused = lab.loop(f"--autoresearch-lock-digest={'0' * 64}")
    assert (refused.code, found[1] in refused.error) == (4, True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--autoresearch-lock=renew",), "--autoresearch-lock: 'renew' is not check or update"),
        (("--autoresearch-lock=check",), "there is no oracle.lock in "),
        ((*NIGHT, "--autoresearch-lock-digest=abc"), "--autoresearch-lock-digest: 'abc' is not a sha256"),
        (("--autoresearch-lock-digest=abc",), "--autoresearch-lock-digest does nothing without --autoresearch-loop or"),
        (("--autoresearch-lock=check", "--autoresearch-loop"), "exclude each other"),
    ],
)
def test_bad_input_is_one_line(lab: Lab, args: tuple[str, ...], says: str) -> None:
    night = lab.pytest(*args)
    assert night.code == 4, night.out
    assert says in night.error


def test_a_damaged_lock_is_named_with_its_line(locked: Lab) -> None:
    locked.write("oracle.lock", locked.read("oracle.lock") + "file 12 pytest.ini\n")
    for args in (NIGHT, ("--autoresearch-lock=check",), ("--autoresearch-lock=update",)):
        assert "oracle.lock, line 12: 'file 12 pytest.ini' is no entry" in locked.pytest(*args).error
    with pytest.raises(LockError, match="line 1"):
        Lock.parse("law x", "oracle.lock")


def test_an_edit_that_is_undone_during_a_run_leaves_no_score(locked: Lab) -> None:
    locked.plan(("meddles", 'MODE = "ok"', 'MODE = "undo"'), ("wider", "WIDTH = 64", "WIDTH = 65"))
    locked.env["LAB_MEDDLE"] = str(locked.root / ".autoresearch/lab/rules/räte.py")
    locked.loop(experiments=2)
    meddled, honest = [run for run in locked.runs if run["kind"] == "experiment"]
    assert meddled["verdict"]["outcome"] == "crash"
    assert meddled["verdict"]["reason"] == "locked files changed: edited and restored: rules/räte.py"
    assert honest["verdict"]["outcome"] == "keep"


def test_what_git_does_not_see_of_a_proposer_is_named_and_undone(locked: Lab) -> None:
    locked.write(
        "conftest.py",
        """
        import subprocess
        from pytest_autoresearch.propose import NoProposal
        TURNS = iter(("untracked", "filtered", "honest"))
        def pytest_autoresearch_propose(workdir):
            turn = next(TURNS, None)
            if turn is None:
                raise NoProposal("done")
            path = workdir / "train.py"
            path.write_text(path.read_text().replace("RATE = 0.04", f"RATE = 0.03{len(turn)}"))
            if turn == "untracked":
                (workdir / "rules/torch.py").write_text("")
            if turn == "filtered":
                git = ["git", "-C", str(workdir), "config", "filter.evil.clean", "printf 'RATE = 1\\\\n'"]
                subprocess.run(git, check=True)
                common = workdir.parent.parent / ".git/info"
                common.mkdir(exist_ok=True)
                (common / "attributes").write_text("rules/*.py filter=evil\\n")
                (workdir / "rules/räte.py").write_text("RATE = 9\\n")
            return turn
        """.replace("\n        ", "\n"),
    )
    assert locked.pytest("--autoresearch-lock=update").code == 0
    locked.commit("proposer")
    night = locked.pytest("--autoresearch-loop", "--autoresearch-tag=lab", "--autoresearch-max=3")
    found = {run["description"]: run["verdict"] for run in locked.runs if run["kind"] == "experiment"}
    reasons = {name: (verdict["outcome"], verdict["reason"]) for name, verdict in found.items()}
    assert reasons["untracked"] == ("crash", "changed what is not its own: added: rules/torch.py"), night.out
    assert reasons["filtered"] == ("crash", "changed what is not its own: changed: rules/räte.py")
    assert "honest" in reasons and reasons["honest"][0] != "crash", night.out
    assert (locked.root / ".autoresearch/lab/rules/räte.py").read_text() == "RATE = 1\n"


def test_what_python_runs_at_its_start_must_not_change_during_a_night(locked: Lab, tmp_path: Path) -> None:
    (site := tmp_path / "site").mkdir()
    (site / "old.pth").write_text("# here from the start\n")
    locked.write(
        "conftest.py", f"import site\nsite.getsitepackages = lambda: [{str(site)!r}]\n" + locked.read("conftest.py")
    )
    assert locked.pytest("--autoresearch-lock=update").code == 0
    locked.commit("site")
    assert locked.loop().code == 0
    before = len(locked.runs)
    locked.plan(("unused", "RATE", "RATE"), ("meddles", 'MODE = "ok"', 'MODE = "meddle"'))
    locked.env["LAB_MEDDLE"] = str(site / "evil.pth")
    night = locked.loop()
    assert night.code == 4, night.out
    assert f"added: {site / 'evil.pth'}" in night.error
    assert len(locked.runs) == before


def test_startup_files_are_those_of_the_site_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pth", "sitecustomize.py", "usercustomize.py", "torch.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr("site.getsitepackages", lambda: [os.fspath(tmp_path)])
    monkeypatch.setattr("site.ENABLE_USER_SITE", False)
    assert [Path(name).name for name in startup_files()] == ["a.pth", "sitecustomize.py", "usercustomize.py"]
