"""Proves oracle/fused/heads.py on CUDA: the Triton kernels and the whole against float64. Needs a CUDA GPU.

Errors are relative, in the Frobenius norm. Outputs of the operators lie in the midst of NaN: an element that is not
written shows, and so does one that is written beside them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracle.fused import heads as _heads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of the operators, given their arguments
MARGIN = 1024
CASES = [  # batch, length, columns, heads of q, heads of k, head_dim
    (2, 2048, 512, 4, 4, 128),
    (3, 100, 256, 4, 2, 64),
    (2, 77, 128, 3, 1, 128),
    (1, 1, 64, 1, 1, 64),
]
cases = pytest.mark.parametrize("shape", CASES, ids=str)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def framed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let new_empty hand out the middle of a NaN block; at the end all middles are written and no margin is."""
    blocks: list[tuple[Tensor, int]] = []
    new_empty = Tensor.new_empty

    def new(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        block = new_empty(self, (size.numel() + 2 * MARGIN,), **options).fill_(float("nan"))
        blocks.append((block, size.numel()))
        return block[MARGIN : MARGIN + size.numel()].view(size)

    monkeypatch.setattr(Tensor, "new_empty", new)
    yield
    monkeypatch.undo()
    assert blocks
    for block, size in blocks:
        assert bool(block[:MARGIN].isnan().all()) and bool(block[MARGIN + size :].isnan().all())
        assert bool(block[MARGIN : MARGIN + size].isfinite().all())


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def tables(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).cuda()
    return angle.cos().float(), angle.sin().float()


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def plain(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, w_q, w_k, w_v, cos, sin, head_dim, scale = arguments

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos[:, None] + right * sin[:, None], right * cos[:, None] - left * sin[:, None]), -1)

    q, k, v = (F.linear(x, w).view(*x.shape[:2], -1, head_dim) for w in (w_q, w_k, w_v))
    return F.rms_norm(rotate(q), (head_dim,)) * scale, F.rms_norm(rotate(k), (head_dim,)) * scale, v


