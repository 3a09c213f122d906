"""Good neighbour: beside the plugins that people have installed, an experiment runs once, to the same verdict.

Needs git, the fake runner of lab.py, and the package with its dev extra: plugins are loaded as pytest loads them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from tests.plugin.lab import RUNNER, TRAIN, WAIT_S, Lab, Night

PLUGINS = ("randomly", "rerunfailures", "xdist", "timeout", "reportlog", "cov")
# Every option that makes a neighbour do something; a second is less than a night takes
BUSY = ("--cov", "--cov-report=", "--timeout=1", "--report-log=log.jsonl", "--junitxml=junit.xml", "-p", "randomly")
EDITS = (
    ("worse", "RATE = 0.04", "RATE = 0.05"),
    ("better", "RATE = 0.04", "RATE = 0.03"),
    ("crashes", 'MODE = "ok"', 'MODE = "crash"'),
)
LOOP = ("--autoresearch-loop", "--autoresearch-tag=lab", "--autoresearch-max=3")
# A conftest.py that has rerunfailures repeat every item that fails, collected or not
REPEATED = """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    item.add_marker(pytest.mark.flaky(reruns=2))
"""
UNMEASURED = "import sys\nif 'coverage' in sys.modules:\n    raise SystemExit('measured by coverage')\n"


def among_neighbours(lab: Lab, *args: str) -> Night:
    """Run pytest with every installed plugin."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *args],
        cwd=lab.root,
        env=env | lab.env | {"COLUMNS": "140"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return Night(code=done.returncode, out=done.stdout)


def verdicts(lab: Lab) -> list[tuple[Any, ...]]:
    """Return what the ledger says of each run, without what differs from night to night."""
    return [
        (run["kind"], run["number"], run["description"], run["result"]["score"], (run["verdict"] or {}).get("outcome"))
        for run in lab.runs
    ]


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A project after a night without neighbours."""
    lab = Lab.build(tmp_path_factory.mktemp("alone") / "project")
    lab.plan(*EDITS)
    assert lab.pytest(*LOOP).code == 1
    return lab


def test_they_are_installed(lab: Lab) -> None:
    lab.write("test_it.py", "def test_it(): pass\n")
    loaded = among_neighbours(lab, "test_it.py").out.partition("plugins: ")[2].partition("\n")[0]
    assert [name for name in PLUGINS if f"{name}-" not in loaded] == []


def test_a_night_among_them_is_the_same_night(lab: Lab, alone: Lab) -> None:
    lab.plan(*EDITS)
    night = among_neighbours(lab, *LOOP, *BUSY)
    assert night.code == 1, night.out
    assert verdicts(lab) == verdicts(alone)
    assert len(lab.requests("run")) == len(alone.requests("run"))
    reports = map(json.loads, lab.read("log.jsonl").splitlines())
    called = Counter(report["nodeid"] for report in reports if report.get("when") == "call")
    assert set(called.values()) == {1}, called
    assert sorted(name.rpartition("::")[2] for name in called) == sorted(lab.properties("junit.xml"))
    assert {"1", "2", "3"} < lab.properties("junit.xml").keys()


@pytest.mark.parametrize("mode", ["ok", "crash"])
def test_a_single_run_among_them_runs_once(lab: Lab, mode: str) -> None:
    lab.write("train.py", TRAIN.replace('"ok"', f'"{mode}"'))
    night = among_neighbours(lab, "train.py", *BUSY)
    assert night.code == (mode != "ok"), night.out
    assert len(lab.requests("run")) == 1
    assert ("val_bpb: 1.084" in night.out) == (mode == "ok")


@pytest.mark.parametrize(
    ("options", "ini", "named"),
    [
        (("-n2",), {}, "-n"),
        (("--dist=each", "--tx=2*popen"), {}, "-n"),
        (("--reruns=2",), {}, "--reruns"),
        ((), {"reruns": "2"}, "--reruns"),
        (("-f",), {}, "--looponfail"),
    ],
)
@pytest.mark.parametrize("what", [LOOP, ("--autoresearch-try=x",), ("--autoresearch-determinism",), ("train.py",)])
def test_what_would_run_it_twice_is_refused(
    lab: Lab, what: tuple[str, ...], options: tuple[str, ...], ini: Mapping[str, str], named: str
) -> None:
    given = [word for key, value in ini.items() for word in ("-o", f"{key}={value}")]
    night = among_neighbours(lab, *what, *options, *given)
    assert night.code == 4, night.out
    assert f"cannot be combined with {named}: an experiment runs once" in night.out
    assert not lab.runs


@pytest.mark.parametrize("option", ["--reruns=2", "-n2"])
def test_it_is_refused_from_another_folder_too(lab: Lab, option: str) -> None:
    lab.write("notes/today.txt", "")
    elsewhere = Lab(top=lab.top, folder="notes", env=lab.env)
    night = among_neighbours(elsewhere, "../train.py", option)
    assert night.code == 4, night.out
    assert "an experiment runs once" in night.error


def test_a_mark_for_reruns_repeats_no_experiment(lab: Lab) -> None:
    lab.plan(*EDITS)
    lab.write("conftest.py", lab.read("conftest.py") + REPEATED)
    lab.commit("repeats what fails")
    night = among_neighbours(lab, *LOOP)
    assert night.code == 4 and "an experiment runs once" in night.error, night.out
    assert len(lab.requests("run")) == 3 + 3  # baselines, then each edit
    assert lab.verdicts == ["discard", "keep"]
    lab.write("train.py", TRAIN.replace('"ok"', '"crash"'))
    assert "an experiment runs once" in among_neighbours(lab, "train.py").error
    assert len(lab.requests("run")) == 3 + 3 + 1


def test_coverage_of_child_processes_leaves_the_runner_alone(lab: Lab) -> None:
    """A judge that is measured would train less in the same time."""
    lab.write("runner.py", UNMEASURED + RUNNER)
    lab.write(".coveragerc", "[run]\npatch = subprocess\n")
    runner = "autoresearch_runner={python} -I runner.py"  # with site folders, from which coverage would start
    night = among_neighbours(lab, "train.py", "-o", runner, "--cov", "--cov-report=")
    assert night.code == 0, night.out


def test_this_suite_is_not_shuffled(pytestconfig: pytest.Config) -> None:
    assert not pytestconfig.pluginmanager.has_plugin("randomly")


def test_ordinary_tests_beside_it_may_use_them(lab: Lab) -> None:
    lab.write(
        "test_it.py", "import pytest\nTRIES = []\n\ndef test_flaky():\n    TRIES.append(1)\n    assert len(TRIES) > 1\n"
    )
    assert among_neighbours(lab, "test_it.py", "--reruns=1").code == 0
    assert among_neighbours(lab, "test_it.py", "-n1", "--reruns=1").code == 0


def test_subtests_are_counted_as_ever(lab: Lab) -> None:
    lab.write(
        "test_it.py",
        "def test_each(subtests):\n    for i in (1, 2):\n        with subtests.test(i=i):\n            pass\n",
    )
    assert among_neighbours(lab, "test_it.py").code == 0
