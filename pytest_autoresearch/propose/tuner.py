"""The built-in proposer: changes one or two SCREAMING numeric constants, where optuna thinks it may pay.

It edits nothing but the literal, of `NAME = 0.04` and of `NAME = {"tiny": 2, ...}[PROFILE]` (the entry of the profile
in use), so that every candidate is a diff of one or two lines. What was tried is read back from the candidates'
commits. Each constant is a coordinate in [-1, 1], 0 being the champion's value and 1 the edge of a range that widens
while draws bring nothing new. In turn it also combines two near misses and sets a constant to zero.
"""

import ast
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from .._git import Plumbing
from ..settings import Settings

DRAWS = 60  # for one proposal
WIDEN_EVERY = 12  # draws that bring nothing new double the range (on its own scale)
COMBINE_EVERY, REMOVE_EVERY = 5, 11  # experiments
BY_PROFILE = 5  # times as likely to be drawn: a constant that profiles differ in
NEAR = 0.002  # of the score: a discard within this of the champion is a near miss

Files = dict[str, bytes]
Key = tuple[str, str]  # file, constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number literal at module level and where it stands."""

    key: Key
    value: int | float
    start: int  # byte offsets of the literal
    end: int
    by_profile: bool  # profiles differ in it, so it matters what this machine makes of it


def propose(settings: Settings, workdir: Path, history: Sequence[dict[str, Any]], seed: int) -> str | None:
    """Edit one or two constants in `workdir`; return what changed, or None when there is nothing to change."""
    profile = next((record["result"]["fingerprint"].get("profile") for record in reversed(history)), settings.profile)
    champion = {name: (workdir / name).read_bytes() for name in settings.mutable}
    constants = {constant.key: constant for constant in find(champion, profile)}
    if not constants:
        return None
    past = _Past(workdir, settings, history, profile)
    rng = random.Random(seed)
    for change in _ideas(constants, past, rng, seed):
        files = _apply(champion, constants, change)
        if files not in past.contents and files != champion:
            for name, content in files.items():
                (workdir / name).write_bytes(content)
            return ", ".join(f"{key[1]} {constants[key].value} -> {value}" for key, value in change.items())
    return None


def find(files: Mapping[str, bytes], profile: str | None) -> Iterator[Constant]:
    """Yield the numeric constants of the Python files that can be parsed, in their order."""
    for name, content in files.items():
        try:
            tree = ast.parse(content) if name.endswith(".py") else ast.Module(body=[], type_ignores=[])
        except (SyntaxError, ValueError):
            continue
        offsets = [0]
        for line in content.splitlines(keepends=True):
            offsets.append(offsets[-1] + len(line))
        for node in tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                title = node.targets[0].id
                literal = _entry(node.value, profile)
                if not re.fullmatch(r"[A-Z][A-Z0-9_]*", title) or "SEED" in title or literal is None:
                    continue
                start = offsets[literal.lineno - 1] + literal.col_offset
                end = offsets[(literal.end_lineno or 0) - 1] + (literal.end_col_offset or 0)
                value = ast.literal_eval(content[start:end].decode())
                by_profile = literal is not node.value
                yield Constant(key=(name, title), value=value, start=start, end=end, by_profile=by_profile)


def _entry(node: ast.expr, profile: str | None) -> ast.expr | None:
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == profile:
                return _entry(value, None)
        return None
    inner = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    number = isinstance(inner, ast.Constant) and type(inner.value) in (int, float)
    return node if number else None


def value_at(constant: Constant, u: float, widen: float) -> int | float:
    """Return the constant's value at coordinate `u` in [-1, 1] of a range `widen` times the plain one."""
    value, name = constant.value, constant.key[1]
    step = u * widen
    if isinstance(value, int):
        if value >= 8 and value & (value - 1) == 0:
            return int(2 ** max(0, int(math.log2(value)) + round(2 * step)))
        moved = value + round(step * max(2, abs(value) / 2))
        return max(moved, 1 if value >= 1 else 0) if value >= 0 else moved
    if 0 <= value <= 1 and re.search(r"RATIO|FRAC", name):
        return _round(min(1.0, max(0.0, value + step / 2)))
    if 0 < value < 1 and re.search(r"BETA|MOMENTUM", name):  # what matters is the distance to 1
        return round(1 - min(0.9, _round((1 - value) * 4**step)), 6)
    if value == 0:
        return _round(abs(step) / 5)
    return _round(value * 4**step)


