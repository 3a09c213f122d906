"""Proves oracle/fused/loss.py on CUDA: the Triton kernel and the whole loss against float64. Needs a CUDA GPU.

Errors are relative, in the Frobenius norm. The free memory is filled with NaN first: an element that is not written
shows. The largest case takes 12 GB and is left out where that is not free.
"""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracle.fused import loss as fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", BOUNDS)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def poison(gigabytes: float = 1.0) -> None:
    """Fill what the allocator hands out next with NaN."""
    torch.cuda.empty_cache()
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 18, 1 << 20, 1 << 22)]
    blocks.append(torch.full((int(gigabytes * 2**28),), float("nan"), device="cuda"))
    del blocks


def error(found: Tensor, wanted: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.detach().double() - wanted.detach().double())
    return float(difference / torch.linalg.vector_norm(wanted.detach().double()))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def words(rows: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    targets = torch.randint(columns, (rows,), device="cuda", generator=generator)
    targets[0], targets[-1] = 0, columns - 1
    return targets


def plain(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by the definition, in float64."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    loss = F.cross_entropy(softcap * torch.tanh((x @ weight.T) / softcap), targets)
    grad_x, grad_weight = torch.autograd.grad(loss, (x, weight))
    return loss, grad_x, grad_weight


@dtypes
@pytest.mark.parametrize("columns", [1, 1000, 8192, 8193, 50257, 65537])
@pytest.mark.parametrize(("scale", "softcap"), [(0.02, 15.0), (10.0, 15.0), (1e3, 15.0), (30.0, 200.0), (3.0, 1.0)])
def test_kernel(dtype: torch.dtype, columns: int, scale: float, softcap: float) -> None:
    """Loss and gradient of given logits; without a gradient the same loss. Past 65536 columns by plain operations.

    The capped logits are off by about 1e-7 * softcap, and the slope by 1e-7, which counts where all logits are
    saturated: errors of the gradient are relative to the gradient without the slope.
    """
    rows = 33
    logits, targets = (randn(rows, columns) * scale).to(dtype), words(rows, columns)
    # A row more on both sides, which must stay as it is
    framed = F.pad(logits, (0, 0, 1, 1), value=float("nan"))
    z = logits.double().requires_grad_()
    capped = softcap * torch.tanh(z / softcap)
    wanted = F.cross_entropy(capped, targets, reduction="none")
    gradient, without_slope = torch.autograd.grad(wanted.sum(), (z, capped))
    losses = torch.full((2, rows), float("nan"), device="cuda")
    fused.loss_and_gradient_(logits.clone(), targets, losses[0], softcap, False)
    fused.loss_and_gradient_(framed[1:-1], targets, losses[1], softcap, True)
    assert torch.equal(losses[0], losses[1])
    assert bool(framed[0].isnan().all()) and bool(framed[-1].isnan().all())
    if columns == 1:
        assert float(losses.abs().max()) <= 2e-7 * max(5.0, softcap) and float(framed[1:-1].abs().max()) <= 1e-6
    else:
        assert error(losses[1], wanted) <= 1e-5
        off = torch.linalg.vector_norm(framed[1:-1].double() - gradient) / torch.linalg.vector_norm(without_slope)
        assert float(off) <= BOUNDS[dtype] * max(1.0, softcap / 15)


@dtypes
@pytest.mark.parametrize("shape", [(1,), (3, 1000), (2, 3, 4096), (7, 50257), (0, 5)])
@pytest.mark.parametrize("softcap", [1.0, 15.0, 200.0])
def test_softcapped(dtype: torch.dtype, shape: tuple[int, ...], softcap: float) -> None:
    """Off by 1e-6 * softcap at most, of rows with gaps too; with a gradient to keep by plain operations."""
    logits = (randn(*shape) * 20).to(dtype)
    wide = F.pad(logits, (1, 2))[..., 1:-2]
    poison()
    for given in (logits, wide, logits.clone().requires_grad_()):
        found = fused.softcapped(given, softcap)
        assert found.dtype == torch.float32 and found.shape == shape
        assert bool(((found - softcap * torch.tanh(logits.double() / softcap)).abs() <= 1e-6 * softcap).all())
    if found.numel():
        (grad,) = torch.autograd.grad(found.sum(), given)
        wanted = 1 - torch.tanh(logits.double() / softcap).square()
        assert grad.dtype == dtype and float((grad - wanted).abs().max()) <= BOUNDS[dtype]


def test_softcapped_past_two_to_the_31_logits() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    logits = torch.full((2**31 + 5,), -3.0, device="cuda", dtype=torch.bfloat16)
    logits[-5:] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    capped = fused.softcapped(logits, 15.0)
    least, most = capped[:-5].aminmax()
    assert least == most == capped[0]
    assert float((capped[-5:] - 15 * torch.tanh(logits[-5:].float() / 15)).abs().max()) <= 1e-5
    del logits, capped
    torch.cuda.empty_cache()


@dtypes
@pytest.mark.parametrize("columns", [1000, 8192, 50257])
@pytest.mark.parametrize("chunk", [None, 100])
def test_loss_and_gradients(dtype: torch.dtype, columns: int, chunk: int | None) -> None:
    """`weight` stays float32; what it is rounded to for the products is what the reference gets."""
    x, targets = randn(512, 128).to(dtype).requires_grad_(), words(512, columns)
    weight = (randn(columns, 128, seed=2) * 0.3).requires_grad_()
    poison()
    loss = fused.softcapped_cross_entropy(x.view(4, 128, 128), weight, targets.view(4, 128), 15.0, chunk=chunk)
    grads = torch.autograd.grad(loss, (x, weight), torch.tensor(1 / 3, device="cuda"))
    wanted, *exact = plain(x, weight.to(dtype), targets, 15.0)
    assert loss.dtype == torch.float32 and grads[0].dtype == dtype and grads[1].dtype == torch.float32
    assert error(loss, wanted) <= {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-4}[dtype]
    for found, reference in zip(grads, exact, strict=True):
        assert error(found * 3, reference) <= BOUNDS[dtype]


def test_autocast_is_bfloat16() -> None:
    x, weight, targets = randn(256, 64).requires_grad_(), randn(1000, 64, seed=2).requires_grad_(), words(256, 1000)
    with torch.autocast("cuda", torch.bfloat16):
        loss = fused.softcapped_cross_entropy(x, weight, targets, 15.0)
    halves = fused.softcapped_cross_entropy(x.bfloat16(), weight, targets, 15.0)
    assert torch.equal(loss, halves) and loss.dtype == torch.float32
    for found, wanted in zip(*(torch.autograd.grad(way, (x, weight)) for way in (loss, halves)), strict=True):
        assert torch.equal(found, wanted) and found.dtype == torch.float32


def test_is_the_same_twice_to_the_last_bit() -> None:
    x, weight, targets = (
        randn(300, 64).bfloat16().requires_grad_(),
        randn(1000, 64, seed=2).requires_grad_(),
        words(300, 1000),
    )
    outcomes = []
    for _ in range(2):
        poison()
        loss = fused.softcapped_cross_entropy(x, weight, targets, 15.0, chunk=128)
        outcomes.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_inside_a_compiled_function() -> None:
    x, weight, targets = (
        randn(300, 64).bfloat16().requires_grad_(),
        randn(1000, 64, seed=2).requires_grad_(),
        words(300, 1000),
    )

    def step(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return fused.softcapped_cross_entropy(F.rms_norm(x, (x.size(-1),)), weight, targets, 15.0) / 2

    outcomes = []
    for run in (step, torch.compile(step)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            loss = run(x, weight, targets)
            outcomes.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert all(error(one, other) <= 1e-2 for one, other in zip(*outcomes, strict=True))


@pytest.mark.parametrize("bad", [-1, -100, 1000])
def test_a_target_that_is_no_word_makes_nan(bad: int) -> None:
    targets = words(64, 1000)
    targets[7] = bad
    assert bool(fused.softcapped_cross_entropy(randn(64, 16), randn(1000, 16), targets, 15.0).isnan())


def test_more_than_two_to_the_31_logits_in_one_chunk() -> None:
    """The rows past 2**31 elements come out as they do alone; 262,145 * 8,200 logits in bfloat16 are 4.3 GB."""
    rows, columns = 262_145, 8_200
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    x, targets = randn(rows, 16).bfloat16().requires_grad_(), words(rows, columns)
    weight = randn(columns, 16, seed=2).requires_grad_()
    assert rows * columns > 2**31
    poison(4.5)
    losses = [fused.softcapped_cross_entropy(x, weight, targets, 15.0, chunk=chunk) for chunk in (rows, 4096)]
    assert error(*losses) <= 1e-5
    for one, other in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in losses), strict=True):
        assert error(one, other) <= 1e-2
    torch.cuda.empty_cache()


def test_memory_stays_below_the_logits() -> None:
    """As float32 the logits alone were 2 GB: here a chunk (half a GB), the gradient of x, and little else."""
    rows, columns, width = 65_536, 8_192, 256
    x, targets = randn(rows, width).bfloat16().requires_grad_(), words(rows, columns)
    weight = randn(columns, width, seed=2).requires_grad_()
    fused.softcapped_cross_entropy(x[:64], weight, targets[:64], 15.0)  # libraries' workspaces
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fused.softcapped_cross_entropy(x, weight, targets, 15.0)
    torch.autograd.backward(loss)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= fused.CUDA_CHUNK_BYTES + 4 * x.nbytes + 6 * weight.nbytes < rows * columns * 4 / 2
