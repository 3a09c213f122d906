"""Proves the optimizer mathematics: each law holds for oracle/optim.py and fails for planted bugs. Needs torch.

Tolerances are for float32; laws about the shape of a formula are checked exactly. `grad` matrices are built as
U diag(sigma) V^T, so that what must happen to each singular value is known.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from oracle import optim

from .law import law

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 32)
shapes = st.sampled_from([(1, 1), (1, 32), (32, 1), (16, 16), (32, 8), (8, 32)]) | st.tuples(sides, sides)
scales = st.integers(-4, 4).map(lambda k: 10.0**k)
conditions = st.sampled_from([1.0, 3.0, 10.0, 100.0, 1000.0])
rates = st.sampled_from([1e-3, 0.02, 0.3])
decays = st.sampled_from([0.0, 0.1, 0.5, 2.0])


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(64)
def orthogonal(seed: int, n: int) -> Tensor:
    q: Tensor = torch.linalg.qr(gaussian(seed, n, n).double()).Q
    return q


def factors(seed: int, shape: tuple[int, int], condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma, V in float64 with sigma log-spaced from 1 to 1/condition; the matrix is U diag(sigma) V^T."""
    rank = min(shape)
    sigma = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    return orthogonal(seed, shape[0])[:, :rank], sigma, orthogonal(seed + 1, shape[1])[:, :rank]


def matrix(seed: int, shape: tuple[int, int], condition: float = 10.0, scale: float = 1.0) -> Tensor:
    u, sigma, v = factors(seed, shape, condition)
    return (scale * (u * sigma) @ v.mT).float()


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


# -----------------------------------------------------------------------------
# Polar Express

polar = optim.polar_express


def planted_polar(
    table: tuple[tuple[float, float, float], ...] = optim.POLAR_EXPRESS,
    divide: Callable[[Tensor], Tensor] = lambda g: torch.linalg.matrix_norm(g, keepdim=True) * 1.02 + 1e-6,
) -> Callable[[Tensor], Tensor]:
    """Polar Express with another table or another divisor."""

    def run(grad: Tensor) -> Tensor:
        x = grad / divide(grad)
        for a, b, c in table:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    return run


NEWTON_SCHULZ = ((1.5, -0.5, 0.0),) * 5
DIGIT_LOST = (*optim.POLAR_EXPRESS[:3], (3.285753657755655, -2.3681294933425376, 0.046), optim.POLAR_EXPRESS[4])


@law(
    polar,
    mutants={
        "four steps": lambda g: polar(g, steps=4),
        "a digit lost in the table": planted_polar(DIGIT_LOST),
        "table reversed": planted_polar(optim.POLAR_EXPRESS[::-1]),
        "Newton-Schulz": planted_polar(NEWTON_SCHULZ),
    },
    seed=seeds,
    shape=shapes,
    condition=conditions,
    scale=scales,
)
def test_singular_values_land_in_their_range(
    polar: Any, seed: int, shape: tuple[int, int], condition: float, scale: float
) -> None:
    u, sigma, v = factors(seed, shape, condition)
    out = polar((scale * (u * sigma) @ v.mT).float()).double()
    landed = (u.mT @ out @ v).diagonal()  # each on its own singular vectors
    assert float(torch.linalg.svdvals(out).max()) <= 1.141 + 0.005
    assert float(landed[sigma / sigma.norm() >= 2e-3].min()) >= 0.859 - 0.005


@law(
    lambda g: polar(g, dtype=torch.bfloat16),
    mutants={"four steps": lambda g: polar(g, steps=4, dtype=torch.bfloat16)},
    seed=seeds,
    condition=st.sampled_from([1.0, 3.0, 10.0]),
)
def test_singular_values_land_in_bfloat16(polar: Any, seed: int, condition: float) -> None:
    landed = torch.linalg.svdvals(polar(matrix(seed, (16, 32), condition)))
    assert float(landed.min()) >= 0.85 and float(landed.max()) <= 1.15


