"""The judge on a GPU: logits through memory of either kind are those of the model, in every sandbox; nothing is left of
it; what a GPU has to be asked is asked of the right one.

Needs CUDA, cuda-bindings and the `cache` fixture.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from oracle import _cuda, _gpu, sandbox, scoring
from oracle._processes import Crash
from oracle._wire import sealed_copy
from oracle.audit import Audit
from oracle.constants import TINY
from oracle.evaluate import evaluate_bpb, token_nats
from oracle.prepared import Prepared
from oracle.scoring import Scorer, Scoring
from tests.processes.judging import FEW_ROWS, judge
from tests.processes.test_audit import CHEATS, HONEST, candidate
from tests.processes.test_judge import HONEST as BIGRAM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as in a scorer; else torch warns of matrix products, an error here
# Its logits vary with the text up to each position, so no two slots and no two batches hold the same
RUNNING = """
import torch
import torch.nn.functional as F
from torch import nn

class Model(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.embedding = nn.Embedding(vocab, 64)
        self.head = nn.Linear(64, vocab)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + F.pad(x, (0, 0, 1, 0))[:, :-1].tanh() + F.pad(x, (0, 0, 7, 0))[:, :-7].sin())

def build_model(spec):
    return Model(spec.vocab_size)

def train(run): ...
"""


class Nothing:
    def send(self, event: str, **fields: object) -> None: ...

    def progress(self, **fields: object) -> None: ...


@pytest.fixture(autouse=True)
def no_memory_held() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def prepared(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(cache))
    return Prepared.open(TINY)


def model_of(source: str) -> nn.Module:
    space: dict[str, type[nn.Module]] = {"__name__": "train"}  # type: ignore[dict-item]
    exec(source, space)
    torch.manual_seed(3)
    return space["Model"](TINY.vocab_size).eval().cuda()


@contextmanager
def scorer_of(
    source: str, model: nn.Module, prepared: Prepared, folder: Path, batch: int | None = None
) -> Iterator[Scorer]:
    (folder / "train.py").write_text(source)
    weights = sealed_copy(save({name: tensor.cpu() for name, tensor in model.state_dict().items()}))
    try:
        with Scorer(prepared, candidate=folder, scratch=folder, seed=0, batch=batch) as scorer:
            scorer.load(weights)
            yield scorer
    finally:
        os.close(weights)


def used_mb() -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


@pytest.mark.parametrize("level", sandbox.LEVELS)
def test_logits_come_through_device_memory_in_every_sandbox(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, level: sandbox.Level
) -> None:
    monkeypatch.setenv("AUTORESEARCH_SANDBOX", level)
    sandbox.available.cache_clear()
    try:
        if sandbox.available() != level:
            pytest.skip(f"no {level} here")
        model, rows = model_of(RUNNING), prepared.val_rows()[:100]
        with scorer_of(RUNNING, model, prepared, tmp_path) as scorer:
            assert scorer.share() == "cuda"
            for which, logits in scorer.logits(rows):  # seven batches through two slots, the last one not full
                assert logits.is_cuda and logits.dtype == torch.float32
                with torch.inference_mode():
                    expected = model(torch.from_numpy(rows[which, :-1].astype(np.int64)).cuda())
                assert (logits - expected).abs().max() < 1e-3
    finally:
        sandbox.available.cache_clear()


def request_for(folder: Path, source: str, model: nn.Module) -> dict[str, object]:
    scratch = folder / "scratch"
    (scratch / "trainer").mkdir(parents=True)
    (folder / "train.py").write_text(source)
    weights = save({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    (scratch / "trainer/weights.safetensors").write_bytes(weights)
    return {"candidate": str(folder), "scratch": str(scratch), "seed": 0}


@pytest.mark.parametrize("kind", ["cuda", "pinned", "shared"])
def test_every_kind_of_memory_gives_the_score_of_one_process(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And the audit passes to the last bit: two processes, other batch mates, the same logits."""

    def none(*given: object) -> None:
        raise _cuda.Unsupported("not in this test")

    if kind != "cuda":
        monkeypatch.setattr(_cuda, "_driver", none)
    if kind == "shared":
        monkeypatch.setattr(_cuda, "_pin", none)
    model, rows = model_of(RUNNING), prepared.val_rows()
    with Scoring(request_for(tmp_path, RUNNING, model), prepared, Nothing(), early=2) as scoring:
        scoring.take()
        audit = Audit(rows, vocab_size=TINY.vocab_size)
        with scoring.fresh() as scorer:
            bpb = scoring.score(scorer, rows, audit)
        assert scoring.shared == kind
        assert scoring.examine(audit)["audit_difference"] == 0.0
    assert bpb == pytest.approx(evaluate_bpb(model, prepared.tokenizer(), TINY.eval_batch, rows), rel=1e-7)


