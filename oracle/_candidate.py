"""What the trainer and the scorer share: loading a candidate's train.py, and saying what went wrong."""

import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ._processes import memory_limit_gb
from ._wire import Channel
from .evaluate import ScoreError, check_logits
from .run import ContractError, Diverged, ModelSpec

TAIL_CHARS = 4_000  # of a traceback
MESSAGE_CHARS = 200  # of an error: what comes before and after it must fit into a crash's reason too
# CUDA and its libraries do not always raise torch.OutOfMemoryError, and compilers wrap it
OUT_OF_MEMORY = re.compile(
    r"(CUDA|HIP|MPS)\b.{0,40}\bout of memory|CUDA_ERROR_OUT_OF_MEMORY|CU(BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: can't allocate memory"
)


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
    short = [one for one in _chain(error) if is_out_of_memory(one)]
    said = short[-1] if short else error
    lines = str(said).strip().split("\n")
    message = next((line.strip() for line in lines if short and OUT_OF_MEMORY.search(line)), lines[0])[:MESSAGE_CHARS]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == "train.py"]
    where = f" (train.py:{frames[-1].lineno})" if frames else ""
    hint = "; try a smaller DEVICE_BATCH_SIZE or model" if short else ""
    return {
        "kind": "memory" if short else "error",
        "reason": f"{type(said).__name__}: {message}{where}{hint}",
        "detail": detail,
    }


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from, the innermost last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error means that memory ran out, on the device or the machine; not all have their own type."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def limit_memory() -> None:
    """Let this process take no more of the GPU than AUTORESEARCH_MEMORY_GB says."""
    if (limit := memory_limit_gb()) is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / total))


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
