"""Proves oracle/fused/heads.py: queries, keys and values, and their gradients. Needs torch; runs on the CPU.

The reference is the plain definition in float64, differentiated by autograd. A mutant is the module itself with one
piece of its source replaced. The Triton kernels have their own tests in tests/gpu.
"""

import itertools
import math
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from oracle.fused import heads as _heads

from .law import law

Function = Callable[..., tuple[Tensor, Tensor, Tensor]]
heads_of: Function = _heads.qkv_heads
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.5, 1.0, 3.0])
numbers = itertools.count()


class Shape(NamedTuple):
    batch: int
    length: int
    columns: int
    q_heads: int
    k_heads: int
    head_dim: int


shapes = st.builds(
    Shape,
    batch=st.integers(1, 3),
    length=st.integers(2, 7),
    columns=st.integers(1, 9),
    q_heads=st.integers(1, 4),
    k_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 6, 16]),
)
SHAPE = Shape(2, 5, 12, 4, 2, 8)


def mutant(old: str, new: str) -> Function:
    """The module with `old`, which stands in it once, replaced by `new`, and with operators of its own."""
    source = Path(_heads.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in heads.py"
    module = types.ModuleType(f"oracle._heads_mutant_{next(numbers)}")
    sys.modules[module.__name__] = module  # torch.compile imports what it traces
    source = source.replace(old, new).replace('"autoresearch::', f'"{module.__name__.replace(".", "_")}::')
    exec(compile(source, "_heads_mutant.py", "exec"), module.__dict__)
    return cast(Function, module.qkv_heads)


def plain(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, w_q, w_k, w_v, cos, sin, head_dim, scale = arguments if len(arguments) == 8 else (*arguments, 1.0)

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos[:, None] + right * sin[:, None], right * cos[:, None] - left * sin[:, None]), -1)

    q, k, v = (F.linear(x, w.to(x.dtype)).view(*x.shape[:2], -1, head_dim) for w in (w_q, w_k, w_v))
    q, k = (F.rms_norm(rotate(x), (head_dim,)).to(x.dtype) * scale for x in (q, k))
    return q, k, v


