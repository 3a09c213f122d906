"""The locked optimizer mathematics: AdamW, Muon (Polar Express, NorMuon, cautious decay), schedules.

A Muon step on a gradient G of a matrix walks these functions in order:

1. `nesterov`         G and its running mean            -> a smoothed direction
2. `polar_express`    that direction                    -> (nearly) the nearest semi-orthogonal matrix
3. `normuon`          its rows or columns               -> evened out, the matrix's norm kept
4. `cautious_update`  parameter, update, lr, decay      -> the new parameter

They are pure, take stacks of matrices [..., rows, cols], and their arguments that change from step to step
(lr, momentum, weight decay) may be floats or 0-D tensors, so that a compiled caller need not recompile.
`MuonAdamW` is the optimizer made of them. Nothing here knows which device it runs on, but for one choice:
bfloat16 products where they are fast.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

# Coefficients (a, b, c) of the odd quintics, one a step: Polar Express, arXiv 2505.16932
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
Scalar = float | Tensor  # a number that changes between steps: a float, or a 0-D tensor under compilation

# -----------------------------------------------------------------------------
# Muon, piece by piece


def nesterov(grad: Tensor, average: Tensor, momentum: Scalar) -> tuple[Tensor, Tensor]:
    """Blend a gradient with its running average, Nesterov style; return the direction and the new average."""
    average = torch.lerp(average, grad, 1 - momentum)
    return torch.lerp(grad, average, momentum), average


def polar_express(grad: Tensor, steps: int = 5, norm_factor: float = 1.02, dtype: torch.dtype | None = None) -> Tensor:
    """Push every singular value of each matrix [..., rows, cols] towards 1, keeping its singular vectors.

    After 5 steps, singular values of at least a thousandth of the Frobenius norm lie in [0.859, 1.141]; zero
    stays zero. The products run in `dtype`, by default bfloat16 on CUDA and float32 elsewhere (a CPU multiplies
    bfloat16 many times slower); the result has the dtype of `grad`. Steps past the table repeat its last row.
    Source: arXiv 2505.16932, algorithm 2, on the shorter side.
    """
    if steps < 1:
        raise ValueError(f"polar_express: steps is {steps}, use at least 1")
    if norm_factor < 1:  # singular values above 1 diverge
        raise ValueError(f"polar_express: norm_factor is {norm_factor}, use at least 1")
    if dtype is None:
        dtype = torch.bfloat16 if grad.device.type == "cuda" else torch.float32
    norm = torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True)
    x: Tensor = (grad / (norm * norm_factor + 1e-6)).to(dtype)
    tall = grad.size(-2) > grad.size(-1)
    x = (x.mT if tall else x).reshape(-1, *sorted(grad.shape[-2:]))
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.reshape(grad.shape).to(grad.dtype)


def second_moment_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Give the shape of NorMuon's state for matrices [..., rows, cols]: a number a row, or a column if more."""
    *stack, rows, cols = shape
    return (*stack, rows, 1) if rows >= cols else (*stack, 1, cols)


def normuon(update: Tensor, second_moment: Tensor, beta2: Scalar) -> tuple[Tensor, Tensor]:
    """Even out the rows (or columns, if more) of each matrix; return the result and the new second moment.

    Each line is divided by the root of the running mean (`beta2`) of its mean square, then each matrix is
    scaled back to the Frobenius norm it came with. `second_moment` has `second_moment_shape(update.shape)`.
    Source: NorMuon, arXiv 2510.05491.
    """
    line = -1 if second_moment.size(-1) == 1 else -2
    norms = torch.linalg.vector_norm(update, dim=line, keepdim=True)
    second_moment = torch.lerp(second_moment, norms.square() / update.size(line), 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    # the matrix's norm before and after follows from its lines' norms: no further pass over the matrix
    before, after = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (norms, norms * scale))
    return update * (scale * (before / after.clamp_min(1e-10))), second_moment


def cautious_update(param: Tensor, update: Tensor, lr: Scalar, weight_decay: Scalar) -> Tensor:
    """Subtract lr * update, and lr * weight_decay * param where update * param >= 0."""
    decayed = torch.where(update * param >= 0, param - (lr * weight_decay) * param, param)
    return decayed - lr * update


def muon_lr(lr: float, rows: int, cols: int) -> float:
    """Scale a Muon learning rate for tall matrices: lr * sqrt(max(1, rows / cols))."""
    return lr * math.sqrt(max(1.0, rows / cols))


def muon_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    second_moments: list[Tensor],
    *,
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
    steps: int,
    norm_factor: float,
) -> None:
    """Take one Muon step in place on matrices of one shape, all in one chain of batched products."""
    direction, average = nesterov(torch.stack(grads), torch.stack(averages), momentum)
    update = polar_express(direction, steps, norm_factor)
    update, second_moment = normuon(update, torch.stack(second_moments), beta2)
    param = cautious_update(torch.stack(params), update, muon_lr(lr, *params[0].shape), weight_decay)
    for old, new in ((averages, average), (second_moments, second_moment), (params, param)):
        torch._foreach_copy_(old, list(new.unbind()))


