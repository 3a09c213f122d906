"""Attention's queries, keys and values in one: a single product, then rotary positions and RMS norm of q and k.

For a head's raw row x = (l, r) of the product, split in halves, with its position's cosines c and sines s:

    u = (l * c + r * s, r * c - l * s)          rotated
    y = scale * u * n,  n = rsqrt(mean(u**2) + eps)

and back, for the gradient g over y:

    du = scale * n * (g - u * n**2 * mean(g * u))
    (dl, dr) = (du_l * c - du_r * s, du_l * s + du_r * c)

Both passes read each row once, write it once and round once; the gradients of q, k and v are written side by side, so
that the products back are single ones too. Two Triton kernels on CUDA, the same in plain torch elsewhere; eager and
torch.compile run the same two operators.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # as off Linux
    triton = None

KERNEL_HEAD_DIMS = (64, 128)


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
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
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
        rotate_norm = _rotate_norm_operator if _opaque(qkv) else _rotate_norm
        q, k = rotate_norm(qkv, cos, sin, q_heads, scale)
        ctx.save_for_backward(rows, weight, qkv, cos, sin)
        ctx.scale = scale
        return q, k, qkv[:, :, q_heads + k.size(2) :]

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, qkv, cos, sin = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(rows.device.type, enabled=False):  # whatever it is where backward is called
            backward = _rotate_norm_backward_operator if _opaque(qkv) else _rotate_norm_backward
            grad = backward(grad_q, grad_k, grad_v, qkv, cos, sin, ctx.scale).view(len(rows), -1)
            if ctx.needs_input_grad[0]:
                grad_x = torch.mm(grad, weight).view(qkv.size(0), qkv.size(1), -1)
            if ctx.needs_input_grad[1]:
                grad_weight = torch.mm(grad.T, rows)
        return grad_x, grad_weight, None, None, None, None, None


# -----------------------------------------------------------------------------
# The two operators for CUDA and torch.compile, and the plain functions behind them: an operator's first call imports
# all of torch.compile, for longer than a small model takes to score


def _rotate_norm(qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the q and k [B, T, H, D] of the product [B, T, Hq + 2 Hk, D], rotated and normed."""
    if _has_kernel(qkv):
        return _launch(qkv, cos, sin, q_heads, scale)
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
    if _has_kernel(qkv):
        return _launch_backward(grad_q, grad_k, grad_v, qkv, cos, sin, scale)
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


def _opaque(x: Tensor) -> bool:
    return x.is_cuda or torch.compiler.is_compiling()


def _has_kernel(qkv: Tensor) -> bool:
    return triton is not None and qkv.is_cuda and _exact(qkv) == torch.float32 and qkv.size(-1) in KERNEL_HEAD_DIMS


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


