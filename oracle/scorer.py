"""The scorer: a fresh untrusted process that rebuilds the model from source and weights and produces logits.

It is started early, so that its imports cost no time when there is something to score, and knows nothing until the
judge hands it the weights. It reads token rows from one shared buffer and writes logits into another (oracle/_cuda.py),
slot by slot as the judge asks. It has no targets, no byte table and no say in the score.
"""

import mmap
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ._candidate import build, limit_memory, load, serve
from ._cuda import Buffer, Unsupported
from ._wire import Channel, shared_array
from .constants import PROFILES
from .evaluate import check_logits, pinned
from .run import ModelSpec, pick_device


def _score(order: dict[str, Any], channel: Channel) -> None:
    profile = PROFILES[order["profile"]]
    device = pick_device()
    shape = (order["batch"], profile.seq_len, profile.vocab_size)
    tokens = shared_array(order["tokens"], (order["slots"], *shape[:2]), np.int64)
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # for a model that compiles itself
    if device.type == "cuda":
        # read at the first matrix product of a process; without it one may differ from run to run
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["TORCH_WARM_POOL"] = "0"  # no process for each core: there is one forward pass to compile
        import_module("torch._inductor.compile_fx")  # seconds, which pass while the trainer starts
    channel.send(op="idle")
    if (fd := channel.receive_descriptor()) is None:
        return
    limit_memory()
    weights = safetensors.torch.load(mmap.mmap(fd, 0, prot=mmap.PROT_READ)[:])
    candidate = load(Path(order["candidate"]))
    spec = ModelSpec(vocab_size=profile.vocab_size, seq_len=profile.seq_len, device=device)
    with pinned(device, order["threads"]):
        torch.manual_seed(order["seed"])
        model = build(candidate.build_model, spec)
        model.load_state_dict(weights)
        model.eval()
        if device.type == "cuda":
            _compile(model, shape, device)
            torch.manual_seed(order["seed"])
        channel.send(op="ready")
        if (logits := _shared(channel, shape)) is None:
            return
        while (request := channel.receive()) is not None:
            slot = request["slot"]
            output = model(torch.from_numpy(tokens[slot].copy()).to(device))
            check_logits(output, shape)
            logits.tensor[slot].copy_(output)
            del output
            if device.type == "cuda":
                torch.cuda.synchronize()  # the judge reads it in another context, which waits for nothing in this one
            channel.send(op="scored", slot=slot)


def _compile(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> None:
    """Run one forward pass on arbitrary tokens, so that a model compiles before it is asked; leave no memory taken."""
    batch, seq_len, vocab_size = shape
    tokens = torch.arange(batch * seq_len, device=device).remainder(vocab_size).view(batch, seq_len)
    check_logits(model(tokens), shape)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _shared(channel: Channel, shape: tuple[int, ...]) -> Buffer | None:
    """Map the memory that the judge offers, of the first kind that works in this process; None when it is gone."""
    while (fd := channel.receive_descriptor()) is not None and (offer := channel.receive()) is not None:
        try:
            buffer = Buffer(offer["kind"], (offer["slots"], *shape), fd)
        except Unsupported as error:
            print(f"cannot write logits to {offer['kind']} memory: {error}", flush=True)
            channel.send(op="refused")
        else:
            channel.send(op="mapped")
            return buffer
    return None


if __name__ == "__main__":
    serve(_score)
