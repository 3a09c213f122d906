"""The weights that the trainer leaves. Candidate code wrote the file: nothing in it is taken on trust."""

import math
from pathlib import Path
from typing import Any

from ._processes import Crash

MAX_BYTES = 16 * 2**30  # a file with holes can be of any size, and every byte of it is read


def weights_file(request: dict[str, Any]) -> Path:
    """Return where a run's weights lie: in the folder that is the trainer's alone."""
    return Path(request["scratch"]) / "trainer" / "weights.safetensors"


def weights_bytes(path: Path) -> bytes:
    """Read the file; raise Crash for anything but a regular file of a sane size (a pipe would never end)."""
    if path.is_symlink() or not path.is_file():
        raise Crash("audit", f"{path.name} is missing or not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise Crash("audit", f"{path.name} has {path.stat().st_size} bytes, more than {MAX_BYTES}")
    return path.read_bytes()


def weights_sizes(weights: bytes) -> dict[str, int]:
    """Return how many numbers each tensor holds; raise Crash where that cannot be read."""
    from safetensors import SafetensorError, deserialize

    try:
        return {name: math.prod(tensor["shape"]) for name, tensor in deserialize(weights)}  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise Crash("audit", f"the weights are no safetensors file: {error}") from error
