"""Proves the surface: names that must not change, what each bad input says (exit 4, one line), and silence when unused.

Needs git and the fake trainer of lab.py; `-p no:autoresearch` and the start-up test need the package to be installed.
"""

import importlib.metadata
import inspect
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import pytest_autoresearch.loop  # noqa: F401 - for good: a pytest run in this process forgets what it imports
from pytest_autoresearch import hookspecs, ledger, plugin
from pytest_autoresearch.records import Candidate, Policy, Result, Verdict
from tests.plugin.lab import TRAIN, Lab, Night

LOOP = ("--autoresearch-loop", "--autoresearch-tag=lab", "--autoresearch-max=1")


def test_the_surface_is_frozen() -> None:
    assert [name for name, _, _ in plugin.OPTIONS] == [
        "--autoresearch-loop",
        "--autoresearch-try",
        "--autoresearch-max",
        "--autoresearch-hours",
        "--autoresearch-tag",
        "--autoresearch-agent",
        "--autoresearch-profile",
        "--autoresearch-device",
        "--autoresearch-require",
        "--autoresearch-determinism",
        "--autoresearch-rule",
        "--autoresearch-adopt",
        "--autoresearch-import",
        "--autoresearch-status",
        "--autoresearch-replay",
        "--autoresearch-lock",
        "--autoresearch-lock-digest",
        "--autoresearch-guard",
        "--autoresearch-allow-oracle-change",
        "--autoresearch-laws",
        "--autoresearch-compare",
    ]
    assert {name: default for name, _, default, _ in plugin.INI_KEYS} == {
        "autoresearch_metric": "val_bpb",
        "autoresearch_direction": "min",
        "autoresearch_budget_s": None,
        "autoresearch_timeout_s": None,
        "autoresearch_mutable": ["train.py"],
        "autoresearch_immutable": [],
        "autoresearch_runner": ["{python}", "-P", "-m", "oracle.judge"],
        "autoresearch_branch_prefix": "autoresearch",
        "autoresearch_line_price": 0.0001,
        "autoresearch_memory_price": 0.001,
        "autoresearch_profile": "",
        "autoresearch_device": "auto",
        "autoresearch_agent_timeout_s": 900.0,
        "autoresearch_program": "program.md",
    }
    hooks = {
        name: list(inspect.signature(f).parameters) for name, f in vars(hookspecs).items() if name.startswith("pytest_")
    }
    assert hooks == {
        "pytest_autoresearch_propose": ["settings", "workdir", "history", "number", "seed", "refused", "crash"],
        "pytest_autoresearch_decide": ["standing", "runs", "lines_added", "policy"],
        "pytest_autoresearch_finished": ["settings", "record"],
    }
    candidate = Candidate(number=1, commit="c", parent="p", description="d", lines_added=0)
    result = Result(status="ok", score=1.0)
    record = ledger.run_record(kind="experiment", candidate=candidate, run=1, seed=1, result=result, verdict=None)
    identity = {"schema", "type", "kind", "number", "run", "attempt", "commit", "parent", "description", "lines_added"}
    assert record.keys() == identity | {"time", "seed", "signature", "policy", "veto", "result", "verdict"}
    columns = {kind: [column.name for column in fields(kind)] for kind in (Result, Verdict, Policy)}
    assert columns == {
        Result: [
            *("status", "score", "memory_gb", "kind", "reason", "detail", "trust", "work", "weights_sha256"),
            *("metrics", "fingerprint"),
        ],
        Verdict: ["outcome", "reason", "gain", "price", "sigma"],
        Policy: ["direction", "rule", "line_price", "memory_price", "prior_sigma", "prior_freedom"],
    }
    assert ledger.results_tsv([], "val_bpb") == "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def test_exit_codes_are_frozen(lab: Lab) -> None:
    """0 fine, 1 a candidate crashed or a check found something, 2 interrupted (test_loop), 4 nothing can be run."""
    lab.plan(
        ("better", "RATE = 0.04", "RATE = 0.03"),
        ("worse", "RATE = 0.03", "RATE = 0.05"),
        ("crashes", 'MODE = "ok"', 'MODE = "crash"'),
    )
    codes = {"no crash": lab.loop(experiments=2).code, "a crash": lab.loop(experiments=1).code}
    lab.git("switch", "-q", "--detach")
    codes["no start"] = lab.loop().code
    lab.git("switch", "-q", "main")
    for name in ("replay", "status", "compare=autoresearch/lab"):
        codes[name] = lab.pytest(f"--autoresearch-{name}", *["--autoresearch-tag=lab"] * ("=" not in name)).code
    codes["no lock"] = lab.pytest("--autoresearch-lock=check").code
    codes["update"] = lab.pytest("--autoresearch-lock=update").code
    codes["check"] = lab.pytest("--autoresearch-lock=check").code
    lab.commit("lock")
    for name, edit in {"try, kept": "RATE = 0.021", "try, not kept": "RATE = 0.9"}.items():
        lab.write("train.py", TRAIN.replace("RATE = 0.04", edit))
        codes[name] = lab.pytest(f"--autoresearch-try={name}", "--autoresearch-tag=try").code
    for mode in ("ok", "crash", "broken"):
        lab.write("train.py", TRAIN.replace('"ok"', f'"{mode}"'))
        codes[f"determinism, {mode}"] = lab.pytest("--autoresearch-determinism").code
        codes[f"train.py, {mode}"] = lab.pytest("train.py").code
    lab.write("train.py", TRAIN)
    codes["guard"] = lab.pytest("--autoresearch-guard=main").code
    lab.git("switch", "-q", "-c", "change")
    lab.write("runner.py", "print()\n")
    lab.commit("changes the runner")
    codes["guard, changed"] = lab.pytest("--autoresearch-guard=main").code
    codes["check, changed"] = lab.pytest("--autoresearch-lock=check").code
    assert {name: code for name, code in codes.items() if code} == {
        "a crash": 1,
        "no start": 4,
        "no lock": 4,
        "try, not kept": 1,
        "determinism, crash": 1,
        "determinism, broken": 1,
        "train.py, crash": 1,
        "guard, changed": 1,
        "check, changed": 1,
    }


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--autoresearch-max=3",), "--autoresearch-max does nothing without --autoresearch-loop"),
        (("--autoresearch-hours=3",), "--autoresearch-hours does nothing without --autoresearch-loop"),
        (("--autoresearch-agent=true",), "--autoresearch-agent does nothing without --autoresearch-loop"),
        (("--autoresearch-tag=a", "train.py"), "--autoresearch-tag does nothing without --autoresearch-loop or"),
        (("--autoresearch-try=x", "--autoresearch-max=3"), "--autoresearch-max does nothing without"),
        (("--autoresearch-try=x", "--autoresearch-loop"), "exclude each other"),
        (("--autoresearch-determinism", "--autoresearch-loop"), "exclude each other"),
        (("--autoresearch-determinism", "--autoresearch-tag=x"), "--autoresearch-tag does nothing without"),
        (("--autoresearch-determinism", "--collect-only"), "cannot be combined with --collect-only"),
        ((*LOOP, "--autoresearch-require=inproc"), "--autoresearch-require: 'inproc' is not 'sealed' or 'split'"),
        ((*LOOP, "--autoresearch-require=split"), "runner's runs here are of no stated trust"),
        (("--autoresearch-guard=main", "--autoresearch-loop"), "exclude each other"),
        (("--autoresearch-allow-oracle-change",), "does nothing without --autoresearch-guard"),
        (("--autoresearch-guard=nowhere",), "--autoresearch-guard: there is no commit 'nowhere'"),
        (("--autoresearch-laws",), "there is no oracle.lock in"),
        (("--autoresearch-loop", "--autoresearch-max=0"), "--autoresearch-max: '0' is not a whole number, 1 or more"),
        (("--autoresearch-loop", "--autoresearch-max=many"), "--autoresearch-max: 'many'"),
        (("--autoresearch-loop", "--autoresearch-hours=nan"), "--autoresearch-hours: 'nan' is not a number above 0"),
        (("--autoresearch-loop", "--autoresearch-tag=a b"), "--autoresearch-tag: 'a b'"),
        (("--autoresearch-loop", "--autoresearch-tag=../x"), "--autoresearch-tag: '../x'"),
        (("--autoresearch-loop", "--autoresearch-agent=no-such-agent -x"), "there is no program 'no-such-agent'"),
        (("--autoresearch-loop", "--autoresearch-agent='open"), "not a shell command line"),
        ((*LOOP, "-p", "xdist", "-n4"), "--autoresearch-loop cannot be combined with -n"),
        ((*LOOP, "-p", "pytest_rerunfailures", "--reruns=2"), "cannot be combined with --reruns"),
        ((*LOOP, "--pdb"), "cannot be combined with --pdb"),
        ((*LOOP, "--trace"), "cannot be combined with --trace"),
        ((*LOOP, "--collect-only"), "cannot be combined with --collect-only"),
        ((*LOOP, "runner.py"), "runs no tests: remove 'runner.py'"),
        ((*LOOP, "-o", "autoresearch_direction=down"), "autoresearch_direction: 'down' is not 'min' or 'max'"),
        ((*LOOP, "-o", "autoresearch_budget_s=-1"), "autoresearch_budget_s: -1.0 is not a number above 0"),
        ((*LOOP, "-o", "autoresearch_budget_s=soon"), "autoresearch_budget_s: could not convert"),
        ((*LOOP, "-o", "autoresearch_mutable=model.py"), "autoresearch_mutable names 'model.py'"),
        ((*LOOP, "-o", "autoresearch_mutable=/etc/passwd"), "autoresearch_mutable: '/etc/passwd' is not a path inside"),
        ((*LOOP, "-o", "autoresearch_mutable=runner.py"), "in autoresearch_mutable and autoresearch_immutable"),
        ((*LOOP, "-o", "autoresearch_immutable=gone"), "'gone'"),
        ((*LOOP, "-o", "autoresearch_runner={python} -c 'raise SystemExit(\"boom\")'"), "failed its check: boom"),
        ((*LOOP, "-o", "autoresearch_runner=no-such-judge"), "autoresearch_runner: no-such-judge"),
        ((*LOOP, "--autoresearch-profile=huge"), "unknown profile 'huge': use tiny or big"),
        ((*LOOP, "--autoresearch-device=mps"), "--autoresearch-device: 'mps' is not 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ((*LOOP, "--autoresearch-device=cuda:-1"), "--autoresearch-device: 'cuda:-1' is not"),
        ((*LOOP, "--autoresearch-device=cuda:7"), "there is no device cuda:7"),
        (("train.py", "--autoresearch-device=cuda:7"), "there is no device cuda:7"),
        ((*LOOP, "-o", "autoresearch_device=gpu"), "autoresearch_device: 'gpu' is not 'auto', 'cpu'"),
        (("train.py", "--autoresearch-profile=huge"), "unknown profile 'huge': use tiny or big"),
    ],
)
def test_bad_input_is_one_line(
    bench: Lab, args: tuple[str, ...], says: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.root)
    for name, value in {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **bench.env}.items():
        monkeypatch.setenv(name, value)
    done = pytester.runpytest_inprocess("-p", "pytest_autoresearch.plugin", "-p", "no:cacheprovider", *args)
    night = Night(code=int(done.ret), out="\n".join([*done.outlines, *done.errlines]))
    assert night.code == 4, night.out
    assert says in night.error
    assert bench.runs == []


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Return one project for all inputs that are refused before anything is run."""
    return Lab.build(tmp_path_factory.mktemp("options") / "project")


def test_missing_data_is_said_and_nothing_recorded(lab: Lab) -> None:
    lab.write("NO_DATA", "")
    lab.commit("no data")
    for args in (LOOP, ("train.py",)):
        night = lab.pytest(*args, "-o", "autoresearch_immutable=runner.py\nNO_DATA")
        assert night.code == 4
        assert night.error == "ERROR: no data for profile tiny: run `python -m oracle.prepare --profile tiny`"
    assert lab.runs == []


def test_no_repository(lab: Lab) -> None:
    (lab.root / ".git").rename(lab.root / "elsewhere")
    for args in (LOOP, ("--autoresearch-try=x",)):
        night = lab.pytest(*args, env={"GIT_CEILING_DIRECTORIES": str(lab.root.parent)})
        assert night.code == 4 and "git" in night.error


def test_dirty_mutable_file(lab: Lab) -> None:
    lab.write("train.py", TRAIN.replace("0.04", "0.01"))
    night = lab.pytest(*LOOP)
    assert night.code == 4 and "train.py" in night.error
    assert "RATE = 0.01" in lab.read("train.py")


def test_detached_head(lab: Lab) -> None:
    lab.git("checkout", "-q", "--detach")
    night = lab.pytest(*LOOP)
    assert night.code == 4 and "HEAD" in night.error


@pytest.mark.parametrize("args", [LOOP, ("train.py",)])
def test_an_unmodified_file_that_breaks_the_contract(lab: Lab, args: tuple[str, ...]) -> None:
    lab.write("train.py", "def train(:\n")
    lab.commit("broken")
    night = lab.pytest(*args)
    assert night.code == 4, night.out
    assert "train.py line 1: invalid syntax" in night.error
    assert lab.runs == []


def test_naming_another_file_collects_it_as_ever(lab: Lab) -> None:
    lab.write("test_it.py", "def test_it(): pass\n")
    night = lab.pytest("test_it.py", "--junitxml=j.xml")
    assert night.code == 0 and list(lab.properties("j.xml")) == ["test_it"]
    assert lab.pytest().code == 0  # train.py, unnamed, is no test


HEAVY = ("git", "rich", "optuna", "psutil", "torch", "pytest_autoresearch.loop", "pytest_autoresearch.settings")


def test_unused_it_loads_nothing(lab: Lab) -> None:
    lab.write("test_it.py", f"import sys\ndef test_it(): assert not set({HEAVY!r}) & set(sys.modules)\n")
    night = lab.pytest("test_it.py")
    assert night.code == 0, night.out
    assert "autoresearch" not in night.out.replace(str(lab.root), "")
    assert not (lab.root / ".git/autoresearch").exists()


def test_it_can_be_switched_off(lab: Lab) -> None:
    if not [e for e in importlib.metadata.entry_points(group="pytest11") if e.name == "autoresearch"]:
        pytest.skip("the package is not installed here, so no entry point can be switched off")
    lab.env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = ""
    code = "import sys; from pytest import main; sys.exit(main(sys.argv[1:]) or 'pytest_autoresearch' in sys.modules)"
    lab.write("test_it.py", "def test_it(): pass\n")
    import subprocess

    _, env = lab.command()
    done = subprocess.run(
        [sys.executable, "-c", code, "-p", "no:autoresearch", "test_it.py", "-o", "addopts="],
        cwd=lab.root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_names_every_option(lab: Lab) -> None:
    out = lab.pytest("--help").out
    for name in [name for name, _, _ in plugin.OPTIONS] + [name for name, *_ in plugin.INI_KEYS]:
        assert name in out


def test_program_is_short_and_has_six_sections() -> None:
    text = (Path(plugin.__file__).parents[1] / "program.md").read_text()
    assert len(text.splitlines()) <= 100
    assert len([line for line in text.splitlines() if line.startswith("## ")]) == 6
    assert "--autoresearch-try" in text
