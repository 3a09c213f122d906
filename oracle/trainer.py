"""The trainer: an untrusted process that runs `train(run)` and hands over weights.

1. Import the candidate, build its model and run one dummy forward pass: the gate, before any budget is spent.
2. Call `train(run)`; batches come from the judge through shared memory.
3. Save the returned model's state as safetensors.

What it says on its channel is a claim; the judge keeps the clock and the counts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ._candidate import build, check_forward, limit_memory, load, serve
from ._wire import RING_BYTES, Channel, shared_array
from .constants import PROFILES
from .run import ContractError, ModelSpec, Run, pick_device, trained


class JudgeSource:
    """Batches that the judge wrote into shared memory."""

    def __init__(self, channel: Channel, ring: int) -> None:
        self._channel = channel
        self._ring = ring
        self._shape = (0, 0)

    def open(self, batch_size: int, seq_len: int) -> None:
        """Ask the judge for batches of this shape."""
        self._shape = (batch_size, seq_len + 1)
        if batch_size * (seq_len + 1) * 2 > RING_BYTES:
            raise ContractError(
                f"run.batches({batch_size}, {seq_len}): a batch may take {RING_BYTES} bytes of token ids at most"
            )
        self._channel.send(op="batches", rows=batch_size, seq_len=seq_len)

    def next(self) -> tuple[NDArray[np.uint16], int, float] | None:
        """Return a copy of the next batch; None when the judge says that the budget is spent."""
        self._channel.send(op="next")
        reply = self._channel.receive()
        if reply is None or "epoch" not in reply:
            return None
        return shared_array(self._ring, self._shape, np.uint16).copy(), reply["epoch"], reply["started"]

    def log(self, step: int, loss: float) -> None:
        """Tell the judge of a step."""
        self._channel.send(op="log", step=step, loss=loss)


def _train(order: dict[str, Any], channel: Channel) -> None:
    from safetensors.torch import save_file

    profile = PROFILES[order["profile"]]
    device = pick_device()
    limit_memory()
    candidate = load(Path(order["candidate"]))
    spec = ModelSpec(vocab_size=profile.vocab_size, seq_len=profile.seq_len, device=device)
    torch.manual_seed(order["seed"])
    check_forward(build(candidate.build_model, spec), spec)
    channel.send(op="ready", device=device.type)
    torch.manual_seed(order["seed"])  # the gate's model has drawn from the generator
    run = Run(
        profile=profile,
        device=device,
        seed=order["seed"],
        budget_s=order["budget_s"],
        bos_id=order["bos_id"],
        source=JudgeSource(channel, order["ring"]),
    )
    model = trained(candidate.train(run))
    if device.type == "cuda":
        torch.cuda.synchronize()
    channel.send(op="returned")
    # copies: safetensors takes no two names for one storage, and a tied weight loads the same from two of them
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, order["weights"])
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    channel.send(op="done", peak_device_mb=peak)


if __name__ == "__main__":
    serve(_train)
