"""Running the judge as its own process, the way the plugin does, on a small corpus made for the tests."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def write_corpus(folder: Path, documents: int = 6_000, words: int = 60) -> None:
    """Write documents of made-up words with enough structure that a model can learn something."""
    chance = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    lexicon = ["".join(chance.choices(letters, range(26, 0, -1), k=chance.randint(2, 9))) for _ in range(4_000)]
    weights = [1 / (rank + 5) for rank in range(len(lexicon))]
    for part in range(documents // 500):
        directory = folder / f"part{part}"
        directory.mkdir(parents=True)
        for number in range(500):
            text = " ".join(chance.choices(lexicon, weights, k=words))
            (directory / f"{number}.txt").write_text(f"{part}.{number} {text}.\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one run of the judge left behind."""

    result: dict[str, Any]
    events: list[dict[str, Any]]
    log: str
    scratch: Path


def judge(
    directory: Path,
    cache: Path,
    source: str = "",
    python: Sequence[str] = ("-m", "oracle.judge"),
    **request: Any,
) -> Judged:
    """Judge `source` as train.py in directories below `directory`; `python` starts another judge."""
    candidate, scratch = directory / "candidate", directory / "scratch"
    candidate.mkdir(parents=True, exist_ok=True)  # verify follows a run in the same place
    scratch.mkdir(exist_ok=True)
    (candidate / "train.py").write_text(source)
    order = {
        "schema": 1,
        "op": "run",
        "candidate": str(candidate),
        "scratch": str(scratch),
        "profile": "tiny",
        "budget_s": 0.5,
        "seed": 7,
        **request,
    }
    reading, writing = os.pipe()
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "AUTORESEARCH_CHANNEL": str(writing),
        "AUTORESEARCH_CACHE": str(cache),
    }
    with (directory / "run.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", *python],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[writing],
            env=env,
            cwd=directory,
        )
        os.close(writing)
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
        with open(reading, encoding="utf-8") as channel:
            events = [json.loads(line) for line in channel]
        process.wait()
    text = (directory / "run.log").read_text(errors="replace")
    assert process.returncode == 0, text
    *events, result = events
    assert result.pop("event") == "result"
    return Judged(result=result, events=events, log=text, scratch=scratch)
