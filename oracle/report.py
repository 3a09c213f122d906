"""The figures of a run: the same keys in the `---` block of `python train.py` and in the judge's result."""

import re
import resource
import sys
from collections.abc import Mapping

import torch

# dense bf16 peak, FLOP/s, from the vendor's data sheets (SXM parts)
PEAK_FLOPS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak; None where it is not known, as on any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_mb(device: torch.device, who: int = resource.RUSAGE_SELF) -> float:
    """Return the peak device memory of this process on CUDA, elsewhere the peak resident memory, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(who).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def used_memory_mb(device: torch.device) -> float:
    """Return how much of the device's memory any process uses now, in MiB; 0 where it is the machine's own."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**20


def figures(
    *,
    val_bpb: float,
    training_s: float,
    total_s: float,
    tokens: int,
    steps: int,
    device: torch.device,
    state: Mapping[str, int],
    peak_mb: float | None = None,
) -> dict[str, float | int]:
    """Gather a run's figures; `state` maps the names of the model's weights to their sizes.

    mfu_percent counts 6 FLOP per parameter and token (Kaplan et al., 2020) and is 0 where the device's peak is unknown.
    depth is the number of numbered blocks that the names of the weights show.
    """
    parameters = sum(state.values())
    peak = peak_flops(device)
    layers = [int(number) for name in state for number in re.findall(r"\.(\d+)\.", f".{name}")[:1]]
    return {
        "val_bpb": val_bpb,
        "training_seconds": training_s,
        "total_seconds": total_s,
        "peak_vram_mb": peak_memory_mb(device) if peak_mb is None else peak_mb,
        "mfu_percent": 100 * 6 * parameters * tokens / training_s / peak if peak and training_s else 0.0,
        "total_tokens_M": tokens / 1e6,
        "num_steps": steps,
        "num_params_M": parameters / 1e6,
        "depth": 1 + max(layers, default=-1),
    }


def print_block(values: Mapping[str, float | int]) -> None:
    """Print the `---` block, one `key: value` a line."""
    digits = {"val_bpb": 6, "mfu_percent": 2, "num_steps": 0, "depth": 0}
    print("---")
    for key, value in values.items():
        print(f"{key + ':':<18}{value:.{digits.get(key, 1)}f}")
