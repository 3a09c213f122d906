"""The Triton kernels of `loss.py`; imported when the first CUDA tensor comes, as Triton is only where CUDA is."""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

MOST_BOUND = 40.0  # exp(-2 * softcap) is then still a normal float32
MOST_COLUMNS = 1 << 16  # a row must fit into the registers of one program (with spills from about 32768)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _tanh(x):  # type: ignore[no-untyped-def]
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)  # the exponential may overflow


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _rows(  # type: ignore[no-untyped-def]
    logits, targets, losses, columns, softcap, BLOCK: tl.constexpr, GRADIENT: tl.constexpr, BOUNDED: tl.constexpr
):
    """Read row `program_id` once; write its loss and, over the row itself, the gradient of that loss."""
    row = tl.program_id(0).to(tl.int64)  # rows * columns passes 2**31
    column = tl.arange(0, BLOCK)
    inside = column < columns
    place = logits + row * columns + column
    target = tl.load(targets + row)
    exists = (target >= 0) & (target < columns)
    chosen = tl.load(logits + row * columns + target, mask=exists, other=0.0).to(tl.float32)
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    t = _tanh(z * (1.0 / softcap))
    capped = tl.where(inside, softcap * t, float("-inf"))
    # What is subtracted before exponentials: the softcap bounds the largest, without a walk over the row
    largest = softcap if BOUNDED else tl.max(capped, 0)
    e = tl.exp(capped - largest)
    total = tl.sum(e, 0)
    loss = tl.log(total) + (largest - softcap * _tanh(chosen * (1.0 / softcap)))
    tl.store(losses + row, tl.where(exists, loss, float("nan")))
    if GRADIENT:
        dz = (e * (1.0 / total) - tl.where(column == target, 1.0, 0.0)) * (1.0 - t * t)
        tl.store(place, dz.to(logits.dtype.element_ty), mask=inside)


def loss_and_gradient_(logits: Tensor, targets: Tensor, losses: Tensor, softcap: float, gradient: bool) -> None:
    """Do what `loss.loss_and_gradient_` does; all contiguous, `losses` float32, at most MOST_COLUMNS columns."""
    rows, columns = logits.shape
    block = max(triton.next_power_of_2(columns), 128)
    with torch.cuda.device(logits.device):
        _rows[(rows,)](
            logits,
            targets,
            losses,
            columns,
            float(softcap),
            BLOCK=block,
            GRADIENT=gradient,
            BOUNDED=softcap <= MOST_BOUND,
            num_warps=warps(block),
        )


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _softcapped(logits, capped, count, softcap, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    z = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(capped + place, softcap * _tanh(z * (1.0 / softcap)), mask=inside)


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Do what `loss.softcapped` does, without a gradient; `logits` are contiguous."""
    capped = torch.empty_like(logits, dtype=torch.float32)
    block = 4096
    with torch.cuda.device(logits.device):
        if capped.numel():
            _softcapped[(triton.cdiv(capped.numel(), block),)](
                logits, capped, capped.numel(), float(softcap), BLOCK=block, num_warps=8
            )
    return capped


def warps(block: int) -> int:
    """Give the warps of a program: 32 columns a thread, but 4 to 32 warps."""
    return min(max(block // 1024, 4), 32)