@law(
    lambda g: polar(g, dtype=g.dtype),
    mutants={
        "divides by the largest entry": planted_polar(divide=lambda g: 8 * g.abs().amax((-2, -1), keepdim=True)),
        "divides by the norm of columns": planted_polar(divide=lambda g: g.norm(dim=-2, keepdim=True)),
        "divides by the norm of rows": planted_polar(divide=lambda g: g.norm(dim=-1, keepdim=True)),
    },
    seed=seeds,
    shape=shapes,
)
def test_commutes_with_rotations(polar: Any, seed: int, shape: tuple[int, int]) -> None:
    """In float64, where rounding cannot hide a fault; in float32 on a matrix large enough to be well-conditioned."""
    turns = orthogonal(seed + 2, shape[0]), orthogonal(seed + 3, shape[1])
    large = orthogonal(0, 64), orthogonal(1, 64)
    for grad, (q, p), tolerance in (
        (matrix(seed, shape).double(), turns, 1e-11),
        (gaussian(seed, 64, 64), large, 5e-6),
    ):
        left, right = (polar(turned.to(grad.dtype)) for turned in (q @ grad.double(), grad.double() @ p))
        assert gap(left, q @ polar(grad).double()) <= tolerance
        assert gap(right, polar(grad).double() @ p) <= tolerance


@law(
    polar,
    mutants={
        "divides by the norm of columns": planted_polar(divide=lambda g: g.norm(dim=-2, keepdim=True)),
        "tall matrices take another table": lambda g: (planted_polar(DIGIT_LOST) if len(g) > len(g.mT) else polar)(g),
    },
    seed=seeds,
    shape=shapes,
)
def test_commutes_with_transposition(polar: Any, seed: int, shape: tuple[int, int]) -> None:
    grad = matrix(seed, shape)
    assert gap(polar(grad.mT), polar(grad).mT) <= 1e-5


