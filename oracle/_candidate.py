"""What the trainer and the scorer share: loading a candidate's train.py, and saying what went wrong."""

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ._wire import Channel
from .evaluate import ScoreError, check_logits
from .run import ContractError, Diverged, ModelSpec

TAIL_CHARS = 4_000  # of a traceback


def load(directory: Path) -> ModuleType:
    """Import <directory>/train.py as the module `train` and check that it keeps the contract."""
    path = directory / "train.py"
    spec = importlib.util.spec_from_file_location("train", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ContractError(f"{path.name} is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ContractError(f"train.py has a syntax error in line {error.lineno}: {error.msg}") from error
    for name, what in (("build_model", "build_model(spec)"), ("train", "train(run)")):
        if not callable(getattr(module, name, None)):
            raise ContractError(f"train.py has no function {what}")
    return module


def build(build_model: Callable[[ModelSpec], Any], spec: ModelSpec) -> nn.Module:
    """Build a model and check that it is one, on the run's device."""
    model = build_model(spec)
    if not isinstance(model, nn.Module):
        raise ContractError(f"build_model(spec) returned {type(model).__name__}, expected a torch.nn.Module")
    return model.to(spec.device)


def check_forward(model: nn.Module, spec: ModelSpec) -> None:
    """Run one small forward pass on dummy tokens and check the logits' shape and type."""
    tokens = torch.arange(2 * spec.seq_len, device=spec.device).remainder(spec.vocab_size).view(2, spec.seq_len)
    with torch.no_grad():
        logits = model(tokens)
    if not isinstance(logits, torch.Tensor):
        raise ContractError(f"model(tokens) returned {type(logits).__name__}, expected logits [B, T, V]")
    try:
        check_logits(logits, (2, spec.seq_len, spec.vocab_size))
    except ScoreError as error:
        raise ContractError(f"model(tokens): {error}") from error


def _crash(error: BaseException) -> dict[str, Any]:
    """Say in one line what ended the candidate, with its kind and the traceback's tail."""
    detail = "".join(traceback.format_exception(error))[-TAIL_CHARS:]
    if isinstance(error, ContractError):
        return {"kind": "contract", "reason": str(error), "detail": detail}
    if isinstance(error, Diverged):
        return {"kind": "diverged", "reason": str(error), "detail": detail}
    message = str(error).strip().partition("\n")[0][:300]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == "train.py"]
    where = f" (train.py:{frames[-1].lineno})" if frames else ""
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    hint = "; try a smaller DEVICE_BATCH_SIZE or model" if out_of_memory else ""
    return {
        "kind": "memory" if out_of_memory else "error",
        "reason": f"{type(error).__name__}: {message}{where}{hint}",
        "detail": detail,
    }


def serve(work: Callable[[dict[str, Any], Channel], None]) -> None:
    """Do `work` by the order in argv[1]; tell the judge what ended it, if anything did."""
    order = json.loads(sys.argv[1])
    channel = Channel.from_fd(order["channel"])
    try:
        work(order, channel)
    except Exception as error:
        traceback.print_exc()
        channel.send(op="crash", **_crash(error))
        sys.exit(1)
