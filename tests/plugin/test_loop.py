"""Proves the loop end to end: baselines, verdicts, ledger, git, report; and that it survives kills and bad candidates.

Needs git and the fake trainer of lab.py; every test runs pytest in a process of its own.
"""

import os
import pty
import re
from pathlib import Path

import pytest

from tests.plugin.lab import PROPOSE, TRAIN, Lab, counts, interrupt, survivors

BETTER = ("rate nearer", "RATE = 0.04", "RATE = 0.03")
WORSE = ("rate away", "RATE = 0.04", "RATE = 0.05")


def test_keep_discard_and_crash(lab: Lab) -> None:
    lab.plan(WORSE, BETTER, ("break it", 'MODE = "ok"', 'MODE = "crash"'))
    (lab.root / "notes.txt").write_text("untracked")
    before = (lab.git("status", "--porcelain"), lab.git("rev-parse", "HEAD"), lab.git("symbolic-ref", "HEAD"))
    night = lab.loop("--junitxml=../j.xml", experiments=3)
    assert night.code == 1, night.out  # a crash is a failed item
    assert counts(night.out) == {"passed": 7, "discarded": 1, "failed": 1}  # 3 baselines and 3 for the claim
    assert lab.verdicts == ["discard", "keep", "crash"]
    log = lab.git("log", "--format=%s", "autoresearch/lab").splitlines()
    assert log == ["rate nearer", "plan", "project"]
    assert "RATE = 0.03" in lab.git("show", "autoresearch/lab:train.py")
    rows = [row.split("\t") for row in lab.results.splitlines()]
    assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert [row[3:] for row in rows[1:]] == [
        *[["keep", "baseline"]] * 3,
        ["discard", "rate away"],
        ["keep", "rate nearer"],
    ]
    table = (lab.root / ".autoresearch/lab/results.tsv").read_text().splitlines()
    assert table[-1].split("\t")[1:] == ["0.000000", "0.0", "crash", "break it"]
    refs = lab.git("for-each-ref", "--format=%(refname)", "refs/autoresearch/").splitlines()
    assert refs == [f"refs/autoresearch/lab/{n:04d}" for n in (1, 2, 3)]
    after = (lab.git("status", "--porcelain"), lab.git("rev-parse", "HEAD"), lab.git("symbolic-ref", "HEAD"))
    assert after == before
    cases = lab.properties("../j.xml")
    assert cases["2"]["val_bpb"] == "1.074" and cases["2"]["verdict"] == "keep"
    assert cases["3"]["reason"] == "ValueError: too wide"
    assert "Traceback (most recent call last): too wide" in night.out
    assert "git cherry-pick -n refs/autoresearch/lab/0001" in night.out
    assert "claim: val_bpb: baseline 1.084000 (3 runs), champion 1.074000 (3 runs, " in night.out
    assert "gain +0.010000 ± 0.000000" in night.out
    lab.git("cherry-pick", "-n", "refs/autoresearch/lab/0001")
    assert "RATE = 0.05" in lab.read("train.py")


NO_SCORES = {
    "exit": "the runner gave no result (exit code 3): KeyError: 'lost'",
    "nan": "val_bpb = nan is not a positive number",
    "zero": "val_bpb = 0.0 is not a positive number",
    "negative": "val_bpb = -1.0 is not a positive number",
    "text": "val_bpb = '1.0' is not a positive number",
    "two": "the runner gave two results",
    "loud": "the runner gave no result (exit code 1): the end is near",
}


def test_what_is_no_score_is_a_crash(lab: Lab) -> None:
    lab.plan(*((mode, '"ok"', f'"{mode}"') for mode in NO_SCORES))
    assert lab.loop(experiments=len(NO_SCORES)).code == 1
    final = [run for run in lab.runs if run["verdict"] and run["verdict"]["outcome"] != "retry"]
    assert {run["description"]: run["verdict"]["reason"] for run in final} == NO_SCORES
    assert {run["verdict"]["outcome"] for run in final} == {"crash"}
    # a runner that fails is the machine's fault, until it fails for the third time
    assert {mode: sum(run["description"] == mode for run in lab.runs) for mode in NO_SCORES} == {
        mode: 3 if "the runner" in reason else 1 for mode, reason in NO_SCORES.items()
    }


def test_garbage_beside_a_result_does_not_hurt(lab: Lab) -> None:
    lab.write("train.py", TRAIN.replace('"ok"', '"garbage"'))
    assert lab.pytest("train.py").code == 0


