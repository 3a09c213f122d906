"""The judge: the trusted process that owns clock, data and targets and computes the score.

`python -m oracle.judge` reads one request (JSON) on its standard input and writes events (JSON lines) to the descriptor
that AUTORESEARCH_CHANNEL names. One run goes:

1. Check the data's digests.
2. Start a trainer. It imports and builds the candidate; its first `next()` starts the clock. Hand it batches until the
   budget is spent; end its whole process tree once its weights are saved.
3. Start a scorer, give it rows and take logits; copy them out of shared memory before looking at them, so that nothing
   can change between two looks; compute the score from targets that never left this process.
4. Send the one result.
"""

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ._wire import RING_BYTES, WireError, shared_array, shared_memory
from .clock import Budget
from .corpus import DataError
from .prepared import Prepared, active_profile, named_profile

SCHEMA = 1
SLOTS = 2  # shared buffers of the scorer: it fills one while the judge reads the other
PROGRESS_S = 0.25  # at most one progress event in this time
SAVE_S = 60.0  # for writing the weights, after train() returned


class Crash(Exception):
    """The candidate failed; `kind`, a one-line reason and the traceback's tail."""

    def __init__(self, kind: str, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.kind = kind
        self.detail = detail


class Events:
    """The private channel to whoever started the judge."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "w", encoding="utf-8")
        self._last = 0.0

    def send(self, event: str, **fields: Any) -> None:
        """Send one event."""
        print(json.dumps({"event": event, **fields}), file=self._file, flush=True)

    def progress(self, **fields: Any) -> None:
        """Send one progress event, unless there was one just now."""
        if time.monotonic() - self._last >= PROGRESS_S:
            self._last = time.monotonic()
            self.send("progress", **fields)


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """Name what scores depend on beyond the candidate; only scores of one fingerprint are compared."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    gpus = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        gpus += [s.partition(":")[2].strip() for s in path.read_text().splitlines() if s.startswith("Model:")]
    return {
        "profile": prepared.profile.name,
        "data": prepared.digest[:16],
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": ", ".join(gpus),
        "torch": version("torch"),
    }


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
        from .dataloader import train_batches

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


def _train(
    request: dict[str, Any], prepared: Prepared, weights: Path, device: str, events: Events
) -> tuple[_Feed, float, float]:
    """Run the trainer; return its feed, the seconds that it trained and the peak device memory that it reports."""
    from ._processes import Child

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
            "device": device,
            "candidate": request["candidate"],
            "weights": str(weights),
            "seed": request["seed"],
            "budget_s": budget_s,
            "bos_id": prepared.bos_id,
        },
    )
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
                    return feed, trained_s, peak_mb
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


def _score(request: dict[str, Any], prepared: Prepared, weights: Path, device: str, events: Events) -> float:
    """Score the weights in a fresh scorer; return bits per byte."""
    import torch

    from ._processes import Child
    from .evaluate import ScoreError, Tally

    profile = prepared.profile
    rows = np.array(prepared.val_rows())
    shape = (profile.eval_batch, profile.seq_len, profile.vocab_size)
    tokens_fd = shared_memory(SLOTS * int(np.prod(shape[:2])) * 8)
    logits_fd = shared_memory(SLOTS * int(np.prod(shape)) * 4)
    tokens = shared_array(tokens_fd, (SLOTS, *shape[:2]), np.int64)
    logits = torch.from_numpy(shared_array(logits_fd, (SLOTS, *shape), np.float32))
    batches = [rows[start : start + profile.eval_batch] for start in range(0, len(rows), profile.eval_batch)]
    tally = Tally(prepared.token_bytes(), prepared.bos_id)
    scorer = Child(
        "scorer",
        cwd=weights.parent,
        fds=(tokens_fd, logits_fd),
        order={
            "tokens": tokens_fd,
            "logits": logits_fd,
            "slots": SLOTS,
            "profile": profile.name,
            "device": device,
            "candidate": request["candidate"],
            "weights": str(weights),
            "seed": request["seed"],
        },
    )

    def ask(index: int) -> None:
        tokens[index % SLOTS] = batches[index][:, :-1]
        scorer.channel.send(op="score", slot=index % SLOTS)

    try:
        if (message := scorer.channel.receive()) is None or message.get("op") != "ready":
            _scorer_failed(message)
        for index in range(min(SLOTS, len(batches))):
            ask(index)
        for index, batch in enumerate(batches):
            message = scorer.channel.receive()
            if message != {"op": "scored", "slot": index % SLOTS}:
                _scorer_failed(message)
            mine = logits[index % SLOTS].clone()  # the scorer can write to the shared one at any time
            if index + SLOTS < len(batches):
                ask(index + SLOTS)
            tally.add(batch, mine)
            events.progress(scored=index + 1, of=len(batches))
        return tally.score().bits_per_byte
    except (WireError, OSError) as error:
        raise Crash("score", f"the scoring process broke its channel: {error}") from error
    except ScoreError as error:
        raise Crash("score", str(error)) from error
    finally:
        scorer.end()
        os.close(tokens_fd)
        os.close(logits_fd)


