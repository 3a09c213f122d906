"""The figures of a run: the same keys in the `---` block of `python train.py` and in the judge's result."""

import re
import resource
import sys
from collections.abc import Mapping

import torch

from ._gpu import stated_peak

# TFLOP/s of dense bf16 products, summed in float32, by Nvidia's data sheets and white papers. A part without further
# words is the SXM one. What is not here is not guessed at: AUTORESEARCH_PEAK_TFLOPS says it.
PEAK_TFLOPS = {
    "GB200": 2_500.0,
    "B200": 2_250.0,
    "GH200": 989.5,
    "H200": 989.5,
    "H200 NVL": 835.5,
    "H100": 989.5,
    "H100 NVL": 835.5,
    "H100 PCIE": 756.5,
    "H800": 989.5,
    "H800 PCIE": 756.5,
    "A100": 312.0,
    "A100 PCIE": 312.0,
    "A800": 312.0,
    "A800 PCIE": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "RTX 6000 ADA GENERATION": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090 TI": 80.0,
    "RTX 3090": 71.0,
}
_NO_PART = re.compile(r"NVIDIA|TESLA|GEFORCE|SXM\d?|HBM\d\w*|\d+GB?")  # words of a name that tell nothing of its speed


def part(name: str) -> str:
    """Return the part that a device's name stands for: NVIDIA A100-SXM4-80GB is an A100, an H100 PCIe no H100."""
    return " ".join(word for word in re.split("[ -]+", name.upper()) if not _NO_PART.fullmatch(word))


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak, FLOP/s, the user's word first; None where it is not known, as on any CPU."""
    if device.type != "cuda":
        return None
    peak = stated_peak() or PEAK_TFLOPS.get(part(torch.cuda.get_device_name(device)))
    return None if peak is None else peak * 1e12


def peak_memory_mb(device: torch.device, who: int = resource.RUSAGE_SELF) -> float:
    """Return the peak device memory of this process on CUDA, elsewhere the peak resident memory, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(who).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def used_memory_mb(device: torch.device) -> float:
    """Return how much of the device's memory any process uses now, in MiB; 0 where it is the machine's own.

    It is infinite where even asking finds no room.
    """
    if device.type != "cuda":
        return 0.0
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return float("inf")
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