# -----------------------------------------------------------------------------
# The kernels: a program takes BLOCK tokens, loads their cosines and sines once, and goes through all of their heads

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _tokens(cos, sin, tokens, length, HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Return the program's tokens [BLOCK, 1], which exist, the columns of half a head, and their tables."""
        token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
        column = tl.arange(0, HALF)[None, :]
        inside = token < tokens
        place = (token % length) * HALF + column
        return (
            token,
            inside,
            column,
            tl.load(cos + place, mask=inside, other=0.0),
            tl.load(sin + place, mask=inside, other=0.0),
        )

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _load_rotated(row, inside, c, s, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
        left = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(row + D // 2, mask=inside, other=0.0).to(tl.float32)
        u_left = left * c + right * s
        u_right = right * c - left * s
        mean = tl.sum(u_left * u_left + u_right * u_right, 1)[:, None] * (1.0 / D)
        return u_left, u_right, tl.rsqrt(mean + eps)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _store(row, left, right, inside, D: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(row, left.to(row.dtype.element_ty), mask=inside)
        tl.store(row + D // 2, right.to(row.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _forward_heads(source, target, inside, c, s, scale, eps, HEADS: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
        for head in range(HEADS):
            u_left, u_right, n = _load_rotated(source + head * D, inside, c, s, eps, D)
            _store(target + head * D, u_left * (n * scale), u_right * (n * scale), inside, D)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _forward(  # type: ignore[no-untyped-def]
        qkv,
        q,
        k,
        cos,
        sin,
        tokens,
        length,
        scale,
        eps,
        Q_HEADS: tl.constexpr,
        K_HEADS: tl.constexpr,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token, inside, column, c, s = _tokens(cos, sin, tokens, length, D // 2, BLOCK)
        token = token.to(tl.int64)  # tokens * columns passes 2**31
        row = qkv + token * ((Q_HEADS + 2 * K_HEADS) * D) + column
        _forward_heads(row, q + token * (Q_HEADS * D) + column, inside, c, s, scale, eps, Q_HEADS, D)
        _forward_heads(row + Q_HEADS * D, k + token * (K_HEADS * D) + column, inside, c, s, scale, eps, K_HEADS, D)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _backward_heads(  # type: ignore[no-untyped-def]
        grad, stride, source, target, inside, c, s, scale, eps, HEADS: tl.constexpr, D: tl.constexpr
    ):
        for head in range(HEADS):
            g_left = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
            g_right = tl.load(grad + D // 2, mask=inside, other=0.0).to(tl.float32)
            grad += stride
            u_left, u_right, n = _load_rotated(source + head * D, inside, c, s, eps, D)
            mean = tl.sum(g_left * u_left + g_right * u_right, 1)[:, None] * (1.0 / D)
            lost = mean * n * n
            du_left = (g_left - u_left * lost) * (n * scale)
            du_right = (g_right - u_right * lost) * (n * scale)
            _store(target + head * D, du_left * c - du_right * s, du_left * s + du_right * c, inside, D)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _backward(  # type: ignore[no-untyped-def]
        grad_q,
        grad_k,
        grad_v,
        qkv,
        grad,
        cos,
        sin,
        tokens,
        length,
        scale,
        eps,
        q_row,  # strides of the gradients: of a row of the batch, a token, a head
        q_token,
        q_head,
        k_row,
        k_token,
        k_head,
        v_row,
        v_token,
        v_head,
        Q_HEADS: tl.constexpr,
        K_HEADS: tl.constexpr,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token, inside, column, c, s = _tokens(cos, sin, tokens, length, D // 2, BLOCK)
        batch = (token // length).to(tl.int64)
        position = (token % length).to(tl.int64)
        place = token.to(tl.int64) * ((Q_HEADS + 2 * K_HEADS) * D) + column
        row = grad_q + batch * q_row + position * q_token + column
        _backward_heads(row, q_head, qkv + place, grad + place, inside, c, s, scale, eps, Q_HEADS, D)
        place += Q_HEADS * D
        row = grad_k + batch * k_row + position * k_token + column
        _backward_heads(row, k_head, qkv + place, grad + place, inside, c, s, scale, eps, K_HEADS, D)
        place += K_HEADS * D
        row = grad_v + batch * v_row + position * v_token + column
        for head in range(K_HEADS):
            left = tl.load(row, mask=inside)
            right = tl.load(row + D // 2, mask=inside)
            _store(grad + place + head * D, left, right, inside, D)
            row += v_head


def _launch(qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k = (qkv.new_empty(part.shape) for part in _split(qkv, q_heads)[:2])
    arguments, options = _arguments(qkv, cos, sin, q_heads, scale)
    if qkv.numel():
        with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
            _forward[_grid](qkv.contiguous(), q, k, *arguments, **options)
    return q, k


def _launch_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> Tensor:
    grads = [grad if grad.stride(3) == 1 else grad.contiguous() for grad in (grad_q, grad_k, grad_v)]
    strides = [stride for grad in grads for stride in grad.stride()[:3]]
    out = qkv.new_empty(qkv.shape)
    arguments, options = _arguments(qkv, cos, sin, grad_q.size(2), scale)
    if qkv.numel():
        with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
            _backward[_grid](*grads, qkv.contiguous(), out, *arguments, *strides, **options)
    return out


def _arguments(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, scale: float
) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Return what both kernels take in the middle and at the end."""
    batch, length, heads, head_dim = qkv.shape
    tables = (table.to(torch.float32).contiguous() for table in (cos, sin))
    # 8 values of each half a thread: 16 bytes of a half type
    options = {"Q_HEADS": q_heads, "K_HEADS": (heads - q_heads) // 2, "D": head_dim, "BLOCK": 2048 // head_dim}
    return (*tables, batch * length, length, scale, torch.finfo(torch.float32).eps), {**options, "num_warps": 4}


def _grid(options: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(options["tokens"], options["BLOCK"]),)
