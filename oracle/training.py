"""One trainer and the judge's end of it: batches go out, the clock runs, weights come in."""

import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ._processes import Child, Crash
from ._wire import RING_BYTES, WireError, shared_array, shared_memory
from .clock import Budget
from .dataloader import train_batches
from .prepared import Prepared

SAVE_S = 60.0  # for writing the weights, after train() returned


class Progress(Protocol):
    """Whoever hears of phases and progress."""

    def send(self, event: str, **fields: Any) -> None:
        """Send one event."""

    def progress(self, **fields: Any) -> None:
        """Send one progress event, or leave it out when there was one just now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One finished training, in the judge's own counts."""

    seconds: float  # from the first batch until train(run) returned
    tokens: int
    steps: int  # log calls
    peak_device_mb: float  # the trainer's word; 0 without a GPU


class _Feed:
    """Serves one trainer: its batches, its clock and its counts."""

    def __init__(self, prepared: Prepared, budget_s: float, ring: int) -> None:
        self._prepared = prepared
        self._ring = ring
        self._batches: Generator[tuple[np.ndarray, int]] | None = None
        self.budget = Budget(budget_s)
        self.tokens = 0
        self.steps = 0
        self.loss = float("nan")

    def open(self, rows: int, seq_len: int) -> None:
        if not (type(rows) is int and type(seq_len) is int and rows > 0 and seq_len > 0):
            raise WireError(f"a batch of {rows!r} x {seq_len!r}")
        if rows * (seq_len + 1) * 2 > RING_BYTES:
            raise WireError(f"a batch of {rows} x {seq_len} tokens")
        self.close()
        self._batches = train_batches(self._prepared, rows, seq_len)

    def next(self) -> dict[str, Any]:
        if self._batches is None:
            raise WireError("next before batches")
        rows, epoch = next(self._batches)
        self.budget.start()
        if self.budget.expired:
            return {"end": True}
        shared_array(self._ring, rows.shape, np.uint16)[...] = rows
        self.tokens += rows.shape[0] * (rows.shape[1] - 1)
        return {"epoch": epoch, "started": self.budget.started}

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def train(request: dict[str, Any], prepared: Prepared, weights: Path, events: Progress) -> Trained:
    """Run one trainer until its weights are saved and its whole process tree is gone. Raises Crash."""
    profile = prepared.profile
    budget_s = profile.budget_s if request["budget_s"] is None else float(request["budget_s"])
    grace_s = max(2.0, 0.02 * budget_s)
    ring = shared_memory(RING_BYTES)
    feed = _Feed(prepared, budget_s, ring)
    trainer = Child(
        "trainer",
        cwd=weights.parent,
        fds=(ring,),
        order={
            "ring": ring,
            "profile": profile.name,
            "candidate": request["candidate"],
            "weights": str(weights),
            "seed": request["seed"],
            "budget_s": budget_s,
            "bos_id": prepared.bos_id,
        },
    )
    import torch  # noqa: F401 (for later; now, because the trainer is importing it too and nobody waits)

    trained_s: float | None = None
    deadline = time.monotonic() + profile.startup_s
    try:
        while True:
            try:
                message = trainer.channel.receive(deadline)
            except TimeoutError:
                if feed.budget.started is None:
                    raise Crash("timeout", f"no training batch was asked for within {profile.startup_s:g} s") from None
                if trained_s is None:
                    over_s = feed.budget.elapsed_s - budget_s
                    raise Crash(
                        "overrun",
                        f"train(run) had not returned {over_s:.1f} s after the budget of {budget_s:g} s",
                    ) from None
                raise Crash("timeout", f"saving the weights took more than {SAVE_S:g} s") from None
            match message:
                case None:
                    status = trainer.process.wait(timeout=SAVE_S)
                    how = f"exit code {status}" if status >= 0 else f"signal {-status}"
                    raise Crash("error", f"the training process ended with {how} before it returned a model")
                case {"op": "ready"}:
                    pass
                case {"op": "batches", "rows": rows, "seq_len": seq_len}:
                    feed.open(rows, seq_len)
                case {"op": "next"}:
                    if feed.budget.started is None:
                        events.send("phase", phase="train")
                    trainer.channel.send(**feed.next())
                    assert feed.budget.started is not None
                    deadline = feed.budget.started + budget_s + grace_s
                case {"op": "log", "loss": float(loss)}:
                    feed.steps += 1
                    elapsed_s = feed.budget.elapsed_s
                    events.progress(
                        elapsed_s=elapsed_s,
                        budget_s=budget_s,
                        step=feed.steps,
                        loss=loss,
                        tokens_per_s=feed.tokens / max(elapsed_s, 1e-9),
                    )
                case {"op": "returned"} if trained_s is None and feed.budget.started is not None:
                    trained_s = feed.budget.elapsed_s
                    deadline = time.monotonic() + SAVE_S
                case {"op": "returned"}:
                    raise Crash("contract", "train(run) returned without having asked for a batch")
                case {"op": "done", "peak_device_mb": float(peak_mb)} if trained_s is not None:
                    return Trained(seconds=trained_s, tokens=feed.tokens, steps=feed.steps, peak_device_mb=peak_mb)
                case {"op": "crash", "kind": str(kind), "reason": str(reason), "detail": str(detail)}:
                    raise Crash(kind, reason, detail)
                case _:
                    raise WireError(f"an unexpected message {str(message)[:80]}")
    except (WireError, OSError) as error:
        raise Crash("error", f"the training process broke its channel: {error}") from error
    finally:
        feed.close()
        trainer.end()
        os.close(ring)
