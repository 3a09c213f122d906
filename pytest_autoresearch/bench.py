"""Where a candidate is run: a fresh directory with pristine locked files, and a runner whose answer is checked.

There is one such directory at a time, `<home>/<name>/{locked,candidate,scratch}`. It stays after a run that gave a
score, so that what is about to be kept can be verified in it, until the next run or `clear`; of each run only the logs
are kept.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from . import supervise
from ._disk import FULL, has_room, remove
from .ledger import one_line
from .lock import Snapshot
from .records import SCHEMA, TRUST, Result
from .settings import Settings

CHECK_TIMEOUT_S = 300.0  # the first import of a large library from a cold disk is slow
DETERMINISM_TIMEOUT_S = 3_600.0  # one training and a dozen scorings
LEAST_TIMEOUT_S = 120.0  # starting and scoring take their time however short the training is
ROOM_MB = 64  # with less, whatever a run failed of may be the disk
BUDGET_S = 300.0  # where neither the settings nor the runner name one
FOLDERS = ("locked", "candidate", "scratch")


def _ignore(event: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the runner said before the first run: scores are comparable while this stays the same."""

    budget_s: float
    profile: str | None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    trust: str = ""  # that every run will have
    verifies: bool = False  # the runner can look at a run once more before it is kept
    steady: bool = False  # nobody else uses the machine: the same files do the same work
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> sha256, bytes, seen
    versions: Mapping[str, str] = field(default_factory=dict)  # of what computes


class _NoRoom(Exception):
    """The run directory cannot be made, for want of room."""


