"""Proves that batches reach a CUDA device whole, without waiting for it. Needs a CUDA GPU."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from oracle.constants import CLIMBMIX
from oracle.run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROWS, SEQ_LEN = 128, 2_048


class Drawn:
    """A source of drawn rows over all 16 bits; its arrays are overwritten as soon as the next is asked for."""

    def __init__(self) -> None:
        self._last: NDArray[np.uint16] | None = None
        self._drawn = 0

    def open(self, batch_size: int, seq_len: int) -> None:
        self._shape = (batch_size, seq_len + 1)

    def next(self) -> tuple[NDArray[np.uint16], int, float]:
        if self._last is not None:
            self._last[:] = 7
        self._last = drawn(self._drawn, self._shape)
        self._drawn += 1
        return self._last, self._drawn, 0.0

    def log(self, step: int, loss: float) -> None:
        """Nothing."""


def drawn(seed: int, shape: tuple[int, int]) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, dtype=np.uint16)


def test_no_batch_is_overwritten_before_its_copy_is_done() -> None:
    """Batches that are asked for while the device is busy are those of the source, and asking does not wait for it."""
    run = Run(profile=CLIMBMIX, device=torch.device("cuda"), seed=0, budget_s=1e12, bos_id=0, source=Drawn())
    batches = run.batches(ROWS, SEQ_LEN)
    next(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(6_000_000_000)  # type: ignore[no-untyped-call]  # cycles: 3 s or more
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    held = [next(batches) for _ in range(24)]
    assert not done.query()  # type: ignore[no-untyped-call]  # the device is busy still
    for index, (inputs, targets, epoch) in enumerate(held, 1):
        assert epoch == index + 1
        expected = torch.from_numpy(drawn(index, (ROWS, SEQ_LEN + 1)).astype(np.int64))
        assert torch.equal(inputs.cpu(), expected[:, :-1]) and torch.equal(targets.cpu(), expected[:, 1:])
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert inputs.dtype == targets.dtype == torch.int64