def test_a_scorer_that_cannot_map_device_memory_gets_host_memory(tmp_path: Path, prepared: Prepared) -> None:
    source = f"""
import oracle._cuda
def none(): raise oracle._cuda.Unsupported("not in here")
oracle._cuda._driver = none
{RUNNING}
"""
    with scorer_of(source, model_of(RUNNING), prepared, tmp_path) as scorer:
        assert scorer.share() == "pinned"
        assert sum(len(logits) for _, logits in scorer.logits(prepared.val_rows()[:50])) == 50


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_judges_copy_stays_when_the_slot_is_written_again(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    monkeypatch.setattr(scoring, "SLOTS", slots)
    model, rows = model_of(RUNNING), prepared.val_rows()[:128]
    with scorer_of(RUNNING, model, prepared, tmp_path) as scorer:
        scorer.share()
        assert scorer._logits is not None
        shared, batches = scorer._logits.tensor, -(-len(rows) // scorer.batch)
        for index, (which, logits) in enumerate(scorer.logits(rows)):
            before = logits.clone()
            while index + slots < batches and torch.equal(shared[index % slots][: len(logits)], before):
                pass  # until the scorer has written over the slot
            assert torch.equal(logits, before), which


def test_an_early_scorer_takes_nothing_of_the_device(tmp_path: Path, prepared: Prepared) -> None:
    (tmp_path / "train.py").write_text(RUNNING)
    before = used_mb()
    with Scorer(prepared, candidate=tmp_path, scratch=tmp_path, seed=0) as scorer:
        scorer.wait()
        assert used_mb() - before < 32


def test_no_device_memory_leaks_over_many_scorers(tmp_path: Path, prepared: Prepared) -> None:
    model, rows = model_of(RUNNING), prepared.val_rows()[:32]
    before, descriptors = 0.0, 0
    for number in range(6):
        with scorer_of(RUNNING, model, prepared, tmp_path, batch=64) as scorer:
            assert scorer.share() == "cuda"
            assert sum(len(logits) for _, logits in scorer.logits(rows)) == 32
        del scorer
        if number == 0:  # what CUDA starts once
            before, descriptors = used_mb(), len(os.listdir("/proc/self/fd"))
    assert used_mb() - before < 16
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_a_buffer_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 2**28)  # 1 GiB
    with closing(_cuda.Buffer("cuda", shape)) as first:  # the kernels take memory too, when they are first run
        assert not first.tensor.fill_(0.0).count_nonzero()
    before = used_mb()
    for _ in range(5):
        with closing(_cuda.Buffer("cuda", shape)) as mine:
            assert not mine.tensor.count_nonzero()  # what was there before is gone
            with closing(_cuda.Buffer("cuda", shape, os.dup(mine.fd))) as again:  # mapped twice in one process
                again.tensor.fill_(3.0)
                torch.cuda.synchronize()
                assert mine.tensor[0, -1].item() == 3.0
            assert 1_000 < used_mb() - before < 1_200
        assert used_mb() - before < 16
    with pytest.raises(torch.OutOfMemoryError, match="cuMemCreate"):
        _cuda.Buffer("cuda", (2**20, 2**20))
    assert used_mb() - before < 16


def test_nats_are_those_of_float64_and_of_any_batch() -> None:
    torch.manual_seed(1)
    logits = torch.randn(8, 64, 8_192, device="cuda") * 10
    targets = torch.randint(8_192, (8, 64), device="cuda")
    nats = token_nats(logits, targets)
    exact = nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    assert nats.device.type == "cpu" and nats.dtype == torch.float64
    assert (nats.flatten() - exact.cpu()).abs().max() < 1e-5
    for one in range(8):
        assert torch.equal(token_nats(logits[one : one + 1], targets[one : one + 1])[0], nats[one])


def test_the_first_pass_is_watched_on_the_device_and_kept_on_the_cpu() -> None:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 512, (16, 65)).astype(np.uint16)
    logits = torch.randn(16, 64, 512)

    def kept(where: str) -> list[Tensor]:
        audit = Audit(rows, vocab_size=512, secret=np.random.default_rng(1))
        audit.watch(slice(0, 16), logits.to(where))
        assert all(not sketch.is_cuda for sketch in audit._before.values())
        return [audit._before[place] for place in range(16)] + [torch.from_numpy(audit.spliced.astype(np.int64))]

    for here, there in zip(kept("cpu"), kept("cuda"), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_run_on_the_device(tmp_path: Path, cache: Path, name: str) -> None:
    run = judge(tmp_path, cache, candidate(HONEST[name]), cold=True, budget_s=2.0, device="cuda:0")
    result = run.result
    assert result["status"] == "ok", (result, run.log)
    assert result["logits"] == "cuda"
    assert result["metrics"]["audit_difference"] <= 1e-3, result
    assert result["fingerprint"]["gpu"] == torch.cuda.get_device_name() and result["fingerprint"]["driver"]
    assert 100 < result["metrics"]["peak_vram_mb"] < 20_000  # a context alone is hundreds


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught_on_the_device(tmp_path: Path, cache: Path, name: str) -> None:
    result = judge(tmp_path, cache, candidate(CHEATS[name][0]), code=FEW_ROWS, budget_s=2.0, cold=False).result
    assert (result["status"], result["kind"]) == ("crash", "audit"), result


def test_the_determinism_table_holds(tmp_path: Path, cache: Path) -> None:
    result = judge(tmp_path, cache, BIGRAM, code=FEW_ROWS, budget_s=2.0, op="determinism").result
    assert result["status"] == "ok" and result["logits"] == "cuda", result
    assert all(row["holds"] for row in result["table"]), result["table"]


def test_a_hidden_gpu_leaves_the_judge_on_the_cpu(tmp_path: Path, cache: Path) -> None:
    result = judge(tmp_path, cache, BIGRAM, cold=True, device="cpu").result
    assert result["status"] == "ok" and result["logits"] == "shared", result
    assert result["fingerprint"]["gpu"] == result["fingerprint"]["driver"] == ""


def test_a_model_too_large_to_score_is_a_crash_with_a_hint(tmp_path: Path, cache: Path) -> None:
    greedy = BIGRAM.replace(
        "return self.table[tokens]",
        "if 'oracle.scorer' in open('/proc/self/cmdline').read(): torch.empty(10**13, device='cuda')\n"
        "        return self.table[tokens]",
    )
    result = judge(tmp_path, cache, greedy, code=FEW_ROWS, budget_s=2.0).result
    assert (result["status"], result["kind"]) == ("crash", "memory"), result
    assert "out of memory" in result["reason"] and "try a smaller" in result["reason"]


def test_a_judge_without_device_memory_is_a_crash_with_a_hint(tmp_path: Path, prepared: Prepared) -> None:
    model = model_of(RUNNING)
    with (
        pytest.raises(Crash, match=r"no device memory left to judge in: .*; try a smaller model") as caught,
        Scoring(request_for(tmp_path, RUNNING, model), prepared, Nothing()) as scoring,
    ):
        scoring.take()
        with scoring.fresh():
            torch.empty(10**13, device="cuda")
    assert caught.value.kind == "memory"


def test_nvml_sees_what_another_process_takes() -> None:
    pytest.importorskip("pynvml")
    gpu = _gpu.selected()
    assert gpu is not None and gpu.name == torch.cuda.get_device_name()
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", gpu.uuid)
    assert str(uuid) == gpu.uuid
    taking = "import torch, sys; x = torch.ones(2**29, device='cuda'); print(1, flush=True); sys.stdin.read()"
    with _gpu.Memory() as memory:
        assert memory.used_mb() is not None
        with subprocess.Popen(
            [sys.executable, "-c", taking], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None and child.stdin is not None
            child.stdout.readline()
            memory.stop()  # reads once more
            child.stdin.close()
        assert memory.peak_mb is not None and 2_048 < memory.peak_mb < 4_096
        assert memory.missing_mb() == 0.0
