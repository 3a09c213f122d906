"""Where a score is decided: logits and targets to nats, nats and bytes to bits per byte.

bits per byte = sum of nats / (ln 2 * sum of bytes), over the targets that stand for at least one byte. Special tokens
stand for none and are in neither sum. Per token the loss is computed in float32 from the logits; sums are float64 per
document and `math.fsum` across documents, so that neither order nor grouping of the rows can change the result.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class ScoreError(ValueError):
    """The output is not what a language model's logits must be, or there is nothing to score."""


@contextmanager
def pinned(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Build and run models in one fixed state of the process, whatever code ran before; restore that state after.

    No gradients, no autocast (a model that wants it says so in its forward), float32 by default and in full precision,
    deterministic kernels where there are any, and `threads` threads, by default one for each core of this process:
    how a reduction is split depends on their number.
    """
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    deterministic = torch.get_deterministic_debug_mode()
    cudnn = torch.backends.cudnn
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads or cores())
    torch.set_float32_matmul_precision("highest")
    # use_deterministic_algorithms would do the same, after it has imported a compiler for longer than scoring takes
    torch.set_deterministic_debug_mode("warn")
    try:
        with (
            cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(device.type, enabled=False),
            torch.inference_mode(),
        ):
            yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])
        torch.set_float32_matmul_precision(before[2])
        torch.set_deterministic_debug_mode(deterministic)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_logits(logits: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise ScoreError unless `logits` is a plain, dense, floating tensor of exactly `shape` [B, T, V]."""
    if type(logits) is not Tensor:
        raise ScoreError(f"forward returned {type(logits).__name__}, not a plain torch.Tensor of logits")
    if tuple(logits.shape) != shape:
        raise ScoreError(f"logits have shape {tuple(logits.shape)}, expected [B, T, V] = {shape}")
    if not logits.is_floating_point() or logits.layout is not torch.strided:
        raise ScoreError(f"logits are {logits.dtype} {logits.layout}, expected a dense floating tensor")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ScoreError("logits are an expanded view (stride 0), not one value per token and vocabulary entry")


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute -ln p(target) for every position.

    logits [B, T, V] floating on any device, targets [B, T] int64 on the same device; returns float64 [B, T] on the CPU,
    never negative. ln p = x_t - m - ln sum exp(x - m) with m = max x (the log-sum-exp identity): the sum is at least 1,
    so its logarithm is at least 0. Raises ScoreError for NaN, +inf or a row of nothing but -inf.
    """
    check_logits(logits, (*targets.shape, logits.shape[-1]))
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        chosen = logits.gather(-1, targets.unsqueeze(-1))
        # On CUDA a row at a time: next to no memory beside the logits', and the same kernels whatever the batch
        parts = logits.split(1) if logits.is_cuda else (logits,)  # type: ignore[no-untyped-call]
        tops = [part.amax(-1, keepdim=True) for part in parts]
        totals = [(part - top).exp_().sum(-1) for part, top in zip(parts, tops, strict=True)]
        # float64 from here on, on the CPU: some devices have none, and these are [B, T] only. One wait for the device
        found = torch.stack((torch.cat(tops)[..., 0], torch.cat(totals), chosen[..., 0])).cpu().double()
        top, total, chosen = found.unbind()
        if not torch.isfinite(top).all():
            raise ScoreError("logits contain NaN, +inf, or a position where every entry is -inf")
        return total.log_() + (top - chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The sums behind a score."""

    nats: float
    n_bytes: int
    n_tokens: int  # targets that were counted

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 * bytes)."""
        return self.nats / (math.log(2) * self.n_bytes)


class Tally:
    """Adds up scored rows, one float64 sum per document, in any order."""

    def __init__(self, token_bytes: NDArray[np.int64], bos_id: int) -> None:
        self._token_bytes = token_bytes
        self._bos_id = bos_id
        self._document_nats: list[float] = []
        self._n_bytes = 0
        self._n_tokens = 0

    def add(self, rows: NDArray[np.uint16], logits: Tensor) -> None:
        """Add `rows` [B, T + 1], scored by `logits` [B, T, V] of rows[:, :-1]."""
        tokens = rows.astype(np.int64)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        check_logits(logits, (*targets.shape, len(self._token_bytes)))
        nats = token_nats(logits, torch.from_numpy(targets.copy()).to(logits.device)).numpy()
        n_bytes = self._token_bytes[targets]
        counted = n_bytes > 0
        nats = np.where(counted, nats, 0.0)
        if not np.isfinite(nats).all():
            raise ScoreError("a target has probability 0 (its logit is -inf)")
        starts = inputs == self._bos_id
        starts[:, 0] = True  # a row never continues the document of the row before
        self._document_nats += np.add.reduceat(nats.ravel(), np.flatnonzero(starts)).tolist()
        self._n_bytes += int(n_bytes.sum())
        self._n_tokens += int(counted.sum())

    def score(self) -> Score:
        """Return the sums; raises ScoreError when no target stands for a byte."""
        if self._n_bytes == 0:
            raise ScoreError("nothing to score: no target stands for a byte")
        return Score(nats=math.fsum(self._document_nats), n_bytes=self._n_bytes, n_tokens=self._n_tokens)


def evaluate_bpb(
    model: nn.Module, tokenizer: "Tokenizer", batch_size: int, rows: NDArray[np.uint16] | None = None
) -> float:
    """Score `model` on the active profile's packed validation rows, in this process.

    Every batch has exactly `batch_size` rows (the last one is filled up with rows whose logits are ignored), because
    kernels are not batch-invariant; which rows are scored does not depend on it. `rows` [N, T + 1] scores others.
    """
    if rows is None:
        from .prepared import Prepared, active_profile

        rows = Prepared.open(active_profile()).val_rows()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    tally = Tally(tokenizer.token_bytes, tokenizer.bos_id)
    try:
        with pinned(device):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                filled = np.resize(batch, (batch_size, rows.shape[1]))
                logits = model(torch.from_numpy(filled[:, :-1].astype(np.int64)).to(device))
                check_logits(logits, (batch_size, rows.shape[1] - 1, tokenizer.vocab_size))
                tally.add(batch, logits[: len(batch)])
    finally:
        model.train(was_training)
    return tally.score().bits_per_byte