def _scorer_failed(message: dict[str, Any] | None) -> None:
    match message:
        case {"op": "crash", "reason": str(reason), "detail": str(detail)}:
            raise Crash("score", f"while scoring: {reason}", detail)
        case None:
            raise Crash("score", "the scoring process ended before every row was scored")
        case _:
            raise WireError(f"an unexpected message {str(message)[:80]}")


def run(request: dict[str, Any], prepared: Prepared, events: Events) -> dict[str, Any]:
    """Train and score one candidate; return the result's fields. Raises Crash."""
    from ._processes import adopt_orphans

    began = time.monotonic()
    adopt_orphans()
    os.environ["AUTORESEARCH_PROFILE"] = prepared.profile.name
    import torch
    from safetensors import safe_open

    from .report import figures, peak_memory_mb
    from .run import pick_device

    device = pick_device()
    weights = Path(request["scratch"]) / "weights.safetensors"
    events.send("phase", phase="start")
    feed, trained_s, peak_mb = _train(request, prepared, weights, device.type, events)
    if device.type != "cuda":
        import resource

        peak_mb = peak_memory_mb(device, resource.RUSAGE_CHILDREN)
    events.send("phase", phase="score")
    scoring = time.monotonic()
    val_bpb = _score(request, prepared, weights, device.type, events)
    scored = time.monotonic()
    with safe_open(weights, framework="np") as file:
        state = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118 (not a dict)
    weights.unlink()
    metrics = figures(
        val_bpb=val_bpb,
        training_s=trained_s,
        total_s=scored - began,
        tokens=feed.tokens,
        steps=feed.steps,
        device=torch.device(device),
        state=state,
        peak_mb=peak_mb,
    )
    metrics["scoring_seconds"] = scored - scoring
    return {"metrics": metrics, "memory_gb": peak_mb / 1024, "trust": "split"}


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    events = Events(int(os.environ.pop("AUTORESEARCH_CHANNEL")))
    try:
        name = request["profile"]
        profile = named_profile(name, "--autoresearch-profile") if name else active_profile()
        prepared = Prepared.open(profile)
        identity = fingerprint(prepared)
        if request["op"] == "check":
            answer = {"budget_s": profile.budget_s, "profile": profile.name}
        else:
            answer = run(request, prepared, events)
        result = {"status": "ok", **answer, "fingerprint": identity}
    except DataError as error:
        result = {"status": "unusable", "reason": str(error)}
    except Crash as error:
        result = {"status": "crash", "kind": error.kind, "reason": str(error), "detail": error.detail}
        result["fingerprint"] = identity
    events.send("result", schema=SCHEMA, **result)


if __name__ == "__main__":
    main()
