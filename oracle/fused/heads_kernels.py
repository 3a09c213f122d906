"""The Triton kernels of `heads.py`; imported when the first CUDA tensor comes, as Triton is only where CUDA is.

A program takes BLOCK tokens, loads their cosines and sines once, and goes through all of their heads.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

HEAD_DIMS = (64, 128)


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


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Do what `heads._rotate_norm` does."""
    k_heads = (qkv.size(2) - q_heads) // 2
    q, k = (qkv.new_empty(*qkv.shape[:2], n, qkv.size(3)) for n in (q_heads, k_heads))
    arguments, options = _arguments(qkv, cos, sin, q_heads, scale)
    if qkv.numel():
        with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
            _forward[_grid](qkv.contiguous(), q, k, *arguments, **options)
    return q, k


def backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> Tensor:
    """Do what `heads._rotate_norm_backward` does."""
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
