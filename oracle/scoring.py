"""One scorer and the judge's end of it: rows go in, logits come out as the judge's own copies; what becomes of them."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ._processes import Child, Crash
from ._wire import WireError, sealed_copy, shared_array, shared_memory
from .audit import TOLERANCE, Audit, AuditError
from .evaluate import ScoreError, Tally
from .packing import Tokens
from .prepared import Prepared
from .run import pick_device
from .training import Progress
from .weights import weights_bytes, weights_file

SLOTS = 2  # shared buffers: the scorer fills one while the judge reads the other
ENDED_EARLY = "the scoring process ended with {how} before every row was scored"


class Scorer:
    """A fresh process that rebuilds the candidate's model from source and weights. Ends its whole tree on exit.

    It runs none of the candidate's code before `load`, so it may be started early. `batch` rows make one forward pass,
    by default the profile's own. Raises Crash for what the candidate does wrong.
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
    ) -> None:
        profile = prepared.profile
        self.batch = batch or profile.eval_batch
        shape = (SLOTS, self.batch, profile.seq_len, profile.vocab_size)
        self._fds = (shared_memory(int(np.prod(shape[:3])) * 8), shared_memory(int(np.prod(shape)) * 4))
        self._tokens = shared_array(self._fds[0], shape[:3], np.int64)
        self._logits = torch.from_numpy(shared_array(self._fds[1], shape, np.float32))
        self._idle = False
        # a place of its own: what an earlier scorer wrote must not reach the one that checks it
        self._home = tempfile.TemporaryDirectory(prefix="scorer-", dir=scratch)
        self._child = Child(
            "scorer",
            cwd=Path(self._home.name),
            fds=self._fds,
            order={
                "tokens": self._fds[0],
                "logits": self._fds[1],
                "slots": SLOTS,
                "batch": self.batch,
                "profile": profile.name,
                "candidate": str(candidate),
                "seed": seed,
                "threads": threads,
            },
            readable=[candidate],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end()
        self._home.cleanup()
        for fd in self._fds:
            os.close(fd)

    def wait(self) -> None:
        """Block until the process has done its imports and takes no more time from others."""
        if not self._idle:
            self._expect({"op": "idle"})
            self._idle = True

    def load(self, weights: int) -> None:
        """Hand over a descriptor of the weights; the candidate's code runs from here on."""
        self.wait()
        with self._broken_channel_is_a_crash():
            self._child.channel.send_descriptor(weights)
            self._expect({"op": "ready"})

    def logits(self, rows: Tokens) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which rows, logits float32 [n, T, V]) for `rows` [N, T + 1], `batch` rows at a time and in order.

        Every forward pass has exactly `batch` rows; the last one is filled up with rows whose logits are left out.
        """
        starts = range(0, len(rows), self.batch)
        with self._broken_channel_is_a_crash():
            for index in range(min(SLOTS, len(starts))):
                self._ask(index, rows[starts[index] : starts[index] + self.batch])
            for index, start in enumerate(starts):
                self._expect({"op": "scored", "slot": index % SLOTS})
                # a copy first: the scorer can write to the shared buffer at any time, also between two looks at it
                mine = self._logits[index % SLOTS].clone()
                if index + SLOTS < len(starts):
                    ahead = starts[index + SLOTS]
                    self._ask(index + SLOTS, rows[ahead : ahead + self.batch])
                which = slice(start, min(start + self.batch, len(rows)))
                yield which, mine[: which.stop - which.start]

    @contextmanager
    def _broken_channel_is_a_crash(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError:  # it ended while something was sent to it
            raise self._child.crash("score", ENDED_EARLY) from None
        except (WireError, OSError) as error:
            raise Crash("score", f"the scoring process broke its channel: {error}") from error

    def _ask(self, index: int, rows: Tokens) -> None:
        self._tokens[index % SLOTS] = np.resize(rows, (self.batch, rows.shape[1]))[:, :-1]
        self._child.channel.send(op="score", slot=index % SLOTS)

    def _expect(self, wanted: dict[str, Any]) -> None:
        match self._child.channel.receive():
            case message if message == wanted:
                return
            case {"op": "crash", "reason": str(reason), "detail": str(detail)}:
                raise Crash("score", f"while scoring: {reason}", detail)
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
            scorer.load(self._sealed)
            yield scorer

    def _scorer(self, **different: Any) -> Scorer:
        given = {"candidate": Path(self._request["candidate"]), "seed": self._request["seed"], **different}
        return Scorer(self._prepared, scratch=Path(self._request["scratch"]), **given)

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