class Bench:
    """Runs candidates one at a time below `home`."""

    def __init__(self, settings: Settings, lock: Snapshot, home: Path) -> None:
        self.settings = settings
        self.lock = lock
        self.home = home
        self.terms = Terms(budget_s=settings.budget_s or BUDGET_S, profile=settings.profile)

    def check(self) -> Terms:
        """Ask the runner whether it can run at all; raise a UsageError with its one line when it cannot."""
        self.clear()
        try:
            outcome, log = self._call("check", "check", {}, CHECK_TIMEOUT_S, _ignore)
        except _NoRoom as full:
            raise pytest.UsageError(str(full)) from full
        finally:
            self.clear()
        if len(outcome.results) != 1 or outcome.results[0].get("status") == "crash":
            said = outcome.results[0] if outcome.results else {}
            reason = one_line(str(said.get("reason", ""))) or _last_line(log) or f"exit code {outcome.returncode}"
            raise pytest.UsageError(f"the runner {self.settings.runner[0]} failed its check: {reason} (see {log})")
        answer = outcome.results[0]
        _refuse_unusable(answer)
        trust, require = str(answer.get("trust", "")), self.settings.require
        if require is not None and _rank(trust) < _rank(require):
            why = one_line(str(answer.get("trust_reason", "")))[:200] or "its documentation says what more trust needs"
            raise pytest.UsageError(
                f"--autoresearch-require: {require!r} is asked for, but the runner's runs here are "
                f"{trust or 'of no stated trust'}: {why}"
            )
        budget_s = self.settings.budget_s or answer.get("budget_s") or BUDGET_S
        profile, fingerprint = answer.get("profile"), answer.get("fingerprint")
        self.terms = Terms(
            budget_s=float(budget_s),
            profile=profile if isinstance(profile, str) else self.settings.profile,
            fingerprint=self._fingerprint(fingerprint),
            trust=trust,
            verifies=answer.get("verifies") is True,
            steady=answer.get("steady") is True,
            data=_data(answer.get("data")),
            versions=_versions(answer.get("versions")),
        )
        return self.terms

    def run(
        self,
        files: Mapping[str, bytes],
        *,
        name: str,
        seed: int,
        heldout: bool = False,
        baseline: Mapping[str, Any] | None = None,
        compiled: Mapping[str, Any] | None = None,
        on_event: Callable[[dict[str, Any]], None] = _ignore,
    ) -> Result:
        """Run one candidate once and return what it is worth; raise a UsageError when nothing can be run here.

        `heldout` asks for the score on the second split too; `baseline` has the metrics of the first baseline;
        `compiled` names the compile cache.
        """
        self.clear()
        asked = {
            "seed": seed,
            "heldout": heldout,
            "baseline": baseline,
            "compiled": compiled,
            "data": dict(self.terms.data),
        }
        return self._settled(self._answer("run", name, files, on_event, asked, self._result))

    def verify(
        self,
        files: Mapping[str, bytes],
        result: Result,
        *,
        name: str,
        seed: int,
        baseline: Mapping[str, Any] | None,
        compiled: Mapping[str, Any] | None,
    ) -> Result:
        """Let the runner look once more, in its directory, at the last run; return `result` with what that added.

        Its metrics are added to the run's, the score aside; what speaks against the run makes it a crash, which
        keeps the run's metrics but has no score.
        """
        metric = self.settings.metric

        def merged(said: Mapping[str, Any], log: Path) -> Result:
            metrics = {**result.metrics, **_metrics(said), metric: result.metrics[metric]}
            return replace(result, metrics=metrics)

        asked = {
            "seed": seed,
            "score": result.score,
            "weights_sha256": result.weights_sha256,
            "baseline": baseline,
            "compiled": compiled,
        }
        verified = self._settled(self._answer("verify", name, files, _ignore, asked, merged))
        if verified.status == "ok":
            return verified
        kind, reason, detail = verified.kind, verified.reason, verified.detail
        return replace(result, status="crash", score=None, kind=kind, reason=reason, detail=detail)

    def determinism(
        self, files: Mapping[str, bytes], *, seed: int, on_event: Callable[[dict[str, Any]], None] = _ignore
    ) -> list[dict[str, Any]] | Result:
        """Let the runner show what repeats to the last bit; return its table, or the crash that it ended in.

        A row has condition, value, difference, guarantee and holds.
        """
        self.clear()
        rows: list[dict[str, Any]] = []

        def table(said: Mapping[str, Any], log: Path) -> Result:
            given = said.get("table")
            whole = isinstance(given, list) and all(isinstance(row, dict) and "holds" in row for row in given)
            if not given or not whole:
                raise pytest.UsageError("the runner answered without a table of conditions: use a matching runner")
            rows.extend(given)
            return Result(status="ok")

        result = self._settled(self._answer("determinism", "determinism", files, on_event, {"seed": seed}, table))
        return rows if result.status == "ok" else result

    def clear(self) -> None:
        """Remove every run directory but its logs, also those that a killed process left."""
        for place in self.home.glob("*"):
            for folder in FOLDERS:
                remove(place / folder)

    def _settled(self, result: Result) -> Result:
        """Return the result; of a crash, say whether the machine's disk is full once the candidate's files are gone."""
        if result.status == "ok":
            return result
        self.clear()
        room = has_room(self.home, ROOM_MB)
        if not room and result.kind != "disk":
            short = f"less than {ROOM_MB} MB can be written to {self.home}"
            return replace(result, kind="disk", reason=f"{short}: {result.reason}"[:300])
        if room and result.kind == "disk":
            reason = f"the disk was full until this run's own files were removed: {result.reason}"
            return replace(result, kind="error", reason=reason[:300])
        return result

    def _answer(
        self,
        op: str,
        name: str,
        files: Mapping[str, bytes],
        on_event: Callable[[dict[str, Any]], None],
        asked: dict[str, Any],
        read: Callable[[Mapping[str, Any], Path], Result],
    ) -> Result:
        """Return what `read` makes of the runner's one ok answer, or the crash that anything else is."""
        timeout_s = DETERMINISM_TIMEOUT_S if op == "determinism" else max(LEAST_TIMEOUT_S, 2 * self.terms.budget_s)
        timeout_s = self.settings.timeout_s or timeout_s
        try:
            outcome, log = self._call(op, name, files, timeout_s, on_event, asked)
        except _NoRoom as full:
            return Result(status="crash", kind="disk", reason=one_line(str(full)))

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
            return crash("judge", f"the runner gave {how}" + (f": {last}" if last else ""))
        said = outcome.results[0]
        _refuse_unusable(said)
        if (
            said.get("status") == "ok" and outcome.returncode != 0
        ):  # whoever wrote that, the runner did not live to mean it
            return crash("judge", f"the runner gave a result and then failed (exit code {outcome.returncode})")
        reason = one_line(str(said.get("reason", "")))[:300]
        if said.get("status") == "crash":
            detail = str(said.get("detail") or "")[-8_000:] or supervise.tail(log)
            kind = one_line(str(said.get("kind") or "error"))[:40]
            return Result(status="crash", kind=kind, reason=reason or kind, detail=detail)
        result = read(said, log)
        before, after = self.terms.fingerprint, self._fingerprint(said.get("fingerprint"))
        if result.status == "ok" and op != "determinism" and after != before:
            differ = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
            return crash("fingerprint", f"what scores are compared under changed since the check: {', '.join(differ)}")
        trust = one_line(str(said.get("trust", result.trust)))[:40]
        if result.status == "ok" and op != "determinism" and _rank(trust) < _rank(self.terms.trust):
            return crash("trust", f"trust {trust or 'not stated'}, but the check promised {self.terms.trust}")
        return result

    def _call(
        self,
        op: str,
        name: str,
        files: Mapping[str, bytes],
        timeout_s: float,
        on_event: Callable[[dict[str, Any]], None],
        asked: Mapping[str, Any] | None = None,
    ) -> tuple[supervise.Outcome, Path]:
        place = self.home / name
        locked, candidate, scratch = (place / folder for folder in FOLDERS)
        log = place / ("verify.log" if op == "verify" else "run.log")
        try:
            for folder in (locked, candidate) if op == "verify" else (locked, candidate, scratch):
                remove(folder)
                folder.mkdir(parents=True)
            self.lock.write(locked)
            for path, content in files.items():
                (candidate / path).parent.mkdir(parents=True, exist_ok=True)
                (candidate / path).write_bytes(content)
        except OSError as exc:
            problem = _NoRoom if exc.errno in FULL else pytest.UsageError
            raise problem(f"cannot make the run directory {place}: {exc.strerror}") from exc
        message = {
            "schema": SCHEMA,
            "op": op,
            "candidate": str(candidate),
            "scratch": str(scratch),
            "profile": self.settings.profile,
            "device": self.settings.device,
            "budget_s": self.settings.budget_s,
            **(asked or {}),
        }
        env = supervise.clean_environment("PYTHON")
        try:
            return supervise.run(
                self.settings.runner,
                cwd=locked,
                env={**env, "PYTHONPATH": str(locked), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"},
                stdin=json.dumps(message).encode() + b"\n",
                log=log,
                timeout_s=timeout_s,
                on_event=on_event,
            ), log
        except FileNotFoundError as exc:
            raise pytest.UsageError(f"autoresearch_runner: {exc}") from None

    def _fingerprint(self, said: object) -> dict[str, Any]:
        return {**(said if isinstance(said, dict) else {}), "locked_files": self.lock.digest}

    def _result(self, said: Mapping[str, Any], log: Path) -> Result:
        def crash(reason: str) -> Result:
            return Result(status="crash", kind="score", reason=reason, detail=supervise.tail(log))

        metrics = _metrics(said)
        score, memory_gb, work = metrics.get(self.settings.metric), said.get("memory_gb", 0.0), said.get("work", 0.0)
        if not _is_number(score) or not score > 0:  # 0.0 is what a crash row says; it is never a score
            given = said.get("metrics")
            raw = given.get(self.settings.metric) if isinstance(given, dict) else None
            return crash(f"{self.settings.metric} = {one_line(repr(raw))[:60]} is not a positive number")
        if not _is_number(memory_gb) or memory_gb < 0:
            return crash(f"memory_gb = {one_line(repr(memory_gb))[:60]} is not a size")
        if not _is_number(work) or work < 0:
            return crash(f"work = {one_line(repr(work))[:60]} is not an amount")
        return Result(
            status="ok",
            score=float(score),
            memory_gb=float(memory_gb),
            work=float(work),
            trust=one_line(str(said.get("trust", "")))[:40],
            weights_sha256=one_line(str(said.get("weights_sha256", "")))[:64],
            metrics=metrics,
            fingerprint=self._fingerprint(said.get("fingerprint")),
        )


def _data(said: object) -> dict[str, dict[str, Any]]:
    """Return the runner's digests of its data: {name: {sha256, bytes, seen}}; `seen` is its own, handed back to it."""
    try:
        listed = dict(said or {})  # type: ignore[call-overload]
        return {
            str(name): {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"]), "seen": entry.get("seen")}
            for name, entry in listed.items()
        }
    except (TypeError, ValueError, KeyError, AttributeError):
        raise pytest.UsageError("the runner gave data without sha256 and bytes: use a matching runner") from None


def _versions(said: object) -> dict[str, str]:
    given = said if isinstance(said, dict) else {}
    return {str(name): one_line(str(number)).replace(" ", "") or "none" for name, number in given.items()}


def _metrics(said: Mapping[str, Any]) -> dict[str, float | int | str]:
    given = said.get("metrics")
    items = given.items() if isinstance(given, dict) else ()
    return {str(name): value for name, value in items if isinstance(value, str) or _is_number(value)}


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(trust: str) -> int:
    return TRUST.index(trust) if trust in TRUST else -1


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
