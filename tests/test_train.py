"""Proves that the starting point train.py keeps its contract and learns. Needs torch and no data; runs on the CPU.

The model is the `tiny` one at full size. Training reads a fixed artificial stream; the budget is a number of batches,
so that nothing here depends on the speed of the machine.
"""

import ast
import gc
import math
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oracle.constants import TINY
from oracle.run import Diverged, ModelSpec, Run

SOURCE = (Path(__file__).parent.parent / "train.py").read_text()
SPEC = ModelSpec(vocab_size=TINY.vocab_size, seq_len=TINY.seq_len, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AUTORESEARCH_PROFILE", "tiny")
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()  # train() leaves the collector frozen, and off where it was interrupted
    gc.enable()


def load(**constants: object) -> ModuleType:
    """Run train.py's source as a module, some of its constants replaced."""
    tree = ast.parse(SOURCE)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in constants:
                node.value = ast.parse(repr(constants.pop(name)), mode="eval").body
    assert not constants, f"train.py has no constant {', '.join(constants)}"
    module = ModuleType("train")
    exec(compile(tree, "train.py", "exec"), module.__dict__)
    return module


def tunables() -> dict[str, Any]:
    """The values that train.py's tunable constants have in the tiny profile."""
    module = load()
    constants = {name: value for name, value in vars(module).items() if name.isupper() and name != "PROFILE"}
    return {name: value for name, value in constants.items() if isinstance(value, int | float | str)}


SMALL: dict[str, Any] = {"TOTAL_BATCH_SIZE": 512, "DEVICE_BATCH_SIZE": 2}


class Stream:
    """A source of rows 0, 1, 2, 3, ... modulo 97: easy to learn, the same in every run."""

    def __init__(self, batches: int) -> None:
        self.left = batches
        self.losses: list[float] = []
        self.row = 0

    def open(self, batch_size: int, seq_len: int) -> None:
        self.shape = (batch_size, seq_len + 1)

    def next(self) -> tuple[NDArray[np.uint16], int, float] | None:
        if self.left == 0:
            return None
        self.left -= 1
        first = self.row + np.arange(self.shape[0])[:, None]
        self.row += self.shape[0]
        return ((7 * first + np.arange(self.shape[1])) % 97).astype(np.uint16), 0, 0.0

    def log(self, step: int, loss: float) -> None:
        self.losses.append(loss)


def run_with(stream: Stream, seed: int = 0) -> Run:
    """A run whose clock stands at the start: schedules see hardly any progress."""
    return Run(profile=TINY, device=SPEC.device, seed=seed, budget_s=1e12, bos_id=0, source=stream)


def train(module: ModuleType, batches: int, seed: int = 0) -> tuple[nn.Module, list[float]]:
    stream = Stream(batches)
    return module.train(run_with(stream, seed)), stream.losses


def tokens(batch_size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SPEC.vocab_size, (batch_size, SPEC.seq_len), generator=generator)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model some steps into training, so that no block is still silent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_PROFILE", "tiny")
        return train(load(**SMALL), batches=8)[0]


def test_logits_are_what_the_contract_asks_for(model: nn.Module) -> None:
    with torch.inference_mode():
        logits = model(tokens(3))
    assert logits.shape == (3, SPEC.seq_len, SPEC.vocab_size) and logits.dtype == torch.float32
    assert bool(logits.isfinite().all()) and float(logits.abs().max()) < 15


@pytest.mark.parametrize("cut", [1, 100, 255])
def test_the_past_does_not_see_the_future(model: nn.Module, cut: int) -> None:
    one, other = tokens(2), tokens(2, seed=1)
    other[:, :cut] = one[:, :cut]
    with torch.inference_mode():
        assert torch.equal(model(one)[:, :cut], model(other)[:, :cut])
        assert not torch.equal(model(one)[:, cut], model(other)[:, cut])


def test_rows_do_not_see_each_other_and_nothing_is_remembered(model: nn.Module) -> None:
    rows = tokens(4)
    with torch.inference_mode():
        first, swapped, again = model(rows), model(rows[[2, 3, 0, 1]]), model(rows)
    assert torch.equal(first, again)
    assert torch.equal(swapped[[2, 3, 0, 1]], first)


def test_short_rows_are_prefixes_and_long_ones_are_refused(model: nn.Module) -> None:
    rows = tokens(2)
    with torch.inference_mode():
        torch.testing.assert_close(model(rows[:, :50]), model(rows)[:, :50], atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="a row of 257 tokens, but the model was built for at most 256"):
            model(torch.zeros(1, 257, dtype=torch.int64))


def test_short_windows_see_their_own_piece_of_the_context() -> None:
    """A changed token reaches the positions after it in its piece, and no other: neither before it nor beyond."""
    model: Any = load(DEPTH=1, **SMALL).build_model(SPEC)
    attention = model.blocks[0].attention  # the last block is L
    attention.piece = 128
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(weight.numel()))
    tokens = torch.arange(200).remainder(SPEC.vocab_size)[None]
    other = tokens.clone()
    other[0, 100] += 1
    with torch.no_grad():
        changed = (model(tokens) - model(other))[0].abs().amax(-1) > 0
    assert changed.nonzero().flatten().tolist() == list(range(100, 128))


