"""What the fused functions share: the dtype that they multiply in, and when torch.compile must not look inside."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Give autocast's dtype where that is on, as nn.Linear does, else that of `x`; float64 stays float64."""
    device = x.device.type
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else x.dtype
    )


def opaque(x: Tensor) -> bool:
    """Tell whether to call operators, which torch.compile takes as they are, or the plain functions behind them.

    The first call of an operator imports all of torch.compile, for longer than a small model takes to score on a CPU.
    """
    return x.is_cuda or torch.compiler.is_compiling()
