"""The judge: the trusted process that owns clock, data and targets and computes the score.

`python -m oracle.judge` reads one request (JSON) on its standard input and writes events (JSON lines) to the descriptor
that AUTORESEARCH_CHANNEL names. One run goes:

1. Check the data's digests.
2. Start a trainer. It imports and builds the candidate; its first `next()` starts the clock. Hand it batches until the
   budget is spent; end its whole process tree once its weights are saved.
3. Start a scorer, give it rows and take logits; copy them out of shared memory before looking at them, so that nothing
   can change between two looks; compute the score from targets that never left this process.
4. Audit: have spliced rows scored by a second fresh scorer (see oracle/audit.py).
5. Send the one result.

Before a keep, `verify` does 3 and 4 again with the weights that the run left, on every row; it scores the second split.
"""

import contextlib
import errno
import json
import os
import platform
import re
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import compiled, sandbox
from ._gpu import Memory, selected, stated_peak
from ._processes import Crash, DeviceError, adopt_orphans, memory_limit_gb, select_device
from .corpus import DataError
from .prepared import Prepared, active_profile, named_profile
from .training import Training
from .weights import weights_file, weights_sizes

SCHEMA = 1
AUDIT_ROWS = 256  # of each run; before a keep, `verify` audits every row
EARLY_SCORERS = 2  # of each run: one scores, one audits
PROGRESS_S = 0.25  # at most one progress event in this time
COMPUTES = ("torch", "numpy", "tiktoken", "rustbpe")  # distributions whose versions are locked, less +cpu and the like
BUSY_MB = 2_048  # of device memory in use once the trainer is gone; the judge itself holds about a quarter of that


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
    gpu, driver = selected(), None
    with contextlib.suppress(OSError):
        driver = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    return {
        "profile": prepared.profile.name,
        "data": prepared.digest[:16],
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu.name if gpu else "",
        "driver": driver[0] if gpu and driver else "",
        "torch": version("torch"),
    } | ({} if (limit := memory_limit_gb()) is None else {"memory_gb": limit})


def run(request: dict[str, Any], prepared: Prepared, events: Events) -> dict[str, Any]:
    """Train, score and audit one candidate; return the result's fields. Raises Crash."""
    began = time.monotonic()
    cache = request.get("compiled")
    events.send("phase", phase="start")
    with Memory() as memory, Training(request, prepared, events) as training:
        # torch is imported here while the trainer imports it; the scorers follow while the trainer builds its model
        from .audit import Audit
        from .report import figures, peak_memory_mb
        from .scoring import Scoring

        with Scoring(request, prepared, events, early=EARLY_SCORERS) as scoring:
            device = scoring.device

            def before_clock() -> None:
                scoring.wait()
                compiled.take(cache, "trainer", weights_file(request).parent)

            trained = training.finish(before_clock=before_clock)
            memory.stop()
            training.end()
            if training.device != device.type:
                raise Crash("error", f"trained on {training.device or 'no device'}, where the judge has {device.type}")
            if device.type == "cuda":
                # NVML's word; the trainer's own is a lower bound of it, for a neighbour that leaves meanwhile
                peak_mb = max(trained.peak_device_mb, memory.peak_mb or 0.0)
                if (missing_mb := memory.missing_mb()) > 0:
                    print(f"{missing_mb:.0f} MB of device memory are not back after training", flush=True)
            else:
                peak_mb = peak_memory_mb(device, resource.RUSAGE_CHILDREN)
            events.send("phase", phase="score")
            started = time.monotonic()
            digest = scoring.take()
            rows = prepared.val_rows()
            audit = Audit(rows, vocab_size=prepared.profile.vocab_size, count=AUDIT_ROWS)
            extra = {}
            with scoring.fresh() as scorer:
                val_bpb = scoring.score(scorer, rows, audit)
                scored = time.monotonic()
                compiled.take(cache, "scorer", scorer.home)
                if request.get("heldout"):
                    extra["heldout_bpb"] = scoring.score(scorer, prepared.val_rows("heldout"))
            events.send("phase", phase="audit")
            auditing = time.monotonic()
            found = scoring.examine(audit)
            ended = time.monotonic()
            sizes = weights_sizes(scoring.weights)
    compiled.keep(cache)
    metrics = figures(
        val_bpb=val_bpb,
        training_s=trained.seconds,
        total_s=ended - began,
        tokens=trained.tokens,
        steps=trained.steps,
        device=device,
        state=sizes,
        peak_mb=peak_mb,
    )
    metrics |= {**extra, **found, "scoring_seconds": scored - started, "audit_seconds": ended - auditing}
    return {
        "metrics": metrics,
        "memory_gb": peak_mb / 1024,
        "logits": scoring.shared,
        "work": trained.tokens,
        "trust": sandbox.trust(),
        "weights_sha256": digest,
    }


