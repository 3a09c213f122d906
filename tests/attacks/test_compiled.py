"""THREATS classes 2 and 5, the compile cache: what a candidate compiles, or puts where that goes, ends with its run.

The first baseline's cache, as it was when its clock started, is lent to every later run, each with a copy of its own.
Needs the `cache` fixture and git; that the kept folder cannot be written to needs a sandbox.
"""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from oracle import compiled
from pytest_autoresearch.compiled import KEPT, NAME, request
from tests.attacks.lab import source
from tests.plugin.lab import Lab
from tests.processes.judging import FEW_ROWS, Judged, judge

HOMES = 'HOMES = [os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"]]'
# every process says what it finds before it leaves anything
LEAVE = """
    {homes}
    print("FOUND", sorted(os.listdir(HOMES[0])) if os.path.isdir(HOMES[0]) else [], flush=True)
    os.makedirs(HOMES[0], exist_ok=True)
    open(os.path.join(HOMES[0], "{name}" + "-scorer" * SCORING), "w").close()
"""
LENT = [["made"], ["made-scorer"], ["made-scorer"]]


@pytest.fixture
def night(tmp_path: Path, cache: Path) -> Callable[..., Judged]:
    """Judge a source that leaves `name` in its caches, one run after the other beside one kept folder."""
    count = iter(range(99))

    def run(name: str, *, keep: bool = False, **places: Any) -> Judged:
        places["top"] = dedent(LEAVE.format(homes=HOMES, name=name)) + dedent(places.get("top", ""))
        asked = {"path": str(tmp_path / "kept"), "keep": keep}
        return judge(tmp_path / f"run{next(count)}", cache, source(**places), code=FEW_ROWS, compiled=asked)

    return run


def found(run: Judged) -> list[list[str]]:
    """Return what each process of a run that gave a score found: the trainer, the scorer, the audit's scorer."""
    assert run.result["status"] == "ok", f"{run.result}\n{run.log[-2_000:]}"
    return [json.loads(line[6:].replace("'", '"')) for line in run.log.splitlines() if line.startswith("FOUND ")]


def plain(home: Path) -> Path:
    (folder := home / "compiled/inductor/ab").mkdir(parents=True)
    (folder / "code.so").write_bytes(b"code")
    return folder