def coordinate(constant: Constant, value: float) -> float:
    """Return about where `value` lies in the constant's plain range, clipped to [-1, 1]."""
    grid = [step / 20 for step in range(-20, 21)]
    return min(grid, key=lambda u: (abs(value_at(constant, u, 1.0) - value), abs(u)))


def _round(number: float) -> float:
    return float(f"{number:.2g}")


def _apply(files: Files, constants: Mapping[Key, Constant], change: Mapping[Key, float]) -> Files:
    changed = dict(files)
    for key in sorted(change, key=lambda key: -constants[key].start):  # from the end: offsets stay right
        constant, name = constants[key], key[0]
        literal = repr(change[key]).encode()
        changed[name] = changed[name][: constant.start] + literal + changed[name][constant.end :]
    return changed


@cache  # commits do not change
def _content(workdir: Path, commit: str, name: str) -> bytes:
    return Plumbing(workdir).raw("cat-file", "blob", f"{commit}:./{name}")


class _Past:
    """What was tried: contents, and for each experiment the constants it changed and what came of it."""

    def __init__(
        self, workdir: Path, settings: Settings, history: Sequence[dict[str, Any]], profile: str | None
    ) -> None:
        def files(commit: str) -> Files:
            return {name: _content(workdir, commit, name) for name in settings.mutable}

        def values(commit: str) -> dict[Key, int | float]:
            return {constant.key: constant.value for constant in find(files(commit), profile)}

        experiments = [record for record in history if record["kind"] == "experiment"]
        self.direction = settings.direction
        self.contents = [files(record["commit"]) for record in experiments]
        self.tried: list[tuple[dict[Key, int | float], dict[str, Any]]] = []
        for record in experiments:
            before, after = values(record["parent"]), values(record["commit"])
            changed = {key: value for key, value in after.items() if key in before and before[key] != value}
            self.tried.append((changed, record))

    def near_misses(self) -> list[dict[Key, int | float]]:
        """Return the changes of discards that came close, the closest first."""
        close = []
        for changed, record in self.tried:
            verdict, score = record["verdict"] or {}, record["result"]["score"]
            gain = verdict.get("gain")
            if not changed or verdict.get("outcome") != "discard" or score is None or gain is None:
                continue
            if gain >= -max(2 * (verdict.get("sigma") or 0.0), NEAR * score):
                close.append((gain, changed))
        return [changed for _, changed in sorted(close, key=lambda pair: -pair[0])]


def _ideas(
    constants: Mapping[Key, Constant], past: _Past, rng: random.Random, seed: int
) -> Iterator[dict[Key, int | float]]:
    count = len(past.tried)
    if count % COMBINE_EVERY == COMBINE_EVERY - 1:
        for one, other in combinations(past.near_misses()[:6], 2):
            both = {**one, **other}
            if not one.keys() & other.keys() and both.keys() <= constants.keys():
                yield both
    if count % REMOVE_EVERY == REMOVE_EVERY - 1:
        numbers = [constant for constant in constants.values() if isinstance(constant.value, float) and constant.value]
        for constant in rng.sample(numbers, len(numbers)):
            yield {constant.key: 0.0}
    yield from _drawn(constants, past, rng, seed)


def _drawn(
    constants: Mapping[Key, Constant], past: _Past, rng: random.Random, seed: int
) -> Iterator[dict[Key, int | float]]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    toward = optuna.study.StudyDirection.MINIMIZE if past.direction == "min" else optuna.study.StudyDirection.MAXIMIZE
    study = optuna.create_study(direction=toward, sampler=optuna.samplers.TPESampler(seed=seed))
    axis = optuna.distributions.FloatDistribution(-1.0, 1.0)
    for changed, record in past.tried:
        known = {key: value for key, value in changed.items() if key in constants}
        if known and record["result"]["score"] is not None:
            study.add_trial(
                optuna.trial.create_trial(
                    params={"/".join(key): coordinate(constants[key], value) for key, value in known.items()},
                    distributions={"/".join(key): axis for key in known},
                    value=record["result"]["score"],
                )
            )
    times = {key: sum(key in changed for changed, _ in past.tried) for key in constants}
    keys = list(constants)
    weights = [(BY_PROFILE if constants[key].by_profile else 1) / (1 + times[key]) for key in keys]
    for draw in range(DRAWS):
        widen = 2.0 ** (draw // WIDEN_EVERY)
        chosen = rng.choices(keys, weights=weights, k=rng.choice((1, 1, 2)))
        trial = study.ask(fixed_distributions={"/".join(key): axis for key in chosen})
        change = {key: value_at(constants[key], trial.params["/".join(key)], widen) for key in chosen}
        yield {key: value for key, value in change.items() if value != constants[key].value}
