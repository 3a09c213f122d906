"""Attention's queries, keys and values in one: a single product, then rotary positions and RMS norm of q and k.

For a head's raw row x = (l, r) of the product, split in halves, with its position's cosines c and sines s:

    u = (l * c + r * s, r * c - l * s)          rotated
    y = scale * u * n,  n = rsqrt(mean(u**2) + eps)

and back, for the gradient g over y:

    du = scale * n * (g - u * n**2 * mean(g * u))
    (dl, dr) = (du_l * c - du_r * s, du_l * s + du_r * c)

Both passes read each row once, write it once and round once; the gradients of q, k and v are written side by side, so
that the products back are single ones too. Two Triton kernels on CUDA, the same in plain torch elsewhere; torch.compile
takes both as operators.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from oracle.fused.rules import kernels, product_dtype


def qkv_heads(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor, head_dim: int, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, T, Hq, D], k and v [B, T, Hk, D] of x [B, T, C]: q and k rotated, normed and times `scale`.

    `w_q` [Hq * D, C], `w_k` and `w_v` [Hk * D, C] are cast to the dtype of the product: that of autocast where it is
    on and x is not float64, else that of x. `cos` and `sin` [T, D/2] get no gradient. Rotation and norm are float32
    (float64 if the product is), with F.rms_norm's default eps. v is a view of the product: do not write into it.

    Raises ValueError if shapes do not fit. It can be differentiated once.
    """
    heads = [len(w) // max(head_dim, 1) for w in (w_q, w_k, w_v)]
    fit = head_dim > 0 and head_dim % 2 == 0 and x.ndim == 3 and min(heads) > 0 and heads[1] == heads[2]
    fit = fit and all(w.shape == (n * head_dim, x.size(2)) for w, n in zip((w_q, w_k, w_v), heads, strict=True))
    if not fit or not all(table.shape == (x.size(1), head_dim // 2) for table in (cos, sin)):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, w_q, w_k, w_v, cos, sin))
        raise ValueError(
            f"qkv_heads: shapes {shapes} and head_dim {head_dim} do not fit, use [B, T, C], [Hq * D, C], "
            "[Hk * D, C] twice, [T, D/2] twice and an even D"
        )
    dtype = product_dtype(x)
    # The cast and the concatenation out here are autograd's to undo
    weight = torch.cat([w.to(dtype) for w in (w_q, w_k, w_v)])
    q, k, v = _Heads.apply(x.to(dtype), weight, cos, sin, heads[0], head_dim, float(scale))  # type: ignore[no-untyped-call]
    return q, k, v


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, q_heads: int, head_dim: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`weight` [(Hq + 2 Hk) * D, C] in the dtype of x."""
        rows = x.reshape(-1, x.size(2))
        qkv = torch.mm(rows, weight.T).view(x.size(0), x.size(1), -1, head_dim)
        rotate_norm = _rotate_norm_operator if torch.compiler.is_compiling() else _rotate_norm
        q, k = rotate_norm(qkv, cos, sin, q_heads, scale)
        ctx.save_for_backward(rows, weight, qkv, cos, sin)
        ctx.scale = scale
        return q, k, qkv[:, :, q_heads + k.size(2) :]

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, qkv, cos, sin = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(rows.device.type, enabled=False):  # whatever it is where backward is called
            compiling = torch.compiler.is_compiling()
            backward = _rotate_norm_backward_operator if compiling else _rotate_norm_backward
            grad = backward(grad_q, grad_k, grad_v, qkv, cos, sin, ctx.scale).view(len(rows), -1)
            if ctx.needs_input_grad[0]:
                grad_x = torch.mm(grad, weight).view(qkv.size(0), qkv.size(1), -1)
            if ctx.needs_input_grad[1]:
                grad_weight = torch.mm(grad.T, rows)
        return grad_x, grad_weight, None, None, None, None, None


# -----------------------------------------------------------------------------
# The two operators, which torch.compile takes as they are, and the plain functions behind them: the first call of an
# operator imports all of torch.compile, for longer than a small model takes to score on a CPU


def _rotate_norm(qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the q and k [B, T, H, D] of the product [B, T, Hq + 2 Hk, D], rotated and normed."""
    if (found := _kernels(qkv)) is not None:
        out: tuple[Tensor, Tensor] = found.forward(qkv, cos, sin, q_heads, scale)
        return out
    c, s = cos[:, None].to(_exact(qkv)), sin[:, None].to(_exact(qkv))
    q, k, _ = _split(qkv, q_heads)
    q, k = ((scale * torch.cat(u, -1) * n).to(qkv.dtype) for u, n in (_rotated(x, c, s) for x in (q, k)))
    return q, k


_rotate_norm_operator = torch.library.custom_op("autoresearch::rotate_norm", _rotate_norm, mutates_args=())


@_rotate_norm_operator.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k, _ = _split(qkv, q_heads)
    return qkv.new_empty(q.shape), qkv.new_empty(k.shape)


def _rotate_norm_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> Tensor:
    """Return the gradient over the product, contiguous, from those over q, k and v."""
    if (found := _kernels(qkv)) is not None:
        out: Tensor = found.backward(grad_q, grad_k, grad_v, qkv, cos, sin, scale)
        return out
    c, s = cos[:, None].to(_exact(qkv)), sin[:, None].to(_exact(qkv))
    q, k, _ = _split(qkv, grad_q.size(2))
    parts = []
    for grad, x in ((grad_q, q), (grad_k, k)):
        u, n = _rotated(x, c, s)
        mean = (grad * torch.cat(u, -1)).mean(-1, keepdim=True)
        left, right = (scale * n * (g - half * n**2 * mean) for g, half in zip(grad.chunk(2, -1), u, strict=True))
        parts += [torch.cat((left * c - right * s, left * s + right * c), -1).to(qkv.dtype)]
    return torch.cat((*parts, grad_v), 2)


_rotate_norm_backward_operator = torch.library.custom_op(
    "autoresearch::rotate_norm_backward", _rotate_norm_backward, mutates_args=()
)


@_rotate_norm_backward_operator.register_fake
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _kernels(qkv: Tensor) -> ModuleType | None:
    """Give the Triton kernels if they can take `qkv`."""
    if not qkv.is_cuda or _exact(qkv) != torch.float32:
        return None
    found = kernels("heads_kernels")
    return found if found is not None and qkv.size(-1) in found.HEAD_DIMS else None


def _exact(x: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(x.dtype, torch.float32)


def _split(qkv: Tensor, q_heads: int) -> tuple[Tensor, ...]:
    k_heads = (qkv.size(2) - q_heads) // 2
    return torch.split(qkv, [q_heads, k_heads, k_heads], 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the rotated halves of x and what to multiply them by."""
    left, right = x.to(cos.dtype).chunk(2, -1)
    u = left * cos + right * sin, right * cos - left * sin
    mean = (u[0].square() + u[1].square()).sum(-1, keepdim=True) / x.size(-1)
    return u, torch.rsqrt(mean + torch.finfo(cos.dtype).eps)