def squashed(divide: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda g: polar(g / divide(g), dtype=torch.bfloat16)


@law(
    lambda g: polar(g, dtype=torch.bfloat16),
    mutants={
        "rows normalised first": squashed(lambda g: g.norm(dim=-1, keepdim=True)),
        "entries squashed first": squashed(lambda g: 1 + g.abs()),
    },
    seed=seeds,
)
def test_commutes_in_bfloat16_as_well_as_it_can(polar: Any, seed: int) -> None:
    grad = gaussian(seed, 48, 64)
    q, p = orthogonal(0, 48), orthogonal(1, 64)
    turned = polar((q @ grad.double() @ p).float())
    assert gap(turned, q @ polar(grad).double() @ p) <= 5e-2
    assert gap(polar(grad.mT), polar(grad).mT) <= 2e-2


@law(
    polar,
    mutants={
        "not normalised": planted_polar(divide=lambda g: torch.ones(())),
        "divides by the squared norm": planted_polar(divide=lambda g: g.square().sum((-2, -1), keepdim=True)),
    },
    seed=seeds,
    shape=shapes,
    power=st.integers(1, 8),
)
def test_ignores_scale(polar: Any, seed: int, shape: tuple[int, int], power: int) -> None:
    grad = matrix(seed, shape)
    grad = grad * 64 / grad.norm()  # the 1e-6 beside the norm is below a rounding error from here on
    assert torch.equal(polar(grad * 2**power), polar(grad))
    large = gaussian(seed, 64, 64)
    assert gap(polar(large * 3**power), polar(large)) <= 2e-6


@law(
    polar,
    mutants={
        "divides by the sum": planted_polar(divide=lambda g: g.sum((-2, -1), keepdim=True) * 8 + 1e-6),
        "of the absolute values": lambda g: polar(g.abs()),
    },
    seed=seeds,
    shape=shapes,
)
def test_is_odd(polar: Any, seed: int, shape: tuple[int, int]) -> None:
    grad = matrix(seed, shape)
    assert torch.equal(polar(-grad), -polar(grad))


@law(
    polar,
    mutants={"no epsilon": planted_polar(divide=lambda g: torch.linalg.matrix_norm(g, keepdim=True))},
    shape=shapes,
)
def test_zero_stays_zero(polar: Any, shape: tuple[int, int]) -> None:
    assert torch.equal(polar(torch.zeros(shape)), torch.zeros(shape))


@law(
    polar,
    mutants={
        "in bfloat16": lambda g: polar(g, dtype=torch.bfloat16),
        "dithered": lambda g: polar(g + 1e-3 * torch.eye(*g.shape)),
    },
    seed=seeds,
    rank=st.integers(1, 7),
    repeated=st.booleans(),
)
def test_rank_is_kept(polar: Any, seed: int, rank: int, repeated: bool) -> None:
    grad = (orthogonal(seed, 8)[:, :rank] @ orthogonal(seed + 1, 16)[:rank]).float()
    if repeated:
        grad = torch.cat((grad, grad))  # duplicated rows
    landed = torch.linalg.svdvals(polar(grad))
    assert float(landed[:rank].min()) >= 0.859 - 0.005
    assert float(landed[rank:].max()) <= 1e-4


@law(
    polar,
    mutants={"no iteration": planted_polar(()), "sign of the entries": lambda g: g.sign()},
    seed=seeds,
    shape=shapes,
    condition=st.sampled_from([1.0, 3.0, 10.0]),
)
def test_points_along_the_polar_factor(polar: Any, seed: int, shape: tuple[int, int], condition: float) -> None:
    grad = matrix(seed, shape, condition)
    along = float((polar(grad) * grad).sum() / torch.linalg.svdvals(grad).sum())
    assert 0.859 - 0.005 <= along <= 1.141 + 0.005


@law(
    polar,
    mutants={
        "one norm for the stack": planted_polar(divide=lambda g: g.norm() * 1.02 + 1e-6),
        "float64 for all": lambda g: polar(g).double(),
    },
    seed=seeds,
    shape=shapes,
    stack=st.sampled_from([(2,), (3, 2)]),
)
def test_a_stack_is_its_matrices(polar: Any, seed: int, shape: tuple[int, int], stack: tuple[int, ...]) -> None:
    matrices = [matrix(seed + i, shape, scale=10.0**i) for i in range(math.prod(stack))]
    out = polar(torch.stack(matrices).view(*stack, *shape))
    assert out.shape == (*stack, *shape) and out.dtype == torch.float32
    assert max(gap(a, polar(b)) for a, b in zip(out.view(-1, *shape), matrices, strict=True)) <= 5e-6


@pytest.mark.parametrize(
    ("wrong", "message"), [({"steps": 0}, "steps is 0"), ({"norm_factor": 0.9}, "norm_factor is 0.9")]
)
def test_polar_express_refuses_what_cannot_converge(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polar(torch.eye(2), **wrong)


# -----------------------------------------------------------------------------
# Momentum, variance reduction, decay


@law(
    optim.nesterov,
    mutants={
        "heavy ball": lambda g, a, m: (torch.lerp(g, a, m),) * 2,
        "undamped": lambda g, a, m: (g + m * (m * a + g), m * a + g),
        "looks at the old average": lambda g, a, m: (torch.lerp(g, a, m), torch.lerp(g, a, m)),
        "weights swapped": lambda g, a, m: optim.nesterov(g, a, 1 - m),
    },
    seed=seeds,
    momentum=st.sampled_from([0.0, 0.5, 0.85, 0.95, 1.0]),
)
def test_nesterov_by_definition(nesterov: Any, seed: int, momentum: float) -> None:
    grad, average = gaussian(seed, 2, 4, 3)
    direction, new = nesterov(grad, average, momentum)
    assert gap(new, momentum * average.double() + (1 - momentum) * grad) <= 1e-6
    assert gap(direction, (1 - momentum) * grad.double() + momentum * new) <= 1e-6


@law(
    optim.second_moment_shape,
    mutants={
        "square counts as wide": lambda s: (*s[:-2], s[-2], 1) if s[-2] > s[-1] else (*s[:-2], 1, s[-1]),
        "the other side": lambda s: (*s[:-2], 1, s[-1]) if s[-2] >= s[-1] else (*s[:-2], s[-2], 1),
    },
    n=st.integers(1, 3),
    shape=shapes,
)
def test_second_moment_has_one_number_a_line(moment_shape: Any, n: int, shape: tuple[int, int]) -> None:
    rows, cols = shape
    assert moment_shape((n, rows, cols)) == ((n, rows, 1) if rows >= cols else (n, 1, cols))


def planted_normuon(restore: Any = (-2, -1), clamp: float = 1e-10, flip: bool = False, root: bool = True) -> Any:
    def run(update: Tensor, moment: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
        dim = -1 if (moment.size(-1) == 1) is not flip else -2
        moment = torch.lerp(update.square().mean(dim, keepdim=True), moment if not flip else torch.zeros(()), beta2)
        even = update * moment.clamp_min(clamp).pow(-0.5 if root else -1)
        if restore is None:
            return even, moment
        before, after = (torch.linalg.vector_norm(x, dim=restore, keepdim=True) for x in (update, even))
        return even * before / after.clamp_min(clamp), moment

    return run


@law(
    optim.normuon,
    mutants={
        "norm not restored": planted_normuon(restore=None),
        "one norm for the stack": planted_normuon(restore=(-3, -2, -1)),
    },
    seed=seeds,
    shape=shapes,
    beta2=st.sampled_from([0.0, 0.9, 0.95]),
)
def test_normuon_keeps_each_norm(normuon: Any, seed: int, shape: tuple[int, int], beta2: float) -> None:
    update = gaussian(seed, 3, *shape) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    moment = gaussian(seed + 1, *optim.second_moment_shape(update.shape)).square()
    out, _ = normuon(update, moment, beta2)
    before, after = update.double().norm(dim=(-2, -1)), out.double().norm(dim=(-2, -1))
    assert float(((after - before) / before).abs().max()) <= 1e-6


@law(
    optim.normuon,
    mutants={
        "the other axis": planted_normuon(flip=True),
        "no square root": planted_normuon(root=False),
        "does nothing": lambda u, m, b: (u, m),
    },
    seed=seeds,
    shape=shapes,
)
def test_normuon_evens_out_the_lines(normuon: Any, seed: int, shape: tuple[int, int]) -> None:
    update = gaussian(seed, *shape)
    rows, cols = shape
    out, _ = normuon(update, torch.zeros(optim.second_moment_shape(shape)), 0.95)
    lines = out.norm(dim=-1 if rows >= cols else -2)
    assert gap(lines, lines.mean().expand_as(lines)) <= 1e-5 * float(lines.mean())


@law(
    optim.normuon,
    mutants={
        "beta2 swapped": lambda u, m, b: optim.normuon(u, m, 1 - b),
        "state not updated": lambda u, m, b: (optim.normuon(u, m, b)[0], m),
        "sum for mean": lambda u, m, b: (u, b * m + (1 - b) * u.square().sum(-1, keepdim=True)),
    },
    seed=seeds,
    beta2=st.sampled_from([0.0, 0.9, 0.95]),
)
def test_normuon_keeps_a_running_mean(normuon: Any, seed: int, beta2: float) -> None:
    update, moment = gaussian(seed, 2, 6, 4), gaussian(seed + 1, 2, 6, 1).square()
    _, new = normuon(update, moment, beta2)
    assert gap(new, beta2 * moment.double() + (1 - beta2) * update.double().square().mean(-1, keepdim=True)) <= 1e-6


@law(optim.normuon, mutants={"no clamp": planted_normuon(clamp=0.0)}, shape=shapes)
def test_normuon_of_zero_is_zero(normuon: Any, shape: tuple[int, int]) -> None:
    out, moment = normuon(torch.zeros(shape), torch.zeros(optim.second_moment_shape(shape)), 0.95)
    assert torch.equal(out, torch.zeros(shape)) and not moment.any()


signed = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.25, 1.0, 3.0])
pairs = st.lists(st.tuples(signed, signed), min_size=1, max_size=16).map(lambda rows: torch.tensor(rows).T)


@law(
    optim.cautious_update,
    mutants={
        "mask turned round": lambda p, u, lr, wd: p - (lr * u + lr * wd * p * (u * p < 0)),
        "zero does not agree": lambda p, u, lr, wd: p - (lr * u + lr * wd * p * (u * p > 0)),
        "no mask": lambda p, u, lr, wd: p - (lr * u + lr * wd * p),
        "masks the update too": lambda p, u, lr, wd: p - (lr * u + lr * wd * p) * (u * p >= 0),
        "decay after the update": lambda p, u, lr, wd: (p - lr * u) * (1 - lr * wd * (u * p >= 0)),
        "coupled": lambda p, u, lr, wd: p - lr * (u + wd * p * (u * p >= 0)) * lr,
    },
    pair=pairs,
    lr=rates,
    wd=decays,
)
def test_decay_is_cautious(cautious: Any, pair: Tensor, lr: float, wd: float) -> None:
    param, update = pair
    agree = ((param >= 0) & (update >= 0)) | ((param <= 0) & (update <= 0))
    out = cautious(param, update, lr, wd)
    assert torch.equal(out[~agree], (param - lr * update)[~agree])
    assert gap(out, param.double() - lr * update.double() - lr * wd * param.double() * agree) <= 1e-6


@law(
    optim.cautious_update,
    mutants={
        "forgets the learning rate": lambda p, u, lr, wd: p - (lr * u + wd * p),
        "zero does not agree": lambda p, u, lr, wd: p - (lr * u + lr * wd * p * (u * p > 0)),
    },
    pair=pairs,
    lr=rates,
    wd=decays,
)
def test_a_zero_update_decays_fully_and_flips_no_sign(cautious: Any, pair: Tensor, lr: float, wd: float) -> None:
    param = pair[0]
    out = cautious(param, torch.zeros_like(param), lr, wd)
    assert torch.equal(out, param - lr * wd * param)
    assert torch.equal(out.sign(), param.sign())


@law(
    optim.cautious_update,
    mutants={
        "exponential": lambda p, u, lr, wd: p * math.exp(-lr * wd) - lr * u,
        "learning rate grows with decay": lambda p, u, lr, wd: optim.cautious_update(p, u, lr * (1 + wd), wd),
    },
    pair=pairs,
    lr=rates,
)
def test_decay_is_decoupled(cautious: Any, pair: Tensor, lr: float) -> None:
    none, half, whole = (cautious(*pair, lr, wd) for wd in (0.0, 0.5, 1.0))
    assert gap(half, (none.double() + whole.double()) / 2) <= 1e-6


@law(
    optim.muon_lr,
    mutants={
        "wide for tall": lambda lr, rows, cols: lr * max(1.0, cols / rows) ** 0.5,
        "shrinks wide ones": lambda lr, rows, cols: lr * (rows / cols) ** 0.5,
        "no root": lambda lr, rows, cols: lr * max(1.0, rows / cols),
    },
    lr=rates,
    shape=shapes,
)
def test_muon_lr_grows_with_tallness_only(muon_lr: Any, lr: float, shape: tuple[int, int]) -> None:
    rows, cols = shape
    assert muon_lr(lr, rows, cols) == (lr if rows <= cols else lr * math.sqrt(rows / cols))


def test_numbers_that_change_may_be_tensors() -> None:
    """So that a compiled caller need not recompile for each value."""
    x, y = gaussian(0, 2, 4, 4)
    moment = torch.ones(4, 1)
    for function, arguments, numbers in (
        (optim.nesterov, (x, y), (0.9,)),
        (optim.normuon, (x, moment), (0.95,)),
        (optim.cautious_update, (x, y), (0.02, 0.1)),
    ):
        plain: Any = function(*arguments, *numbers)
        wrapped: Any = function(*arguments, *map(torch.tensor, numbers))
        torch.testing.assert_close(wrapped, plain)


# -----------------------------------------------------------------------------
# Whole steps

MUON = {"momentum": 0.9, "beta2": 0.95, "steps": 5, "norm_factor": 1.02}


def muon_run(muon: Any, params: list[Tensor], grads: list[list[Tensor]], **options: float) -> list[Tensor]:
    params = [param.clone() for param in params]
    averages = [torch.zeros_like(param) for param in params]
    moments = [torch.zeros(optim.second_moment_shape(param.shape)) for param in params]
    for step in grads:
        muon(params, step, averages, moments, **{**MUON, **options})
    return params


def without(name: str) -> Callable[..., None]:
    """Muon with one of its parts off."""
    parts: dict[str, dict[str, Any]] = {
        "momentum": {"momentum": 0.0},
        "variance reduction": {"beta2": 1.0},
        "decay": {"weight_decay": 0.0},
        "one step": {"steps": 4},
    }
    return lambda *lists, **options: optim.muon_(*lists, **{**options, **parts[name]})


def forgetful(params: Any, grads: Any, averages: Any, moments: Any, **options: Any) -> None:
    optim.muon_(params, grads, [a.clone() for a in averages], moments, **options)


@law(
    optim.muon_,
    mutants={
        **{f"without {name}": without(name) for name in ("momentum", "variance reduction", "decay", "one step")},
        "average not kept": forgetful,
        "lr unscaled for tall": lambda p, *lists, lr, **o: optim.muon_(p, *lists, lr=lr / 2**0.5, **o),
    },
    seed=seeds,
)
def test_muon_by_definition(muon: Any, seed: int) -> None:
    """Against the formulas, written out in float64 for one tall matrix."""
    lr, wd = 0.05, 0.3
    start, grads = matrix(seed, (8, 4)), [matrix(seed + i, (8, 4)) for i in (1, 2, 3)]
    p, average, moment = start.double(), torch.zeros(8, 4).double(), torch.zeros(8, 1).double()
    for grad in grads:
        g = grad.double()
        average = MUON["momentum"] * average + (1 - MUON["momentum"]) * g
        x = (1 - MUON["momentum"]) * g + MUON["momentum"] * average
        x = x / (x.square().sum().sqrt() * MUON["norm_factor"] + 1e-6)
        for a, b, c in optim.POLAR_EXPRESS:
            x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
        moment = MUON["beta2"] * moment + (1 - MUON["beta2"]) * x.square().mean(1, keepdim=True)
        even = x / moment.sqrt()
        even = even * x.norm() / even.norm()
        step = lr * math.sqrt(2)
        p = p - step * even - step * wd * torch.where(even * p >= 0, p, 0)
    [out] = muon_run(muon, [start], [[grad] for grad in grads], lr=lr, weight_decay=wd)
    assert gap(out, p) <= 1e-4


def one_state(params: Any, grads: Any, averages: Any, moments: Any, **options: Any) -> None:
    optim.muon_(params, grads, [averages[0]] * len(params), moments, **options)


@law(
    optim.muon_,
    mutants={
        "one average for the stack": one_state,
        "gradients out of order": lambda p, g, *lists, **o: optim.muon_(p, g[::-1], *lists, **o),
    },
    seed=seeds,
    shape=st.sampled_from([(8, 8), (16, 4), (4, 16), (3, 1)]),
)
def test_stacking_changes_nothing(muon: Any, seed: int, shape: tuple[int, int]) -> None:
    options = {"lr": 0.02, "weight_decay": 0.1}
    params = [matrix(seed + i, shape) for i in range(3)]
    grads = [[matrix(seed + 3 * step + i, shape) for i in range(3)] for step in range(2)]
    together = muon_run(muon, params, grads, **options)
    alone = [muon_run(optim.muon_, [params[i]], [[g[i]] for g in grads], **options)[0] for i in range(3)]
    assert max(gap(a, b) for a, b in zip(together, alone, strict=True)) <= 1e-6


@law(
    optim.muon_,
    mutants={
        "skips zero gradients": lambda p, g, *lists, **o: optim.muon_(p, g, *lists, **o) if g[0].any() else None,
        "decays without lr": lambda *lists, lr, **o: optim.muon_(*lists, lr=1.0, **o),
    },
    seed=seeds,
    shape=shapes,
    wd=st.sampled_from([0.1, 0.5]),
)
def test_muon_decays_under_a_zero_gradient(muon: Any, seed: int, shape: tuple[int, int], wd: float) -> None:
    param, lr = gaussian(seed, *shape), 0.02
    [out] = muon_run(muon, [param], [[torch.zeros(shape)]], lr=lr, weight_decay=wd)
    assert torch.equal(out, param - optim.muon_lr(lr, *shape) * wd * param)


ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def adamw_run(adamw: Any, param: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    param, average, moment = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
    for step, grad in enumerate(grads, start=1):
        adamw([param], [grad.clone()], [average], [moment], step=step, **{**ADAM, **options})
    return param


def planted_adamw(*, decay: str = "before", correct: bool = True, eps_inside: bool = False) -> Callable[..., None]:
    def run(
        p: Any, g: Any, m: Any, v: Any, *, step: int, lr: float, betas: Any, eps: float, weight_decay: float
    ) -> None:
        [p], [g], [m], [v] = p, g, m, v
        if decay == "before":
            p.mul_(1 - lr * weight_decay)
        if decay == "coupled":
            g.add_(weight_decay * p)
        m.lerp_(g, 1 - betas[0])
        v.lerp_(g * g, 1 - betas[1])
        unbias = [1 - beta**step if correct else 1.0 for beta in betas]
        root = (v / unbias[1] + eps).sqrt() if eps_inside else (v / unbias[1]).sqrt() + eps
        p.sub_(lr * (m / unbias[0]) / root)
        if decay == "after":
            p.mul_(1 - lr * weight_decay)

    return run


@law(
    optim.adamw_,
    mutants={
        "coupled decay": planted_adamw(decay="coupled"),
        "decay after the step": planted_adamw(decay="after"),
        "no bias correction": planted_adamw(correct=False),
        "epsilon inside the root": planted_adamw(eps_inside=True),
        "betas swapped": lambda *lists, betas, **o: optim.adamw_(*lists, betas=betas[::-1], **o),
        "step one late": lambda *lists, step, **o: optim.adamw_(*lists, step=step + 1, **o),
    },
    seed=seeds,
    steps=st.integers(1, 6),
    lr=rates,
    wd=st.sampled_from([0.0, 0.1, 0.5]),
    eps=st.sampled_from([1e-10, 1e-8, 1e-3]),
    betas=st.sampled_from([(0.8, 0.95), (0.9, 0.999), (0.0, 0.5)]),
)
def test_adamw_is_torchs(
    adamw: Any, seed: int, steps: int, lr: float, wd: float, eps: float, betas: tuple[float, float]
) -> None:
    options: dict[str, Any] = {"lr": lr, "weight_decay": wd, "eps": eps, "betas": betas}
    param, grads = gaussian(seed, 4, 5), [gaussian(seed + i, 4, 5) for i in range(steps)]
    theirs = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], foreach=False, **options)
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
    assert gap(adamw_run(adamw, param, grads, **options), theirs.detach()) <= 1e-6 * float(1 + param.abs().max())


