"""Is it a language model? Every logit must follow from the tokens up to its position, and from nothing else.

1. `Audit` chooses secretly: which rows, where each is cut, and which columns of the vocabulary are compared.
2. `watch` goes along with the pass that decides the score. Of an audited row it keeps a sketch of the logits before the
   cut (260 bytes a position, in host memory: 2.7 GB for all of climbmix), and it draws another token for the cut from
   what the model itself expects there.
3. `examine` has the spliced rows scored by a fresh process: the text up to the cut, the drawn token, and from there on
   the text of another row; in another order, with other batch mates. Every logit before the cut must be what it was.
4. Where one changed, the same rows are scored again without a splice. That tells a model that looks ahead from one that
   remembers earlier batches or depends on its batch mates.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .packing import Tokens

COLUMNS = 63  # secret columns of the vocabulary; with the two values that decide a score a sketch has 65
# The largest change of a logit that is taken for rounding, by device type, where bit-equality does not hold. Nothing
# has needed it so far: transformer, GRU and convolution are bit-equal on a CPU in float32 and on an H200 in bfloat16.
TOLERANCE = {"cpu": 1e-4, "mps": 1e-3, "cuda": 1e-3}

Pass = Callable[[Tokens], Iterator[tuple[slice, Tensor]]]  # rows [N, T + 1] to (which rows, logits [n, T, V])


class AuditError(Exception):
    """The model is not a language model; one line that says what failed and where."""


def sketch(logits: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
    """Keep of logits [T, V] what decides the score, and a sample of the rest: float32 [T, 2 + columns].

    The score is made of the target's logit and the log-sum-exp, so nothing that changes it can leave both as they were.
    """
    chosen = logits.gather(-1, targets.unsqueeze(-1))
    return torch.cat((chosen, logits.logsumexp(-1, keepdim=True), logits[:, columns]), dim=-1)


def change(before: Tensor, after: Tensor) -> NDArray[np.float32]:
    """Return the largest |difference| of two sketches at each position, float32 [T]; infinite where NaN is involved."""
    size = (after - before).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    result: NDArray[np.float32] = torch.where(after == before, 0.0, size).amax(-1).numpy()  # -inf equals -inf
    return result


class Audit:
    """One audit of a model on `rows` [N, T + 1], with N and T at least 2; all of them unless `count` says fewer.

    `secret` makes every choice; by default it is seeded by the operating system and known to nobody else.
    """

    def __init__(
        self, rows: Tokens, *, vocab_size: int, count: int | None = None, secret: np.random.Generator | None = None
    ) -> None:
        self._secret = np.random.default_rng() if secret is None else secret
        self.chosen = self._secret.permutation(len(rows))[:count]  # the order of the second pass
        self.cuts = self._secret.integers(1, rows.shape[1] - 1, len(self.chosen))  # the first token that is replaced
        self._columns = torch.from_numpy(self._secret.permutation(vocab_size)[:COLUMNS])
        self._original = rows[self.chosen]
        others = rows[(self.chosen + self._secret.integers(1, len(rows), len(self.chosen))) % len(rows)]
        behind = np.arange(rows.shape[1]) > self.cuts[:, None]
        self.spliced: Tokens = np.where(behind, others, self._original)  # the token at the cut follows in `watch`
        self._places = {int(row): place for place, row in enumerate(self.chosen)}
        self._before: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.chosen)

    def watch(self, which: slice, logits: Tensor) -> None:
        """Take note of the first pass: finite float32 `logits` [n, T, V] of the rows `which`."""
        for row, scored in zip(range(which.start, which.stop), logits, strict=True):
            if (place := self._places.get(row)) is not None:
                cut = self.cuts[place]
                self._before[place] = self._sketch(place, scored)
                self.spliced[place, cut] = self._draw(scored[cut - 1].cpu(), self._original[place, cut])

    def examine(self, fresh: Pass, *, batch: int, exact: bool, tolerance: float) -> float:
        """Return the largest change of a logit before a cut; raise AuditError where it is more than rounding.

        Each call of `fresh` scores rows in a new process, `batch` rows at a time and in order. With `exact` no change
        at all is rounding, unless the model's own kernels round differently elsewhere in a batch, which the same rows
        without a splice show; then, and without `exact`, rounding is up to `tolerance`.
        """
        spliced = self._changes(fresh(self.spliced))
        largest = float(spliced.max())
        if largest <= (0.0 if exact else tolerance):
            return largest
        control = self._changes(fresh(self._original))
        if control.max() > tolerance:
            # whole batches in reverse order: who knows nothing of earlier batches gives the same again
            whole = len(self) // batch * batch
            order = np.arange(whole).reshape(-1, batch)[::-1].ravel() if whole else np.arange(len(self))
            turned = self._changes(fresh(self._original[order]), order)
            if not (np.abs(turned - control[order]) <= tolerance).all():
                what, when = "carries state between batches, or is random", "when other batches came before it"
            else:
                what, when = "depends on its batch mates", "when it was scored among other rows"
            raise AuditError(f"{what}: {self._where(control, tolerance)[0]} {when}")
        limit = 0.0 if exact and control.max() == 0 else tolerance
        if largest <= limit:
            return largest
        where, cut = self._where(spliced, limit)
        tiny = " (so little could be rounding, but the baseline has none)" if largest <= tolerance else ""
        raise AuditError(f"looks ahead: {where} when the text from position {cut} on was replaced{tiny}")

    def _sketch(self, place: int, logits: Tensor) -> Tensor:
        cut = self.cuts[place]
        targets = torch.from_numpy(self._original[place, 1 : cut + 1].astype(np.int64))
        # made where the logits are; on CUDA every pass over a row sees the same kernels, its length up to the cut too
        return sketch(logits[:cut], targets.to(logits.device), self._columns.to(logits.device)).cpu()

    def _draw(self, logits: Tensor, original: int) -> int:
        """Draw a token from the model's own prediction [V], but not the original one."""
        weights = logits.double().softmax(-1).numpy()
        weights[original] = 0.0
        if not weights.sum() > 0:  # nothing else is possible, says the model
            weights = np.ones(len(weights))
            weights[original] = 0.0
        return int(self._secret.choice(len(weights), p=weights / weights.sum()))

    def _changes(
        self, scored: Iterator[tuple[slice, Tensor]], order: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Compare a pass over the audited rows (those at `order`) with the first: float32 [n, T], 0 from the cut on."""
        places = np.arange(len(self)) if order is None else order
        changes = np.zeros((len(places), self.spliced.shape[1] - 1), np.float32)
        for which, logits in scored:
            for index, after in zip(range(which.start, which.stop), logits, strict=True):
                place = int(places[index])
                changes[index, : self.cuts[place]] = change(self._before[place], self._sketch(place, after))
        return changes

    def _where(self, changes: NDArray[np.float32], limit: float) -> tuple[str, int]:
        """Name the first row of all that changed, and the first position in it; return its cut too."""
        place = min(np.flatnonzero((changes > limit).any(1)), key=lambda place: int(self.chosen[place]))
        position = int(np.argmax(changes[place] > limit))
        size = changes[place, position]
        return f"row {self.chosen[place]} changed by {size:.2g} at position {position}", int(self.cuts[place])
