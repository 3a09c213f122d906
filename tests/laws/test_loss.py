"""Proves oracle/fused/loss.py: value and gradients of the softcapped cross-entropy, in chunks. Runs on the CPU.

The reference is the plain definition in float64, differentiated by autograd. A mutant is the module itself with one
piece of its source replaced. The Triton kernel has its own tests in tests/gpu.
"""

import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from oracle.fused import loss

from .law import law

loss_of = loss.softcapped_cross_entropy
Given = tuple[Tensor, Tensor, Tensor]  # x, weight, targets
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 9)
softcaps = st.sampled_from([0.5, 1.0, 15.0, 300.0])
chunks = st.sampled_from([1, 2, 3, 5, 9, 1000, None])
leads: st.SearchStrategy[tuple[int, ...]] = st.sampled_from([(), (2, 3), (3, 1, 2)]) | st.tuples(st.integers(1, 12))
scales = st.sampled_from([0.0, 0.01, 1.0, 30.0, 1e4])  # of the logits: from uniform to saturated


def mutant(old: str, new: str, function: str = "softcapped_cross_entropy") -> Callable[..., Tensor]:
    source = Path(loss.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in loss.py"
    module = types.ModuleType(f"oracle.fused_mutant_{len(sys.modules)}")
    sys.modules[module.__name__] = module  # torch.compile imports what it traces
    source = source.replace(old, new)
    # What a mutant leaves out is 0, not what memory happens to hold
    source = source.replace(".new_empty(", ".new_zeros(").replace("empty_like(x)", "zeros_like(x)")
    exec(compile(source, "fused_mutant.py", "exec"), module.__dict__)
    return cast(Callable[..., Tensor], getattr(module, function))


def plain(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    logits = softcap * torch.tanh((x @ weight.T) / softcap)
    return F.cross_entropy(logits.reshape(-1, len(weight)), targets.reshape(-1))


def case(
    seed: int, lead: tuple[int, ...], columns: int, words: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Given:
    """x, weight, targets; the first target is the first word and the last one the last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, columns, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(words, columns, generator=generator, dtype=torch.float64)
    targets = torch.randint(words, lead, generator=generator)
    targets.view(-1)[0] = 0
    targets.view(-1)[-1] = words - 1
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


givens = st.builds(case, seeds, leads, sides, sides, scales)


def grads(loss: Tensor, *inputs: Tensor, incoming: float = 1.0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, torch.tensor(incoming, dtype=loss.dtype))


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = torch.linalg.vector_norm(found.detach().double() - wanted.detach().double())
    assert float(error) <= tolerance * (1e-3 + float(torch.linalg.vector_norm(wanted.detach().double())))


CHUNKED = {
    "the last chunk left out": mutant("range(0, len(x), chunk)", "range(0, max(1, len(x) - chunk), chunk)"),
    "chunks overlap": mutant("range(0, len(x), chunk)", "range(0, len(x), max(1, chunk - 1))"),
    "the first targets for every chunk": mutant(
        "loss_and_gradient_(logits, targets[place]", "loss_and_gradient_(logits, targets[: len(logits)]"
    ),
    "weight's gradient of the last chunk": mutant("addmm_(logits.T, x[place])", "addmm_(logits.T, x[place], beta=0)"),
}


@law(
    loss_of,
    mutants={
        "no softcap": mutant(".div_(softcap).tanh_()", ".div_(softcap)"),
        "not scaled back": mutant("capped = t * softcap", "capped = t * 1"),
        "of the sum": mutant("losses.mean()", "losses.sum()"),
        "the next target": mutant(
            "- capped.gather(1, targets[", "- capped.gather(1, (targets + 1).fmod(logits.size(1))["
        ),
        "no normalizer": mutant("capped.logsumexp(1)", "capped.amax(1)"),
        "overflows": mutant("capped.logsumexp(1)", "capped.float().exp().sum(1).log().double()"),
        "the last chunk left out": CHUNKED["the last chunk left out"],
        "the first targets for every chunk": CHUNKED["the first targets for every chunk"],
    },
    given=givens,
    softcap=softcaps,
    chunk=chunks,
)
def test_is_the_plain_loss(loss_of: Any, given: Given, softcap: float, chunk: int | None) -> None:
    x, weight, targets = given
    loss = loss_of(x, weight, targets, softcap, chunk=chunk)
    assert loss.shape == () and loss.dtype == torch.float64
    near(loss, plain(x, weight, targets, softcap), 1e-12)
    with torch.no_grad():
        assert torch.equal(loss_of(x, weight, targets, softcap, chunk=chunk), loss)


@law(
    loss_of,
    mutants={
        **CHUNKED,
        "no slope of the softcap": mutant("p.sub_(p * t.square_())", "p"),
        "slope 1 - t": mutant("p * t.square_()", "p * t"),
        "softmax alone": mutant("(len(p), 1), -1.0)", "(len(p), 1), 0.0)"),
        "the target's sign": mutant("(len(p), 1), -1.0)", "(len(p), 1), 1.0)"),
        "softmax of the raw logits": mutant(
            "p = capped.sub_(normalizer[:, None]).exp_()", "p = (t.atanh() * softcap).softmax(1)"
        ),
        "gradient of the sum": mutant("grad / ctx.rows", "grad / 1"),
        "x's gradient kept from the first chunk": mutant("out=grad_x[place]", "out=grad_x[: len(logits)]"),
    },
    given=givens,
    softcap=softcaps,
    chunk=chunks,
)
def test_has_the_plain_gradients(loss_of: Any, given: Given, softcap: float, chunk: int | None) -> None:
    x, weight, targets = given
    found = grads(loss_of(x, weight, targets, softcap, chunk=chunk), x, weight)
    for grad, wanted in zip(found, grads(plain(x, weight, targets, softcap), x, weight), strict=True):
        near(grad, wanted, 1e-10)


@law(
    loss_of,
    mutants={
        "no slope of the softcap": mutant("p.sub_(p * t.square_())", "p"),
        "incoming gradient forgotten": mutant("(grad / ctx.rows)", "(grad.sign() / ctx.rows)"),
        "weight's gradient of the last chunk": CHUNKED["weight's gradient of the last chunk"],
    },
)
def test_passes_gradcheck(loss_of: Any) -> None:
    x, weight, targets = case(0, (2, 3), 4, 5)

    def curved(x: Tensor, weight: Tensor) -> Tensor:  # so that what comes in is not 1
        loss: Tensor = loss_of(x, weight, targets, 2.0, chunk=4)
        return loss.square() * 3

    assert torch.autograd.gradcheck(curved, (x, weight), raise_exception=False)


@law(
    loss_of,
    mutants={
        "incoming gradient forgotten": mutant("(grad / ctx.rows)", "(grad.sign() / ctx.rows)"),
        "for x alone": mutant("(grad_weight * scale)", "(grad_weight / ctx.rows)"),
        "for the weight alone": mutant("torch.mul(grad_x, scale,", "torch.div(grad_x, ctx.rows,"),
    },
    seed=seeds,
    chunk=chunks,
    incoming=st.sampled_from([-2.0, 0.0, 1 / 3, 1.0, 1e6]),
)
def test_is_linear_in_the_incoming_gradient(loss_of: Any, seed: int, chunk: int | None, incoming: float) -> None:
    """And a graph that is kept can be walked again, with the same outcome."""
    x, weight, targets = case(seed, (7,), 3, 5)
    loss = loss_of(x, weight, targets, 4.0, chunk=chunk)
    one, scaled = (
        torch.autograd.grad(loss, (x, weight), torch.tensor(by, dtype=loss.dtype), retain_graph=True)
        for by in (1.0, incoming)
    )
    for a, b in zip(one, scaled, strict=True):
        near(b, incoming * a, 1e-14)


@law(
    loss_of,
    mutants={
        **CHUNKED,
        "mean over chunks": mutant("losses.mean()", "torch.stack([c.mean() for c in losses.split(chunk)]).mean()"),
    },
    seed=seeds,
    rows=st.integers(1, 20),
    chunk=st.integers(1, 21),
)
def test_does_not_depend_on_the_chunk(loss_of: Any, seed: int, rows: int, chunk: int) -> None:
    x, weight, targets = case(seed, (rows,), 4, 6, scale=3.0)
    outcomes = []
    for size in (chunk, rows):
        loss = loss_of(x, weight, targets, 5.0, chunk=size)
        outcomes.append((loss, *grads(loss, x, weight)))
    for found, wanted in zip(*outcomes, strict=True):
        near(found, wanted, 1e-13)


@law(
    loss_of,
    mutants={
        "the last micro-batch": mutant("return grad_x, grad_weight, None", "return grad_x, grad_weight * 0, None"),
        "a mean of its own": mutant("(grad / ctx.rows)", "(grad.sign() / ctx.rows)"),
    },
    seed=seeds,
    parts=st.sampled_from([1, 2, 4]),
)
def test_gradients_accumulate(loss_of: Any, seed: int, parts: int) -> None:
    x, weight, targets = case(seed, (8,), 4, 6)
    for some, aim in zip(x.chunk(parts), targets.chunk(parts), strict=True):
        torch.autograd.backward(loss_of(some, weight, aim, 5.0, chunk=3) / parts)
    assert x.grad is not None and weight.grad is not None
    for found, wanted in zip((x.grad, weight.grad), grads(plain(x, weight, targets, 5.0), x, weight), strict=True):
        near(found, wanted, 1e-12)


@law(
    loss_of,
    mutants={
        "always for x": mutant("if wanted[0] else None", "if True else None"),
        "always for the weight": mutant("if wanted[1] else None", "if True else None"),
        "without a look at no_grad": mutant("torch.is_grad_enabled() and ", ""),
        "always over the logits": mutant("any(wanted))", "True)"),
    },
    for_x=st.booleans(),
    for_weight=st.booleans(),
    enabled=st.booleans(),
)
def test_no_gradient_is_made_that_nobody_asks_for(loss_of: Any, for_x: bool, for_weight: bool, enabled: bool) -> None:
    x, weight, targets = case(0, (4,), 3, 5)
    x.requires_grad_(for_x)
    weight.requires_grad_(for_weight)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.set_grad_enabled(enabled),
    ):
        loss = loss_of(x, weight, targets, 5.0, chunk=2)
    counts = {event.key: event.count for event in profile.key_averages()}
    products = counts.get("aten::mm", 0), counts.get("aten::addmm_", 0)
    assert products == (4 if for_x and enabled else 2, 2 if for_weight and enabled else 0)
    assert ("aten::scatter_add_" in counts) == (enabled and (for_x or for_weight)) == loss.requires_grad
    if loss.requires_grad:
        torch.autograd.backward(loss)
        assert (x.grad is not None, weight.grad is not None) == (for_x, for_weight)


@law(
    loss_of,
    mutants={
        "softmax in bfloat16": mutant("t = logits.to(losses.dtype)", "t = logits.to(torch.bfloat16).to(losses.dtype)"),
        "loss in float64": mutant("return losses.mean()", "return losses.double().mean()"),
        "mean in bfloat16": mutant("losses.mean()", "losses.bfloat16().mean().float()"),
    },
    seed=seeds,
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    chunk=chunks,
)
def test_float32_is_near_float64(loss_of: Any, seed: int, scale: float, chunk: int | None) -> None:
    x, weight, targets = case(seed, (2, 5), 16, 33, scale, torch.float32)
    x64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    loss, wanted = loss_of(x, weight, targets, 15.0, chunk=chunk), plain(x64, weight64, targets, 15.0)
    assert loss.dtype == torch.float32
    near(loss, wanted, 1e-5)
    for found, exact in zip(grads(loss, x, weight), grads(wanted, x64, weight64), strict=True):
        assert found.dtype == torch.float32
        near(found, exact, 1e-4)


@law(
    loss_of,
    mutants={
        "x rounded": mutant("rows = x.to(dtype)", "rows = x.bfloat16().to(dtype)"),
        "one dtype for both gradients": mutant(".to(ctx.dtype)", ".to(torch.bfloat16)"),
        "float64 cast down": mutant("else torch.promote_types(x.dtype, torch.float32)", "else torch.float32"),
        "autocast": lambda x, *rest, **chunk: loss_of(
            x.bfloat16() if torch.is_autocast_enabled("cpu") else x, *rest, **chunk
        ),
    },
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    autocast=st.booleans(),
)
def test_halves_and_autocast(loss_of: Any, dtype: torch.dtype, autocast: bool) -> None:
    """Off CUDA nothing in between is rounded to half types, whatever x is and autocast says."""
    x, weight, targets = case(3, (6,), 16, 33, 2.0, dtype)
    weight = weight.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(x, weight, targets, 15.0, chunk=4)
    found = grads(loss, x, weight)
    assert (loss.dtype, found[0].dtype, found[1].dtype) == (weight.dtype, dtype, weight.dtype)
    x64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    wanted = plain(x64, weight64, targets, 15.0)
    near(loss, wanted, 1e-6)
    near(found[1], grads(wanted, weight64)[0], 1e-5)


@law(
    loss_of,
    mutants={
        "traced": mutant("if torch.compiler.is_compiling():", "if False:"),
        "with another chunk": mutant(
            "softcap, chunk=chunk)\n    if weight", "softcap * 2, chunk=chunk)\n    if weight"
        ),
    },
)
def test_runs_as_it_is_inside_a_compiled_function(loss_of: Any) -> None:
    x, weight, targets = case(0, (4,), 3, 5)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(x: Tensor) -> Tensor:
        loss: Tensor = loss_of(x * 2, weight, targets, 5.0, chunk=3)
        return loss + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what dynamo itself does at a break
        loss = torch.compile(step, backend=backend)(x)
    torch.compiler.reset()
    near(loss, plain(x * 2, weight, targets, 5.0) + 1, 1e-14)
    near(grads(loss, x)[0], grads(plain(x * 2, weight, targets, 5.0), x)[0], 1e-12)
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert names and not any("tanh" in name or "autograd_function" in name for name in names)


@law(
    loss.softcapped,
    mutants={
        "no softcap": mutant("torch.tanh(logits.to(exact) / softcap)", "(logits.to(exact) / softcap)", "softcapped"),
        "not scaled back": mutant("return softcap * torch.tanh", "return torch.tanh", "softcapped"),
        "in halves": mutant("torch.tanh(logits.to(exact) / softcap)", "torch.tanh(logits / softcap)", "softcapped"),
        "float64 cast down": mutant(
            "exact = torch.promote_types(logits.dtype, torch.float32)\n    plain",
            "exact = torch.float32\n    plain",
            "softcapped",
        ),
        "cut off from the gradient": lambda logits, softcap: loss.softcapped(logits.detach(), softcap),
    },
    seed=seeds,
    lead=leads,
    scale=scales,
    softcap=softcaps,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_softcapped_is_its_definition(
    softcapped: Any, seed: int, lead: tuple[int, ...], scale: float, softcap: float, dtype: torch.dtype
) -> None:
    """With its gradient: 1 - tanh(z / softcap)**2."""
    logits = case(seed, lead, 5, 2, min(scale, 1e3), dtype)[0]
    capped = softcapped(logits, softcap)
    assert capped.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    t = torch.tanh(logits.detach().double() / softcap)
    near(capped, softcap * t, 1e-6 if dtype != torch.float64 else 1e-14)
    assert capped.requires_grad
    near(grads(capped.sum(), logits)[0], 1 - t.square(), {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2))
    with torch.no_grad():
        assert torch.equal(softcapped(logits, softcap), capped)


@pytest.mark.parametrize(
    ("logits", "softcap", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), 15.0, "logits torch.int64 and softcap 15.0"),
        (torch.zeros(2), 0.0, "softcap 0.0, use a floating dtype and above 0"),
        (torch.zeros(2), float("nan"), "softcap nan"),
    ],
)
def test_softcapped_names_what_does_not_fit(logits: Tensor, softcap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss.softcapped(logits, softcap)


X, W, T = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.zeros(5, 3), T, 15.0), r"x \(2, 3, 4\), weight \(5, 3\) and targets \(2, 3\) do not fit"),
        ((X, torch.zeros(4), T, 15.0), r"weight \(4,\) .* do not fit"),
        ((X, W, T.T, 15.0), r"targets \(3, 2\) do not fit"),
        ((X.flatten(0, 1), W, T, 15.0), r"x \(6, 4\), .* do not fit"),
        ((torch.tensor(1.0), W, T, 15.0), r"x \(\), .* do not fit"),
        ((X.long(), W, T, 15.0), "x torch.int64, .* use floating dtypes and int64"),
        ((X, W, T.int(), 15.0), "targets torch.int32, use floating dtypes and int64"),
        ((X[:0], W, T[:0], 15.0), "there is no target"),
        ((X, W, T, 0.0), "softcap is 0.0, use a number above 0"),
        ((X, W, T, float("nan")), "softcap is nan"),
        ((X, W, T + 5, 15.0), r"target 5 is not in \[0, 5\)"),
        ((X, W, T - 100, 15.0), r"target -100 is not in \[0, 5\)"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(*arguments)


def test_a_chunk_has_a_row() -> None:
    with pytest.raises(ValueError, match="chunk is 0, use at least 1"):
        loss_of(X, W, T, 15.0, chunk=0)


def test_it_is_differentiated_once() -> None:
    x, weight, targets = case(0, (4,), 3, 5)
    (grad,) = torch.autograd.grad(loss_of(x, weight, targets, 5.0).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(grad.sum())
