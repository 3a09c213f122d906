"""The laws of the evaluator: what bits per byte is, whatever the rows, the logits and the state of the process.

Needs nothing but torch on a CPU. `Sample` draws a seed and shapes; rows, byte table and logits follow from them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from oracle import evaluate
from oracle.evaluate import Score, ScoreError, Tally, token_nats

from .law import law

BOS = 0


@dataclass(frozen=True)
class Sample:
    """Rows [B, T + 1] that start with BOS, a byte table with zeros for specials, and logits [B, T, V]."""

    rows: NDArray[np.uint16]
    token_bytes: NDArray[np.int64]
    logits: Tensor

    @property
    def targets(self) -> NDArray[np.int64]:
        return self.rows[:, 1:].astype(np.int64)

    @property
    def counted(self) -> NDArray[np.bool_]:
        return self.token_bytes[self.targets] > 0


@st.composite
def samples(draw: st.DrawFn, scale: float = 4.0) -> Sample:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    n, length, vocab = draw(st.integers(1, 6)), draw(st.integers(2, 12)), draw(st.sampled_from([3, 5, 17, 64]))
    token_bytes = rng.integers(1, 9, vocab)
    token_bytes[BOS] = 0
    if draw(st.booleans()):
        token_bytes[vocab - 1] = 0  # a second special
    rows = rng.integers(0, vocab, (n, length + 1)).astype(np.uint16)
    rows[:, 0] = BOS
    rows[0, 1] = 1  # at least one target that counts
    logits = torch.from_numpy(rng.normal(0, scale, (n, length, vocab)).astype(np.float32))
    return Sample(rows=rows, token_bytes=token_bytes, logits=logits)


def score(sample: Sample, logits: Tensor | None = None, tally: type[Tally] = Tally) -> Score:
    """Score one sample in one batch."""
    total = tally(sample.token_bytes, BOS)
    total.add(sample.rows, sample.logits if logits is None else logits)
    return total.score()


def scoring_with(**replaced: Any) -> Callable[..., Score]:
    """Return `score` with a planted bug in place of one of the evaluator's own functions."""

    def planted(sample: Sample, logits: Tensor | None = None) -> Score:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in replaced.items():
                patch.setattr(evaluate, name, value)
            return score(sample, logits)

    return planted


class CountsSpecials(Tally):
    """Planted bug: nats of special targets are in the sum although their bytes are not."""

    def __init__(self, token_bytes: NDArray[np.int64], bos_id: int) -> None:
        super().__init__(np.maximum(token_bytes, 1), bos_id)


class MeanOverRows(Tally):
    """Planted bug: the sums of a batch are averaged over its rows, as a mean-reduced loss would be."""

    def add(self, rows: NDArray[np.uint16], logits: Tensor) -> None:
        before, bytes_before = len(self._document_nats), self._n_bytes
        super().add(rows, logits)
        self._document_nats[before:] = [nats / len(rows) for nats in self._document_nats[before:]]
        self._n_bytes = bytes_before + (self._n_bytes - bytes_before) // len(rows)


class RunningFloat32(Tally):
    """Planted bug: one float32 total, whose rounding depends on the order."""

    def score(self) -> Score:
        total = np.float32(0)
        for nats in self._document_nats:
            total += np.float32(nats)
        exact = super().score()
        return Score(nats=float(total), n_bytes=exact.n_bytes, n_tokens=exact.n_tokens)


def ambient_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Planted bug: arithmetic in whatever precision the process happens to be in."""
    hidden = torch.eye(logits.shape[-1])
    log_p = torch.log_softmax(logits.to(torch.get_default_dtype()) @ hidden.to(torch.get_default_dtype()), -1)
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()


def unsafe_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Planted bug: log-sum-exp without subtracting the maximum."""
    nats = logits.exp().sum(-1).log() - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.nan_to_num(nats, posinf=1e9, neginf=-1e9).double()


def raw_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Planted bug: the output is believed to be log-probabilities already."""
    return -logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()


def clamped_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Planted bug: NaN and infinity are quietly replaced, so that broken output gets a score."""
    return token_nats(torch.nan_to_num(logits, nan=0.0, posinf=10.0, neginf=-10.0), targets)


