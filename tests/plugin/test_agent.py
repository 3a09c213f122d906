"""Proves `--autoresearch-agent`: what the command reads, what becomes of its edit, and that a bad one harms nothing.

Needs git and the fake trainer of lab.py; the agents are small Python programs.
"""

import shlex
import sys
from pathlib import Path

import psutil

from tests.plugin.lab import Lab, Night

HEAD = "import os, pathlib, sys; said = sys.stdin.read(); train = pathlib.Path('train.py'); "
EDIT = "train.write_text(train.read_text().replace('RATE = 0.04', 'RATE = 0.03')); "


def night(lab: Lab, code: str, *args: str) -> Night:
    """Run the loop for one experiment with an agent made of `code`."""
    command = shlex.join([sys.executable, "-c", HEAD + code])
    return lab.loop("--autoresearch-agent", command, *args)


def test_its_edit_is_the_candidate_and_its_last_line_the_description(lab: Lab) -> None:
    lab.write("program.md", "Be bold.\n")
    lab.commit("program")
    done = night(lab, EDIT + r"print('thinking'); print('\x1b[1mnearer\x1b[0m\trate ' + 'x' * 300); print('  ')")
    assert done.code == 0, done.out
    assert lab.verdicts == ["keep"]
    description = lab.runs[-1]["description"]
    assert description.startswith("[1mnearer [0m rate xxx") and len(description) <= 200


def test_what_it_reads(lab: Lab) -> None:
    lab.write("program.md", "Be bold.\n")
    lab.plan(("rate away", "RATE = 0.04", "RATE = 0.09"))
    lab.loop()
    (lab.root / "conftest.py").unlink()
    copy = Path(lab.env["HOME"]) / "said"
    night(lab, EDIT + f"pathlib.Path({str(copy)!r}).write_text(said + os.getcwd()); print('nearer')")
    said = copy.read_text()
    assert said.startswith("Be bold.\n")
    assert "You are in experiment 2" in said and "val_bpb: lower is better" in said
    assert "1\t1.134000\t-0.050000\tdiscard\trate away\t" in said
    assert said.count("\tbaseline\t") == 3
    assert "combine two near misses" in said
    assert said.endswith(str(lab.root / ".autoresearch/lab"))


TURN = "turn = pathlib.Path(os.environ['LAB_PIDS'] + '.turn'); n = turn.exists() and len(turn.read_text()); "
COUNT = "turn.open('a').write('x'); "


def test_no_proposal_is_said_passed_on_and_not_counted(lab: Lab) -> None:
    code = (
        f"{TURN}{COUNT}\nif n == 0: print('nothing to do')\nelif n == 1: sys.exit(3)\n"
        f"elif n == 2: {EDIT}print('no key'); sys.exit(1)\nelif n == 3: train.unlink(); print('gone')\n"
        f"elif said.count('Your last proposals were not run') == 1: {EDIT}print('nearer')"
    )
    done = night(lab, code)
    assert done.code == 0, done.out
    said = [line.split("no experiment: ")[1] for line in done.out.splitlines() if "no experiment: " in line]
    assert said[0] == "train.py means the same as the champion's"
    assert said[1].startswith("the agent's command failed (exit code 3)")
    assert said[2] == "the agent's command failed (exit code 1): no key"
    assert "train.py" in said[3]
    assert lab.verdicts == ["keep"]  # and the edit of the failed command was taken back: its gain would be refused


def test_one_that_never_returns_is_ended_with_all_it_started(lab: Lab) -> None:
    pids = lab.env["LAB_PIDS"]
    child = f"[{sys.executable!r}, '-c', 'import time; time.sleep(600)']"
    code = (
        f"{TURN}{COUNT}\nif n: {EDIT}print('nearer'); sys.exit()\n"
        f"import subprocess; p = subprocess.Popen({child}, start_new_session=True)\n"
        f"open({pids!r}, 'a').write(f'{{p.pid}} '); print('y' * 1_000_000, flush=True); p.wait()"
    )
    done = night(lab, code, "-o", "autoresearch_agent_timeout_s=2")
    assert "the agent's command was ended after 2 s" in done.out
    started = [int(pid) for pid in Path(pids).read_text().split()]
    assert started and not [pid for pid in started if psutil.pid_exists(pid)]
    assert lab.verdicts == ["keep"]


def test_edits_elsewhere_are_named_undone_and_a_crash(lab: Lab) -> None:
    done = night(lab, EDIT + "pathlib.Path('runner.py').write_text('print(1)'); print('cheat')")
    assert lab.verdicts == ["crash"] and done.code == 1
    assert "changed what is not its own: changed: runner.py" in done.out
    assert "print(1)" not in (lab.root / ".autoresearch/lab/runner.py").read_text()


BREAK = "train.write_text(train.read_text().replace('\"ok\"', '\"crash\"')); print('too bold')"


def test_a_crash_is_handed_back_with_its_files_and_what_it_ended_with(lab: Lab) -> None:
    mend = "train.write_text(train.read_text().replace('\"crash\"', '\"ok\"')); "
    code = (
        f"{TURN}{COUNT}\nif n == 0: {BREAK}\nelse: assert 'ValueError: too wide' in said; {mend}{EDIT}print('mended')"
    )
    done = night(lab, code)
    assert done.code == 1, done.out  # an item crashed
    assert [(run["number"], run["attempt"], run["verdict"]["outcome"]) for run in lab.runs if run["verdict"]] == [
        (1, 1, "crash"),
        (1, 2, "keep"),
    ]
    assert [row.split("\t")[3:] for row in lab.results.splitlines()[4:]] == [["keep", "mended"]]
    refs = lab.git("for-each-ref", "--format=%(refname:lstrip=3)", "refs/autoresearch/").splitlines()
    assert refs == ["0001", "0001-2"]


def test_a_crash_is_handed_back_twice_and_then_recorded(lab: Lab) -> None:
    bolder = "train.write_text(train.read_text() + f'A{n} = {n}' + chr(10)); "
    done = night(lab, f"{TURN}{COUNT}\nif n: {bolder}print('again')\nelse: {BREAK}")
    assert [(run["attempt"], run["verdict"]["outcome"]) for run in lab.runs if run["verdict"]] == [
        (1, "crash"),
        (2, "crash"),
        (3, "crash"),
    ]
    assert "1 experiment, as --autoresearch-max asked" in done.out
    assert [
        row.split("\t")[3:] for row in (lab.root / ".autoresearch/lab/results.tsv").read_text().splitlines()[4:]
    ] == [["crash", "again"]]


def test_an_agent_that_leaves_a_crash_as_it_is_is_not_asked_again(lab: Lab) -> None:
    done = night(lab, f"{TURN}{COUNT}\nif n == 0: {BREAK}")
    assert "not repaired: train.py means the same as in experiment 1 (crash)" in done.out
    assert lab.verdicts == ["crash"]
    assert '"ok"' in (lab.root / ".autoresearch/lab/train.py").read_text()
