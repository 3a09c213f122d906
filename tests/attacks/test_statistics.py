"""THREATS class 8, the statistics: what chance, another seed or another machine gives is no progress.

Each attack is a night of the loop, with its verdict and its reason, beside an honest twin. Real pytest and git; the
runner is a function whose score depends on the file, the seed and the machine (tests/plugin/forks.py).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.plugin.forks import LOOP, Idea, Nights, build, copy, outcomes, records, train

MORE = '''\
import torch
SEED = 1337
DEPTH = 4  # layers
def main():
    """Train."""
    torch.manual_seed(SEED)
    return torch.randn(DEPTH)
'''
BASE = train(1.0, noise=0.01, more=MORE)


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    with Nights(tmp_path_factory.mktemp("nights")) as nights:
        yield nights


@pytest.fixture(scope="module")
def begun(nights: Nights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with baselines and one discard."""
    top = build(tmp_path_factory.mktemp("begun") / "project", BASE)
    ended = nights.run(top, *LOOP, ideas=[Idea(description="worse", text=train(1.2, more=MORE))])
    assert outcomes(top) == ["baseline"] * 3 + ["discard"], ended.out
    return top


@pytest.fixture
def top(begun: Path) -> Path:
    """Return that repository, as it was."""
    saved = begun.with_name("saved")
    copy(saved, begun) if saved.exists() else copy(begun, saved)
    return begun


def verdicts(top: Path) -> list[tuple[str, str]]:
    """Return outcome and reason of every run that has a verdict."""
    found = [record["verdict"] for record in records(top) if record["verdict"]]
    return [(verdict["outcome"], verdict["reason"]) for verdict in found]


def idea(text: str, description: str = "an idea") -> Idea:
    return Idea(description=description, text=text)


WORSE = train(1.2, more=MORE)
CHAMPION, FIRST = "the champion's", r"in experiment 1 \(discard\)"
NOT_NEW = {
    "another seed": (BASE.replace("1337", "4242"), CHAMPION),
    "another seed, computed": (BASE.replace("1337", "1337 * 3 + 1"), CHAMPION),
    "another seed in place": (BASE.replace("manual_seed(SEED)", "manual_seed(99)"), CHAMPION),
    "one seed more": (BASE.replace("    return", "    torch.cuda.manual_seed_all(7)\n    return"), CHAMPION),
    "no seed": (BASE.replace("    torch.manual_seed(SEED)\n", ""), CHAMPION),
    "a comment": (BASE.replace("# layers", "# a great many layers"), CHAMPION),
    "a docstring": (BASE.replace("Train.", "Train better."), CHAMPION),
    "lines and brackets": (BASE.replace("DEPTH = 4  # layers\n", "\nDEPTH = (\n    4\n)\n\n"), CHAMPION),
    "nothing": (BASE, CHAMPION),
    "a discard again, in other words": (WORSE.replace("layers", "layer"), FIRST),
    "a discard again, with a lucky seed": (WORSE.replace("1337", "7"), FIRST),
}


@pytest.mark.parametrize("name", NOT_NEW)
def test_what_is_no_experiment_is_not_run(nights: Nights, top: Path, name: str) -> None:
    text, like = NOT_NEW[name]
    before = records(top)
    ended = nights.run(top, *LOOP, ideas=[idea(WORSE), idea(text)])
    assert re.search(f"no experiment: train.py means the same as {like}", ended.out), ended.out
    assert records(top) == before


def test_a_discard_is_not_run_again_after_a_keep_nor_are_the_baselines(nights: Nights, top: Path) -> None:
    better = train(0.5, more=MORE)
    ended = nights.run(top, *LOOP, ideas=[idea(WORSE), idea(better), idea(WORSE), idea(BASE)])
    said = re.findall(r"no experiment: train.py means the same as in (.*)", ended.out)
    assert said[:2] == ["experiment 1 (discard)", "the baselines"], ended.out
    assert [run["verdict"]["outcome"] for run in records(top) if run["verdict"]][-1] == "keep"


RUN = {  # the whole train.py, its outcome, the reason
    "honest: a constant": (
        BASE.replace("DEPTH = 4", "DEPTH = 5").replace("= 1.0", "= 0.9"),
        "keep",
        "gain 0.1.* beats",
    ),
    "honest: what a draw is used for": (BASE.replace("torch.randn(", "2 * torch.randn("), "keep|discard", "gain"),
    "run on another machine than the champion": (
        train(0.5, mode="elsewhere", more=MORE),
        "crash",
        "what scores are compared under changed since the check: machine",
    ),
    "calls every run the machine's fault": (train(0.5, mode="busy", more=MORE), "crash", "ValueError: busy"),
}


@pytest.mark.parametrize("name", RUN)
def test_one_change_has_its_verdict(nights: Nights, top: Path, name: str) -> None:
    text, outcome, reason = RUN[name]
    ended = nights.run(top, *LOOP, ideas=[idea(WORSE), idea(text)])
    got = verdicts(top)[-1]
    assert len(verdicts(top)) > 1, ended.out
    assert re.fullmatch(outcome, got[0]) and re.search(reason, got[1]), ended.out
    assert len(records(top)) <= 4 + 3  # of one change three runs at most, however it ends


