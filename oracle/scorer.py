"""The scorer: a fresh untrusted process that rebuilds the model from source and weights and produces logits.

It is started early, so that its imports cost no time when there is something to score, and knows nothing until the
judge hands it the weights. It reads token rows from one shared buffer and writes logits into another, slot by slot as
the judge asks. It has no targets, no byte table and no say in the score.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ._candidate import build, load, serve
from ._wire import Channel, shared_array
from .constants import PROFILES
from .evaluate import check_logits, pinned
from .run import ModelSpec, pick_device


def _score(order: dict[str, Any], channel: Channel) -> None:
    profile = PROFILES[order["profile"]]
    device = pick_device()
    shape = (order["batch"], profile.seq_len, profile.vocab_size)
    tokens = shared_array(order["tokens"], (order["slots"], *shape[:2]), np.int64)
    logits = torch.from_numpy(shared_array(order["logits"], (order["slots"], *shape), np.float32))
    channel.send(op="idle")
    if (fd := channel.receive_descriptor()) is None:
        return
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # for a model that compiles itself
    weights = safetensors.torch.load(mmap.mmap(fd, 0, prot=mmap.PROT_READ)[:])
    candidate = load(Path(order["candidate"]))
    spec = ModelSpec(vocab_size=profile.vocab_size, seq_len=profile.seq_len, device=device)
    with pinned(device, order["threads"]):
        torch.manual_seed(order["seed"])
        model = build(candidate.build_model, spec)
        model.load_state_dict(weights)
        model.eval()
        channel.send(op="ready")
        while (request := channel.receive()) is not None:
            slot = request["slot"]
            output = model(torch.from_numpy(tokens[slot].copy()).to(device))
            check_logits(output, shape)
            logits[slot].copy_(output)
            channel.send(op="scored", slot=slot)


if __name__ == "__main__":
    serve(_score)
