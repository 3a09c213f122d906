"""Locked mathematics of a transformer in fewer passes over memory: head and loss, attention's inputs, the MLP.

Each function is a plain definition, which its docstring states and a law in tests/laws/ holds it to. On CUDA it runs as
products of torch's and Triton kernels around them, elsewhere in plain torch. train.py may use them or not.
"""

from .heads import qkv_heads
from .loss import softcapped, softcapped_cross_entropy
from .mlp import relu2_mlp

__all__ = ["qkv_heads", "relu2_mlp", "softcapped", "softcapped_cross_entropy"]
