"""Proves oracle/fused/mlp.py: value, gradients and memory of the squared-ReLU MLP. Needs torch; runs on the CPU.

The reference is the plain definition in float64, differentiated by autograd. A mutant is the module itself with one
piece of its source replaced. The Triton kernels have their own tests in tests/gpu.
"""

import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from oracle.fused import mlp

from .law import law

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 9)
leads: st.SearchStrategy[tuple[int, ...]] = st.sampled_from([(), (0,), (2, 3), (3, 1, 2)]) | st.tuples(sides)
scales = st.sampled_from([1e-3, 1.0, 100.0])


def mutant(old: str, new: str) -> types.ModuleType:
    source = Path(mlp.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in mlp.py"
    number = len(sys.modules)
    module = types.ModuleType(f"oracle.fused.mlp_mutant_{number}")
    sys.modules[module.__name__] = module  # torch.compile imports what it traces
    source = source.replace(old, new).replace('"autoresearch::', f'"autoresearch_mutant_{number}::')
    exec(compile(source, "mlp_mutant.py", "exec"), module.__dict__)
    return module


def plain(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return F.relu(x @ w_in.T).square() @ w_out.T


def case(
    seed: int, lead: tuple[int, ...], sizes: tuple[int, int, int] = (4, 6, 5), dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x [*lead, C], w_in [H, C] and w_out [D, H] for sizes (C, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    c, h, d = sizes
    shapes = ((*lead, c), (h, c), (d, h))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def grads(y: Tensor, *inputs: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    incoming = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, inputs, incoming, retain_graph=True)


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = torch.linalg.vector_norm(found.detach().double() - wanted.detach().double())
    assert float(error) <= tolerance * (1e-9 + float(torch.linalg.vector_norm(wanted.detach().double())))


@contextmanager
def without_error() -> Iterator[None]:
    """So that a mutant may also turn a law red by what torch refuses."""
    try:
        yield
    except Exception as error:
        pytest.fail(repr(error))


ACTIVATIONS = {
    "no square": mutant(".relu_().square_()", ".relu_()"),
    "no relu": mutant(".relu_().square_()", ".square_()"),
    "leaky": mutant(".relu_().square_()", ".clamp_(min=-0.1).square_()"),
}
SLOPES = {
    "no slope": mutant(".mul_(a.sqrt().mul_(2))", ""),
    "half the slope": mutant("a.sqrt().mul_(2)", "a.sqrt()"),
    "of a cube": mutant("a.sqrt().mul_(2)", "a.mul(2)"),
}


@law(
    mlp,
    mutants={
        **ACTIVATIONS,
        "rows left flat": mutant("return y.view(*x.shape[:-1], len(w_out))", "return y"),
        "w_out as it lies": mutant("return a @ w_out.T", "return a @ w_out.reshape(a.size(1), -1)"),
    },
    seed=seeds,
    lead=leads,
    sizes=st.tuples(sides, sides, sides),
    scale=scales,
)
def test_is_the_plain_mlp(
    relu2: Any, seed: int, lead: tuple[int, ...], sizes: tuple[int, int, int], scale: float
) -> None:
    x, w_in, w_out = case(seed, lead, sizes)
    y = relu2.relu2_mlp(x * scale, w_in, w_out)
    assert y.dtype == torch.float64
    near(y, plain(x * scale, w_in, w_out), 1e-12)
    with torch.no_grad():
        assert torch.equal(relu2.relu2_mlp(x * scale, w_in, w_out), y)


@law(
    mlp,
    mutants={
        **SLOPES,
        "no relu": ACTIVATIONS["no relu"],
        "h's gradient for w_out": mutant("weigh(grad, a,", "weigh(grad, a.sqrt(),"),
        "x's gradient through the slope alone": mutant("grad_x = grad_h @ w_in", "grad_x = grad_h.sign() @ w_in"),
        "w_in's gradient of the first row": mutant("weigh(grad_h, x,", "weight_gradient(grad_h[:1], x[:1],"),
    },
    seed=seeds,
    lead=leads,
    sizes=st.tuples(sides, sides, sides),
    scale=scales,
)
def test_has_the_plain_gradients(
    relu2: Any, seed: int, lead: tuple[int, ...], sizes: tuple[int, int, int], scale: float
) -> None:
    x, w_in, w_out = case(seed, lead, sizes)
    found = grads(relu2.relu2_mlp(x * scale, w_in, w_out), x, w_in, w_out)
    for grad, wanted in zip(found, grads(plain(x * scale, w_in, w_out), x, w_in, w_out), strict=True):
        near(grad, wanted, 1e-12)


@law(mlp, mutants=SLOPES)
def test_passes_gradcheck(relu2: Any) -> None:
    def distance(seed: int) -> float:  # from the kink
        x, w_in, _ = case(seed, (2, 3))
        return (x @ w_in.T).abs().min().item()

    inputs = case(max(range(20), key=distance), (2, 3))
    assert torch.autograd.gradcheck(relu2.relu2_mlp, inputs, raise_exception=False)


@law(
    mlp,
    mutants={
        "no relu": ACTIVATIONS["no relu"],
        "leaky": ACTIVATIONS["leaky"],
        "the root divides": mutant("a.sqrt().mul_(2)", "a.div(a.sqrt()).mul_(2)"),
    },
    seed=seeds,
    zeros=st.booleans(),
)
def test_what_is_not_positive_has_no_slope(relu2: Any, seed: int, zeros: bool) -> None:
    x, w_in, w_out = (tensor.detach() for tensor in case(seed, (3,)))
    inputs = [x.abs() * (not zeros), -w_in.abs(), w_out]
    y = relu2.relu2_mlp(*(tensor.requires_grad_() for tensor in inputs))
    for tensor in (y, *grads(y, *inputs)):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@law(mlp, mutants={"nan is cut off": mutant(".relu_().square_()", ".relu_().nan_to_num_(0).square_()")})
def test_nan_is_not_hidden(relu2: Any) -> None:
    x, w_in, w_out = case(0, (2,))
    bad = x.detach().clone()
    bad[0, 0] = float("nan")
    y = relu2.relu2_mlp(bad.requires_grad_(), w_in, w_out)
    assert bool(y[0].isnan().all()) and not bool(y[1].isnan().any())
    assert bool(grads(y, bad)[0][0].isnan().all())


@law(
    mlp,
    mutants={
        "the slope is kept too": mutant("else None, a)", "else None, a, a.sqrt())"),
        "x kept for nobody": mutant("x if for_in else None", "x"),
        "w_in kept for nobody": mutant("w_in if for_x else None", "w_in"),
        "w_out kept for nobody": mutant("w_out if for_x or for_in else None", "w_out"),
        "h through autograd": mutant(
            "y: Tensor = _Mlp.apply(rows, w_in, w_out)", "y = (rows @ w_in.T).relu().square() @ w_out.to(x.dtype).T"
        ),
    },
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    enabled=st.booleans(),
)
def test_keeps_one_hidden_tensor(relu2: Any, wanted: tuple[bool, bool, bool], enabled: bool) -> None:
    """And of all others only what the gradients asked for need; nothing if there are none."""
    _, w_in, w_out = inputs = case(0, (2, 7))
    for tensor, flag in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(flag)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.set_grad_enabled(enabled),
    ):
        relu2.relu2_mlp(*inputs)
    for_x, for_in, for_out = wanted if enabled else (False, False, False)
    needed = {(14, 4): for_in, w_in.shape: for_x, w_out.shape: for_x or for_in, (14, 6): for_x or for_in or for_out}
    assert sorted(map(tuple, (tensor.shape for tensor in kept))) == sorted(tuple(s) for s, yes in needed.items() if yes)


@law(
    mlp,
    mutants={
        "always for w_out": mutant("if for_out:", "if True:"),
        "always for x": mutant(
            "if for_x:\n                    grad_x = grad_h @ w_in", "grad_x = grad_h @ grad_h[:5].T"
        ),
    },
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
)
def test_no_gradient_is_made_that_nobody_asks_for(relu2: Any, wanted: tuple[bool, bool, bool]) -> None:
    inputs = case(0, (7,), (5, 6, 5))
    for tensor, flag in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(flag)
    y = relu2.relu2_mlp(*inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.backward(y, torch.ones_like(y))
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    for_x, for_in, for_out = wanted
    assert products == for_out + (for_x or for_in) + for_x + for_in
    assert tuple(tensor.grad is not None for tensor in inputs) == wanted


@law(mlp, mutants={"a is used up": mutant("a.sqrt().mul_(2)", "a.sqrt_().mul_(2)")}, seed=seeds)
def test_a_kept_graph_can_be_walked_again(relu2: Any, seed: int) -> None:
    inputs = case(seed, (7,))
    y = relu2.relu2_mlp(*inputs)
    with without_error():
        first, second = grads(y, *inputs), grads(y, *inputs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@law(
    mlp,
    mutants={
        "float64 cast down": mutant(
            "product_dtype(x)).reshape",
            'torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype).reshape',
        ),
        "autocast ignored": mutant("x.to(product_dtype(x))", "x"),
        "x's own dtype forgotten": mutant("rows = x.to(product_dtype(x))", "rows = x.to(w_in.dtype)"),
    },
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    autocast=st.booleans(),
)
def test_dtypes(relu2: Any, dtype: torch.dtype, autocast: bool) -> None:
    """Products in the dtype of x or of autocast, gradients in those of x and of the float32 weights."""
    x, w_in, w_out = case(3, (40,), (16, 32, 8), torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = relu2.relu2_mlp(x, w_in, w_out)
    half = dtype == torch.bfloat16 or (autocast and dtype == torch.float32)
    assert y.dtype == (torch.bfloat16 if half else dtype)
    with without_error():
        found = grads(y, x, w_in, w_out)
    assert [grad.dtype for grad in found] == [dtype, torch.float32, torch.float32]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w_in, w_out)]
    wanted = plain(*exact)
    tolerance = 2e-2 if half else 1e-6
    near(y, wanted, 1e-14 if dtype == torch.float64 else tolerance)
    for grad, truth in zip(found, grads(wanted, *exact), strict=True):
        near(grad, truth, tolerance)


@law(
    mlp,
    mutants={"cast on the way back": mutant("with torch.autocast(grad.device.type, enabled=False):", "if True:")},
)
def test_autocast_on_the_way_back_changes_nothing(relu2: Any) -> None:
    inputs = case(3, (40,), (16, 32, 8), torch.float32)
    y = relu2.relu2_mlp(*inputs)
    outside = grads(y, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = grads(y, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(outside, inside, strict=True))


class Block(torch.nn.Module):
    """What surrounds the MLP in a model, norm and residual."""

    def __init__(self, relu2: Any, autocast: bool) -> None:
        super().__init__()
        _, w_in, w_out = case(1, (), (8, 12, 8), torch.float32)
        self.w_in, self.w_out = torch.nn.Parameter(w_in.detach()), torch.nn.Parameter(w_out.detach())
        self.mlp, self.autocast = relu2.relu2_mlp, autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            y: Tensor = x + self.mlp(F.rms_norm(x, x.shape[-1:]), self.w_in, self.w_out)
        return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what dynamo itself does with an autograd.Function
@law(
    mlp,
    mutants={
        "breaks the graph": mutant("    rows = x.to(", "    torch._dynamo.graph_break()\n    rows = x.to("),
        "fake of another shape": mutant("x.new_empty(x.size(0), w_in.size(0))", "x.new_empty(w_in.size(0), x.size(0))"),
        "slope forgotten when compiled": mutant(
            "grad_h = slope(grad, w_out, a)",
            "grad_h = grad @ w_out if torch.compiler.is_compiling() else slope(grad, w_out, a)",
        ),
    },
)
def test_compiles_whole(relu2: Any) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for autocast in (False, True):
        block = Block(relu2, autocast)
        inputs = (x, block.w_in, block.w_out)
        torch.compiler.reset()
        with without_error():
            y = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
            found = grads(y, *inputs)
        wanted = block(x)
        assert torch.equal(y, wanted)
        for one, other in zip(found, grads(wanted, *inputs), strict=True):
            assert one.dtype == other.dtype
            near(one, other, 1e-6)
    torch.compiler.reset()


@law(
    mlp,
    mutants={
        "a is used up": mutant("a.sqrt().mul_(2)", "a.sqrt_().mul_(2)"),
        "a fake of another dtype": mutant(
            "return grad.new_empty(grad.size(0)", "return grad.float().new_empty(grad.size(0)"
        ),
        "a fake weight of another dtype": mutant("rows.size(1), dtype=dtype)", "rows.size(1))"),
        "a fake of another shape": mutant("return x.new_empty(x.size(0), w", "return x.new_empty(x.size(1), w"),
    },
)
def test_the_operators_keep_torchs_rules(relu2: Any) -> None:
    x, w_in, w_out = (tensor.detach() for tensor in case(0, (7,), (4, 6, 4)))
    with without_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(relu2.activation_operator, (x, w_in))
        torch.library.opcheck(relu2.hidden_gradient_operator, (x, w_out, torch.rand(7, 6).double()))
        torch.library.opcheck(relu2.weight_gradient_operator, (x, torch.rand(7, 6).double(), torch.float32))


X, IN, OUT = torch.zeros(2, 3, 4), torch.zeros(6, 4), torch.zeros(5, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.zeros(6, 3), OUT), r"x \(2, 3, 4\), w_in \(6, 3\) and w_out \(5, 6\) do not fit"),
        ((X, IN, torch.zeros(6, 5)), r"w_out \(6, 5\) do not fit"),
        ((X, torch.zeros(4), OUT), r"w_in \(4,\) .* do not fit"),
        ((X, IN, torch.zeros(6)), r"w_out \(6,\) do not fit"),
        ((torch.tensor(1.0), IN, OUT), r"x \(\), .* do not fit"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp.relu2_mlp(*arguments)


def test_it_is_differentiated_once() -> None:
    inputs = case(0, (4,))
    (grad,) = torch.autograd.grad(mlp.relu2_mlp(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(grad.sum())
