"""The language model's last step in one: output head, softcap and cross-entropy, without all logits at once.

N tokens and V words make N * V logits, which as float32 (and again for softcap, cross-entropy and their gradients)
are most of a small model's memory and much of its time. Here a chunk of rows at a time is

1. multiplied out: logits = x @ weight.T, in the dtype of x;
2. turned in place, each row read once and written once, into the gradient of its loss;
3. multiplied back: into the gradient of x, and into the sum that becomes the gradient of the weight.

So the forward pass does all the work, and the backward pass scales by the gradient that comes in. The idea is known:
Liger Kernel, arXiv 2410.10989, section 3 (chunks, and gradients in the forward pass); arXiv 2411.09009 has a kin.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oracle.fused.rules import kernels, product_dtype

# What a chunk's logits may take by default: few large products on a GPU, elsewhere what a cache can partly hold
CUDA_CHUNK_BYTES = 512 << 20
CHUNK_BYTES = 32 << 20


def softcapped_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, *, chunk: int | None = None
) -> Tensor:
    """Return the mean cross-entropy of softcap * tanh(x @ weight.T / softcap) against `targets`, in nats; 0-D.

    `x` [..., C] has any floating dtype, `weight` [V, C] likewise (a float32 master weight beside a bfloat16 x is
    fine), `targets` int64 [...] lie in [0, V). The products run in the dtype of x; on CUDA in autocast's where that is
    on, elsewhere never in a half type, as only CUDA multiplies those fast. Softcap, softmax, loss and the weight's
    gradient are float32 (float64 if x is), and so is the result; gradients come in the dtypes of `x` and `weight`.
    `chunk` rows are done at a time, by default as many as keep to the bytes named above.

    With t = tanh(z / softcap) of a logit z, p = softmax(softcap * t) along a row and N rows:
        loss = sum(logsumexp(softcap * t) - softcap * t[target]) / N
        dloss/dz = (p - onehot(target)) * (1 - t**2) / N

    Raises ValueError if shapes or dtypes do not fit, there is no row, or `softcap` or `chunk` is not positive. A
    target outside [0, V) raises ValueError on the CPU; on CUDA, where looking would wait for the GPU, the loss is nan.
    It can be differentiated once. Inside torch.compile it breaks the graph and runs as it is.
    """
    if torch.compiler.is_compiling():
        as_it_is = cast(Callable[..., Tensor], torch.compiler.disable(softcapped_cross_entropy))  # type: ignore[no-untyped-call]
        return as_it_is(x, weight, targets, softcap, chunk=chunk)
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or x.shape[:-1] != targets.shape:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"softcapped_cross_entropy: {shapes} do not fit, use [..., C], [V, C] and [...]")
    if not (x.is_floating_point() and weight.is_floating_point() and targets.dtype == torch.int64):
        dtypes = f"x {x.dtype}, weight {weight.dtype} and targets {targets.dtype}"
        raise ValueError(f"softcapped_cross_entropy: {dtypes}, use floating dtypes and int64")
    if not targets.numel():
        raise ValueError("softcapped_cross_entropy: there is no target, and no mean over none")
    if not softcap > 0:
        raise ValueError(f"softcapped_cross_entropy: softcap is {softcap}, use a number above 0")
    if chunk is not None and chunk < 1:
        raise ValueError(f"softcapped_cross_entropy: chunk is {chunk}, use at least 1")
    if targets.device.type == "cpu":
        for bad in (int(targets.min()), int(targets.max())):
            if not 0 <= bad < len(weight):
                raise ValueError(f"softcapped_cross_entropy: target {bad} is not in [0, {len(weight)})")

    device = x.device.type
    dtype = product_dtype(x) if device == "cuda" else torch.promote_types(x.dtype, torch.float32)
    if chunk is None:
        chunk = max(1, (CUDA_CHUNK_BYTES if device == "cuda" else CHUNK_BYTES) // (len(weight) * dtype.itemsize))
    # Casts and reshapes out here are autograd's to undo
    rows = x.to(dtype).reshape(-1, x.size(-1))
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, weight)]
    with torch.autocast(device, enabled=False):
        loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
            rows, weight, targets.reshape(-1).contiguous(), float(softcap), chunk, wanted
        )
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float, chunk: int, wanted: list[bool]
    ) -> Tensor:
        """`x` [N, C] in the dtype of the products, `targets` [N]; `wanted`: a gradient for x, for weight?"""
        exact = torch.promote_types(x.dtype, torch.float32)
        w = weight.to(x.dtype)
        # Gradients of the sum of the losses: halves would underflow as gradients of the mean
        grad_x = torch.empty_like(x) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        losses = x.new_empty(len(x), dtype=exact)
        buffer = x.new_empty(min(chunk, len(x)), len(w))
        for start in range(0, len(x), chunk):
            place = slice(start, start + chunk)
            logits = torch.mm(x[place], w.T, out=buffer[: len(x) - start])
            loss_and_gradient_(logits, targets[place], losses[place], softcap, any(wanted))
            if grad_x is not None:
                torch.mm(logits, w, out=grad_x[place])
            if grad_weight is not None:
                if x.dtype == exact:
                    grad_weight.addmm_(logits.T, x[place])
                else:
                    grad_weight += torch.mm(logits.T, x[place], out_dtype=exact)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.rows, ctx.dtype = len(x), weight.dtype
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = (grad / ctx.rows).reshape(1)  # of one dimension, so that halves are multiplied by it unrounded
        if grad_x is not None:
            grad_x = torch.mul(grad_x, scale, out=torch.empty_like(grad_x))
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.dtype)
        return grad_x, grad_weight, None, None, None, None


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Return softcap * tanh(logits / softcap), as float32 (float64 if `logits` are); the shape is that of `logits`.

    Without a gradient to keep it is one Triton kernel on CUDA, which reads and writes once. Raises ValueError if
    `logits` are not floating or `softcap` is not positive.
    """
    if not logits.is_floating_point() or not softcap > 0:
        raise ValueError(f"softcapped: logits {logits.dtype} and softcap {softcap}, use a floating dtype and above 0")
    exact = torch.promote_types(logits.dtype, torch.float32)
    plain = torch.compiler.is_compiling() or (logits.requires_grad and torch.is_grad_enabled())
    if logits.is_cuda and exact == torch.float32 and not plain and (found := kernels("loss_kernel")) is not None:
        capped: Tensor = found.softcapped(logits.contiguous(), softcap)
        return capped
    return softcap * torch.tanh(logits.to(exact) / softcap)


def loss_and_gradient_(logits: Tensor, targets: Tensor, losses: Tensor, softcap: float, gradient: bool) -> None:
    """Write the loss of each row of `logits` [n, V] into `losses` [n] and, if asked, its gradient over the logits.

    Without `gradient` the logits hold anything afterwards. One Triton kernel on CUDA, where Triton is there.
    """
    found = kernels("loss_kernel") if logits.is_cuda else None
    if found is not None and logits.size(1) <= found.MOST_COLUMNS:
        found.loss_and_gradient_(logits, targets, losses, softcap, gradient)
        return
    t = logits.to(losses.dtype).div_(softcap).tanh_()  # the logits themselves, unless they are halves
    capped = t * softcap
    normalizer = capped.logsumexp(1)
    losses.copy_(normalizer - capped.gather(1, targets[:, None])[:, 0])
    if gradient:
        p = capped.sub_(normalizer[:, None]).exp_()
        p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
        logits.copy_(p.sub_(p * t.square_()))  # (p - onehot) * (1 - t**2)
