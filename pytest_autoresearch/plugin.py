"""The plugin's entry: options and on-demand registration. Costs nothing until one of its options or files is used.

`--autoresearch-loop`, `--autoresearch-try` (loop.py) and `--autoresearch-determinism` register a mode; naming a mutable
file on the command line collects it as an experiment instead of importing it (nodes.py). Nothing else here does
anything. `--autoresearch-guard`, `-lock` and `-laws` are done before any conftest.py is loaded.
"""

import importlib
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .records import Policy, Result, Standing, Verdict
    from .settings import Settings

# name, argument, help
OPTIONS = (
    ("--autoresearch-loop", None, "run the research loop: propose a change, run it, keep it or not, repeat"),
    (
        "--autoresearch-try",
        "DESCRIPTION",
        "put the edit that is in your work tree through one experiment: exit code 0 kept, 1 not",
    ),
    ("--autoresearch-max", "N", "end the loop after N experiments (default: it goes on until you stop it)"),
    ("--autoresearch-hours", "H", "end the loop when H hours are over; a running experiment is finished"),
    (
        "--autoresearch-tag",
        "TAG",
        "name of this line of research; its branch is autoresearch/TAG (default: the date, like nov23)",
    ),
    (
        "--autoresearch-agent",
        "COMMAND",
        "let COMMAND edit the mutable file instead of the built-in tuner; it reads program.md and the history on "
        "stdin, and its last line of output describes the change",
    ),
    (
        "--autoresearch-profile",
        "NAME",
        "set of constants the runner uses, such as tiny or climbmix (default: the runner chooses)",
    ),
    (
        "--autoresearch-device",
        "NAME",
        "device that candidates run on: auto (the first GPU, else the CPU; the default), cpu, cuda, or cuda:N with "
        "nvidia-smi's N; one loop uses one device",
    ),
    (
        "--autoresearch-require",
        "TRUST",
        "run nothing unless candidates are kept from their score at least this well: split (processes of their own) "
        "or sealed (a sandbox too)",
    ),
    (
        "--autoresearch-determinism",
        None,
        "train the mutable file once, score it under conditions that must not matter, and show what repeats to the "
        "last bit: exit code 1 where a guarantee breaks",
    ),
    (
        "--autoresearch-rule",
        "RULE",
        "when a change is kept: ladder (what is too close to call gets a second run; the default) or strict (any lower "
        "score is kept)",
    ),
    (
        "--autoresearch-adopt",
        "BRANCH",
        "run the loop on the changes that another machine kept on BRANCH, one by one, each judged here",
    ),
    (
        "--autoresearch-import",
        "FILE",
        "begin the loop's history with the rows of a results.tsv of something else; they are read, never ranked",
    ),
    ("--autoresearch-status", None, "print the state of a line of research as JSON, and run nothing"),
    (
        "--autoresearch-replay",
        None,
        "reach every verdict of a line of research again from its ledger alone: exit code 1 where one differs",
    ),
    (
        "--autoresearch-lock",
        "check|update",
        "compare everything that scores depend on with oracle.lock: exit code 1 where it differs; or write it anew",
    ),
    (
        "--autoresearch-lock-digest",
        "SHA256",
        "run nothing unless the lock has this digest, which the loop prints at its start",
    ),
    (
        "--autoresearch-guard",
        "REF",
        "name the immutable files that HEAD changed since it left REF, and run nothing: exit code 1 where there is one",
    ),
    (
        "--autoresearch-allow-oracle-change",
        None,
        "let the guard pass such a change if oracle.lock was updated with it, and the laws and determinism hold",
    ),
    (
        "--autoresearch-laws",
        None,
        "run the locked laws from a pristine copy in a process of their own: exit code 1 unless every one holds",
    ),
    (
        "--autoresearch-compare",
        "BRANCH",
        "line up champions, kept changes and gains of the loop's branches of several machines, and run nothing",
    ),
)
MODES = ("--autoresearch-loop", "--autoresearch-adopt", "--autoresearch-try", "--autoresearch-determinism")
EARLY = ("--autoresearch-guard", "--autoresearch-lock", "--autoresearch-laws")
REPORTS = ("--autoresearch-status", "--autoresearch-replay", "--autoresearch-compare")
# name, type, default, help
INI_KEYS: tuple[tuple[str, Any, Any, str], ...] = (
    ("autoresearch_metric", "string", "val_bpb", "name of the score among the runner's metrics"),
    ("autoresearch_direction", "string", "min", "min when a lower score is better, max when a higher one is"),
    ("autoresearch_budget_s", "float", None, "seconds of training of one run (default: the runner's own)"),
    (
        "autoresearch_timeout_s",
        "float",
        None,
        "seconds that one phase of a run may take before it is ended (default: twice the budget, at least 120)",
    ),
    ("autoresearch_mutable", "linelist", ["train.py"], "files that experiments may change"),
    (
        "autoresearch_immutable",
        "linelist",
        [],
        "files and folders the score depends on; a run gets a pristine copy of them "
        "(default: oracle, tests/laws, conftest.py, tests/conftest.py, program.md, .github/workflows; pytest's "
        "configuration and oracle.lock always are)",
    ),
    (
        "autoresearch_runner",
        "args",
        ["{python}", "-P", "-m", "oracle.judge"],
        "command that judges a candidate, started in the copy of the immutable files",
    ),
    ("autoresearch_branch_prefix", "string", "autoresearch", "first part of the branch's name"),
    ("autoresearch_line_price", "float", 0.0001, "what a net line added must gain, in units of the metric"),
    ("autoresearch_memory_price", "float", 0.001, "what a GB of peak memory added must gain"),
    ("autoresearch_profile", "string", "", "as --autoresearch-profile"),
    ("autoresearch_device", "string", "auto", "as --autoresearch-device"),
    ("autoresearch_agent_timeout_s", "float", 900.0, "seconds the agent's command may take for one proposal"),
    ("autoresearch_program", "string", "program.md", "instructions that the agent's command reads on stdin"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("autoresearch", "research loop on one file (pytest-autoresearch)")
    for name, argument, text in OPTIONS:
        if argument is None:
            group.addoption(name, action="store_true", default=False, help=text)
        elif name == "--autoresearch-compare":
            group.addoption(name, metavar=argument, nargs="+", default=None, help=text)
        else:
            group.addoption(name, metavar=argument, default=None, help=text)
    for key, kind, default, text in INI_KEYS:
        parser.addini(key, text, type=kind, default=default)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from . import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest's capture, so that progress is seen
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None]:
    """Do what must not depend on a conftest.py, and end; refuse to load one that is not the locked one."""
    modes = _modes(early_config)
    typed = {str(argument).partition("=")[0] for argument in early_config.invocation_params.args}
    if lost := [name for name in EARLY if name in typed and name not in modes]:
        raise pytest.UsageError(
            f"{lost[0]} is on the command line, but an option of addopts hides it: remove `--` from addopts"
        )
    if modes and modes[0] in EARLY:
        from ._foreign import refuse

        refuse(early_config)
        name = {"guard": "guard", "lock": "lockfile", "laws": "laws"}[modes[0].rpartition("-")[2]]
        raise SystemExit(importlib.import_module(f".{name}", __package__).main(early_config))
    named = [*(name for name in modes if name in MODES), *_mutable_files(early_config)]
    if named:
        from .settings import refuse_repeats

        refuse_repeats(early_config, named[0])
    if modes and modes[0] in MODES:
        from .lockfile import refuse_changed_files
        from .settings import immutable_patterns

        refuse_changed_files(early_config.rootpath, immutable_patterns(early_config.getini("autoresearch_immutable")))
    yield


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Print a report and end, before any test is looked for."""
    reports = [name for name in _modes(config) if name in REPORTS]
    if not reports:
        return None
    module = importlib.import_module(f".report.{reports[0].rpartition('-')[2]}", __package__)
    return int(module.main(config))


def pytest_configure(config: pytest.Config) -> None:
    modes = [name for name in _modes(config) if name in MODES]
    if modes and not hasattr(config, "workerinput"):
        if modes[0] == "--autoresearch-determinism":
            from .determinism import register
        else:
            from .loop import register
        register(config, modes[0])


def _modes(config: pytest.Config) -> list[str]:
    """Return what is asked for, at most one thing; raise a UsageError for options without theirs."""
    given = config.known_args_namespace
    used = [name for name, _, _ in OPTIONS if getattr(given, name.lstrip("-").replace("-", "_")) not in (None, False)]
    modes = [name for name in used if name in MODES + REPORTS + EARLY]
    if len(modes) > 1:
        raise pytest.UsageError(f"{' and '.join(modes)} exclude each other: give one of them")
    loop, adopt, attempt, _ = MODES
    works_with = {
        "--autoresearch-max": [loop],
        "--autoresearch-hours": [loop, adopt],
        "--autoresearch-agent": [loop],
        "--autoresearch-import": [loop],
        "--autoresearch-rule": [loop, adopt, attempt],
        "--autoresearch-tag": [loop, adopt, attempt, *REPORTS[:2]],
        "--autoresearch-lock-digest": [*MODES, "--autoresearch-lock"],
        "--autoresearch-allow-oracle-change": ["--autoresearch-guard"],
    }
    for name in used:
        if name in works_with and not set(modes) & set(works_with[name]):
            wanted = " or ".join(works_with[name])
            raise pytest.UsageError(f"{name} does nothing without {wanted}: add it, or remove {name}")
    return modes


def _mutable_files(config: pytest.Config) -> list[str]:
    """Return the arguments of the command line that name a mutable file."""
    mutable = {config.rootpath / name for name in config.getini("autoresearch_mutable")}
    given, folder = config.known_args_namespace.file_or_dir, config.invocation_params.dir
    return [name for name in given if Path(os.path.abspath(folder / name.partition("::")[0])) in mutable]


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take a mutable file that is named on the command line; anything else is an ordinary module."""
    config = parent.config
    if not parent.session.isinitpath(module_path):
        return None
    if module_path not in [config.rootpath / name for name in config.getini("autoresearch_mutable")]:
        return None
    from .nodes import ExperimentFile

    return ExperimentFile.from_parent(parent, path=module_path)


@pytest.hookimpl(trylast=True)
def pytest_autoresearch_propose(
    settings: "Settings",
    workdir: Path,
    history: Sequence[dict[str, Any]],
    number: int,
    seed: int,
    refused: Sequence[str],
    crash: str,
) -> str | None:
    if settings.agent is not None:
        from .propose.agent import propose

        return propose(settings, workdir, history, number, refused, crash)
    from .propose.tuner import propose as tune

    return tune(settings, workdir, history, seed)


@pytest.hookimpl(trylast=True)
def pytest_autoresearch_decide(
    standing: "Standing", runs: "Sequence[Result]", lines_added: int, policy: "Policy"
) -> "Verdict":
    from .ratchet import decide

    return decide(standing, runs, lines_added, policy)