def strided(kind: str, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A gradient [B, T, H, D] that lies in memory as `kind` says."""
    batch, length, heads, head_dim = shape
    if kind == "heads first":
        return randn(batch, heads, length, head_dim, seed=seed, dtype=dtype).transpose(1, 2)
    if kind == "part of a row":
        return randn(batch, length, 3 * heads, head_dim, seed=seed, dtype=dtype)[:, :, heads : 2 * heads]
    if kind == "off 16 bytes":
        return randn(batch, length, heads, head_dim + 1, seed=seed, dtype=dtype)[..., 1:]
    if kind == "channels apart":
        return randn(batch, length, head_dim, heads, seed=seed, dtype=dtype).transpose(2, 3)
    if kind == "expanded":
        return randn(1, 1, 1, 1, seed=seed, dtype=dtype).expand(shape)
    return randn(*shape, seed=seed, dtype=dtype)


KINDS = ["contiguous", "heads first", "part of a row", "off 16 bytes", "channels apart", "expanded"]


@pytest.mark.usefixtures("framed")
@pytest.mark.parametrize("dtype", BOUNDS)
@cases
def test_forward_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, _, q_heads, k_heads, head_dim = shape
    qkv, (cos, sin) = randn(batch, length, q_heads + 2 * k_heads, head_dim, dtype=dtype), tables(length, head_dim)
    found = torch.ops.autoresearch.rotate_norm(qkv, cos, sin, q_heads, 1.3)
    wanted = _heads._rotate_norm(qkv.double().cpu(), cos.cpu(), sin.cpu(), q_heads, 1.3)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and a.is_contiguous() and error(a.cpu(), b) < BOUNDS[dtype]


@pytest.mark.usefixtures("framed")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", KINDS)
@cases
def test_backward_kernel(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    batch, length, _, q_heads, k_heads, head_dim = shape
    qkv, (cos, sin) = randn(batch, length, q_heads + 2 * k_heads, head_dim, dtype=dtype), tables(length, head_dim)
    grads = [
        strided(kind, batch, length, heads, head_dim, seed=1 + i, dtype=dtype)
        for i, heads in enumerate((q_heads, k_heads, k_heads))
    ]
    found = torch.ops.autoresearch.rotate_norm_backward(*grads, qkv, cos, sin, 1.3)
    on_cpu = [tensor.double().cpu() for tensor in (*grads, qkv)]
    wanted = _heads._rotate_norm_backward(*on_cpu, cos.cpu(), sin.cpu(), 1.3)  # type: ignore[call-arg, arg-type]
    assert found.dtype == dtype and found.is_contiguous() and error(found.cpu(), wanted) < BOUNDS[dtype]
    assert torch.equal(found[:, :, q_heads + k_heads :], grads[2])


def test_large_offsets() -> None:
    """More than 2**31 elements: the last tokens come out as they do alone."""
    batch, length, heads, head_dim = 700, 2048, 12, 128
    need = 4 * batch * length * heads * head_dim * 2
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of GPU memory")
    qkv = torch.ones(batch, length, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    qkv[-1] = last = randn(length, heads, head_dim, dtype=torch.bfloat16)
    cos, sin = tables(length, head_dim)
    q, k = torch.ops.autoresearch.rotate_norm(qkv, cos, sin, 4, 1.0)
    alone = torch.ops.autoresearch.rotate_norm(last[None], cos, sin, 4, 1.0)
    assert torch.equal(q[-1], alone[0][0]) and torch.equal(k[-1], alone[1][0])
    grads = (q, k, qkv[:, :, 8:])
    grad = torch.ops.autoresearch.rotate_norm_backward(*grads, qkv, cos, sin, 1.0)
    wanted = torch.ops.autoresearch.rotate_norm_backward(*(g[-1:] for g in grads), last[None], cos, sin, 1.0)
    assert torch.equal(grad[-1], wanted[0])


def training_case(shape: tuple[int, ...]) -> list[Tensor]:
    batch, length, columns, q_heads, k_heads, head_dim = shape
    weights = [
        randn(n * head_dim, columns, seed=1 + i) / columns**0.5 for i, n in enumerate((q_heads, k_heads, k_heads))
    ]
    x = randn(batch, length, columns, dtype=torch.bfloat16)
    return [*(tensor.requires_grad_() for tensor in (x, *weights)), *tables(length, head_dim)]


def exact(tensors: list[Tensor], head_dim: int, grads: list[Tensor]) -> list[Tensor]:
    """q, k, v and the gradients, by the definition in float64 from weights as they are multiplied."""
    x, *weights = (tensor.detach().to(torch.bfloat16).double().requires_grad_() for tensor in tensors[:4])
    outputs = plain(x, *weights, *(table.double() for table in tensors[4:]), head_dim, 1.2)
    return [*outputs, *torch.autograd.grad(outputs, (x, *weights), [grad.double() for grad in grads])]


def heads(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cuda", torch.bfloat16):
        return _heads.qkv_heads(*arguments)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["contiguous", "heads first"])
@pytest.mark.parametrize("shape", [*CASES, (2, 33, 64, 2, 2, 32)], ids=str)  # the last is without a kernel
def test_the_whole(shape: tuple[int, ...], kind: str, compiled: bool) -> None:
    batch, length, _, q_heads, k_heads, head_dim = shape
    tensors = training_case(shape)
    run: Callable[..., Any] = heads
    if compiled:
        torch.compiler.reset()
        run = torch.compile(heads, fullgraph=True, dynamic=False)
    outputs = run(*tensors, head_dim, 1.2)
    grads = [
        strided(kind, batch, length, n, head_dim, seed=5 + i, dtype=torch.bfloat16)
        for i, n in enumerate((q_heads, k_heads, k_heads))
    ]
    found = [*outputs, *torch.autograd.grad(outputs, tensors[:4], grads)]
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 4 + [torch.float32] * 3
    for name, a, b in zip(
        ("q", "k", "v", "dx", "dw_q", "dw_k", "dw_v"), found, exact(tensors, head_dim, grads), strict=True
    ):
        assert error(a, b) < 1e-2, name


@pytest.mark.filterwarnings("ignore")
def test_in_attention_compiled_is_eager() -> None:
    """As in a model: attention above it, a gate on v, the loss in the same graph."""
    tensors = training_case(CASES[0])

    def loss_of(*tensors: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in heads(*tensors, 128, 1.2))
        y = F.scaled_dot_product_attention(q, k, v + 0.5 * v.sigmoid(), is_causal=True)
        return y.float().square().mean()

    def results(run: Callable[..., Tensor]) -> list[Tensor]:
        loss = run(*tensors)
        return [loss, *torch.autograd.grad(loss, tensors[:4])]

    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=False)
    for a, b in zip(results(compiled), results(loss_of), strict=True):
        assert error(a, b) < 1e-2