@law(
    optim.adamw_,
    mutants={"coupled decay": planted_adamw(decay="coupled")},
    seed=seeds,
    lr=rates,
    wd=st.sampled_from([0.1, 0.5]),
)
def test_adamw_only_decays_under_a_zero_gradient(adamw: Any, seed: int, lr: float, wd: float) -> None:
    param = gaussian(seed, 4, 5)
    assert torch.equal(adamw_run(adamw, param, [torch.zeros(4, 5)], lr=lr, weight_decay=wd), param * (1 - lr * wd))


# -----------------------------------------------------------------------------
# MuonAdamW


def parameters(seed: int) -> list[torch.nn.Parameter]:
    shapes = [(8, 4), (4, 8), (8, 4), (8, 8), (8, 4)]
    return [torch.nn.Parameter(gaussian(seed + i, *shape)) for i, shape in enumerate(shapes)]


def give_grads(params: list[torch.nn.Parameter], seed: int) -> None:
    for i, param in enumerate(params):
        param.grad = matrix(seed + i, (param.size(0), param.size(1)))


class Positional(optim.MuonAdamW):
    """Keeps the state of the first parameter of each shape for all."""

    def _state(self, param: Tensor, kind: str) -> dict[str, Any]:
        first = next(p for p in self.param_groups[0]["params"] if p.shape == param.shape)
        self.state[param] = state = super()._state(first, kind)
        return state


