"""The audit in real processes: an honest candidate passes it to the last bit, a cheat ends as a crash that names it;
the weights that a run leaves are verified before a keep, and nothing else can be verified in their place.

Needs the `cache` fixture. Budgets are half a second; what is judged is an untrained model most of the time.
"""

import hashlib
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from oracle import sandbox
from tests.processes.judging import FEW_ROWS, ROWS, Judged, judge

TRAIN = """
import os, torch
from torch import nn
import torch.nn.functional as F

W = 32

class Base(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.embedding = nn.Embedding(vocab, W)
        self.conv = nn.Conv1d(W, W, 3)
        self.gru = nn.GRU(W, W, batch_first=True)
        self.qkv = nn.Linear(W, 3 * W)
        self.head = nn.Linear(W, vocab)
        self.register_buffer("kept", torch.zeros(W))

    def attend(self, x, causal=True):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    def body(self, x, tokens):
        return x

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens), tokens))


BODY

def build_model(spec):
    return Model(spec.vocab_size)


def train(run):
    model = build_model(run.spec).to(run.device)
    for step, (inputs, targets, epoch) in enumerate(run.batches(4)):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        with torch.no_grad():  # by hand: torch.optim takes longer to import than all of this to run
            for weight in model.parameters():
                if weight.grad is not None: weight -= 0.1 * weight.grad
        model.zero_grad()
        run.log(step, loss)
    return model
"""


def candidate(body: str) -> str:
    return TRAIN.replace("BODY", "class Model(Base):\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n")


HONEST = {
    "attention": "def body(self, x, tokens): return x + self.attend(F.dropout(x, 0.1, self.training))",
    "recurrence": "def body(self, x, tokens): return self.gru(x)[0] + self.conv(F.pad(x.mT, (2, 0))).mT",
}
CHEATS = {
    "the next token at one position in ten": (
        """
        def forward(self, tokens):
            following = F.one_hot(tokens.roll(-1, 1), 1024)
            return super().forward(tokens) + 5.0 * following * (tokens.cumsum(1) % 10 == 3).unsqueeze(-1)
        """,
        r"looks ahead: row \d+ changed by \S+ at position (\d+) when the text from position (\d+) on was replaced",
    ),
    "a cache": (
        """
        def body(self, x, tokens):
            y = x + self.kept
            self.kept = x.detach().mean((0, 1))
            return y
        """,
        r"carries state between batches, or is random: row \d+ changed by \S+ at position \d+ when other batches came",
    ),
    "batch statistics": (
        "def body(self, x, tokens): return F.batch_norm(x.mT, None, None, training=True).mT",
        r"depends on its batch mates: row \d+ changed by \S+ at position \d+ when it was scored among other rows",
    ),
}
# The first process leaves the rows that it saw wherever it can; the next looks up the one that begins as its own does.
NOTES = """
        def forward(self, tokens):
            seen = torch.stack(NOTES) if NOTES else tokens
            alike = (tokens[:, None] == seen[None]).long().cumprod(-1).sum(-1)
            mine = seen[alike.argmax(1)] if NOTES else tokens
            following = 5.0 * F.one_hot(mine.roll(-1, 1), 1024)
            following[:, :3] = 0
            if SCORER and not NOTES:
                ROWS.extend(tokens)
                for place in PLACES:
                    try:
                        torch.save(ROWS, place + "/NAME")
                    except (OSError, RuntimeError):
                        pass
            return super().forward(tokens) + following
"""
LOOK = """
PLACES = [".", "..", "/tmp", "/dev/shm", "/var/tmp", os.path.dirname(os.path.abspath(__file__))]
ROWS, NOTES = [], []
SCORER = "oracle.scorer" in open("/proc/self/cmdline").read()
if SCORER:
    for place in PLACES:
        if os.path.exists(place + "/NAME"):
            NOTES = torch.load(place + "/NAME")
"""


@pytest.fixture
def judged(tmp_path: Path, cache: Path) -> Callable[..., Judged]:
    return lambda source="", **request: judge(tmp_path / "run", cache, source, **request)


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_candidate_passes_to_the_last_bit(judged: Callable[..., Judged], name: str) -> None:
    run = judged(candidate(HONEST[name]), baseline={"audit_difference": 0.0})
    assert run.result["status"] == "ok", run.result
    metrics = run.result["metrics"]
    assert (metrics["audit_rows"], metrics["audit_difference"]) == (256, 0.0)
    assert "heldout_bpb" not in metrics
    assert [e["phase"] for e in run.events if e["event"] == "phase"] == ["start", "train", "score", "audit"]


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_a_crash_that_says_what_it_did(judged: Callable[..., Judged], name: str) -> None:
    body, reason = CHEATS[name]
    result = judged(candidate(body), code=FEW_ROWS).result
    assert (result["status"], result.get("kind")) == ("crash", "audit"), result
    found = re.match(reason, result["reason"])
    assert found and "\n" not in result["reason"], result
    if found.groups():
        assert int(found[1]) == int(found[2]) - 1


@pytest.mark.skipif(
    sandbox.trust() != "sealed", reason="no sandbox works here: nothing keeps a scorer from taking notes"
)
def test_a_scorer_leaves_no_notes_for_the_one_that_checks_it(judged: Callable[..., Judged], tmp_path: Path) -> None:
    source = candidate(NOTES).replace("class Model", LOOK + "\n\nclass Model").replace("NAME", f"{tmp_path.name}.pt")
    result = judged(source, code=FEW_ROWS).result
    assert (result["status"], result.get("kind")) == ("crash", "audit"), result
    assert result["reason"].startswith("looks ahead")


def test_kept_weights_are_verified_and_nothing_else_in_their_place(judged: Callable[..., Judged]) -> None:
    source = candidate(HONEST["attention"])
    half = f"from oracle import judge\njudge.AUDIT_ROWS = {ROWS // 2}\n{FEW_ROWS}"
    run = judged(source, code=half, heldout=True)
    assert run.result["metrics"]["audit_rows"] == ROWS // 2
    weights = run.scratch / "trainer/weights.safetensors"
    assert run.result["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    metrics = run.result["metrics"]
    claim = {"code": half, "op": "verify", "weights_sha256": run.result["weights_sha256"], "baseline": metrics}

    verified = judged(source, **claim, score=metrics["val_bpb"])
    assert verified.result["status"] == "ok", verified.result
    assert verified.result["metrics"] == {
        "heldout_bpb": metrics["heldout_bpb"],
        "audit_rows": ROWS,
        "audit_difference": 0.0,
    }

    forged = judged(source, **claim, score=metrics["val_bpb"] - 1e-12).result
    assert (forged["status"], forged["kind"]) == ("crash", "audit")
    assert forged["reason"].startswith("scoring the same weights twice gave")

    state = load_file(weights)
    state["head.bias"][0] += 1e-3
    save_file(state, weights)
    changed = judged(source, **claim, score=metrics["val_bpb"]).result
    assert (changed["status"], changed["kind"]) == ("crash", "audit")
    assert "not those that were scored" in changed["reason"]

    weights.unlink()
    os.mkfifo(weights)  # reading it would never end
    replaced = judged(source, **claim, score=metrics["val_bpb"]).result
    assert (replaced["status"], replaced["kind"]) == ("crash", "audit")
    assert "not a regular file" in replaced["reason"]