# -----------------------------------------------------------------------------
# AdamW


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    second_moments: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take AdamW step number `step` (from 1) in place: decoupled decay, then the bias-corrected Adam step.

    Equal to `torch.optim.AdamW`. Source: arXiv 1711.05101, algorithm 2, without the schedule multiplier.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(averages, grads, 1 - beta1)
    torch._foreach_mul_(second_moments, beta2)
    torch._foreach_addcmul_(second_moments, grads, grads, 1 - beta2)
    spread = list(torch._foreach_sqrt(second_moments))
    torch._foreach_div_(spread, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(spread, eps)
    torch._foreach_addcdiv_(params, averages, spread, -lr / (1 - beta1**step))


# -----------------------------------------------------------------------------
# The optimizer

DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "muon": {"momentum": 0.95, "beta2": 0.95, "weight_decay": 0.0, "steps": 5, "norm_factor": 1.02},
}


class MuonAdamW(torch.optim.Optimizer):
    """Optimize each parameter group with AdamW or Muon, as its `kind` says.

    A group is a dict with `kind` ("adamw" or "muon"), `params`, `lr` and any of that kind's DEFAULTS; it
    remembers its first `lr` as `initial_lr`. Muon groups hold matrices only. A parameter without a gradient is
    left alone, state and all; a zero gradient is a gradient like any other.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(param_groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        kind = param_group.get("kind")
        if kind not in DEFAULTS:
            raise ValueError(f"MuonAdamW: a parameter group has kind {kind!r}, use one of {', '.join(DEFAULTS)}")
        if unknown := param_group.keys() - DEFAULTS[kind].keys() - {"kind", "params", "lr", "initial_lr"}:
            raise ValueError(f"MuonAdamW: {kind} groups have no {sorted(unknown)[0]!r}")
        if "lr" not in param_group:
            raise ValueError(f"MuonAdamW: a parameter group of kind {kind!r} has no lr")
        for beta in param_group.get("betas", ()):
            if not 0 <= beta < 1:
                raise ValueError(f"MuonAdamW: a beta is {beta}, use a number from 0 to below 1")
        group = {**DEFAULTS[kind], "initial_lr": param_group["lr"], **param_group}
        super().add_param_group(group)
        for param in group["params"]:
            if kind == "muon" and param.ndim != 2:
                raise ValueError(f"MuonAdamW: Muon is for matrices, not for shape {tuple(param.shape)}")

    def scale_lr(self, multiplier: float) -> None:
        """Set the lr of every group to its `initial_lr` times `multiplier`."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients at hand; a `closure` computes them first and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Parameters that can take the step together: for Muon one shape, for AdamW one step count
            together: dict[Any, list[Tensor]] = {}
            options = {name: group[name] for name in ("lr", *DEFAULTS[group["kind"]])}
            for param in group["params"]:
                if param.grad is not None:
                    state = self._state(param, group["kind"])
                    key = param.shape if group["kind"] == "muon" else state["step"]
                    together.setdefault(key, []).append(param)
            for key, params in together.items():
                grads = [param.grad for param in params if param.grad is not None]
                averages = [self.state[param]["average"] for param in params]
                second_moments = [self.state[param]["second_moment"] for param in params]
                if group["kind"] == "muon":
                    muon_(params, grads, averages, second_moments, **options)
                else:
                    adamw_(params, grads, averages, second_moments, step=key, **options)
        return loss

    def _state(self, param: Tensor, kind: str) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            shape = second_moment_shape(param.shape) if kind == "muon" else param.shape
            state.update(step=0, average=torch.zeros_like(param), second_moment=param.new_zeros(shape))
        state["step"] += 1
        return state


# -----------------------------------------------------------------------------
# Schedules


def lr_multiplier(progress: float, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float) -> float:
    """Give the factor on every learning rate at `progress` in [0, 1]: up from 0, flat at 1, down to a fraction.

    The ramps are linear and take the first `warmup_ratio` and the last `warmdown_ratio` of the run; a ratio of
    0 means no ramp. Progress outside [0, 1] counts as the nearer end. Raises ValueError if a ratio or
    `final_lr_frac` lies outside [0, 1] or the ramps overlap.
    """
    ratios = {"warmup_ratio": warmup_ratio, "warmdown_ratio": warmdown_ratio, "final_lr_frac": final_lr_frac}
    for name, value in ratios.items():
        if not 0 <= value <= 1:
            raise ValueError(f"lr_multiplier: {name} is {value}, use a number from 0 to 1")
    if warmup_ratio + warmdown_ratio > 1:
        raise ValueError(f"lr_multiplier: warmup_ratio {warmup_ratio} + warmdown_ratio {warmdown_ratio} is more than 1")
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if 1 - progress < warmdown_ratio:
        left = (1 - progress) / warmdown_ratio
        return left + (1 - left) * final_lr_frac
    return 1.0


def muon_momentum(step: int, start: float = 0.85, end: float = 0.95, steps: int = 300) -> float:
    """Give Muon's momentum at a step counted from 0: linear from `start` to `end` over `steps`, then flat."""
    done = min(step / steps, 1.0) if steps > 0 else 1.0
    return (1 - done) * start + done * end


def weight_decay(progress: float, base: float) -> float:
    """Give the weight decay at `progress` in [0, 1]: linear from `base` to 0."""
    return base * (1 - progress)