class NoneIsZero(optim.MuonAdamW):
    def step(self, closure: Any = None) -> Any:
        for param in (param for group in self.param_groups for param in group["params"]):
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        return super().step(closure)


class Compounding(optim.MuonAdamW):
    def scale_lr(self, multiplier: float) -> None:
        for group in self.param_groups:
            group["lr"] *= multiplier


kinds = st.sampled_from(["muon", "adamw"])


@law(
    optim.MuonAdamW,
    mutants={"state by shape": Positional},
    seed=seeds,
    order=st.permutations(range(5)),
    split=st.integers(1, 4),
    kind=kinds,
)
def test_grouping_and_order_change_nothing(optimizer: Any, seed: int, order: list[int], split: int, kind: str) -> None:
    one, other = parameters(seed), parameters(seed)
    shared = {"kind": kind, "lr": 0.02, "weight_decay": 0.1}
    shuffled = [other[i] for i in order]
    a = optimizer([{"params": one, **shared}])
    b = optim.MuonAdamW([{"params": shuffled[:split], **shared}, {"params": shuffled[split:], **shared}])
    for step in range(2):
        give_grads(one, seed + 5 * step)
        give_grads(other, seed + 5 * step)
        a.step()
        b.step()
    assert max(gap(x.detach(), y.detach()) for x, y in zip(one, other, strict=True)) <= 1e-6