def rolls(count: int) -> list[Idea]:
    """Return changes that change nothing but the draw; no gate knows them for what they are."""
    return [idea(BASE.replace("DEPTH", f"DEPTH_{n}"), f"roll {n}") for n in range(count)]


@pytest.mark.parametrize("rule", ["ladder", "strict"])
def test_rolling_again_until_lucky_is_no_claim(nights: Nights, tmp_path: Path, rule: str) -> None:
    """The winner's curse: what was kept for its score is run afresh before anything is claimed."""
    top = build(tmp_path / "project", BASE)
    ended = nights.run(top, *LOOP, f"--autoresearch-rule={rule}", "--autoresearch-max=14", ideas=rolls(15))
    runs = records(top)
    kept = [record for record in runs if record["verdict"] and record["verdict"]["outcome"] == "keep"]
    assert kept, "nobody was lucky: this night proves nothing"
    if rule == "ladder":
        assert {record["kind"] for record in kept} == {"confirm"}, "a lucky run was believed"
    start, fresh = scores(runs, "baseline"), scores(runs, "claim")
    assert len(fresh) == 3 and {record["commit"] for record in runs[-3:]} == {kept[-1]["commit"]}
    promised, claimed = fmean(start) - kept[-1]["result"]["score"], fmean(start) - fmean(fresh)
    assert claimed < promised
    assert f"gain {claimed:+.6f} ±" in ended.out and "within two standard errors of nothing" in ended.out


def test_honest_a_gain_is_claimed(nights: Nights, tmp_path: Path) -> None:
    top = build(tmp_path / "project", BASE)
    ended = nights.run(top, *LOOP, "--autoresearch-max=1", ideas=[idea(BASE.replace("= 1.0", "= 0.9"))])
    claimed = fmean(scores(records(top), "baseline")) - fmean(scores(records(top), "claim"))
    assert claimed == pytest.approx(0.1, abs=0.02)
    assert f"gain {claimed:+.6f} ±" in ended.out and "errors of nothing" not in ended.out


def scores(runs: list[dict[str, Any]], kind: str) -> list[float]:
    return [record["result"]["score"] for record in runs if record["kind"] == kind]


def test_a_confirmed_champion_is_compared_by_its_fresh_run(nights: Nights, top: Path) -> None:
    ideas = [idea(WORSE), idea(train(0.9925, noise=0.004)), idea(train(1.5, noise=0.0))]
    ended = nights.run(top, *LOOP, ideas=ideas)
    assert outcomes(top)[4:] == ["confirm", "keep", "discard"], ended.out
    lucky, fresh, last = records(top)[4:]
    assert lucky["result"]["score"] != fresh["result"]["score"]
    assert last["verdict"]["gain"] == fresh["result"]["score"] - last["result"]["score"]


def test_rows_of_different_machines_are_never_compared(nights: Nights, top: Path) -> None:
    """On the other machine everything scores half, so that whatever is run there looks like a record here."""
    ideas = [idea(WORSE), idea(train(0.9)), idea(train(0.95)), idea(train(0.8))]
    nights.run(top, *LOOP, ideas=ideas[:2])
    ended = nights.run(top, *LOOP, ideas=ideas, machine="fast")
    assert "the champion has no score under this machine: its own baselines come first" in ended.out
    assert outcomes(top)[4:] == ["keep", *["baseline"] * 3, "discard", "keep"], ended.out
    assert {record["commit"] for record in records(top)[5:8]} == {records(top)[4]["commit"]}
    worse, better = records(top)[8:]
    assert worse["result"]["score"] < records(top)[4]["result"]["score"]  # and yet
    assert worse["verdict"]["gain"] == pytest.approx(-0.025, abs=0.002)
    assert better["verdict"]["gain"] == pytest.approx(0.05, abs=0.002)  # the honest one, against the same machine's
    ended = nights.run(top, *LOOP, ideas=ideas)  # back at home, where the champion has no score
    assert outcomes(top)[-3:] == ["baseline"] * 3, ended.out


def test_imported_rows_are_never_ranked(nights: Nights, tmp_path: Path) -> None:
    top = build(tmp_path / "project", BASE)
    rows = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription", "abcdef1\t0.100000\t1.0\tkeep\ttoo good"]
    rows += ["abcdef2\t0.000000\t0.0\tcrash\ta zero"]
    (tmp_path / "results.tsv").write_text("\n".join(rows) + "\n")
    imported = f"--autoresearch-import={tmp_path / 'results.tsv'}"
    ended = nights.run(top, *LOOP, imported, ideas=[idea(train(0.9)), idea(train(0.95))])
    assert outcomes(top) == ["baseline"] * 3 + ["keep", "discard"], ended.out