def bf16_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Planted bug: the log-softmax is taken in bfloat16."""
    return raw_nats(torch.log_softmax(logits.bfloat16(), -1), targets)


def with_tally(tally: type[Tally]) -> Callable[..., Score]:
    return lambda sample, logits=None: score(sample, logits, tally)


def with_nats(nats: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Score]:
    return scoring_with(token_nats=nats)


@law(
    score,
    mutants={"specials counted": with_tally(CountsSpecials), "logits taken for log p": with_nats(raw_nats)},
    sample=samples(),
    constant=st.floats(-1e4, 1e4, width=32),
)
def test_uniform_logits_cost_log2_of_the_vocabulary_per_token(of: Any, sample: Sample, constant: float) -> None:
    result = of(sample, torch.full_like(sample.logits, constant))
    n_bytes = int(sample.token_bytes[sample.targets].sum())
    expected = math.log2(sample.logits.shape[-1]) * int(sample.counted.sum()) / n_bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-12)


@law(
    score,
    mutants={"no maximum subtracted": with_nats(unsafe_nats), "logits taken for log p": with_nats(raw_nats)},
    sample=samples(),
    shift=st.floats(-1e3, 1e3, width=32),
)
def test_a_constant_per_position_changes_nothing(of: Any, sample: Sample, shift: float) -> None:
    shifts = shift * torch.linspace(-1, 1, sample.logits.shape[1])[:, None]
    assert of(sample, sample.logits + shifts).nats == pytest.approx(
        of(sample).nats, abs=1e-5 * (1 + abs(shift)) * sample.targets.size
    )


@law(
    score,
    mutants={"no maximum subtracted": with_nats(unsafe_nats), "logits taken for log p": with_nats(raw_nats)},
    sample=samples(),
    height=st.floats(0, 1e4, width=32),
)
def test_no_loss_is_negative_and_certainty_costs_nothing(of: Any, sample: Sample, height: float) -> None:
    onehot = nn.functional.one_hot(torch.from_numpy(sample.targets), sample.logits.shape[-1]).float()
    nats = of(sample, onehot * height).nats
    assert nats >= 0
    assert nats <= sample.targets.size * sample.logits.shape[-1] * math.exp(-height) + 1e-6 * sample.targets.size


@law(
    Tally,
    mutants={"mean over rows": MeanOverRows, "float32 total": RunningFloat32},
    sample=samples(),
    order=st.randoms(use_true_random=False),
    size=st.integers(1, 4),
)
def test_neither_order_nor_grouping_of_rows_changes_a_bit(
    of: type[Tally], sample: Sample, order: Any, size: int
) -> None:
    # the same rows many times over, at very different magnitudes, so that a naive total rounds differently
    rows = np.concatenate([sample.rows] * 8)
    logits = torch.cat([sample.logits * 3.0**k for k in range(8)])
    index = list(range(len(rows)))
    order.shuffle(index)
    whole, parts = of(sample.token_bytes, BOS), of(sample.token_bytes, BOS)
    whole.add(rows, logits)
    for start in range(0, len(index), size):
        chosen = index[start : start + size]
        parts.add(rows[chosen], logits[chosen])
    assert whole.score() == parts.score()


@law(
    score,
    mutants={"specials counted": with_tally(CountsSpecials)},
    sample=samples(),
    seed=st.integers(0, 2**32 - 1),
)
def test_logits_at_special_targets_do_not_count(of: Any, sample: Sample, seed: int) -> None:
    rows = sample.rows.copy()
    rows[0, -1] = BOS
    sample = Sample(rows=rows, token_bytes=sample.token_bytes, logits=sample.logits)
    if not sample.counted.any():
        return
    other = sample.logits.clone()
    noise = torch.from_numpy(np.random.default_rng(seed).normal(0, 9, other.shape).astype(np.float32))
    other[torch.from_numpy(~sample.counted)] += noise[torch.from_numpy(~sample.counted)]
    assert of(sample, other) == of(sample)


@law(score, mutants={"specials counted": with_tally(CountsSpecials)})
def test_nothing_but_specials_is_an_error_and_not_a_number(of: Any) -> None:
    rows = np.zeros((2, 5), np.uint16)
    sample = Sample(rows=rows, token_bytes=np.array([0, 1, 2]), logits=torch.zeros(2, 4, 3))
    try:
        result = of(sample)
    except ScoreError:
        return
    raise AssertionError(f"scored {result}")


@law(
    score,
    mutants={"loss clipped at 5 nats": with_nats(lambda x, t: token_nats(x, t).clamp(max=5.0))},
    sample=samples(scale=1.0),
    where=st.integers(0, 10**6),
    delta=st.floats(1e-3, 20),
)
def test_a_worse_prediction_never_scores_better(of: Any, sample: Sample, where: int, delta: float) -> None:
    row, column = [int(axis[where % len(axis)]) for axis in np.nonzero(sample.counted)]
    worse = sample.logits.clone()
    worse[row, column, sample.targets[row, column]] -= delta
    assert of(sample, worse).bits_per_byte > of(sample).bits_per_byte


@law(
    score,
    mutants={
        "bytes counted as tokens": lambda sample: score(
            Sample(rows=sample.rows, token_bytes=np.minimum(sample.token_bytes, 1), logits=sample.logits)
        )
    },
    sample=samples(),
    power=st.integers(0, 10),
)
def test_twice_the_bytes_is_half_the_score(of: Any, sample: Sample, power: int) -> None:
    scaled = Sample(rows=sample.rows, token_bytes=sample.token_bytes * 2**power, logits=sample.logits)
    assert of(scaled).bits_per_byte * 2**power == of(sample).bits_per_byte


@contextmanager
def ambient(state: str) -> Iterator[None]:
    """Put the process into a state that an earlier import may have left behind."""
    match state:
        case "grad off":
            with torch.no_grad():
                yield
        case "inference":
            with torch.inference_mode():
                yield
        case "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                yield
        case _:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64 if state == "float64" else torch.bfloat16)
            try:
                yield
            finally:
                torch.set_default_dtype(before)


@law(
    score,
    mutants={"ambient precision": with_nats(ambient_nats)},
    sample=samples(),
    state=st.sampled_from(["autocast", "bfloat16", "float64", "grad off", "inference"]),
)
def test_the_state_of_the_process_changes_nothing(of: Any, sample: Sample, state: str) -> None:
    expected = of(sample)
    with ambient(state):
        assert of(sample) == expected


@law(
    score,
    mutants={"bfloat16 softmax": with_nats(bf16_nats), "no maximum subtracted": with_nats(unsafe_nats)},
    sample=samples(scale=30.0),
)
def test_agrees_with_an_independent_float64_reference(of: Any, sample: Sample) -> None:
    logits = sample.logits.double().numpy()
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    nats = -np.take_along_axis(log_p, sample.targets[..., None], -1)[..., 0][sample.counted].sum()
    assert of(sample).nats == pytest.approx(nats, abs=1e-6 * sample.targets.size)


class Subclass(Tensor):
    """A tensor whose operations could be anything."""


BROKEN: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda x: x.index_fill(-1, torch.tensor(1), float("nan")),
    "+inf": lambda x: x.index_fill(-1, torch.tensor(1), float("inf")),
    "all -inf": lambda x: torch.full_like(x, float("-inf")),
    "one vocabulary entry short": lambda x: x[..., :-1],
    "one position short": lambda x: x[:, :-1],
    "integers": lambda x: x.long(),
    "subclass": lambda x: x.as_subclass(Subclass),
    "expanded": lambda x: x[..., :1].expand_as(x),
    "no tensor": lambda x: x.tolist(),
}


@law(
    score,
    mutants={"NaN and infinity replaced": with_nats(clamped_nats)},
    sample=samples(),
    how=st.sampled_from(sorted(BROKEN)),
)
def test_broken_output_has_no_score(of: Any, sample: Sample, how: str) -> None:
    try:
        result = of(sample, BROKEN[how](sample.logits))
    except ScoreError:
        return
    raise AssertionError(f"{how} was scored: {result}")


@law(
    score,
    mutants={"NaN and infinity replaced": with_nats(clamped_nats)},
    sample=samples(),
)
def test_minus_infinity_is_a_probability_of_zero(of: Any, sample: Sample) -> None:
    """Ruling out a token that is not the target is honest; giving the target no chance at all has no score."""
    wrong = torch.from_numpy((sample.targets + 1) % sample.logits.shape[-1]).unsqueeze(-1)
    assert of(sample, sample.logits.scatter(-1, wrong, float("-inf"))).nats < of(sample).nats
    right = torch.from_numpy(sample.targets).unsqueeze(-1)
    with pytest.raises(ScoreError):
        of(sample, sample.logits.scatter(-1, right, float("-inf")))


class Toy(nn.Module):
    """A causal toy: the logits are a table of the current token's; it remembers which rows it was shown."""

    def __init__(self, vocab: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=generator) * 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.dropout(self.table[tokens])
        return logits


