"""The laws of the audit: an honest language model is never flagged, whatever its kind; a model that looks ahead,
carries state or depends on its batch mates is, and is called by its name.

Needs torch on a CPU only. A "fresh process" is a fresh copy of the model with the same random state.
"""

import copy
import re
from collections.abc import Callable, Iterator
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from oracle.audit import COLUMNS, Audit, AuditError, Pass, change, sketch
from oracle.packing import Tokens

from .law import law
from .zoo import BOS, CHEATS, HONEST, VOCAB, Fourier, Peeker

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, LENGTH, BATCH = 64, 24, 8
TOLERANCE = 1e-4
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The models are so small that a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_rows(seed: int, n_rows: int = ROWS) -> Tokens:
    rows = np.random.default_rng(seed).integers(0, VOCAB, (n_rows, LENGTH + 1)).astype(np.uint16)
    rows[:, 0] = BOS
    return rows


def make(kind: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval()


def scored(model: nn.Module, rows: Tokens, batch: int = BATCH) -> Iterator[tuple[slice, Tensor]]:
    """What the judge gets from a fresh scorer."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        filled = np.resize(part, (batch, rows.shape[1]))
        with torch.inference_mode():
            logits = model(torch.from_numpy(filled[:, :-1].astype(np.int64)))
        yield slice(start, start + len(part)), logits[: len(part)].clone()


def audited(
    model: nn.Module, seed: int, kind: type[Audit] = Audit, *, exact: bool = True, n_rows: int = ROWS
) -> str | None:
    """Audit a model on all of some rows; return what is wrong with it, if anything."""
    rows = make_rows(seed, n_rows)
    audit = kind(rows, vocab_size=VOCAB, secret=np.random.default_rng(seed))
    for which, logits in scored(model, rows):
        audit.watch(which, logits)
    try:
        audit.examine(lambda rows: scored(model, rows), batch=BATCH, exact=exact, tolerance=TOLERANCE)
    except AuditError as error:
        return str(error)
    return None


def clopper_pearson(hits: int, trials: int, confidence: float) -> tuple[float, float]:
    """Return the exact two-sided interval of a probability, found by bisection on the binomial's tails."""

    def at_most(k: int, p: float) -> float:
        return sum(comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k + 1))

    def solve(k: int, level: float) -> float:  # at_most falls with p
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(k, middle) > level else (low, middle)
        return low

    tail = (1 - confidence) / 2
    return (solve(hits - 1, 1 - tail) if hits else 0.0), (solve(hits, tail) if hits < trials else 1.0)


class ComparesBehindTheCut(Audit):
    def _sketch(self, place: int, logits: Tensor) -> Tensor:
        cuts, self.cuts = self.cuts, self.cuts + 1
        kept = super()._sketch(place, logits)
        self.cuts = cuts
        return kept

    def _changes(self, *given: Any) -> NDArray[np.float32]:
        cuts, self.cuts = self.cuts, self.cuts + 1
        self._sketch = super()._sketch  # type: ignore[method-assign]
        changes = super()._changes(*given)
        self.cuts = cuts
        return changes


class KnowsNoRounding(Audit):
    def examine(self, fresh: Pass, **given: Any) -> float:
        return super().examine(fresh, **{**given, "tolerance": 0.0})


class KeepsTheText(Audit):
    def watch(self, which: slice, logits: Tensor) -> None:
        super().watch(which, logits)
        self.spliced = self._original.copy()


class SameOrder(Audit):
    def __init__(self, rows: Tokens, **given: Any) -> None:
        super().__init__(rows, **given)
        order = np.argsort(self.chosen)
        self.chosen, self.cuts = self.chosen[order], self.cuts[order]
        self._original, self.spliced = self._original[order], self.spliced[order]
        self._places = {int(row): place for place, row in enumerate(self.chosen)}


class DrawsTheOriginal(Audit):
    def _draw(self, logits: Tensor, original: int) -> int:
        return super()._draw(logits, original if logits[original] < logits.amax() else int(logits.argmin()))


class ConstantCut(Audit):
    def __init__(self, rows: Tokens, **given: Any) -> None:
        super().__init__(rows, **given)
        self.cuts[:] = LENGTH // 2
        behind = np.arange(rows.shape[1]) > LENGTH // 2
        self.spliced = np.where(behind, np.roll(self._original, 1, axis=0), self._original)