def verify(request: dict[str, Any], prepared: Prepared, events: Events) -> dict[str, Any]:
    """Score the weights of an earlier run again, audit every row, and score the second split. Raises Crash."""
    from .audit import Audit
    from .scoring import Scoring

    events.send("phase", phase="score")
    rows = prepared.val_rows()
    audit = Audit(rows, vocab_size=prepared.profile.vocab_size)
    with Scoring(request, prepared, events, early=EARLY_SCORERS) as scoring:
        if scoring.take() != request["weights_sha256"]:
            raise Crash("audit", "the weights are not those that were scored: their file was changed after the run")
        with scoring.fresh() as scorer:
            again = scoring.score(scorer, rows, audit)
            if again != request["score"]:
                raise Crash("audit", f"scoring the same weights twice gave {request['score']!r} and {again!r}")
            heldout_bpb = scoring.score(scorer, prepared.val_rows("heldout"))
        events.send("phase", phase="audit")
        metrics = {"heldout_bpb": heldout_bpb, **scoring.examine(audit)}
        return {"metrics": metrics, "logits": scoring.shared, "trust": sandbox.trust()}


def determinism(request: dict[str, Any], prepared: Prepared, events: Events) -> dict[str, Any]:
    """Train one artifact and score it in every way that must not matter. Raises Crash."""
    events.send("phase", phase="start")
    memory = Memory()
    with Training(request, prepared, events) as training:
        training.finish()
    memory.missing_mb()
    from .determinism import table
    from .scoring import Scoring

    events.send("phase", phase="score")
    with Scoring(request, prepared, events) as scoring:
        scoring.take()
        lines = table(scoring, request, prepared)
        return {"table": lines, "logits": scoring.shared, "trust": sandbox.trust()}


def blamed(crash: Crash) -> Crash:
    """Return a crash whose processes are gone, with the kind busy where others left it too little device memory."""
    if crash.kind != "memory":
        return crash
    from .report import used_memory_mb
    from .run import pick_device

    device, memory = pick_device(), Memory()
    known = device.type == "cuda" and memory.used_mb() is not None
    used_mb = memory.settled_mb(BUSY_MB) if known else used_memory_mb(device)
    if used_mb <= BUSY_MB:
        return crash
    amount = f"{used_mb:.0f} MB" if used_mb < float("inf") else "all"
    busy = f"{amount} of the device's memory are used by other processes"
    return Crash("busy", f"{busy}: {crash}", crash.detail)


OPERATIONS = {"run": run, "verify": verify, "determinism": determinism}


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    # Idle OpenMP threads spin briefly, then sleep. Judge and scorer compute at the same time: where one's idle threads
    # spin for good, they keep the other's from their core (six passes beside six: 13.1 s, against 1.3 s with none).
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    events = Events(int(os.environ.pop("AUTORESEARCH_CHANNEL")))
    try:
        select_device(request.get("device"))
        stated_peak()  # an unusable one is said now, not after the training
        name = request["profile"]
        profile = named_profile(name, "--autoresearch-profile") if name else active_profile()
        prepared = Prepared.open(profile, request.get("data"))
        identity = fingerprint(prepared)
        if request["op"] == "check":
            if (name := request.get("device") or "").startswith("cuda") and not identity["gpu"]:
                raise DeviceError(f"there is no device {name}: CUDA sees no such GPU here; `nvidia-smi -L` lists those")
            answer = {
                "budget_s": profile.budget_s,
                "profile": profile.name,
                "verifies": True,
                "steady": bool(identity["gpu"]),  # a GPU is taken to be one's own; a CPU's cores are shared
                "data": prepared.identity,
                "versions": {name: version(name).partition("+")[0] for name in COMPUTES},
                "trust": sandbox.trust(),
                "trust_reason": f"sandbox {sandbox.available()}; sealed needs bubblewrap, or Landlock ABI 6 or later",
            }
        else:
            adopt_orphans()
            os.environ["AUTORESEARCH_PROFILE"] = profile.name
            answer = OPERATIONS[request["op"]](request, prepared, events)
        result = {"status": "ok", **answer, "fingerprint": identity}
    except (DataError, DeviceError, sandbox.SandboxError) as error:
        result = {"status": "unusable", "reason": str(error)}
    except Crash as error:
        error = blamed(error)
        result = {"status": "crash", "kind": error.kind, "reason": str(error), "detail": error.detail}
        result["fingerprint"] = identity
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        result = {"status": "crash", "kind": "disk", "reason": f"the judge could not go on: {error}"}
    events.send("result", schema=SCHEMA, **result)


if __name__ == "__main__":
    main()