@law(optim.MuonAdamW, mutants={"None is zero": NoneIsZero}, seed=seeds, kind=kinds, idle=st.integers(0, 4))
def test_no_gradient_no_step(optimizer: Any, seed: int, kind: str, idle: int) -> None:
    """A parameter that sits a step out is as if that step had not been, whatever shares its shape."""
    params, lone = parameters(seed), parameters(seed)[idle]
    shared = {"kind": kind, "lr": 0.02, "weight_decay": 0.1}
    a, b = optimizer([{"params": params, **shared}]), optim.MuonAdamW([{"params": [lone], **shared}])
    for step in range(3):
        give_grads(params, seed + 5 * step)
        lone.grad = params[idle].grad
        if step == 1:
            params[idle].grad = None
        else:
            b.step()
        a.step()
    assert gap(params[idle].detach(), lone.detach()) <= 1e-6


@law(optim.MuonAdamW, mutants={"compounds": Compounding}, multipliers=st.lists(st.floats(0, 1), min_size=2))
def test_lr_is_the_initial_lr_times_the_multiplier(optimizer: Any, multipliers: list[float]) -> None:
    made = optimizer([{"params": parameters(0)[:1], "kind": "muon", "lr": 0.04}])
    made.add_param_group({"params": parameters(0)[1:], "kind": "adamw", "lr": 0.6})
    for multiplier in (0.5, *multipliers):
        made.scale_lr(multiplier)
        assert [group["lr"] for group in made.param_groups] == [0.04 * multiplier, 0.6 * multiplier]


