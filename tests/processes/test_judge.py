"""The judge, the trainer and the scorer as real processes: an honest candidate gets its score, a broken or forging one
gets a crash with the true reason, and nothing that it started is left.

Needs the `cache` fixture: a corpus of made-up words prepared for the tiny profile. Budgets are half a second.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from oracle import sandbox
from tests.processes.judging import Judged, judge

MARK = "61.8033988"  # seconds of sleep; names a process that must be gone

HONEST = """
import os, sys, time
import torch
from torch import nn
import torch.nn.functional as F


class Bigram(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab, vocab))

    def forward(self, tokens):
        return self.table[tokens]


def build_model(spec):
    return Bigram(spec.vocab_size)


def train(run):
    model = build_model(run.spec).to(run.device)
    inputs, targets = run.dummy_batch(BATCH)
    for step, (inputs, targets, epoch) in enumerate(run.batches(BATCH)):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        with torch.no_grad():  # by hand: torch.optim takes longer to import than all of this to run
            model.table -= RATE * model.table.grad
        model.zero_grad()
        run.log(step, loss, lr=RATE)
    return model

RATE = 200.0
BATCH = 8
"""


@pytest.fixture
def judged(tmp_path: Path, cache: Path) -> Callable[..., Judged]:
    return lambda source="", **request: judge(tmp_path / "run", cache, source, **request)


def uniform_bpb(cache: Path) -> float:
    """The exact score of a model that gives every token the same probability, computed without the evaluator."""
    rows = np.load(cache / "tiny/val.npy")
    n_bytes = np.load(cache / "tiny/token_bytes.npy")[rows[:, 1:].astype(int)]
    return math.log2(1024) * int((n_bytes > 0).sum()) / int(n_bytes.sum())


def test_an_honest_candidate_is_scored(judged: Callable[..., Judged], cache: Path) -> None:
    run = judged(HONEST, cold=True)
    result = run.result
    assert result["status"] == "ok", result
    assert result["trust"] == sandbox.trust()
    metrics = result["metrics"]
    assert 0.5 < metrics["val_bpb"] < uniform_bpb(cache)
    assert metrics["num_steps"] == run.log.count("step ") > 0
    assert metrics["total_tokens_M"] == metrics["num_steps"] * 8 * 256 / 1e6 == result["work"] / 1e6
    assert metrics["num_params_M"] == 1024**2 / 1e6
    assert 0.5 <= metrics["training_seconds"] < metrics["total_seconds"]
    assert [e["phase"] for e in run.events if e["event"] == "phase"] == ["start", "train", "score", "audit"]
    assert {"elapsed_s", "budget_s", "step", "loss", "tokens_per_s"} <= set(
        next(e for e in run.events if e["event"] == "progress")
    )
    assert result["fingerprint"]["profile"] == "tiny" and "driver" in result["fingerprint"]
    assert (run.scratch / "trainer/weights.safetensors").is_file()  # kept until the verdict


def test_a_uniform_model_scores_log2_of_the_vocabulary_whatever_it_prints(
    judged: Callable[..., Judged], cache: Path
) -> None:
    """The whole path, to the last digit; a printed metric and a file that looks like a result are only noise."""
    forged = HONEST.replace("RATE = 200.0", "RATE = 0.0").replace(
        "    return model\n",
        "    print('---\\nval_bpb: 0.1', flush=True)\n    open('result.json', 'w').write('{\"val_bpb\": 0.1}')\n"
        '    print(\'{"event": "result", "status": "ok"}\', file=sys.stderr)\n    return model\n',
        1,
    )
    run = judged(forged)
    assert "val_bpb: 0.1" in run.log
    assert run.result["metrics"]["val_bpb"] == pytest.approx(uniform_bpb(cache), rel=1e-14)


BROKEN = {
    "syntax": ("def train(:", "contract", "syntax error in line 1"),
    "no train": ("def build_model(spec): ...", "contract", r"no function train\(run\)"),
    "no build_model": ("def train(run): ...", "contract", r"no function build_model\(spec\)"),
    "missing import": ("import no_such_module", "error", r"No module named 'no_such_module' \(train.py:1\)"),
    "no module": (HONEST.replace("return Bigram(spec.vocab_size)", "return 5"), "contract", "returned int"),
    "wrong shape": (
        HONEST.replace("return self.table[tokens]", "return self.table[tokens][..., :-1]"),
        "contract",
        r"logits have shape \(2, 256, 1023\), expected \[B, T, V\] = \(2, 256, 1024\)",
    ),
    "returns a number": (HONEST.replace("    return model\n", "    return 3\n", 1), "contract", "returned int"),
    "never asks": (
        HONEST.replace("    inputs, targets", "    return model\n    inputs, targets", 1),
        "contract",
        "without having asked for a batch",
    ),
    "exits": (HONEST.replace("        run.log", "        os._exit(0)\n        run.log", 1), "error", "exit code 0"),
    "diverges": (HONEST.replace("RATE = 200.0", "RATE = 1e9"), "diverged", r"training loss .* \(the limit is 100\)"),
    "raises": (
        HONEST.replace("        run.log", "        1 / 0\n        run.log", 1),
        "error",
        r"ZeroDivisionError: division by zero \(train.py:\d+\)",
    ),
    "overruns": (
        HONEST.replace("    return model\n", "    time.sleep(600)\n", 1),
        "overrun",
        r"had not returned 2\.\d s after the budget of 0.5 s",
    ),
    "scores NaN": (
        HONEST.replace("    return model\n", "    model.table.data.fill_(float('nan'))\n    return model\n", 1),
        "score",
        "NaN",
    ),
    "other weights": (
        HONEST.replace("    return model\n", "    return nn.Linear(2, 2)\n", 1),
        "score",
        "Error.* in loading state_dict",
    ),
    "huge batch": (HONEST.replace("BATCH = 8", "BATCH = 10**7"), "contract", "64-MiB|bytes of token ids at most"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_candidate_is_a_crash_with_the_true_reason(judged: Callable[..., Judged], name: str) -> None:
    source, kind, reason = BROKEN[name]
    if name == "huge batch":  # dummy_batch would ask for the memory first
        source = source.replace("    inputs, targets = run.dummy_batch(BATCH)\n", "")
    result = judged(source, cold=name == "raises").result
    assert result["status"] == "crash" and "metrics" not in result
    assert result["kind"] == kind, result
    assert re.search(reason, result["reason"]), result
    assert "\n" not in result["reason"]


def test_batches_are_the_same_rows_for_any_batch_size_and_are_never_overwritten(tmp_path: Path, cache: Path) -> None:
    source = HONEST.replace(
        "    for step,",
        "    held = []\n    for x, y, epoch in run.batches(BATCH):\n"
        "        if len(held) * BATCH < 64: held.append((x, y))\n"
        "    import hashlib\n"
        "    assert all(torch.equal(x[:, 1:], y[:, :-1]) and x[:, 0].eq(run.bos_id).all() for x, y in held)\n"
        "    print('ROWS', hashlib.sha256(torch.cat([x for x, y in held]).numpy().tobytes()).hexdigest())\n"
        "    raise Exception('seen')\n    for step,",
    )
    digests = set()
    for size in (4, 16):
        run = judge(tmp_path / str(size), cache, source.replace("BATCH = 8", f"BATCH = {size}"))
        assert run.result["reason"].startswith("Exception: seen"), run.log
        digests.add(run.log.partition("ROWS ")[2].split()[0])
    assert len(digests) == 1


def test_nothing_that_a_candidate_started_outlives_its_run(judged: Callable[..., Judged]) -> None:
    """A daemon that forked twice into a session of its own is gone before scoring, let alone before the next run."""
    daemon = (
        "    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n            open('ran', 'w')\n"
        f"            os.execvp('sleep', ['sleep', '{MARK}'])\n        os._exit(0)\n    os.wait()\n"
    )
    run = judged(HONEST.replace("    inputs, targets = run", daemon + "    inputs, targets = run", 1))
    assert run.result["status"] == "ok", run.result
    assert (run.scratch / "trainer/ran").exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if MARK in (p.info["cmdline"] or [])]


def test_check_answers_without_running_anything(judged: Callable[..., Judged]) -> None:
    result = judged(op="check").result
    assert result["status"] == "ok" and result["budget_s"] == 20.0 and result["profile"] == "tiny"
    assert json.dumps(result["fingerprint"])


@pytest.mark.parametrize("damage", ["unknown profile", "missing", "truncated", "flipped"])
def test_bad_data_is_never_a_score(tmp_path: Path, cache: Path, damage: str) -> None:
    home = tmp_path / "cache/tiny"
    home.mkdir(parents=True)
    for path in (cache / "tiny").iterdir():
        if not path.name.endswith(".whl"):
            (home / path.name).write_bytes(path.read_bytes())
    victim = home / "val.npy"
    match damage:
        case "missing":
            victim.unlink()
        case "truncated":
            victim.write_bytes(victim.read_bytes()[:-100])
        case "flipped":
            data = bytearray(victim.read_bytes())
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
    profile = "huge" if damage == "unknown profile" else "tiny"
    result = judge(tmp_path / "run", tmp_path / "cache", HONEST, profile=profile).result
    assert result["status"] == "unusable"
    expected = "choose tiny or climbmix" if damage == "unknown profile" else "val.npy"
    assert expected in result["reason"] and "\n" not in result["reason"]
