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
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ._processes import Crash, adopt_orphans
from .corpus import DataError
from .prepared import Prepared, active_profile, named_profile
from .training import train

SCHEMA = 1
PROGRESS_S = 0.25  # at most one progress event in this time


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


def _score(request: dict[str, Any], prepared: Prepared, weights: Path, device: str, events: Events) -> float:
    """Score the weights in a fresh scorer; return bits per byte."""
    from .evaluate import ScoreError, Tally
    from .scoring import Scorer

    rows = prepared.val_rows()
    tally = Tally(prepared.token_bytes(), prepared.bos_id)
    candidate = Path(request["candidate"])
    with Scorer(prepared, candidate=candidate, weights=weights, device=device, seed=request["seed"]) as scorer:
        for which, logits in scorer.logits(rows):
            try:
                tally.add(rows[which], logits)
            except ScoreError as error:
                raise Crash("score", str(error)) from error
            events.progress(scored=which.stop, of=len(rows))
    return tally.score().bits_per_byte


def run(request: dict[str, Any], prepared: Prepared, events: Events) -> dict[str, Any]:
    """Train and score one candidate; return the result's fields. Raises Crash."""
    began = time.monotonic()
    adopt_orphans()
    os.environ["AUTORESEARCH_PROFILE"] = prepared.profile.name
    weights = Path(request["scratch"]) / "weights.safetensors"
    events.send("phase", phase="start")
    trained = train(request, prepared, weights, events)

    from safetensors import safe_open

    from .report import figures, peak_memory_mb
    from .run import pick_device

    device = pick_device()
    peak_mb = trained.peak_device_mb if device.type == "cuda" else peak_memory_mb(device, resource.RUSAGE_CHILDREN)
    events.send("phase", phase="score")
    scoring = time.monotonic()
    val_bpb = _score(request, prepared, weights, device.type, events)
    scored = time.monotonic()
    with safe_open(weights, framework="np") as file:
        state = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118 (not a dict)
    weights.unlink()
    metrics = figures(
        val_bpb=val_bpb,
        training_s=trained.seconds,
        total_s=scored - began,
        tokens=trained.tokens,
        steps=trained.steps,
        device=device,
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
