"""One scorer and the judge's end of it: rows go in, logits come out as the judge's own copies; what becomes of them."""

import hashlib
import math
import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from . import compiled
from ._candidate import is_out_of_memory
from ._cuda import Buffer, Unsupported, kinds
from ._processes import Child, Crash, memory_limit_gb
from ._wire import WireError, sealed_copy, shared_array, shared_memory
from .audit import TOLERANCE, Audit, AuditError
from .evaluate import ScoreError, Tally
from .packing import Tokens
from .prepared import Prepared
from .run import pick_device
from .training import Progress
from .weights import weights_bytes, weights_file

SLOTS = 2  # shared buffers: the scorer fills one while the judge reads the other
ROOM = 32  # times the logits of one pass must be free for two models to start at once; each takes a few of them
ENDED_EARLY = "the scoring process ended with {how} before every row was scored"


class Scorer:
    """A fresh process that rebuilds the candidate's model from source and weights. Ends its whole tree on exit.

    It runs none of the candidate's code and takes nothing of the device before `begin`, so it may be started early.
    `batch` rows make one forward pass, by default the profile's own. Raises Crash for what the candidate does wrong.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        candidate: Path,
        scratch: Path,
        seed: int,
        batch: int | None = None,
        threads: int | None = None,
        cache: compiled.Compiled | None = None,
    ) -> None:
        profile = prepared.profile
        self.batch = batch or profile.eval_batch
        self._device = pick_device()
        self._shape = (SLOTS, self.batch, profile.seq_len, profile.vocab_size)
        self.pass_bytes = math.prod(self._shape[1:]) * 4  # logits of one forward pass
        self._fd = shared_memory(int(np.prod(self._shape[:3])) * 8)
        self._tokens = shared_array(self._fd, self._shape[:3], np.int64)
        self._logits: Buffer | None = None
        self._mine = torch.empty(0)
        self._idle = self._begun = self._ready = False
        # a place of its own: what an earlier scorer wrote must not reach the one that checks it
        self._home = tempfile.TemporaryDirectory(prefix="scorer-", dir=scratch, ignore_cleanup_errors=True)
        self.home = Path(self._home.name)
        self._child = Child(
            "scorer",
            cwd=self.home,
            fds=(self._fd,),
            order={
                "tokens": self._fd,
                "slots": SLOTS,
                "batch": self.batch,
                "profile": profile.name,
                "candidate": str(candidate),
                "seed": seed,
                "threads": threads,
            },
            readable=[candidate],
            env=compiled.lend(cache, "scorer", self.home),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end()
        self._home.cleanup()
        os.close(self._fd)
        self._mine = torch.empty(0)
        if self._logits is not None:
            self._logits.close()

    def wait(self) -> None:
        """Block until the process has done its imports and takes no more time from others."""
        if not self._idle:
            self._expect({"op": "idle"})
            self._idle = True

    def begin(self, weights: int) -> None:
        """Hand over a descriptor of the weights, if that is not done yet; the candidate's code runs from here on."""
        if not self._begun:
            self.wait()
            with self._broken_channel_is_a_crash():
                self._child.channel.send_descriptor(weights)
            self._begun = True

    def load(self, weights: int) -> None:
        """Block until the model is built and has its weights; let the process go on if it was held."""
        self.begin(weights)
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # this process's own context starts meanwhile, which takes a while
        if not self._ready:
            with self._broken_channel_is_a_crash():
                self._expect({"op": "ready"})
            self._ready = True
        self._child.thaw()

    def hold(self, weights: int) -> None:
        """Load, and stand still until the next `load`: meanwhile another sees rows that this one must not learn of."""
        self.load(weights)
        self._child.freeze()

    def share(self) -> str:
        """Give the scorer memory to write logits to, of the best kind that works on both sides; return which.

        The memory is taken now, not when the process starts: until then the device is the trainer's.
        """
        slots = _slots(self._device, self.pass_bytes)
        for kind in kinds(self._device):
            try:
                offered = Buffer(kind, (slots, *self._shape[1:]))
            except Unsupported as error:
                print(f"no {kind} memory for logits: {error}", flush=True)
                continue
            self._logits = offered
            with self._broken_channel_is_a_crash():
                self._child.channel.send_descriptor(offered.fd)
                self._child.channel.send(kind=kind, slots=slots)
                mapped = self._expect({"op": "mapped"}, {"op": "refused"})["op"] == "mapped"
            if mapped:
                on_cuda = self._device.type == "cuda"
                self._mine = torch.empty(self._shape[1:], device=self._device if on_cuda else "cpu")
                break
            self._logits = None
            offered.close()
        if self._logits is None:
            raise Crash("score", "the scoring process can write its logits nowhere")
        return self._logits.kind

    def logits(self, rows: Tokens) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which rows, logits float32 [n, T, V]) for `rows` [N, T + 1], `batch` rows at a time and in order.

        Every forward pass has exactly `batch` rows; the last one is filled up with rows whose logits are left out. They
        lie on the device where that is CUDA, else in this process's memory, and hold until the next are asked for. The
        scorer has loaded and shares its memory.
        """
        assert self._logits is not None, "share comes first"
        shared = self._logits.tensor
        slots = len(shared)
        starts = range(0, len(rows), self.batch)
        with self._broken_channel_is_a_crash():
            for index in range(min(slots, len(starts))):
                self._ask(index % slots, rows[starts[index] : starts[index] + self.batch])
            for index, start in enumerate(starts):
                self._expect({"op": "scored", "slot": index % slots})
                # a copy first: the scorer can write to the shared buffer at any time, also between two looks at it
                self._mine.copy_(shared[index % slots])
                if self._mine.is_cuda:
                    torch.cuda.synchronize()  # the copy is done before the slot is written again
                if index + slots < len(starts):
                    ahead = starts[index + slots]
                    self._ask(index % slots, rows[ahead : ahead + self.batch])
                which = slice(start, min(start + self.batch, len(rows)))
                yield which, self._mine[: which.stop - which.start]

    @contextmanager
    def _broken_channel_is_a_crash(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError:  # it ended while something was sent to it
            raise self._child.crash("score", ENDED_EARLY) from None
        except (WireError, OSError) as error:
            raise Crash("score", f"the scoring process broke its channel: {error}") from error

    def _ask(self, slot: int, rows: Tokens) -> None:
        self._tokens[slot] = np.resize(rows, (self.batch, rows.shape[1]))[:, :-1]
        self._child.channel.send(op="score", slot=slot)

    def _expect(self, *wanted: dict[str, Any]) -> dict[str, Any]:
        match self._child.channel.receive():
            case message if message in wanted:
                return message
            case {"op": "crash", "kind": str(kind), "reason": str(reason), "detail": str(detail)}:
                raise Crash("memory" if kind == "memory" else "score", f"while scoring: {reason}", detail)
            case None:
                raise self._child.crash("score", ENDED_EARLY)
            case message:
                raise WireError(f"an unexpected message {str(message)[:80]}")


class Scoring:
    """Scores and audits one set of weights, by fresh scorers only. Raises Crash."""

    def __init__(self, request: dict[str, Any], prepared: Prepared, events: Progress, early: int = 0) -> None:
        """Start `early` scorers now, for weights that `take` will read later."""
        self.device = pick_device()
        self.weights = b""
        self.shared = ""  # the kind of memory that logits came through
        self._request, self._prepared, self._events = request, prepared, events
        self._sealed = -1
        self._early = [self._scorer() for _ in range(early)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for scorer in self._early:
            scorer.__exit__(None, None, None)
        if self._sealed >= 0:
            os.close(self._sealed)
        if self.device.type == "cuda":
            traceback.clear_frames(trace)  # or they hold the judge's copy of the logits
            torch.cuda.empty_cache()  # what is still taken after this is not the judge's
        if is_out_of_memory(error):
            said = " ".join(str(error).split())[:200]
            raise Crash("memory", f"no device memory left to judge in: {said}; try a smaller model") from error

    def wait(self) -> None:
        """Block until the scorers that were started early take no more time from others."""
        for scorer in self._early:
            scorer.wait()

    def take(self) -> str:
        """Read the weights once, for all scorers; return their sha256."""
        self.weights = weights_bytes(weights_file(self._request))
        self._sealed = sealed_copy(self.weights)
        return hashlib.sha256(self.weights).hexdigest()

    @contextmanager
    def fresh(self, **different: Any) -> Iterator[Scorer]:
        """Give a scorer on the same weights as every other; `different` from a run's own."""
        early = bool(self._early) and not different
        with self._early.pop() if early else self._scorer(**different) as scorer:
            # The next one's model starts beside this one's, before any row is shown
            beside = self._early if not different and _room(self.device, scorer.pass_bytes) else []
            for waiting in beside:
                waiting.begin(self._sealed)
            scorer.load(self._sealed)
            for waiting in beside:
                waiting.hold(self._sealed)
            self.shared = scorer.share()
            yield scorer

    def _scorer(self, **different: Any) -> Scorer:
        request = self._request
        given = {"candidate": Path(request["candidate"]), "seed": request["seed"], **different}
        return Scorer(self._prepared, scratch=Path(request["scratch"]), cache=request.get("compiled"), **given)

    def score(self, scorer: Scorer, rows: Tokens, audit: Audit | None = None) -> float:
        """Score packed rows, the first pass of `audit` if there is one; return bits per byte."""
        tally = Tally(self._prepared.token_bytes(), self._prepared.bos_id)
        for which, logits in self._logits(scorer, rows):
            try:
                tally.add(rows[which], logits)  # refuses NaN and the like: the audit sees valid logits only
            except ScoreError as error:
                raise Crash("score", str(error)) from error
            if audit is not None:
                audit.watch(which, logits)
        return tally.score().bits_per_byte

    def examine(self, audit: Audit) -> dict[str, float | int]:
        """Finish an audit whose first pass is done; return its figures."""

        def fresh(rows: Tokens) -> Iterator[tuple[slice, Tensor]]:
            with self.fresh() as scorer:
                yield from self._logits(scorer, rows)

        baseline = self._request.get("baseline") or {}
        try:
            difference = audit.examine(
                fresh,
                batch=self._prepared.profile.eval_batch,
                exact=baseline.get("audit_difference") == 0.0,
                tolerance=TOLERANCE[self.device.type],
            )
        except AuditError as error:
            raise Crash("audit", str(error)) from error
        return {"audit_rows": len(audit), "audit_difference": difference}

    def _logits(self, scorer: Scorer, rows: Tokens) -> Iterator[tuple[slice, Tensor]]:
        for which, logits in scorer.logits(rows):
            yield which, logits
            self._events.progress(scored=which.stop, of=len(rows))


def _slots(device: torch.device, n_bytes: int) -> int:
    """Return how many slots of so many bytes to share: one where more would take over an eighth of a small device."""
    return SLOTS if device.type != "cuda" or SLOTS * n_bytes <= _memory()[1] / 8 else 1


def _room(device: torch.device, n_bytes: int) -> bool:
    """Tell whether two models can start on the device at once whose logits take so many bytes."""
    return device.type == "cuda" and _memory()[0] >= ROOM * n_bytes


def _memory() -> tuple[float, float]:
    """Return how much of the device's memory is free and how much there is, as far as AUTORESEARCH_MEMORY_GB goes."""
    free, total = torch.cuda.mem_get_info()
    limit = min(float(total), (memory_limit_gb() or float("inf")) * 2**30)
    return limit - (total - free), limit
