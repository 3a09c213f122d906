"""The oracle: the immutable code and data that decide a score.

Importing it is cheap; torch is loaded with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import evaluate_bpb
    from .prepared import profile_name
    from .run import ModelSpec, Run, main

__all__ = ["ModelSpec", "Run", "evaluate_bpb", "main", "profile_name"]

_HOMES = {
    "ModelSpec": "run",
    "Run": "run",
    "main": "run",
    "evaluate_bpb": "evaluate",
    "profile_name": "prepared",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
