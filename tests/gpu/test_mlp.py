"""Proves oracle/fused/mlp_kernels.py: the products with an epilogue, with TMA and with plain pointers. Needs CUDA.

The reference is the plain definition in float64. Errors are relative, in Frobenius norm.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracle.fused import mlp

if not (torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)):
    pytest.skip("no CUDA with bfloat16", allow_module_level=True)
kernels: Any = pytest.importorskip("oracle.fused.mlp_kernels")

hopper = torch.cuda.get_device_capability()[0] == 9
# Rows, C, H: the size of the model, one that no block divides, widths that TMA refuses, one row, less than a block
SIZES = [(4096, 512, 2048), (1000, 192, 520), (1000, 100, 333), (1, 512, 2048), (129, 8, 24), (50_000, 64, 128)]
TOLERANCE = 1e-2


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float(torch.linalg.vector_norm(found.double() - wanted) / torch.linalg.vector_norm(wanted))


def case(rows: int, c: int, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [rows, C] and a gradient of its shape, w_in [H, C], w_out [C, H]; all of bfloat16's numbers."""
    generator = torch.Generator("cuda").manual_seed(rows + c + h)
    shapes = ((rows, c), (rows, c), (h, c), (c, h))
    x, grad, w_in, w_out = (torch.randn(s, generator=generator, device="cuda") for s in shapes)
    return x.bfloat16(), grad.bfloat16(), (w_in * c**-0.5).bfloat16(), (w_out * h**-0.5).bfloat16()


@pytest.fixture(params=["tma", "pointers"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pointers":
        monkeypatch.setattr(kernels, "tma", lambda *tensors: False)
    elif not hopper:
        pytest.skip("not a Hopper GPU")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_kernel_writes_every_number(size: tuple[int, int, int]) -> None:
    x, grad, w_in, w_out = case(*size)
    rows, _, h = size
    a, grad_h = (torch.full((rows + 1, h), float("nan"), device="cuda", dtype=x.dtype) for _ in range(2))
    kernels.launch(x, w_in, None, a[:rows])
    assert error(a[:rows], F.relu(x.double() @ w_in.double().T).square()) < TOLERANCE
    kernels.launch(grad, w_out, a[:rows], grad_h[:rows])
    assert error(grad_h[:rows], (grad.double() @ w_out.double()) * 2 * a[:rows].double().sqrt()) < TOLERANCE
    assert bool(a[rows].isnan().all() and grad_h[rows].isnan().all())  # and no number beside them


@pytest.mark.usefixtures("kernel")
def test_more_than_two_to_the_31_numbers() -> None:
    rows, c, h = 1_100_000, 16, 2048
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB")
    x, grad, w_in, w_out = case(rows, c, h)
    a = kernels.activation(x, w_in)
    grad_h = kernels.hidden_gradient(grad, w_out, a)
    for place in (slice(0, 2000), slice(rows - 2000, rows)):
        assert error(a[place], F.relu(x[place].double() @ w_in.double().T).square()) < TOLERANCE
        wanted = (grad[place].double() @ w_out.double()) * 2 * a[place].double().sqrt()
        assert error(grad_h[place], wanted) < TOLERANCE


@pytest.mark.usefixtures("kernel")
def test_nan_and_views() -> None:
    x, _, w_in, _ = case(300, 64, 128)
    x[7, 3] = float("nan")
    a = kernels.activation(x, w_in)
    assert bool(a[7].isnan().all()) and int(a.isnan().sum()) == a.size(1)
    x, _, w_in, _ = case(300, 65, 128)
    x = x[:, 1:]  # neither contiguous nor on 16 bytes
    w_in = w_in.T[:64].T
    wanted = F.relu(x.double() @ w_in.double().T).square()
    assert error(kernels.activation(x, w_in), wanted) < TOLERANCE
    odd = torch.empty(300 * 64 + 1, device="cuda", dtype=x.dtype)[1:].view(300, 64).copy_(x)
    assert error(kernels.activation(odd, w_in), wanted) < TOLERANCE
    assert kernels.activation(x[:0], w_in).shape == (0, 128)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [(4096, 512, 2048), (1000, 192, 520), (1000, 100, 333), (300_000, 512, 2048)], ids=str)
@pytest.mark.filterwarnings("ignore")  # what dynamo and inductor say themselves
def test_the_mlp_is_the_plain_one(size: tuple[int, int, int], autocast: bool, compiled: bool) -> None:
    rows, c, _ = size
    if rows > 100_000 and torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("float64 of this size needs 40 GB")
    x, grad, w_in, w_out = case(*size)
    x = x.view(2, rows // 2, c).float() if autocast else x.view(2, rows // 2, c)
    grad = grad.view(2, rows // 2, c)
    inputs = [x, w_in.float(), w_out.float()]
    for tensor in inputs:
        tensor.requires_grad_()

    def call(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return mlp.relu2_mlp(x, w_in, w_out)

    torch.compiler.reset()
    y = (torch.compile(call, fullgraph=True, dynamic=False) if compiled else call)(*inputs)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, inputs, grad)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in inputs]

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = F.relu(exact[0] @ exact[1].T).square() @ exact[2].T
    assert error(y.detach(), wanted.detach()) < TOLERANCE
    for one, truth in zip(found, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        assert error(one, truth) < TOLERANCE


def test_the_kernels_are_the_ones_that_run() -> None:
    """And only one hidden tensor is made on the way forward."""
    x, grad, w_in, w_out = case(65_536, 512, 2048)
    inputs = [x.requires_grad_(), w_in.float().requires_grad_(), w_out.float().requires_grad_()]
    mlp.relu2_mlp(*inputs)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = mlp.relu2_mlp(*inputs)
        used = torch.cuda.max_memory_allocated() - before
        torch.autograd.grad(y, inputs, grad)
        torch.cuda.synchronize()
    name = "_hopper" if hopper else "_anywhere"
    assert sum(event.count for event in profile.key_averages() if name in event.key) == 2
    assert used < 1.2 * (65_536 * 2048 * 2 + 65_536 * 512 * 2) + (8 << 20)
