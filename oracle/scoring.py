"""One scorer and the judge's end of it: rows go in, logits come out as the judge's own copies."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ._processes import Child, Crash
from ._wire import WireError, shared_array, shared_memory
from .packing import Tokens
from .prepared import Prepared

SLOTS = 2  # shared buffers: the scorer fills one while the judge reads the other


class Scorer:
    """A fresh process that rebuilds the candidate's model from source and weights. Ends its whole tree on exit.

    `batch` rows make one forward pass, by default the profile's own. Raises Crash for what the candidate does wrong.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        candidate: Path,
        weights: Path,
        device: str,
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
        self._ready = False
        self._child = Child(
            "scorer",
            cwd=weights.parent,
            fds=self._fds,
            order={
                "tokens": self._fds[0],
                "logits": self._fds[1],
                "slots": SLOTS,
                "batch": self.batch,
                "profile": profile.name,
                "device": device,
                "candidate": str(candidate),
                "weights": str(weights),
                "seed": seed,
                "threads": threads,
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end()
        for fd in self._fds:
            os.close(fd)

    def logits(self, rows: Tokens) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which rows, logits float32 [n, T, V]) for `rows` [N, T + 1], `batch` rows at a time and in order.

        Every forward pass has exactly `batch` rows; the last one is filled up with rows whose logits are left out.
        """
        starts = range(0, len(rows), self.batch)
        try:
            if not self._ready:
                self._expect({"op": "ready"})
                self._ready = True
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
                raise Crash("score", "the scoring process ended before every row was scored")
            case message:
                raise WireError(f"an unexpected message {str(message)[:80]}")
