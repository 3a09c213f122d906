"""The contract that train.py programs against: `ModelSpec`, `Run`, and `main` for `python train.py`.

A candidate owes two functions, `build_model(spec)` and `train(run)`. `Run` hands out batches, knows the budget and
takes the log; where the batches come from (this process, or the judge through shared memory) is its `Source`'s matter.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .clock import Budget
from .constants import MAX_LOSS, Profile


class ContractError(Exception):
    """train.py does not do what the contract asks of it."""


class Diverged(Exception):
    """The training loss is NaN or beyond any use."""


def pick_device() -> torch.device:
    """Return the best device of this machine: CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What a model must fit: it maps int64 [B, T] to logits [B, T, vocab_size], each row on its own."""

    vocab_size: int
    seq_len: int  # T of the rows that decide the score
    device: torch.device


class Source(Protocol):
    """Where a run's batches come from and where its log goes."""

    def open(self, batch_size: int, seq_len: int) -> None:
        """Start the stream of rows anew, in batches of this shape."""

    def next(self) -> tuple[NDArray[np.uint16], int, float] | None:
        """Return a fresh [B, T + 1] array, its epoch and when the clock started; None when the budget is spent."""

    def log(self, step: int, loss: float) -> None:
        """Take note of a step."""


class Run:
    """One training run: its device, seed and budget, its batches and its log."""

    def __init__(
        self,
        *,
        profile: Profile,
        device: torch.device,
        seed: int,
        budget_s: float,
        bos_id: int,
        source: Source,
    ) -> None:
        self.profile = profile.name
        self.device = device
        self.seed = seed
        self.bos_id = bos_id
        self.spec = ModelSpec(vocab_size=profile.vocab_size, seq_len=profile.seq_len, device=device)
        self.budget_s = budget_s
        self._budget = Budget(budget_s)
        self._source = source
        self._tokens = 0
        self._logged = (0.0, 0)  # elapsed seconds and tokens at the last log line

    def dummy_batch(self, batch_size: int, seq_len: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets), int64 [B, T] of arbitrary tokens, for compiling and warming up before the clock."""
        shape = (batch_size, (seq_len or self.spec.seq_len) + 1)
        tokens = torch.arange(math.prod(shape), device=self.device).remainder(self.spec.vocab_size).view(shape)
        return tokens[:, :-1].clone(), tokens[:, 1:].clone()

    def batches(self, batch_size: int, seq_len: int | None = None) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield (inputs, targets, epoch) until the budget is spent; the first `next()` starts the clock.

        inputs and targets are int64 [B, T] on the run's device, contiguous copies that nothing writes to again. The
        rows are the same whatever B is. A second call starts the stream anew; the clock goes on.
        """
        seq_len = self.spec.seq_len if seq_len is None else seq_len
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
            if not isinstance(value, int) or value < 1:
                raise ContractError(f"run.batches: {name} is {value!r}, expected a whole number of at least 1")
        self._source.open(batch_size, seq_len)
        while (item := self._source.next()) is not None:
            rows, epoch, started = item
            self._budget.start(at=started)
            self._tokens += batch_size * seq_len
            tokens = torch.from_numpy(rows)
            if self.device.type == "cuda":
                # Two bytes a token, without waiting: torch gives a pinned block to nobody else before its copy is done
                tokens = tokens.pin_memory().to(self.device, non_blocking=True)
            yield tokens[:, :-1].to(self.device, torch.int64), tokens[:, 1:].to(self.device, torch.int64), epoch

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, in [0, 1]; drives schedules."""
        return self._budget.progress

    @property
    def expired(self) -> bool:
        """Whether the budget is spent."""
        return self._budget.expired

    def log(self, step: int, loss: float | Tensor, lr: float | None = None, **figures: float) -> None:
        """Print one line of progress; raises Diverged when the loss is NaN or above 100."""
        loss = float(loss.detach() if isinstance(loss, Tensor) else loss)
        elapsed_s, tokens = self._logged
        self._logged = (self._budget.elapsed_s, self._tokens)
        rate = (self._tokens - tokens) / max(self._budget.elapsed_s - elapsed_s, 1e-9)
        parts = [f"step {step}", f"loss {loss:.4f}"]
        parts += [] if lr is None else [f"lr {lr:.1e}"]
        parts += [f"{rate / 1000:.1f}k tokens/s"] if self._tokens > tokens else []  # none since: a last report
        parts += [f"{name} {value:.4g}" for name, value in figures.items()]
        print(" | ".join(parts), flush=True)
        self._source.log(step, loss)
        if not loss <= MAX_LOSS:
            raise Diverged(f"training loss {loss:g} at step {step} (the limit is {MAX_LOSS:g})")


class _LocalSource:
    """Batches packed in this process, for `python train.py`."""

    def __init__(self, batches: Callable[[int, int], Iterator[tuple[NDArray[np.uint16], int]]], seconds: float) -> None:
        self._make = batches
        self._iterator: Iterator[tuple[NDArray[np.uint16], int]] | None = None
        self.budget = Budget(seconds)
        self.tokens = 0
        self.steps = 0

    def open(self, batch_size: int, seq_len: int) -> None:
        self._iterator = self._make(batch_size, seq_len)

    def next(self) -> tuple[NDArray[np.uint16], int, float] | None:
        assert self._iterator is not None
        rows, epoch = next(self._iterator)
        self.budget.start()
        if self.budget.expired:
            return None
        self.tokens += rows.shape[0] * (rows.shape[1] - 1)
        assert self.budget.started is not None
        return rows, epoch, self.budget.started

    def log(self, step: int, loss: float) -> None:
        self.steps += 1


def trained(model: Any) -> nn.Module:
    """Check what `train` returned and take it out of torch.compile's wrapper."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise ContractError(f"train(run) returned {type(model).__name__}, expected the trained torch.nn.Module")
    return model


def main(build_model: Callable[[ModelSpec], nn.Module], train: Callable[[Run], nn.Module]) -> None:
    """Train once in this process, score the model and print the `---` block: what `python train.py` does.

    The figure is unsealed (trust `inproc`): it is for a look, never for a verdict. The seed is always 0.
    """
    from ._gpu import stated_peak
    from .corpus import DataError
    from .dataloader import train_batches
    from .evaluate import evaluate_bpb
    from .prepared import Prepared, active_profile
    from .report import figures, print_block

    began = time.monotonic()
    try:
        prepared = Prepared.open(active_profile())
        stated_peak()  # an unusable one is said now, not after the training
    except DataError as error:
        sys.exit(f"error: {error}")
    profile, tokenizer, device = prepared.profile, prepared.tokenizer(), pick_device()
    source = _LocalSource(lambda batch_size, seq_len: train_batches(prepared, batch_size, seq_len), profile.budget_s)
    torch.manual_seed(0)
    run = Run(
        profile=profile,
        device=device,
        seed=0,
        budget_s=profile.budget_s,
        bos_id=tokenizer.bos_id,
        source=source,
    )
    try:
        model = trained(train(run))
        training_s = source.budget.elapsed_s
        val_bpb = evaluate_bpb(model, tokenizer, profile.eval_batch)
    except (ContractError, Diverged) as error:
        sys.exit(f"error: {error}")
    print_block(
        figures(
            val_bpb=val_bpb,
            training_s=training_s,
            total_s=time.monotonic() - began,
            tokens=source.tokens,
            steps=source.steps,
            device=device,
            state={name: tensor.numel() for name, tensor in model.state_dict().items()},
        )
    )