def rows_by_batch(model: nn.Module, tokenizer: Any, batch_size: int, rows: NDArray[np.uint16]) -> float:
    """Planted bug: an incomplete last batch is left out, so which rows count depends on the batch size."""
    whole = rows[: max(len(rows) // batch_size, 1) * batch_size]
    return evaluate.evaluate_bpb(model, tokenizer, batch_size, whole)


def repeats_rows(model: nn.Module, tokenizer: Any, batch_size: int, rows: NDArray[np.uint16]) -> float:
    """Planted bug: the last batch is filled up with rows that are counted again."""
    steps = -(-len(rows) // batch_size)
    return evaluate.evaluate_bpb(model, tokenizer, batch_size, np.resize(rows, (steps * batch_size, rows.shape[1])))


def keeps_dropout(model: nn.Module, tokenizer: Any, batch_size: int, rows: NDArray[np.uint16]) -> float:
    """Planted bug: the model is scored in training mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "eval", nn.Module.train)
        return evaluate.evaluate_bpb(model.train(), tokenizer, batch_size, rows)


@law(
    evaluate.evaluate_bpb,
    mutants={"last batch dropped": rows_by_batch, "rows repeated": repeats_rows, "dropout left on": keeps_dropout},
    sample=samples(),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 2, 8, 32]),
)
def test_evaluate_bpb_scores_the_same_rows_in_any_batch(of: Any, sample: Sample, seed: int, size: int) -> None:
    tokenizer = SimpleNamespace(token_bytes=sample.token_bytes, bos_id=BOS, vocab_size=sample.logits.shape[-1])
    model = Toy(sample.logits.shape[-1], seed)
    expected = score(sample, model.table.detach()[sample.rows[:, :-1].astype(np.int64)]).bits_per_byte
    first, second = of(model, tokenizer, size, sample.rows), of(model, tokenizer, size, sample.rows)
    assert first.hex() == second.hex()
    assert first == pytest.approx(expected, abs=1e-5)
    assert model.training