def test_a_hanging_candidate_is_ended_and_the_loop_goes_on(lab: Lab) -> None:
    lab.plan(("hang", '"ok"', '"hang"'), BETTER)
    night = lab.loop("-o", "autoresearch_timeout_s=2", "-p", "timeout", "--timeout=0.01", experiments=2)
    assert lab.verdicts == ["crash", "keep"], night.out  # and pytest-timeout, at 10 ms, never fired
    assert lab.runs[3]["result"]["kind"] == "timeout"
    assert not [pid for pid in Path(lab.env["LAB_PIDS"]).read_text().split() if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGKILL"])
def test_the_next_start_goes_on_after_a_kill(lab: Lab, end: str) -> None:
    lab.plan(BETTER, ("hang", '"ok"', '"hang"'))
    process = lab.start("--autoresearch-loop", "--autoresearch-tag=lab")
    with process:
        tree = lab.hanging(process)
        assert len(tree) >= 3
        interrupt(process) if end == "Ctrl-C" else process.kill()
        out, _ = process.communicate(timeout=60)
    assert survivors(tree) == []
    if end == "Ctrl-C":
        assert (process.returncode == 2 and "Interrupted" in out) or "KeyboardInterrupt" in out
        assert "go on from here" in out
        assert '"ok"' in (lab.root / ".autoresearch/lab/train.py").read_text()
    assert lab.verdicts == ["keep"]  # nothing half-done is recorded
    lab.plan(BETTER, ("wider", "WIDTH = 64", "WIDTH = 128"))
    night = lab.loop()
    assert night.code == 0, night.out
    assert "goes on from experiment 1" in night.out
    assert [record["kind"] for record in lab.runs] == [
        *["baseline"] * 3,
        *["experiment"] * 2,
        *["claim"] * 3,
    ]
    assert lab.git("log", "--format=%s", "autoresearch/lab").splitlines()[:2] == ["wider", "rate nearer"]


def test_what_is_no_experiment_is_not_run(lab: Lab) -> None:
    lab.plan(
        ("only a comment", "# units", "# of each layer"),
        WORSE,
        ("the same again, other words", "RATE = 0.04  # learning rate", "RATE = 0.05  # again"),
        BETTER,
    )
    night = lab.loop(experiments=2)
    assert "means the same as the champion's" in night.out
    assert "means the same as in experiment 1 (discard)" in night.out
    assert lab.verdicts == ["discard", "keep"]


def test_a_loop_with_an_end_gives_up_on_a_proposer_without_ideas(lab: Lab) -> None:
    hook = "def pytest_autoresearch_propose(): raise NoProposal('not today')\n"
    lab.write("conftest.py", "from pytest_autoresearch.propose import NoProposal\n" + hook)
    night = lab.loop()
    assert night.code == 0 and lab.verdicts == []
    assert "5 proposals in a row that were no experiment; the last: not today" in night.out


def test_foreign_changes_of_a_proposer_are_named_and_undone(lab: Lab) -> None:
    lab.plan(BETTER)
    conftest = lab.read("conftest.py").replace(
        "    return description", "    (workdir / 'runner.py').write_text('print(1)')\n    return description"
    )
    lab.write("conftest.py", conftest)
    lab.commit("meddler")
    night = lab.loop()
    assert lab.verdicts == ["crash"]
    assert "changed what is not its own: changed: runner.py" in night.out
    assert "print(1)" not in (lab.root / ".autoresearch/lab/runner.py").read_text()


def test_locked_files_changed_during_a_run_forbid_the_keep(lab: Lab) -> None:
    lab.plan(("meddle", '"ok"', '"meddle"'))
    night = lab.pytest(
        "--autoresearch-loop",
        "--autoresearch-tag=lab",
        "--autoresearch-max=1",
        env={"LAB_MEDDLE": str(lab.root / ".autoresearch/lab/runner.py")},
    )
    assert lab.verdicts == ["crash"] and night.code == 1
    assert "locked files changed: changed: runner.py" in night.out


def test_a_failing_teardown_vetoes_a_keep(lab: Lab) -> None:
    lab.plan(BETTER)
    hook = "\n\ndef pytest_runtest_teardown(item):\n    if item.name == '1':\n        raise OSError('no going back')\n"
    lab.write("conftest.py", lab.read("conftest.py") + hook)
    lab.commit("teardown")
    night = lab.loop()
    assert lab.verdicts == ["crash"] and night.code == 1
    assert "teardown failed: OSError: no going back" in night.out
    assert lab.git("log", "-1", "--format=%s", "autoresearch/lab") == "teardown"


def test_maxfail_ends_the_loop_as_it_ends_pytest(lab: Lab) -> None:
    lab.plan(("break it", '"ok"', '"crash"'), BETTER)
    night = lab.loop("-x", experiments=2)
    assert night.code == 1 and "stopping after 1 failures" in night.out
    assert lab.verdicts == ["crash"]


DECIDE = """

def pytest_autoresearch_decide(standing, runs):
    import os, signal
    from pytest_autoresearch.records import Verdict
    if len(runs) == 2 and os.environ.get("LAB_KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Verdict(outcome="confirm" if len(runs) == 1 else "keep", reason="asked twice")
"""


def test_a_kill_in_the_second_run_repeats_only_that(lab: Lab) -> None:
    lab.write("conftest.py", PROPOSE + DECIDE)
    lab.plan(BETTER)
    lab.commit("decide")
    lab.env["LAB_KILL"] = "1"
    assert lab.loop().code == -9
    assert lab.verdicts == ["confirm"]
    lab.env["LAB_KILL"] = ""
    night = lab.loop()
    assert night.code == 0, night.out
    assert [(run["kind"], run["number"], run["run"]) for run in lab.runs[3:5]] == [
        ("experiment", 1, 1),
        ("confirm", 1, 2),
    ]
    assert lab.git("log", "-1", "--format=%s", "autoresearch/lab") == "rate nearer"


def test_hours_end_the_loop_and_higher_can_be_better(lab: Lab) -> None:
    lab.plan(WORSE)
    args = ("--autoresearch-loop", "--autoresearch-tag=lab", "--autoresearch-hours=0.00000001")
    assert "hours, as --autoresearch-hours asked" in lab.pytest(*args).out
    night = lab.loop("-o", "autoresearch_direction=max")
    assert lab.verdicts == ["keep"] and "gain +0.010000" in night.out


def test_quiet_verbose_and_without_a_terminal(lab: Lab) -> None:
    lab.plan(BETTER, ("wider", "WIDTH = 64", "WIDTH = 128"), ("warm", "= 0.1", "= 0.2"))
    assert "keep: " in lab.loop("-q").out
    assert "train.py::2 PASSED" in lab.loop("-v").out
    assert lab.loop("-p", "no:terminal").code == 0


def test_two_loops_exclude_each_other(lab: Lab) -> None:
    lab.write("train.py", lab.read("train.py").replace('"ok"', '"hang"'))
    lab.commit("hang")
    process = lab.start("--autoresearch-loop", "--autoresearch-tag=lab")
    with process:
        tree = lab.hanging(process)
        other = lab.pytest("--autoresearch-loop", "--autoresearch-tag=other", "--autoresearch-max=1")
        process.kill()
    assert survivors(tree) == []
    assert other.code == 4 and "repository" in other.error


def test_the_users_files_survive_discards(lab: Lab) -> None:
    lab.write(".gitignore", "ignored.txt\n")
    for name in ("staged.txt", "modified.txt"):
        lab.write(name, "committed\n")
    lab.plan(WORSE)
    for name in ("untracked.txt", "ignored.txt", "staged.txt"):
        lab.write(name, f"{name} of the user\n")
    lab.git("add", "staged.txt")
    lab.write("modified.txt", "work in progress\n")
    before = {path: path.read_bytes() for path in lab.root.iterdir() if path.is_file()}
    status = lab.git("status", "--porcelain", "--ignored", "--", ".", ":!.autoresearch")
    assert lab.loop().code == 0 and lab.verdicts == ["discard"]
    lab.write("train.py", TRAIN.replace("0.04", "0.06"))
    assert lab.pytest("--autoresearch-try", "worse", "--autoresearch-tag=lab").code == 1
    assert lab.verdicts == ["discard", "discard"]
    after = {path: path.read_bytes() for path in lab.root.iterdir() if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    assert lab.git("status", "--porcelain", "--ignored", "--", ".", ":!.autoresearch") == status


def test_monorepo_folder_with_spaces_and_umlauts(tmp_path: Path) -> None:
    lab = Lab.build(tmp_path / "Große Ablage", folder="my project/train")
    lab.plan(BETTER)
    night = lab.loop()
    assert night.code == 0, night.out
    assert lab.verdicts == ["keep"]
    changed = lab.git("show", "--name-only", "--format=", "autoresearch/lab").splitlines()
    assert changed == ["my project/train/results.tsv", "my project/train/train.py"]


def test_tuner_without_arguments_finds_gains(lab: Lab) -> None:
    for nights in range(1, 4):  # it proposes at random: a night may find nothing, three hardly will
        night = lab.loop(experiments=8)
        assert night.code == 0, night.out
        assert len({record["commit"] for record in lab.runs if record["verdict"]}) == 8 * nights
        if "keep" in lab.verdicts:
            break
    assert "keep" in lab.verdicts
    assert lab.git("diff", "--numstat", "HEAD..autoresearch/lab", "--", "train.py").split()[0] in ("1", "2", "3")


def test_live_line_is_rewritten_on_a_terminal(lab: Lab) -> None:
    command, env = lab.command("train.py")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(lab.root)
        os.execve(command[0], command, {**env, "TERM": "xterm"})
    out = b""
    try:
        while data := os.read(terminal, 65_536):
            out += data
    except OSError:  # Linux reports the closed terminal so
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert re.search(rb"\r[^\n]*15 of 30 s  step 7  loss 3.2500  12.3k tok/s[^\n]*\r", out), out
