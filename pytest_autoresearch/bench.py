"""Where a candidate is run: a fresh directory with pristine locked files, and a runner whose answer is checked."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from . import supervise
from .ledger import one_line
from .lock import Snapshot
from .records import SCHEMA, Result
from .settings import Settings

CHECK_TIMEOUT_S = 300.0  # the first import of a large library from a cold disk is slow
BUDGET_S = 300.0  # where neither the settings nor the runner name one


def _ignore(event: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the runner said before the first run: scores are comparable while this stays the same."""

    budget_s: float
    profile: str | None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


class Bench:
    """Runs candidates one at a time below `home`; of each run only its log is kept."""

    def __init__(self, settings: Settings, lock: Snapshot, home: Path) -> None:
        self.settings = settings
        self.lock = lock
        self.home = home
        self.terms = Terms(budget_s=settings.budget_s or BUDGET_S, profile=settings.profile)

    def check(self) -> Terms:
        """Ask the runner whether it can run at all; raise a UsageError with its one line when it cannot."""
        outcome, log = self._call("check", {"op": "check"}, {}, CHECK_TIMEOUT_S, _ignore)
        if len(outcome.results) != 1 or outcome.results[0].get("status") == "crash":
            said = outcome.results[0] if outcome.results else {}
            reason = one_line(str(said.get("reason", ""))) or _last_line(log) or f"exit code {outcome.returncode}"
            raise pytest.UsageError(f"the runner {self.settings.runner[0]} failed its check: {reason} (see {log})")
        answer = outcome.results[0]
        _refuse_unusable(answer)
        budget_s = self.settings.budget_s or answer.get("budget_s") or BUDGET_S
        profile, fingerprint = answer.get("profile"), answer.get("fingerprint")
        self.terms = Terms(
            budget_s=float(budget_s),
            profile=profile if isinstance(profile, str) else self.settings.profile,
            fingerprint=self._fingerprint(fingerprint),
        )
        return self.terms

    def run(
        self,
        files: Mapping[str, bytes],
        *,
        name: str,
        seed: int,
        on_event: Callable[[dict[str, Any]], None] = _ignore,
    ) -> Result:
        """Run one candidate once and return what it is worth; raise a UsageError when nothing can be run here."""
        timeout_s = self.settings.timeout_s or 2 * self.terms.budget_s
        outcome, log = self._call(name, {"op": "run", "seed": seed}, files, timeout_s, on_event)
        result = self._result(outcome, log, timeout_s)
        if result.status == "ok" and result.fingerprint != self.terms.fingerprint:
            before, after = self.terms.fingerprint, result.fingerprint
            differ = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
            reason = f"what scores are compared under changed since the check: {', '.join(differ)}"
            return Result(status="crash", kind="fingerprint", reason=reason)
        return result

    def _call(
        self,
        name: str,
        request: dict[str, Any],
        files: Mapping[str, bytes],
        timeout_s: float,
        on_event: Callable[[dict[str, Any]], None],
    ) -> tuple[supervise.Outcome, Path]:
        place = self.home / name
        shutil.rmtree(place, ignore_errors=True)
        locked, candidate, scratch = place / "locked", place / "candidate", place / "scratch"
        for folder in (locked, candidate, scratch):
            folder.mkdir(parents=True)
        self.lock.write(locked)
        for path, content in files.items():
            (candidate / path).parent.mkdir(parents=True, exist_ok=True)
            (candidate / path).write_bytes(content)
        message = {
            "schema": SCHEMA,
            "candidate": str(candidate),
            "scratch": str(scratch),
            "profile": self.settings.profile,
            "budget_s": self.settings.budget_s,
            **request,
        }
        env = supervise.clean_environment("PYTHON")
        log = place / "run.log"
        try:
            return supervise.run(
                self.settings.runner,
                cwd=locked,
                env={**env, "PYTHONPATH": str(locked), "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=json.dumps(message).encode() + b"\n",
                log=log,
                timeout_s=timeout_s,
                on_event=on_event,
            ), log
        except FileNotFoundError as exc:
            raise pytest.UsageError(f"autoresearch_runner: {exc}") from None
        finally:
            for folder in (locked, candidate, scratch):
                shutil.rmtree(folder, ignore_errors=True)

    def _fingerprint(self, said: object) -> dict[str, Any]:
        return {**(said if isinstance(said, dict) else {}), "locked_files": self.lock.digest}

    def _result(self, outcome: supervise.Outcome, log: Path, timeout_s: float) -> Result:
        def crash(kind: str, reason: str) -> Result:
            return Result(status="crash", kind=kind, reason=reason, detail=supervise.tail(log))

        if outcome.survivors:
            return crash("error", f"processes that could not be ended: {', '.join(map(str, outcome.survivors))}")
        if outcome.timed_out:
            phase = f" in phase {outcome.phase}" if outcome.phase else ""
            return crash("timeout", f"ended after {timeout_s:g} s{phase}")
        if len(outcome.results) != 1:
            how = "two results" if outcome.results else f"no result (exit code {outcome.returncode})"
            last = "" if outcome.results else _last_line(log)
            return crash("error", f"the runner gave {how}" + (f": {last}" if last else ""))
        said = outcome.results[0]
        _refuse_unusable(said)
        reason = one_line(str(said.get("reason", "")))[:300]
        if said.get("status") == "crash":
            detail = str(said.get("detail") or "")[-8_000:] or supervise.tail(log)
            kind = one_line(str(said.get("kind") or "error"))[:40]
            return Result(status="crash", kind=kind, reason=reason or kind, detail=detail)
        given = said.get("metrics")
        metrics = {
            str(name): value
            for name, value in (given.items() if isinstance(given, dict) else ())
            if isinstance(value, str) or _is_number(value)
        }
        score, memory_gb = metrics.get(self.settings.metric), said.get("memory_gb", 0.0)
        if not _is_number(score) or not score > 0:  # 0.0 is what a crash row says; it is never a score
            raw = given.get(self.settings.metric) if isinstance(given, dict) else None
            return crash("score", f"{self.settings.metric} = {one_line(repr(raw))[:60]} is not a positive number")
        if not _is_number(memory_gb) or memory_gb < 0:
            return crash("score", f"memory_gb = {one_line(repr(memory_gb))[:60]} is not a size")
        return Result(
            status="ok",
            score=float(score),
            memory_gb=float(memory_gb),
            trust=str(said.get("trust", "")),
            metrics=metrics,
            fingerprint=self._fingerprint(said.get("fingerprint")),
        )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_unusable(said: Mapping[str, Any]) -> None:
    if said.get("schema") != SCHEMA or said.get("status") not in ("ok", "crash", "unusable"):
        raise pytest.UsageError(
            f"the runner answered with schema {said.get('schema')!r} and status {said.get('status')!r}; "
            f"this plugin reads schema {SCHEMA} with ok, crash or unusable: use a matching runner"
        )
    if said["status"] == "unusable":
        raise pytest.UsageError(one_line(str(said.get("reason") or "the runner cannot run here and does not say why")))


def _last_line(log: Path) -> str:
    return one_line(supervise.tail(log, lines=1))[:200]
