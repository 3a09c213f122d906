"""The MLP of squared ReLUs with one hidden activation in memory: y = relu(x @ w_in.T)**2 @ w_out.T.

Written with plain operations, the hidden layer h = x @ w_in.T of [N, H] numbers is written, read, squared and written
again, and likewise its gradient on the way back: time spent at the speed of memory. Here only a = relu(h)**2 is ever
written, at the end of the product that makes it. That is enough, for the slope of a is 2 * relu(h) = 2 * sqrt(a).

forward:   a = relu(x @ w_in.T)**2         (a product with an epilogue)
           y = a @ w_out.T
backward:  gh = (g @ w_out) * 2 * sqrt(a)  (a product with an epilogue)
           dw_out = g.T @ a,  dw_in = gh.T @ x,  dx = gh @ w_in

The products with an epilogue are operators of their own, which torch.compile takes as they are: Triton for bfloat16
on CUDA, plain torch for all else.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oracle.fused.rules import kernels, product_dtype


def relu2_mlp(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Return relu(x @ w_in.T)**2 @ w_out.T for x [..., C], w_in [H, C] and w_out [D, H]; [..., D].

    The weights may have another dtype than x (float32 beside a bfloat16 x). The products run in the dtype of x, or
    of autocast where that is on, as those of nn.Linear do; float64 stays float64. Gradients come in the dtypes of
    their tensors, those of float32 weights straight from the float32 accumulators on CUDA. What is kept for them,
    beside x and the cast weights, is a = relu(h)**2: a float16 |h| below 2e-4 has no slope left.

    It can be differentiated once, and torch.compile traces it whole. Raises ValueError if shapes do not fit.
    """
    if w_in.ndim != 2 or w_out.ndim != 2 or x.shape[-1:] != w_in.shape[1:] or len(w_in) != w_out.size(1):
        shapes = f"x {tuple(x.shape)}, w_in {tuple(w_in.shape)} and w_out {tuple(w_out.shape)}"
        raise ValueError(f"relu2_mlp: {shapes} do not fit, use [..., C], [H, C] and [D, H]")
    # Cast and reshape out here are autograd's to undo; autocast itself finds nothing left to cast
    rows = x.to(product_dtype(x)).reshape(-1, x.size(-1))
    y: Tensor = _Mlp.apply(rows, w_in, w_out)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], len(w_out))


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """`x` [N, C] in the dtype of the products."""
        ctx.dtypes = w_in.dtype, w_out.dtype
        w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
        a: Tensor = (activation_operator if torch.compiler.is_compiling() else activation)(x, w_in)
        for_x, for_in, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_in else None, w_in if for_x else None, w_out if for_x or for_in else None, a)
        return a @ w_out.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, a = ctx.saved_tensors
        for_x, for_in, for_out = ctx.needs_input_grad
        grad_x = grad_in = grad_out = None
        compiling = torch.compiler.is_compiling()
        weigh = weight_gradient_operator if compiling else weight_gradient
        slope = hidden_gradient_operator if compiling else hidden_gradient
        with torch.autocast(grad.device.type, enabled=False):  # it may be on now though it was off on the way forward
            if for_out:
                grad_out = weigh(grad, a, ctx.dtypes[1])
            if for_x or for_in:
                grad_h = slope(grad, w_out, a)
                if for_x:
                    grad_x = grad_h @ w_in
                if for_in:
                    grad_in = weigh(grad_h, x, ctx.dtypes[0])
        return grad_x, grad_in, grad_out


# -----------------------------------------------------------------------------
# The operators, which torch.compile takes as they are, and the plain functions behind them


def _kernels(x: Tensor) -> ModuleType | None:
    """Give the Triton kernels if they can take `x`."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and torch.version.hip is None):
        return None
    if torch.cuda.get_device_capability(x.device) < (8, 0):  # no bfloat16 in its tensor cores
        return None
    return kernels("mlp_kernels")


def activation(x: Tensor, w_in: Tensor) -> Tensor:
    """Give relu(x @ w_in.T)**2 [N, H]; x [N, C] and w_in [H, C] of one dtype."""
    if (found := _kernels(x)) is not None:
        out: Tensor = found.activation(x, w_in)
        return out
    return torch.mm(x, w_in.T).relu_().square_()


activation_operator = torch.library.custom_op("autoresearch::relu2", activation, mutates_args=())


@activation_operator.register_fake
def _(x: Tensor, w_in: Tensor) -> Tensor:
    return x.new_empty(x.size(0), w_in.size(0))


def hidden_gradient(grad: Tensor, w_out: Tensor, a: Tensor) -> Tensor:
    """Give (grad @ w_out) * 2 * sqrt(a) [N, H]; grad [N, D], w_out [D, H] and a [N, H] of one dtype."""
    if (found := _kernels(grad)) is not None:
        out: Tensor = found.hidden_gradient(grad, w_out, a)
        return out
    return torch.mm(grad, w_out).mul_(a.sqrt().mul_(2))


hidden_gradient_operator = torch.library.custom_op("autoresearch::relu2_backward", hidden_gradient, mutates_args=())


@hidden_gradient_operator.register_fake
def _(grad: Tensor, w_out: Tensor, a: Tensor) -> Tensor:
    return grad.new_empty(grad.size(0), w_out.size(1))


def weight_gradient(grad: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Give grad.T @ rows in `dtype`, without rounding to that of the factors where torch can.

    An operator only because torch.compile does not know `out_dtype` in every version.
    """
    if grad.is_cuda and grad.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.mm(grad.T, rows, out_dtype=dtype)
    return torch.mm(grad.T, rows).to(dtype)


weight_gradient_operator = torch.library.custom_op(
    "autoresearch::relu2_weight_gradient", weight_gradient, mutates_args=()
)


@weight_gradient_operator.register_fake
def _(grad: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.size(1), rows.size(1), dtype=dtype)
