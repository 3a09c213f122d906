"""What the user chose: one frozen `Settings`, read once from the command line and the configuration file."""

import math
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import pytest

from .records import TRUST, Policy

DEFAULT_IMMUTABLE = ("oracle", "tests/laws", "conftest.py", "tests/conftest.py", "program.md", ".github/workflows")
# Locked whatever else is: what pytest reads its configuration from, and the lock.
ALWAYS_IMMUTABLE = (
    *("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg"),
    "oracle.lock",
)
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides how experiments are proposed, run and compared."""

    root: Path  # pytest's rootdir; all paths below are relative to it
    metric: str
    policy: Policy
    budget_s: float | None  # None: the runner's own
    timeout_s: float | None  # None: twice the budget, at least bench.LEAST_TIMEOUT_S
    mutable: tuple[str, ...]
    immutable: tuple[str, ...]  # patterns, as `immutable_patterns` gives them
    runner: tuple[str, ...]
    profile: str | None  # None: the runner's own
    device: str  # auto, cpu, cuda or cuda:N
    branch_prefix: str
    tag: str
    agent: tuple[str, ...] | None  # None: the tuner proposes
    agent_timeout_s: float
    program: str
    max_experiments: int | None
    hours: float | None
    require: str | None  # trust below which nothing is run
    adopt: str | None  # branch whose kept changes are proposed
    history: Path | None  # results.tsv of something else, to begin the history with
    lock_digest: str | None  # that the lock must have

    @property
    def direction(self) -> Literal["min", "max"]:
        """Which way the metric is better."""
        return self.policy.direction


def immutable_patterns(given: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of everything immutable; `given` is what the ini key says."""
    return (*(str(PurePosixPath(pattern.strip())) for pattern in given or DEFAULT_IMMUTABLE), *ALWAYS_IMMUTABLE)


def read(config: pytest.Config) -> Settings:
    """Read and check every option and ini key; a UsageError names the bad value, its source and the remedy."""
    root = config.rootpath
    mutable = tuple(_path(name, "autoresearch_mutable") for name in config.getini("autoresearch_mutable"))
    if not mutable:
        raise pytest.UsageError("autoresearch_mutable is empty: name the file that experiments may change")
    for name in mutable:
        if not (root / name).is_file():
            raise pytest.UsageError(
                f"autoresearch_mutable names {name!r}, and there is no such file in {root}: "
                "create it, or name the file that experiments may change"
            )
    immutable = tuple(_path(name, "autoresearch_immutable") for name in config.getini("autoresearch_immutable"))
    if both := sorted(set(mutable) & set(immutable)):
        raise pytest.UsageError(f"{both[0]!r} is in autoresearch_mutable and autoresearch_immutable: remove one")
    for pattern in immutable:
        if not any(root.glob(pattern)):
            raise pytest.UsageError(
                f"autoresearch_immutable: {pattern!r} names no file in {root}: correct or remove it"
            )
    runner = tuple(config.getini("autoresearch_runner"))
    if not runner:
        raise pytest.UsageError("autoresearch_runner is empty: give the command that judges a candidate")
    direction = config.getini("autoresearch_direction")
    if direction not in ("min", "max"):
        raise _bad(direction, "autoresearch_direction", "'min' or 'max'")
    return Settings(
        root=root,
        metric=_word(config.getini("autoresearch_metric"), "autoresearch_metric"),
        policy=Policy(
            direction=cast(Literal["min", "max"], direction),
            rule=_rule(_given(config, "autoresearch_rule")),
            line_price=_number(config, "autoresearch_line_price", least=0.0) or 0.0,
            memory_price=_number(config, "autoresearch_memory_price", least=0.0) or 0.0,
        ),
        budget_s=_number(config, "autoresearch_budget_s", above=0.0),
        timeout_s=_number(config, "autoresearch_timeout_s", above=0.0),
        mutable=mutable,
        immutable=immutable_patterns(immutable),
        runner=tuple(part.replace("{python}", sys.executable) for part in runner),
        profile=_given(config, "autoresearch_profile") or config.getini("autoresearch_profile") or None,
        device=_device(config),
        branch_prefix=_word(config.getini("autoresearch_branch_prefix"), "autoresearch_branch_prefix"),
        tag=_word(_given(config, "autoresearch_tag") or _today(), "--autoresearch-tag"),
        agent=_agent(_given(config, "autoresearch_agent")),
        agent_timeout_s=_number(config, "autoresearch_agent_timeout_s", above=0.0) or 900.0,
        program=_path(config.getini("autoresearch_program"), "autoresearch_program"),
        max_experiments=_count(_given(config, "autoresearch_max"), "--autoresearch-max"),
        hours=_positive(_given(config, "autoresearch_hours"), "--autoresearch-hours"),
        require=_trust(_given(config, "autoresearch_require")),
        adopt=_given(config, "autoresearch_adopt"),
        history=_file(config, _given(config, "autoresearch_import"), "--autoresearch-import"),
        lock_digest=_digest(_given(config, "autoresearch_lock_digest")),
    )


