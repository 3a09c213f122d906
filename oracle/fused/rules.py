"""What the fused functions share: the dtype of their products, and where their kernels come from."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Give autocast's dtype where that is on, as nn.Linear does, else that of `x`; float64 stays float64."""
    device = x.device.type
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else x.dtype
    )


@cache  # an import that fails is tried again at every call
def kernels(name: str) -> ModuleType | None:
    """Import a module of Triton kernels from this package; None where there is no Triton, as on Windows."""
    try:
        return import_module(f"oracle.fused.{name}")
    except ImportError:
        return None