def tables(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(
        torch.arange(length).double(), 100.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    )
    return angle.cos(), angle.sin()


def case(seed: int, shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, w_q, w_k, w_v, cos, sin; all but the tables want a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    batch, length, columns, q_heads, k_heads, head_dim = shape
    weights = (randn(heads * head_dim, columns) for heads in (q_heads, k_heads, k_heads))
    return [randn(batch, length, columns), *weights, *tables(length, head_dim)]


def upstream(outputs: tuple[Tensor, ...], seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]


def results(heads: Function, tensors: list[Tensor], head_dim: int, scale: float) -> list[Tensor]:
    """q, k, v and the gradients of a weighted sum of all three over x and the weights."""
    outputs = heads(*tensors, head_dim, scale)
    return [*outputs, *torch.autograd.grad(outputs, tensors[:4], upstream(outputs))]


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def test_a_mutant_of_nothing_holds() -> None:
    tensors = case(0, SHAPE)
    copy = mutant("# whatever it is where backward is called", "# as it is")
    assert copy is not heads_of
    for a, b in zip(results(copy, tensors, 8, 1.5), results(heads_of, tensors, 8, 1.5), strict=True):
        assert torch.equal(a, b)


# -----------------------------------------------------------------------------
# Values


@law(
    heads_of,
    mutants={
        "turned the other way": mutant(
            "u = left * cos + right * sin, right * cos - left * sin",
            "u = left * cos - right * sin, right * cos + left * sin",
        ),
        "not turned": mutant("u = left * cos + right * sin, right * cos - left * sin", "u = left, right"),
        "eps of float32": mutant("torch.finfo(cos.dtype).eps)", "torch.finfo(torch.float32).eps)"),
        "half of the mean": mutant(" / x.size(-1)", " / (2 * x.size(-1))"),
        "no scale": mutant("(scale * torch.cat(u, -1) * n)", "(torch.cat(u, -1) * n)"),
        "k and v swapped": mutant("for w in (w_q, w_k, w_v)])", "for w in (w_q, w_v, w_k)])"),
        "v is k": mutant("qkv[:, :, q_heads + k.size(2) :]", "qkv[:, :, q_heads : q_heads + k.size(2)]"),
    },
    seed=seeds,
    shape=shapes,
    scale=scales,
    size=st.sampled_from([1e-7, 1.0, 100.0]),
)
def test_values_by_definition(heads: Function, seed: int, shape: Shape, scale: float, size: float) -> None:
    x, *others = case(seed, shape)
    found, wanted = (of(x * size, *others, shape.head_dim, scale) for of in (heads, plain))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and error(a, b) <= 1e-12


@law(
    heads_of,
    mutants={
        "norm of the half": mutant(" / x.size(-1)", " / (x.size(-1) / 2)"),
        "no norm": mutant("(scale * torch.cat(u, -1) * n)", "(scale * torch.cat(u, -1))"),
        "norm before the product": mutant("(scale * torch.cat(u, -1) * n)", "(scale * torch.cat(u, -1) * n.mean())"),
    },
    seed=seeds,
    shape=shapes,
    scale=scales,
)
def test_every_head_has_one_norm(heads: Function, seed: int, shape: Shape, scale: float) -> None:
    for y in heads(*case(seed, shape), shape.head_dim, scale)[:2]:
        norm = torch.linalg.vector_norm(y.detach(), dim=-1)
        torch.testing.assert_close(norm, torch.full_like(norm, scale * math.sqrt(shape.head_dim)), rtol=1e-6, atol=0)


@law(
    heads_of,
    mutants={
        "only the left half turned": mutant("right * cos - left * sin\n", "right\n"),
        "mirrored": mutant("right * cos - left * sin\n", "left * sin - right * cos\n    u = u[0], u[1] * cos\n"),
    },
    seed=seeds,
    shift=st.integers(0, 3),
)
def test_only_distances_count(heads: Function, seed: int, shift: int) -> None:
    """The same x everywhere: q_i . k_j depends on i - j alone, and shifting all positions changes no product."""
    x, *weights = case(seed, SHAPE)[:4]
    x = x[:, :1].expand(-1, 6, -1)
    cos, sin = tables(6 + shift, SHAPE.head_dim)
    q, k, _ = (y.detach() for y in heads(x, *weights, cos[shift:], sin[shift:], SHAPE.head_dim))
    products = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2))
    torch.testing.assert_close(products[..., 1:, 1:], products[..., :-1, :-1], rtol=1e-9, atol=1e-9)
    first, other, _ = heads(x, *weights, *tables(6, SHAPE.head_dim), SHAPE.head_dim)
    unshifted = torch.einsum("bihd,bjhd->bhij", first, other.repeat_interleave(2, 2))
    torch.testing.assert_close(products, unshifted.detach(), rtol=1e-9, atol=1e-9)
    assert error(products[..., :1, :], products[..., 1:2, :]) > 1e-3


@law(
    heads_of,
    mutants={
        "no eps": mutant("torch.rsqrt(mean + torch.finfo(cos.dtype).eps)", "torch.rsqrt(mean)"),
        "starts at one": mutant("qkv = torch.mm(rows, weight.T)", "qkv = (torch.mm(rows, weight.T) + 1)"),
    },
    shape=shapes,
    zero=st.sampled_from(["x", "weights"]),
)
def test_zero_stays_zero(heads: Function, shape: Shape, zero: str) -> None:
    """And the gradients are finite."""
    tensors = case(0, shape)
    with torch.no_grad():
        for tensor in tensors[:1] if zero == "x" else tensors[1:4]:
            tensor.zero_()
    q, k, v, *gradients = results(heads, tensors, shape.head_dim, 1.0)
    assert not any(bool(y.count_nonzero()) for y in (q, k, v))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