def refuse_impossible(config: pytest.Config, mode: str) -> None:
    """Raise a UsageError when an option would run an experiment in a debugger or not at all, or tests beside it."""
    option = config.option
    mixes = {
        "--pdb": getattr(option, "usepdb", False),
        "--trace": getattr(option, "trace", False),
        "--collect-only": option.collectonly,
        "--setup-only": getattr(option, "setuponly", False),
        "--setup-plan": getattr(option, "setupplan", False),
    }
    _refuse_mixed(mode, mixes)
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        mutable = {(config.rootpath / name).resolve() for name in config.getini("autoresearch_mutable")}
        for argument in config.args:
            if (config.invocation_params.dir / argument).resolve() not in mutable:
                raise pytest.UsageError(f"{mode} runs no tests: remove {argument!r} from the command line")


def refuse_repeats(config: pytest.Config, what: str) -> None:
    """Raise a UsageError when another plugin would run an experiment more than once, or elsewhere.

    Works before any conftest.py is loaded, and before a plugin takes the call over.
    """
    option = config.known_args_namespace
    reruns = getattr(option, "reruns", None) or getattr(option, "force_reruns", None) or _ini(config, "reruns")
    workers = getattr(option, "numprocesses", None) or getattr(option, "tx", None)
    _refuse_mixed(what, {"-n": workers, "--looponfail": getattr(option, "looponfail", False), "--reruns": reruns})


def _refuse_mixed(what: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value and value != "0":
            raise pytest.UsageError(
                f"{what} cannot be combined with {name}: an experiment runs once, alone, in this process's order; "
                f"remove {name}"
            )


def _given(config: pytest.Config, name: str) -> str | None:
    return cast("str | None", getattr(config.known_args_namespace, name))  # known before any conftest.py is loaded


def _ini(config: pytest.Config, name: str) -> Any:
    try:
        return config.getini(name)
    except ValueError:  # no installed plugin has such a key
        return None


def _today() -> str:
    now = time.localtime()
    return f"{MONTHS[now.tm_mon - 1]}{now.tm_mday}"


def _bad(value: object, source: str, wanted: str) -> pytest.UsageError:
    return pytest.UsageError(f"{source}: {value!r} is not {wanted}")


def _word(value: str, source: str) -> str:
    if not re.fullmatch(r"\w[\w.@%+-]*", value) or ".." in value or value.endswith((".", ".lock")):
        raise _bad(value, source, "one word of letters, digits, '-', '_' and '.'")
    return value


def _path(value: str, source: str) -> str:
    path = PurePosixPath(value.strip())
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise _bad(value, source, "a path inside pytest's rootdir, relative to it")
    return str(path)


def _number(config: pytest.Config, name: str, *, least: float = -math.inf, above: float = -math.inf) -> float | None:
    try:
        value = config.getini(name)
    except (ValueError, TypeError, pytest.UsageError) as exc:
        raise pytest.UsageError(f"{name}: {exc}") from None
    if value is None:
        return None
    if not math.isfinite(value) or value < least or value <= above:
        raise _bad(value, name, "a number above 0" if above == 0.0 else "a number, 0 or more")
    return float(value)


def _positive(value: str | None, source: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise _bad(value, source, "a number above 0")
    return number


def _count(value: str | None, source: str) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) == 0:
        raise _bad(value, source, "a whole number, 1 or more")
    return int(value)


def _rule(value: str | None) -> Literal["ladder", "strict"]:
    if value not in (None, "ladder", "strict"):
        raise _bad(value, "--autoresearch-rule", "'ladder' or 'strict'")
    return "strict" if value == "strict" else "ladder"


def _device(config: pytest.Config) -> str:
    given = _given(config, "autoresearch_device")
    value = cast(str, config.getini("autoresearch_device")) if given is None else given
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
        source = "autoresearch_device" if given is None else "--autoresearch-device"
        raise _bad(value, source, "'auto', 'cpu', 'cuda' or 'cuda:N': `nvidia-smi -L` lists each N")
    return value


def _file(config: pytest.Config, value: str | None, source: str) -> Path | None:
    if value is None:
        return None
    path = config.invocation_params.dir / value
    if not path.is_file():
        raise _bad(value, source, "a file")
    return path


def _trust(value: str | None) -> str | None:
    if value is not None and value not in TRUST[1:]:
        raise _bad(value, "--autoresearch-require", " or ".join(map(repr, reversed(TRUST[1:]))))
    return value


def _digest(value: str | None) -> str | None:
    if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
        raise _bad(value, "--autoresearch-lock-digest", "a sha256 as the loop prints it: 64 hexadecimal digits")
    return value


def _agent(command: str | None) -> tuple[str, ...] | None:
    if command is None:
        return None
    import shlex

    try:
        words = tuple(shlex.split(command))
    except ValueError as exc:
        raise pytest.UsageError(f"--autoresearch-agent: {command!r} is not a shell command line: {exc}") from None
    if not words:
        raise _bad(command, "--autoresearch-agent", "a command")
    if shutil.which(words[0]) is None:
        raise pytest.UsageError(
            f"--autoresearch-agent: there is no program {words[0]!r} on PATH: install it, or give its full path"
        )
    return words
