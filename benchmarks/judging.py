"""One judged run, as the plugin has it done: what the benchmarks of the judge and of the GPU time."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the judge said, and when."""

    at: dict[str, float]  # seconds from its start to the first of each event or phase, by name
    events: list[dict[str, Any]]
    result: dict[str, Any]
    total_s: float
    log: str


def judge(folder: Path, source: str, *, env: Mapping[str, str] | None = None, **request: Any) -> Judged:
    """Judge the train.py `source` once, with files below `folder`; `env` and `request` are added to the usual ones."""
    candidate, scratch = folder / "candidate", folder / "scratch"
    for each in (candidate, scratch):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir()
    (candidate / "train.py").write_text(source)
    asked = {"schema": 1, "op": "run", "candidate": str(candidate), "scratch": str(scratch), "seed": 0, **request}
    reading, writing = os.pipe()
    environment = {**os.environ, **(env or {}), "AUTORESEARCH_CHANNEL": str(writing)}
    began = time.perf_counter()
    with (folder / "run.log").open("wb") as log, (folder / "request").open("w+") as order:
        json.dump(asked, order)
        order.seek(0)
        command = [sys.executable, "-P", "-m", "oracle.judge"]
        process = subprocess.Popen(command, stdin=order, stdout=log, stderr=log, pass_fds=[writing], env=environment)
    os.close(writing)
    at: dict[str, float] = {}
    events: list[dict[str, Any]] = []
    with open(reading, encoding="utf-8") as channel:
        for line in channel:
            events.append(json.loads(line))
            at.setdefault(events[-1].get("phase", events[-1]["event"]), time.perf_counter() - began)
    process.wait()
    said = (folder / "run.log").read_text(errors="replace")
    result = events[-1] if events else {"status": "crash", "kind": "judge", "reason": "it said nothing"}
    return Judged(at=at, events=events, result=result, total_s=time.perf_counter() - began, log=said)