def test_a_saved_optimizer_goes_on_where_it_was() -> None:
    shared = {"lr": 0.02, "weight_decay": 0.1}
    a, b = parameters(0), parameters(0)
    first, second = (
        optim.MuonAdamW([{"params": p[:3], "kind": "muon", **shared}, {"params": p[3:], "kind": "adamw", **shared}])
        for p in (a, b)
    )
    give_grads(a, 1)
    first.step()
    with torch.no_grad():
        for x, y in zip(a, b, strict=True):
            y.copy_(x)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for params, optimizer in ((a, first), (b, second)):
        give_grads(params, 2)
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"kind": "sgd", "lr": 0.1}, "kind 'sgd', use one of adamw, muon"),
        ({"lr": 0.1}, "kind None"),
        ({"kind": "muon"}, "has no lr"),
        ({"kind": "muon", "lr": 0.1, "betas": (0.9, 0.9)}, "muon groups have no 'betas'"),
        ({"kind": "adamw", "lr": 0.1, "betas": (0.9, 1.0)}, "a beta is 1.0"),
        ({"kind": "muon", "lr": 0.1, "params": [torch.nn.Parameter(torch.zeros(3))]}, r"not for shape \(3,\)"),
    ],
)
def test_a_wrong_group_is_named(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.MuonAdamW([{"params": parameters(0), **group}])


def test_a_closure_computes_the_loss() -> None:
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optim.MuonAdamW([{"params": [param], "kind": "adamw", "lr": 0.1}])

    def closure() -> float:
        loss = param.square().sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert float(param.detach().max()) < 1.0