# -----------------------------------------------------------------------------
# Gradients


@law(
    heads_of,
    mutants={
        "norm taken for constant": mutant("(g - half * n**2 * mean)", "g"),
        "n once": mutant("(g - half * n**2 * mean)", "(g - half * n * mean)"),
        "turned on, not back": mutant(
            "(left * c - right * s, left * s + right * c)", "(left * c + right * s, right * c - left * s)"
        ),
        "no scale on the way back": mutant("(scale * n * (g -", "(n * (g -"),
        "scale twice": mutant("(scale * n * (g -", "(scale**2 * n * (g -"),
        "v gets none": mutant("torch.cat((*parts, grad_v), 2)", "torch.cat((*parts, 0 * grad_v), 2)"),
        "q and k swapped": mutant("((grad_q, q), (grad_k, k))", "((grad_q, q), (grad_k, q[:, :, : k.size(2)]))"),
        "weight of another row": mutant("torch.mm(grad.T, rows)", "torch.mm(grad.T, rows.flip(0))"),
    },
    seed=seeds,
    shape=shapes,
    scale=scales,
)
def test_gradients_by_definition(heads: Function, seed: int, shape: Shape, scale: float) -> None:
    tensors = case(seed, shape)
    found, wanted = (results(of, tensors, shape.head_dim, scale)[3:] for of in (heads, plain))
    for a, b in zip(found, wanted, strict=True):
        # Of a gradient over q and k with head_dim 2 and one column next to nothing is left: so absolute
        assert a.dtype == b.dtype and float((a - b).abs().max()) <= 1e-9 * float(1 + b.abs().max())


@law(
    heads_of,
    mutants={
        "norm taken for constant": mutant("(g - half * n**2 * mean)", "g"),
        "turned on, not back": mutant(
            "(left * c - right * s, left * s + right * c)", "(left * c + right * s, right * c - left * s)"
        ),
    },
    seed=st.integers(0, 3),
    isometric=st.booleans(),
)
def test_gradcheck(heads: Function, seed: int, isometric: bool) -> None:
    """Tables that are no rotation too."""
    *tensors, cos, sin = case(seed, Shape(1, 3, 5, 2, 1, 4))
    if not isometric:
        cos, sin = (torch.randn(cos.shape, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2))
    try:
        torch.autograd.gradcheck(lambda *t: heads(*t, cos, sin, 4, 1.5), tensors)
    except RuntimeError as wrong:  # gradcheck's GradcheckError
        pytest.fail(str(wrong))


class Wanted(NamedTuple):
    x: bool
    weights: bool


@law(
    heads_of,
    mutants={
        "x if it wants none": mutant("if ctx.needs_input_grad[0]:", "if not ctx.needs_input_grad[0]:"),
        "never the weights": mutant("if ctx.needs_input_grad[1]:", "if ctx.needs_input_grad[0]:"),
    },
    wanted=st.sampled_from([Wanted(True, True), Wanted(True, False), Wanted(False, True)]),
)
def test_what_wants_none_gets_none(heads: Function, wanted: Wanted) -> None:
    tensors = case(0, SHAPE)
    tensors[0].requires_grad_(wanted.x)
    for weight in tensors[1:4]:
        weight.requires_grad_(wanted.weights)
    some = [tensor for tensor in tensors if tensor.requires_grad]
    reference = torch.autograd.grad(plain(*tensors, 8), some, upstream(plain(*tensors, 8)))
    outputs = heads(*tensors, 8)
    try:
        gradients = torch.autograd.grad(outputs, some, upstream(outputs))
    except (RuntimeError, TypeError) as wrong:
        pytest.fail(str(wrong))
    for a, b in zip(gradients, reference, strict=True):
        assert error(a, b) <= 1e-12


