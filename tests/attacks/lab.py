"""What the attack tables share: an honest train.py with places to put an attack, and how a run of it may end.

With `rate` 0 the model keeps giving every token the same probability, whose score is known to the last digit without
any evaluator. An attack on the number that leaves exactly that score got nothing.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from tests.processes.judging import ROWS, Judged

HONEST = """\
import atexit, ctypes, gc, glob, json, os, signal, socket, subprocess, sys, threading, time
import torch
from torch import nn
import torch.nn.functional as F

RATE = {rate}
SCORING = "oracle.scorer" in sys.orig_argv
ORDER = json.loads(sys.argv[-1])  # what the judge told this process: descriptors, paths, seed
def say(**message):
    while True:
        try: return os.write(ORDER["channel"], json.dumps(message).encode() + b"\\n")
        except BlockingIOError: time.sleep(0.001)
{top}

class SGD:  # torch.optim takes longer to import than all of this to run
    def __init__(self, model):
        self.model = model

    def step(self):
        with torch.no_grad():
            for weight in self.model.parameters(): weight -= RATE * weight.grad

    def zero_grad(self):
        self.model.zero_grad()


class Bigram(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab, vocab))
        {init}

    def forward(self, tokens):
        {forward}


def build_model(spec):
    return Bigram(spec.vocab_size)


def train(run):
    model = build_model(run.spec).to(run.device)
    optimizer = SGD(model)
    {before}
    for step, (inputs, targets, epoch) in enumerate(run.batches(8)):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss, lr=RATE)
        {step}
    {after}
    return model
"""


def source(rate: float = 0.0, **places: str) -> str:
    """Return the honest train.py with code put at `top`, `init`, `forward`, `before`, `step` or `after`."""
    filled = {
        "top": "",
        "init": "",
        "forward": "return self.table[tokens]",
        "before": "",
        "step": "",
        "after": "",
    }
    filled |= places
    for place, code in filled.items():
        indent = re.search(rf"^( *)\{{{place}\}}$", HONEST, re.MULTILINE)
        assert indent is not None
        filled[place] = dedent(code).strip().replace("\n", "\n" + indent[1])
    text = HONEST.replace("{rate}", str(rate))
    for place, code in filled.items():
        text = text.replace(f"{{{place}}}", code)
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """Code in an honest train.py, and how its run must end: no advantage unless `kind` says that it is a crash."""

    places: Mapping[str, str]
    kind: str = ""
    reason: str = ""  # of the crash, as a regular expression
    says: str = ""  # what the log must show, so that an attack that never happened is no proof
    never: str = ""  # what the log must not show
    may_crash: str = ""  # another kind of crash that is as good
    sealed: bool = False  # only a sandbox keeps it from what it is after
    rate: float = 0.0
    check: Callable[[Judged], None] | None = None
    request: Mapping[str, Any] = field(default_factory=dict)


def attack(kind: str = "", reason: str = "", **fields: Any) -> Attack:
    """Return an attack whose `top`, `init`, `forward`, `before`, `step` and `after` are its places."""
    names = ("top", "init", "forward", "before", "step", "after")
    places = {name: fields.pop(name) for name in names if name in fields}
    return Attack(places=places, kind=kind, reason=reason, **fields)


def uniform_bpb(cache: Path) -> float:
    """Return the exact score of equal probabilities, computed without the evaluator."""
    rows = np.load(cache / "tiny/val.npy")[:ROWS]
    n_bytes = np.load(cache / "tiny/token_bytes.npy")[rows[:, 1:].astype(int)]
    return math.log2(1024) * int((n_bytes > 0).sum()) / int(n_bytes.sum())


def hold(planted: Attack, judge: Callable[..., Judged], cache: Path, trust: str) -> None:
    """Judge the attack and check that it ends as its table says."""
    if planted.sealed and trust != "sealed":
        pytest.skip(f"needs a sandbox; trust here is {trust}")
    run = judge(source(planted.rate, **planted.places), **planted.request)
    result = run.result
    shown = f"{result}\n{run.log[-2_000:]}"
    assert all(event["event"] in ("phase", "progress") for event in run.events), shown
    assert re.search(planted.says, run.log), shown
    assert not planted.never or not re.search(planted.never, run.log), shown
    if planted.check is not None:
        planted.check(run)
    if planted.kind or (result["status"] == "crash" and planted.may_crash == result["kind"]):
        assert result["status"] == "crash" and "metrics" not in result, shown
        assert result["kind"] in (planted.kind, planted.may_crash), shown
        assert re.search(planted.reason, result["reason"]), shown
        assert "\n" not in result["reason"] and len(result["reason"]) <= 400, shown
        return
    assert result["status"] == "ok", shown
    score, uniform = result["metrics"]["val_bpb"], uniform_bpb(cache)
    if planted.rate == 0.0:
        assert score == pytest.approx(uniform, rel=1e-14), shown
    else:
        assert 0.5 < score < uniform, shown