def test_a_row_may_end_anywhere_in_a_piece() -> None:
    model = load(SHORT_WINDOW=0.3, **SMALL).build_model(SPEC)  # three pieces of 86 tokens: 258 for 256
    tokens = torch.arange(256).remainder(SPEC.vocab_size)[None]
    with torch.no_grad():
        whole = model(tokens)
        assert whole.shape == (1, 256, SPEC.vocab_size)
        for length in (1, 85, 86, 87, 200):
            torch.testing.assert_close(model(tokens[:, :length]), whole[:, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("profile", "vocab_size", "parameters"), [("tiny", 1_024, 786_500), ("climbmix", 8_192, None)])
def test_parameters_are_counted(
    monkeypatch: pytest.MonkeyPatch, profile: str, vocab_size: int, parameters: int | None
) -> None:
    """Embedding, head, value embeddings on every other layer, the blocks' matrices, gates and two scalars a layer."""
    monkeypatch.setenv("AUTORESEARCH_PROFILE", profile)
    module = load()
    model = module.build_model(ModelSpec(vocab_size=vocab_size, seq_len=256, device=SPEC.device))
    depth, width, heads, gate, group = {"tiny": (2, 128, 2, 32, 1), "climbmix": (8, 512, 4, 12, 2)}[profile]
    gated, kv_width = depth // 2, width // group
    tables = (2 * width + gated * kv_width) * vocab_size
    blocks = depth * (10 * width**2 + 2 * width * kv_width) + gated * gate * heads // group
    expected = tables + blocks + 2 * depth
    assert sum(p.numel() for p in model.parameters()) == expected == (parameters or expected)


def nudged(value: Any) -> list[Any]:
    if isinstance(value, str):
        return ["L", "S", "SL", "SSSSL"]
    if isinstance(value, int):
        return [max(1, value - max(1, value // 5)), value + max(1, value // 5)]
    if 0.5 < value < 1:  # betas and momenta
        return [1 - 1.5 * (1 - value), 1 - 0.5 * (1 - value)]
    return [value * 0.8, value * 1.25] if value else [0.05]


@pytest.mark.parametrize("name", sorted(tunables()))
def test_every_constant_can_be_nudged(name: str) -> None:
    """A neighbour of the defaults trains: whatever a tuner does to one constant, heads and batches still come out."""
    for value in nudged((tunables() | SMALL)[name]):
        model, losses = train(load(**SMALL | {name: value}), batches=2)
        assert losses and all(map(math.isfinite, losses))
        with torch.inference_mode():
            assert model(tokens(1)).shape == (1, SPEC.seq_len, SPEC.vocab_size)


@pytest.mark.parametrize(
    "name",
    ["DEPTH", "ASPECT_RATIO", "HEAD_DIM", "KV_GROUP", "MLP_RATIO", "SHORT_WINDOW", "GATE_CHANNELS", "WINDOW_PATTERN"],
)
def test_the_model_of_a_gpu_can_be_nudged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_PROFILE", "climbmix")
    spec = ModelSpec(vocab_size=64, seq_len=64, device=SPEC.device)
    for value in [*nudged(getattr(load(), name)), *((3, 4) if name == "KV_GROUP" else ())]:
        model = load(**{name: value}).build_model(spec)
        with torch.inference_mode():
            assert model(torch.arange(64)[None]).shape == (1, 64, 64)


@pytest.mark.parametrize(
    ("memory_gb", "fraction", "rows"), [(141, 1.0, 128), (24, 1.0, 64), (141, 8 / 141, 16), (4, 1.0, 4)]
)
def test_a_micro_batch_fits_the_card(
    memory_gb: int, fraction: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTORESEARCH_PROFILE", "climbmix")
    card = types.SimpleNamespace(total_memory=memory_gb * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: fraction)
    module = load()
    with torch.device("meta"):
        model = module.GPT(8_192, 2_048)
    assert module.micro_batch(model, torch.device("cuda")) == rows
    assert module.micro_batch(model, torch.device("cpu")) == 128


def test_a_batch_that_does_not_divide_is_rounded() -> None:
    """600 tokens in rows of 256: two micro-batches of a row; fewer tokens than one micro-batch: one."""
    assert len(train(load(TOTAL_BATCH_SIZE=600, DEVICE_BATCH_SIZE=1), batches=6)[1]) == 3
    assert len(train(load(TOTAL_BATCH_SIZE=10, DEVICE_BATCH_SIZE=1), batches=6)[1]) == 6


def test_accumulation_is_a_larger_batch() -> None:
    """Two micro-batches of two rows and one of four make the same step.

    AdamW's epsilon is large here: with a tiny one its first step is the sign of a gradient that may be rounding alone.
    """
    one = train(load(TOTAL_BATCH_SIZE=1024, DEVICE_BATCH_SIZE=4, ADAM_EPS=1e-2), batches=2)[1]
    two = train(load(TOTAL_BATCH_SIZE=1024, DEVICE_BATCH_SIZE=2, ADAM_EPS=1e-2), batches=4)[1]
    half = train(load(TOTAL_BATCH_SIZE=512, DEVICE_BATCH_SIZE=2, ADAM_EPS=1e-2), batches=2)[1]
    assert one == pytest.approx(two, abs=1e-4)
    assert one != pytest.approx(half, abs=1e-3)


def test_a_wrong_window_pattern_is_named() -> None:
    with pytest.raises(ValueError, match="WINDOW_PATTERN is 'SX', use the letters S and L"):
        load(DEPTH=3, WINDOW_PATTERN="SX").build_model(SPEC)


def test_it_starts_at_chance_and_learns() -> None:
    _, losses = train(load(**SMALL), batches=30)
    assert losses[0] == pytest.approx(math.log(SPEC.vocab_size), abs=0.01)
    assert losses[-1] < 0.5 * losses[0]


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    module = load(**SMALL)
    torch.manual_seed(5)
    first = train(module, batches=3)[0].state_dict()
    torch.manual_seed(6)  # what came before must not matter
    again, other = train(module, batches=3)[0].state_dict(), train(module, batches=3, seed=1)[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_warming_up_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dummy batch's tokens do not reach the weights, nor does whether there was randomness in it."""

    def other_tokens(run: Run, batch_size: int, seq_len: int | None = None) -> tuple[Tensor, Tensor]:
        torch.rand(3)
        return tokens(batch_size, seed=3), tokens(batch_size, seed=4)

    module = load(**SMALL)
    usual, _ = train(module, batches=2)
    rested = torch.random.get_rng_state()
    monkeypatch.setattr(Run, "dummy_batch", other_tokens)
    model, _ = train(module, batches=2)
    assert torch.equal(torch.random.get_rng_state(), rested)
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), model.parameters(), strict=True))


def test_a_run_that_ends_before_a_step_returns_the_untrained_model() -> None:
    model, losses = train(load(**SMALL), batches=0)
    assert losses == [] and isinstance(model, nn.Module)


def test_divergence_stops_the_run() -> None:
    with pytest.raises(Diverged):
        train(load(**SMALL, MATRIX_LR=1e38), batches=9)