@law(heads_of, mutants={"writes into v": mutant("grad_v), 2)", "grad_v.zero_()), 2)")}, only=st.integers(0, 2))
def test_one_output_may_be_used_alone(heads: Function, only: int) -> None:
    tensors = case(0, SHAPE)
    outputs, wanted = heads(*tensors, 8), plain(*tensors, 8)
    gradient = upstream(wanted)[only]
    kept = gradient.clone()
    found = torch.autograd.grad(outputs[only], tensors[:4], gradient, materialize_grads=True)
    for a, b in zip(found, torch.autograd.grad(wanted[only], tensors[:4], kept, materialize_grads=True), strict=True):
        assert float((a - b).abs().max()) <= 1e-9
    assert torch.equal(gradient, kept)


def saved(heads: Function, tensors: list[Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        heads(*tensors, 8)
    return kept


@pytest.mark.parametrize("graph", [False, True])
def test_without_a_gradient_nothing_is_kept(graph: bool) -> None:
    tensors = case(0, SHAPE)
    assert saved(plain, tensors)
    if graph:
        assert not saved(heads_of, [tensor.detach() for tensor in tensors])
    else:
        with torch.no_grad():
            assert not saved(heads_of, tensors)


def test_v_is_a_view_of_the_product() -> None:
    _, _, v = heads_of(*case(0, SHAPE), 8)
    assert v.stride() == (5 * 8 * 8, 8 * 8, 8, 1) and v.untyped_storage().nbytes() == 2 * 5 * 8 * 8 * 8


# -----------------------------------------------------------------------------
# Dtypes, autocast, compilation


@law(
    heads_of,
    mutants={
        "norm in halves": mutant("return torch.promote_types(x.dtype, torch.float32)", "return x.dtype"),
        "not rounded back": mutant("* n).to(qkv.dtype)", "* n).float()"),
    },
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-3, 1.0]),
)
def test_halves_are_normed_in_float32(heads: Function, dtype: torch.dtype, size: float) -> None:
    """Against float64 from the same product, with master weights of float32: only the last rounding is off."""
    shape = Shape(4, 16, 12, 4, 2, 64)
    x, *weights, cos, sin = (tensor.detach() for tensor in case(0, shape, torch.float32))
    q, k, v = heads((x * size).to(dtype), *weights, cos, sin, shape.head_dim, 1.5)
    assert q.dtype == k.dtype == v.dtype == dtype
    qkv = torch.mm((x * size).to(dtype).flatten(0, 1), torch.cat(weights).to(dtype).T).view(4, 16, 8, 64).double()
    cos, sin = cos[:, None], sin[:, None]
    left, right = qkv[:, :, :6].chunk(2, -1)
    u = torch.cat((left * cos + right * sin, right * cos - left * sin), -1)
    wanted = 1.5 * u * (u.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    assert error(torch.cat((q, k), 2), wanted) <= 0.5 * torch.finfo(dtype).eps * 0.75
    assert torch.equal(v.double(), qkv[:, :, 6:])


def step(heads: Function, autocast: bool) -> Callable[..., Tensor]:
    """What a training step does with the heads, down to one number."""

    def run(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            q, k, v = (y.transpose(1, 2) for y in heads(x, w_q, w_k, w_v, cos, sin, 8, 1.5))
            y = F.scaled_dot_product_attention(q, k, 2 * v, is_causal=True, enable_gqa=True)
        return y.double().square().sum()

    return run


def loss_and_gradients(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    loss = run(*tensors)
    return [loss.detach(), *torch.autograd.grad(loss, tensors[:4])]


CASTS = {torch.float64: torch.float64, torch.float32: torch.bfloat16, torch.bfloat16: torch.bfloat16}


@law(
    heads_of,
    mutants={
        "ignores autocast": mutant("dtype = product_dtype(x)", "dtype = x.dtype"),
        "casts float64": mutant(
            "dtype = product_dtype(x)",
            'dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype',
        ),
    },
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_autocast_gives_its_dtype_but_to_float64(heads: Function, dtype: torch.dtype) -> None:
    x, *others = case(0, SHAPE, torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = heads(x, *others, 8)
    by_hand = heads_of(x.to(CASTS[dtype]), *others, 8)
    assert [y.dtype for y in found] == [CASTS[dtype]] * 3
    assert all(torch.equal(a, b) for a, b in zip(found, by_hand, strict=True))
    try:
        gradients = torch.autograd.grad(found, (x, *others[:3]), upstream(found))
    except RuntimeError as wrong:
        pytest.fail(str(wrong))
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32, torch.float32]


@law(
    heads_of,
    mutants={"leaves it on": mutant("with torch.autocast(rows.device.type, enabled=False):", "if True:")},
    seed=seeds,
)
def test_backward_under_autocast_is_exact(heads: Function, seed: int) -> None:
    tensors = case(seed, SHAPE, torch.float32)
    wanted = results(heads, tensors, 8, 1.0)[3:]
    outputs = heads(*tensors, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(outputs, tensors[:4], upstream(outputs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@law(
    heads_of,
    mutants={
        "fakes are float32": mutant(
            "qkv.new_empty(q.shape), qkv.new_empty(k.shape)\n",
            "qkv.new_empty(q.shape, dtype=torch.float32), qkv.new_empty(k.shape, dtype=torch.float32)\n",
        ),
        "breaks the graph": mutant("    heads = [len(w)", "    torch._dynamo.graph_break()\n    heads = [len(w)"),
        "another scale": mutant(
            "head_dim, float(scale))", "head_dim, 1.0 if torch.compiler.is_compiling() else scale)"
        ),
    },
)
def test_compiled_is_eager(heads: Function) -> None:
    for dtype, autocast in ((torch.float64, False), (torch.float32, True), (torch.bfloat16, True)):
        tensors = case(0, SHAPE, dtype)
        run = step(heads, autocast)
        torch.compiler.reset()
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own deprecations
                found = loss_and_gradients(compiled, tensors)
        except Exception as wrong:
            pytest.fail(str(wrong))
        for a, b in zip(found, loss_and_gradients(run, tensors), strict=True):
            assert a.dtype == b.dtype and error(a, b) <= 1e-12


@pytest.mark.parametrize("operator", ["rotate_norm", "rotate_norm_backward"])
def test_operators_are_what_torch_takes_them_for(operator: str) -> None:
    """Schema, fake tensors and strides, by torch's own check."""
    qkv = torch.randn(2, 5, 8, 8)
    cos, sin = (table.float() for table in tables(5, 8))
    if operator == "rotate_norm":
        arguments: tuple[Any, ...] = (qkv, cos, sin, 4, 1.5)
    else:
        strided = torch.randn(2, 4, 5, 8).transpose(1, 2)
        arguments = (strided, strided[:, :, :2], torch.randn(2, 5, 2, 8), qkv, cos, sin, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(getattr(torch.ops.autoresearch, operator), arguments)


BROKEN: dict[str, Callable[[list[Tensor]], tuple[Any, ...]]] = {
    "x without batch": lambda t: (t[0][0], *t[1:], 8),
    "other columns": lambda t: (t[0][..., :3], *t[1:], 8),
    "fewer values than keys": lambda t: (*t[:3], t[3][:8], *t[4:], 8),
    "short tables": lambda t: (*t[:4], t[4][:3], t[5][:3], 8),
    "tables of another head": lambda t: (*t, 16),
    "odd head": lambda t: (*t, 7),
    "no head": lambda t: (*t, 0),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_shapes_that_do_not_fit_are_named(broken: Callable[[list[Tensor]], tuple[Any, ...]]) -> None:
    with pytest.raises(ValueError, match=r"qkv_heads: shapes .* do not fit"):
        heads_of(*broken(case(0, SHAPE)))
