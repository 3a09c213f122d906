"""One trainer and the judge's end of it: batches go out, the clock runs, weights come in."""

import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from . import compiled
from ._processes import Child, Crash
from ._wire import RING_BYTES, WireError, shared_array, shared_memory
from .clock import Budget
from .dataloader import train_batches
from .prepared import Prepared
from .weights import weights_file

TRAINER_KINDS = ("contract", "diverged", "error", "memory")  # of a crash that a trainer can speak of


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
        if self.budget.expired:
            return {"end": True}  # without packing: a batch can be so large that it takes seconds
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


class Training:
    """One trainer: started at once, served by `finish`, its whole process tree gone on exit."""

    def __init__(self, request: dict[str, Any], prepared: Prepared, events: Progress) -> None:
        profile = prepared.profile
        weights = weights_file(request)
        weights.parent.mkdir()
        self.budget_s = profile.budget_s if request["budget_s"] is None else float(request["budget_s"])
        self.startup_s = profile.startup_s
        self.device = ""  # type of the trainer's, by its word
        self._events = events
        self._ring = shared_memory(RING_BYTES)
        self._feed = _Feed(prepared, self.budget_s, self._ring)
        self._trainer = Child(
            "trainer",
            cwd=weights.parent,
            fds=(self._ring,),
            order={
                "ring": self._ring,
                "profile": profile.name,
                "candidate": request["candidate"],
                "weights": str(weights),
                "seed": request["seed"],
                "budget_s": self.budget_s,
                "bos_id": prepared.bos_id,
            },
            readable=[Path(request["candidate"])],
            env=compiled.lend(request.get("compiled"), "trainer", weights.parent),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End the trainer's whole process tree, now rather than on exit."""
        if self._ring >= 0:
            self._feed.close()
            self._trainer.end()
            os.close(self._ring)
            self._ring = -1

    def finish(self, before_clock: Callable[[], None] = lambda: None) -> Trained:
        """Serve the trainer until its weights are saved; `before_clock` is called before the first batch goes out.

        Raises Crash for what the candidate does wrong.
        """
        feed, trainer, events, budget_s = self._feed, self._trainer, self._events, self.budget_s
        grace_s = max(2.0, 0.02 * budget_s)
        trained_s: float | None = None
        deadline = time.monotonic() + self.startup_s
        try:
            while True:
                try:
                    message = trainer.channel.receive(deadline)
                except TimeoutError:
                    if feed.budget.started is None:
                        raise Crash("timeout", f"no training batch was asked for within {self.startup_s:g} s") from None
                    if trained_s is None:
                        over_s = feed.budget.elapsed_s - budget_s
                        raise Crash(
                            "overrun",
                            f"train(run) had not returned {over_s:.1f} s after the budget of {budget_s:g} s",
                        ) from None
                    raise Crash("overrun", f"saving the weights took more than {grace_s:g} s") from None
                match message:
                    case None:
                        raise trainer.crash("error", "the training process ended with {how} before it returned a model")
                    case {"op": "ready", "device": str(device)}:
                        self.device = device
                    case {"op": "batches", "rows": rows, "seq_len": seq_len} if trained_s is None:
                        feed.open(rows, seq_len)
                    case {"op": "next"} if trained_s is None:
                        if feed.budget.started is None:
                            before_clock()
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
                    case {"op": "returned"} if feed.budget.started is None:
                        raise Crash("contract", "train(run) returned without having asked for a batch")
                    case {"op": "returned"} if trained_s is None:
                        trained_s = feed.budget.elapsed_s
                        deadline = (
                            time.monotonic() + grace_s
                        )  # no more: what says that it saves may as well be training on
                    case {"op": "done", "peak_device_mb": float(peak_mb)} if (
                        trained_s is not None and 0 <= peak_mb < inf
                    ):
                        return Trained(seconds=trained_s, tokens=feed.tokens, steps=feed.steps, peak_device_mb=peak_mb)
                    case {"op": "crash", "kind": str(kind), "reason": str(reason), "detail": str(detail)}:
                        raise Crash(kind if kind in TRAINER_KINDS else "error", reason, detail)
                    case _:
                        raise WireError(f"an unexpected message {str(message)[:80]}")
        except ConnectionError:  # it ended while something was sent to it
            raise trainer.crash("error", "the training process ended with {how} while it trained") from None
        except (WireError, OSError) as error:
            raise Crash("error", f"the training process broke its channel: {error}") from error