def test_a_later_run_gets_the_first_baselines_cache_and_nothing_of_another(
    night: Callable[..., Judged], tmp_path: Path, trust: str
) -> None:
    trained = 'open(os.path.join(HOMES[0], "trained"), "w").close()'
    first = night("made", keep=True, step=trained, after=trained)
    assert found(first) == [[], [], []]
    kept = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").glob("*/*/*"))
    # of the trainer, what was there when the clock started
    assert kept == ["scorer/inductor/made-scorer", "trainer/inductor/made"]
    # a copy, so that it may do with its own what it likes; the kept one it does not reach
    poison = f"""
        for name in os.listdir(HOMES[0]): open(os.path.join(HOMES[0], name), "w").write("poison")
        try: open({str(tmp_path / "kept/trainer/inductor/poison")!r}, "w"); print("REACHED")
        except OSError: pass
    """
    later = night("poison", top=poison)
    assert found(later) == LENT
    assert trust != "sealed" or "REACHED" not in later.log
    if trust != "sealed":
        (tmp_path / "kept/trainer/inductor/poison").unlink(missing_ok=True)
    again = night("more", keep=True)  # there is one already
    assert found(again) == LENT
    assert [path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()] == [b"", b""]
    assert sorted(os.listdir(tmp_path / "kept/trainer/inductor")) == ["made"]


def test_a_crash_of_the_first_baseline_keeps_nothing(night: Callable[..., Judged], tmp_path: Path) -> None:
    assert night("made", keep=True, after="raise ValueError('late')").result["status"] == "crash"
    assert not (tmp_path / "kept").exists()
    asked = {"path": str(tmp_path / "kept"), "keep": True}
    (plain(tmp_path) / "new").touch()  # what the crash left half done is in nobody's way
    compiled.take(asked, "trainer", tmp_path)
    compiled.keep(asked)
    assert os.listdir(tmp_path / "kept/trainer/inductor") == ["ab"]
    assert sorted(path.name for path in tmp_path.glob("kept*")) == ["kept"]


@pytest.mark.parametrize("what", ["link", "link to a folder", "pipe", "socket", "too large", "too many", "too deep"])
def test_what_is_no_cache_is_not_kept(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    folder = plain(tmp_path)
    match what:
        case "link":
            (folder / "it").symlink_to("/etc/passwd")
        case "link to a folder":
            (folder / "it").symlink_to("/etc")
        case "pipe":
            os.mkfifo(folder / "it")
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind("compiled/inductor/ab/it")
        case "too large":
            os.truncate(folder / "code.so", compiled.MAX_BYTES + 1)
            monkeypatch.setattr(compiled, "MAX_BYTES", 2**20)
        case "too many":
            monkeypatch.setattr(compiled, "MAX_FILES", 2)
        case "too deep":
            folder.joinpath(*["d"] * 60).mkdir(parents=True)
    asked = {"path": str(tmp_path / "kept"), "keep": True}
    compiled.take(asked, "trainer", tmp_path)
    compiled.keep(asked)
    assert list(tmp_path.glob("kept*")) == []


def test_a_folder_that_is_a_link_is_no_cache(tmp_path: Path) -> None:
    plain(tmp_path / "elsewhere")
    (tmp_path / "compiled").symlink_to(tmp_path / "elsewhere/compiled")
    asked = {"path": str(tmp_path / "kept"), "keep": True}
    compiled.take(asked, "trainer", tmp_path)
    compiled.keep(asked)
    assert list(tmp_path.glob("kept*")) == []


def test_tritons_lists_name_the_copy(tmp_path: Path) -> None:
    """As FileCacheManager.put_group writes them: with the full path of where the kernel was made."""
    (made := tmp_path / "first/compiled/triton/KEY").mkdir(parents=True)
    for name in ("kernel.cubin", "kernel.json"):
        (made / name).write_text(name)
    paths = {name: str(made / name) for name in ("kernel.cubin", "kernel.json")}
    (made / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    asked = {"path": str(tmp_path / "kept"), "keep": True}
    compiled.take(asked, "trainer", tmp_path / "first")
    compiled.keep(asked)
    environment = compiled.lend(asked, "trainer", tmp_path / "second")
    mine = Path(environment["TRITON_CACHE_DIR"]) / "KEY"
    listed = json.loads((mine / "__grp__kernel.json").read_text())["child_paths"]
    assert listed == {name: str(mine / name) for name in paths} and mine.is_relative_to(tmp_path / "second")
    assert Path(listed["kernel.cubin"]).read_text() == "kernel.cubin"


def asked_of(lab: Lab) -> list[tuple[str, bool]]:
    return [(run["compiled"]["path"], run["compiled"]["keep"]) for run in lab.requests("run")]


def test_only_the_first_baseline_of_a_loop_fills_it(tmp_path: Path) -> None:
    """A line that goes on lends the same folder; a champion that was kept before its first baseline fills none."""
    lab = Lab.build(tmp_path / "project")
    lab.plan(("better", "RATE = 0.04", "RATE = 0.02"), ("worse", "RATE = 0.02", "RATE = 0.9"))
    assert lab.loop().code == 0 and lab.verdicts[-1] == "keep"
    assert lab.loop().code == 0
    runs = asked_of(lab)
    (folder,) = {path for path, _ in runs}
    assert [keep for _, keep in runs] == [True] + [False] * (len(runs) - 1)
    assert Path(folder).parent == lab.top / ".git/autoresearch" / NAME
    assert {run["compiled"]["path"] for run in lab.requests("verify")} <= {folder}
    assert lab.loop("-o", "autoresearch_budget_s=7").code in (0, 4)  # another fingerprint: its own baselines come first
    others = asked_of(lab)[len(runs) :]
    assert others and all(path != folder and not keep for path, keep in others)


def test_a_few_are_kept(tmp_path: Path) -> None:
    def made(start: str) -> Path:
        asked = request(tmp_path, start, {"gpu": "one"}, fill=True)
        path = Path(asked["path"])
        path.mkdir(parents=True, exist_ok=True)
        (path / "file").touch()
        order = len(list(path.parent.iterdir()))
        os.utime(path, ns=(order, order + int(start)))
        return path

    folders = [made(str(number)) for number in range(KEPT)]
    Path(f"{folders[0]}.new").mkdir()  # of a judge that was killed
    other: Any = request(tmp_path, "0", {"gpu": "two"}, fill=False)
    assert Path(other["path"]) not in folders and all(path.exists() for path in folders)
    last = made("9")
    assert sorted((tmp_path / NAME).iterdir()) == sorted([*folders[1:], last])