class FewerRows(Audit):
    def __init__(self, rows: Tokens, **given: Any) -> None:
        super().__init__(rows, **given, count=len(rows) // 3)


@law(
    Audit,
    mutants={"compares behind the cut": ComparesBehindTheCut, "knows no rounding": KnowsNoRounding},
    kind=st.sampled_from(sorted(HONEST)),
    seed=SEEDS,
)
def test_an_honest_model_is_never_flagged(audit: type[Audit], kind: str, seed: int) -> None:
    """On every row; to the last bit, but for kernels that round by place."""
    assert audited(make(HONEST[kind], seed), seed, audit) is None


@law(
    Audit,
    mutants={
        "keeps the text": KeepsTheText,
        "same order and mates": SameOrder,
        "draws the original": DrawsTheOriginal,
    },
    kind=st.sampled_from(sorted(CHEATS)),
    exact=st.booleans(),
    seed=SEEDS,
)
def test_a_cheat_is_always_flagged_and_called_by_its_name(
    audit: type[Audit], kind: str, exact: bool, seed: int
) -> None:
    make_cheat, named = CHEATS[kind]
    said = audited(make(make_cheat, seed), seed, audit, exact=exact)
    assert said is not None and said.startswith(named), (kind, said)
    assert re.search(r"row \d+ changed by \S+ at position \d+ when", said), said


@law(Audit, mutants={"constant cut": ConstantCut})
def test_no_position_is_safe_from_the_cut(audit: type[Audit]) -> None:
    """A peeker at a single position: one audit of 64 rows misses it with probability (22/23)^64, six in a row never."""
    for position in range(LENGTH - 1):
        model = make(lambda at=position: Peeker(1.0, only=at), position)  # type: ignore[misc]
        assert any(audited(model, seed, audit) is not None for seed in range(6)), position


@law(Audit, mutants={"fewer rows": FewerRows})
def test_a_peeker_at_one_per_cent_is_caught_as_often_as_its_share_says(audit: type[Audit]) -> None:
    """One cut a row meets a share p of peeking positions with probability p: 1 - (1 - p)^256 for 256 rows."""
    trials, share = 60, 0.01
    model = make(lambda: Peeker(share), 1)
    caught = sum(audited(model, seed, audit, n_rows=256) is not None for seed in range(trials))
    low, high = clopper_pearson(caught, trials, 0.999)
    assert low <= 1 - (1 - share) ** 256 <= high, (caught, trials)


def test_little_leaks_count_where_the_baseline_has_none() -> None:
    """A convolution by Fourier transform looks ahead by rounding alone: bit-equality refuses it, the tolerance not."""
    model = make(Fourier, 1)
    said = audited(model, 1, exact=True)
    assert said is not None and said.endswith("(so little could be rounding, but the baseline has none)")
    assert audited(model, 1, exact=False) is None


# --- what one audit is made of ---------------------------------------------------------------------------------------


class NoExclusion(Audit):
    def _draw(self, logits: Tensor, original: int) -> int:
        weights = logits.double().softmax(-1).numpy()
        return int(self._secret.choice(len(weights), p=weights / weights.sum()))


class UniformDraw(Audit):
    def _draw(self, logits: Tensor, original: int) -> int:
        return super()._draw(torch.zeros_like(logits), original)


class NoDonor(Audit):
    def __init__(self, rows: Tokens, **given: Any) -> None:
        super().__init__(rows, **given)
        self.spliced = self._original.copy()


@law(
    Audit,
    mutants={"original not excluded": NoExclusion, "no other text": NoDonor},
    seed=SEEDS,
    gain=st.sampled_from([0.0, 20.0, 1e4]),
)
def test_a_spliced_row_is_its_own_text_another_token_and_the_text_of_another_row(
    audit: type[Audit], seed: int, gain: float
) -> None:
    rows = make_rows(seed)
    drawn = audit(rows, vocab_size=VOCAB, secret=np.random.default_rng(seed))
    for which, logits in scored(make(lambda: Peeker(1.0, gain=gain), seed), rows):
        drawn.watch(which, logits)
    assert sorted(drawn.chosen) == list(range(len(rows)))
    for row, cut, spliced in zip(drawn.chosen, drawn.cuts, drawn.spliced, strict=True):
        assert 1 <= cut < LENGTH
        assert (spliced[:cut] == rows[row, :cut]).all() and spliced[cut] != rows[row, cut]
        donors = np.flatnonzero((rows[:, cut + 1 :] == spliced[cut + 1 :]).all(1))
        assert set(donors) - {row}


@law(Audit, mutants={"uniform": UniformDraw})
def test_the_token_at_the_cut_is_one_that_the_model_expects(audit: type[Audit]) -> None:
    """Of 2,000 draws each token has about its share of them (chi-square)."""
    torch.manual_seed(3)
    logits = torch.randn(VOCAB) * 1.5
    drawn = audit(make_rows(1), vocab_size=VOCAB, secret=np.random.default_rng(1))
    counts = np.bincount([drawn._draw(logits, 5) for _ in range(2_000)], minlength=VOCAB)
    expected = logits.double().softmax(-1).numpy()
    expected[5] = 0
    expected *= 2_000 / expected.sum()
    assert counts[5] == 0
    statistic = float(((counts - expected) ** 2 / np.where(expected, expected, 1)).sum())
    assert statistic < 75, statistic  # 30 degrees of freedom: one in 100,000


def no_target(logits: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
    return sketch(logits, targets, columns)[:, 1:]


def no_normaliser(logits: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
    return sketch(logits, targets, columns)[:, [0, *range(2, 2 + len(columns))]]


@law(
    sketch,
    mutants={"no target": no_target, "no log-sum-exp": no_normaliser},
    seed=SEEDS,
    size=st.floats(0.01, 5),
    conserving=st.booleans(),
)
def test_no_gain_goes_unseen(
    sketch: Callable[[Tensor, Tensor, Tensor], Tensor], seed: int, size: float, conserving: bool
) -> None:
    """Whatever is done to the logits: where the nats of a target move, the sketch moves at least half as much."""
    torch.manual_seed(seed)
    logits = torch.randn(6, 500) * 3
    targets, columns = torch.randint(500, (6,)), torch.randperm(500)[:20]
    if conserving:  # from the likeliest other token to the target
        chances = logits.softmax(-1)
        loser = chances.scatter(-1, targets[:, None], 0).argmax(-1, keepdim=True)
        taken = chances.gather(-1, loser) * min(size / 6, 0.9)
        after = chances.scatter_add(-1, loser, -taken).scatter_add(-1, targets[:, None], taken).log()
        logits = chances.log()
    else:  # from all tokens that are not watched
        unseen = torch.ones(500).index_fill(0, columns, 0) * torch.ones(6, 1)
        after = logits - size * unseen.scatter(-1, targets[:, None], 0)
    moved = F.cross_entropy(after, targets, reduction="none") - F.cross_entropy(logits, targets, reduction="none")
    seen = change(sketch(logits, targets, columns), sketch(after, targets, columns))
    assert (moved.abs() > 1e-4).any()
    assert (seen >= moved.abs().numpy() / 2 - 1e-5).all()


def lax(before: Tensor, after: Tensor) -> NDArray[np.float32]:
    size: NDArray[np.float32] = (after - before).abs().nan_to_num(nan=0.0).amax(-1).numpy()
    return size


def naive(before: Tensor, after: Tensor) -> NDArray[np.float32]:
    size: NDArray[np.float32] = (after - before).abs().amax(-1).numpy()
    return size


@law(change, mutants={"NaN is no change": lax, "-inf is not itself": naive}, seed=SEEDS)
def test_infinities_are_values_and_nan_is_a_change(
    change: Callable[[Tensor, Tensor], NDArray[np.float32]], seed: int
) -> None:
    torch.manual_seed(seed)
    kept = torch.randn(4, 7)
    kept[0, 1] = -torch.inf
    assert (change(kept, kept.clone()) == 0).all()
    for value in (torch.nan, torch.inf, -torch.inf):
        other = kept.clone()
        other[2, 3] = value
        assert change(kept, other).tolist() == [0, 0, np.inf, 0]


def test_the_choices_are_secret_and_cover_all_rows() -> None:
    rows = make_rows(1)
    one, other = (Audit(rows, vocab_size=1_000) for _ in range(2))
    assert len(one) == ROWS and len(Audit(rows, vocab_size=1_000, count=10)) == 10
    assert len(Audit(rows, vocab_size=1_000, count=1_000)) == ROWS
    assert len(one._columns) == COLUMNS
    for name in ("chosen", "cuts", "_columns"):
        assert not np.array_equal(getattr(one, name), getattr(other, name)), name
